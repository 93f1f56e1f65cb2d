"""A backbone with the classifier that an evaluation trained on it: kept as one file, and ready to name new images."""

import json
from pathlib import Path

import fsspec
import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import backbones
from backbones.contract import Backbone, Features
from pipeline.errors import UserError
from pipeline.evaluation.attentive import Attentive
from pipeline.evaluation.pooling import pool


class Classifier(nn.Module):
    """Normalised images [B, C, H, W] to logits [B, classes].

    Args:
        head: of pooled features [B, D], or an `Attentive` one, of cells [B, N, D].
        classes: their names, in the order of the logits.
        image_size: what the images were brought to where the head was trained.
        pooling: what a linear head reads, by a name of `pipeline.evaluation.pooling`, or "pooled".
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Linear | Attentive,
        classes: tuple[str, ...],
        image_size: int | tuple[int, int],
        pooling: str = "pooled",
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.classes, self.image_size = backbone, head, classes, image_size
        self.pooling = pooling

    def forward(self, images: Tensor) -> Tensor:
        features: Features = self.backbone(images, summaries=self.pooling != "pooled")
        if self.pooling != "pooled":
            return self.head(pool(self.pooling, features.summaries).float())
        return self.head((features.cells if isinstance(self.head, Attentive) else features.pooled).float())


def save(classifier: Classifier) -> bytes:
    """The content of a file that `load` reads: safetensors, with what builds the modules again as its metadata."""
    weights = {name: value.detach().cpu().contiguous() for name, value in classifier.state_dict().items()}
    facts = {
        "backbone": classifier.backbone.config,
        "head": "attentive" if isinstance(classifier.head, Attentive) else "linear",
        "classes": classifier.classes,
        "image_size": classifier.image_size,
        "pooling": classifier.pooling,
    }
    return safetensors.torch.save(weights, {"classifier": json.dumps(facts)})


def load(path: str | Path) -> Classifier:
    """The classifier that `python -m pipeline.evaluate` left in a run's folder `classifiers/`, ready to be used.

    Raises:
        UserError: there is none, or it is another program's.
    """
    address, remote = str(path), "://" in str(path)
    try:
        file_here = fsspec.open_local(f"simplecache::{address}") if remote else address
        content = Path(str(file_here)).read_bytes()
    except OSError:
        raise UserError(
            f"{path}: cannot be read; python -m pipeline.evaluate RUN leaves classifiers in the folder RUN/classifiers"
        ) from None
    try:
        with safe_open(file_here, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["classifier"])
        backbone = backbones.create(**facts["backbone"])
        kind = {"attentive": Attentive, "linear": nn.Linear}[facts["head"]]
        size, weights = facts["image_size"], safetensors.torch.load(content)
        width = weights["head.weight"].shape[1] if kind is nn.Linear else backbone.width
        classifier = Classifier(
            backbone, kind(width, len(facts["classes"])), tuple(facts["classes"]),
            size if isinstance(size, int) else (size[0], size[1]), facts.get("pooling", "pooled"),
        )  # fmt: skip
        classifier.load_state_dict(weights)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a classifier that this program left ({str(error)[:100]})") from error
    return classifier.eval()
