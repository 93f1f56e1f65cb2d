"""Teachers that are given: a run of this program, a backbone it exported, or timm's published weights."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

import backbones
import objectives
from objectives.checkpoint import read
from objectives.multicrop import crop_size

if TYPE_CHECKING:
    from backbones import Backbone, Features


def teacher(address: str) -> "Frozen":
    """The teacher that `address` names, frozen; no file is ever executed.

    A run folder (its exported backbone, else its newest checkpoint), a checkpoint `.pt`, an exported
    `backbone.safetensors`, each here or at any fsspec address; a name of a backbone with weights of timm's; or
    `random:NAME`, a backbone as it starts, the control that shows what a teacher's knowledge is worth.

    Raises:
        ValueError: nothing is named, nothing is there, or it is none of ours.
    """
    if not address:
        raise ValueError(
            "distillation needs a teacher: a run folder, a checkpoint, backbone.safetensors or timm's name"
        )
    if address.startswith("random:"):
        return Frozen(backbones.create(address.removeprefix("random:")))
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(address)
    if not filesystem.exists(path):
        if "/" in address or address.endswith((".pt", ".safetensors")):
            raise ValueError(f"teacher {address}: no such run folder or file")
        backbone = backbones.create(address, pretrained=True)
        return Frozen(backbone, *normalisation(backbone))
    if filesystem.isdir(path):
        exported = f"{path}/backbone.safetensors"
        found = sorted(filesystem.glob(f"{path}/checkpoints/*.pt"))
        if not found and not filesystem.exists(exported):
            raise ValueError(f"teacher {address}: this run folder holds neither backbone.safetensors nor a checkpoint")
        path = exported if filesystem.exists(exported) else found[-1]
    if path.endswith(".safetensors"):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "backbone.safetensors")
            filesystem.get_file(path, str(copy))
            return Frozen(backbones.load(copy))
    folder, _, file = path.rpartition("/")
    return Frozen(from_checkpoint(file, lambda name: filesystem.cat_file(f"{folder}/{name}"), address))


def normalisation(backbone: "Backbone") -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the channels of images in [0, 1] that timm's weights were trained with."""
    published = next(config for module in backbone.modules() if (config := getattr(module, "pretrained_cfg", None)))
    return published["mean"], published["std"]


def from_checkpoint(file: str, fetch: Callable[[str], bytes], name: str) -> "Backbone":
    """The backbone that an objective evaluates, out of a checkpoint of its run.

    Args:
        file, fetch: the checkpoint's file, and the bytes of one beside it.
        name: what to call it.

    Raises:
        ValueError: a torn or foreign file, or one that does not fit its own configuration.
    """
    import yaml

    try:
        state = read(file, fetch)
        config: dict[str, Any] = yaml.safe_load(state["config"])
        kind = objectives.objective(config["objective"])
        backbone = backbones.create(
            config["backbone"], image_size=config["image_size"], drop_path=config["drop_path"], pool=kind.pool
        )
        objective = kind(backbone, image_size=config["image_size"], **config["options"])
        objective.load_state_dict(state["objective"])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise ValueError(f"teacher {name}: is no checkpoint that can be taught from ({reason})") from error
    return objective.backbone


class Frozen(nn.Module):
    """A teacher that never changes: no gradient, no training mode, no moving statistics; its weights are state.

    It sees the student's views, resized to the nearest size that its stride divides, or the only one it takes.

    Args:
        mean, std: of the channels, what its images were normalised with. Views come in with ImageNet's, and so do
            those of this program's own runs.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        backbone: "Backbone",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        given_mean, given_std, mean_, std_ = (
            torch.tensor(x).view(1, -1, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, mean, std)
        )
        self.register_buffer("scale", given_std / std_, persistent=False)
        self.register_buffer("shift", (given_mean - mean_) / std_, persistent=False)
        self.renormalises = tuple(mean) != IMAGENET_DEFAULT_MEAN or tuple(std) != IMAGENET_DEFAULT_STD
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Never."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple["Features", tuple[int, int]]:
        """Features of the images [B, C, h, w], and the grid of their cells."""
        height, width = images.shape[-2:]
        size = crop_size(self.backbone, (height, width), self.backbone.config["image_size"])
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        if self.renormalises:
            images = images * self.scale.to(images) + self.shift.to(images)
        return self.backbone(images), self.backbone.grid(*size)
