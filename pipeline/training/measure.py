"""What rank 0 measures of a run: k-NN now and then, everything at the end with both floors beside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import backbones
import objectives
from backbones import Backbone, Features, exported
from pipeline import evaluation
from pipeline.config import Config
from pipeline.data.packed import Packed
from pipeline.device import placed, precision_of
from pipeline.evaluation import floors
from pipeline.training.run_folder import RunFolder

ONLINE_IMAGES = 5_000  # of the training set, the bank of the online k-NN; and of the validation set
SHORT = 6  # and no more than this part of all images a run sees: measuring must stay cheap in a short run
MEASUREMENTS = 10  # of k-NN over a run, where --knn-every is left open


def fresh_backbone(config: Config) -> Backbone:
    """The configured backbone, its weights drawn from torch's generator as it stands."""
    kind = objectives.objective(config.objective)
    return backbones.create(
        config.backbone, image_size=int(config.image_size or 0), drop_path=config.drop_path or 0.0, pool=kind.pool
    )


class Stopped(Exception):
    """A measurement was given up."""


class Stoppable(nn.Module):
    """A backbone that gives up, with `Stopped`, at the first batch after it is asked to stop."""

    def __init__(self, backbone: Backbone, asked_to_stop: Callable[[], bool]) -> None:
        super().__init__()
        self.backbone, self.asked_to_stop = backbone, asked_to_stop

    def forward(self, images: Tensor) -> Features:
        """As of the backbone."""
        if self.asked_to_stop():
            raise Stopped
        features: Features = self.backbone(images)
        return features


class OnlineKnn:
    """k-NN accuracy while training, at every `--knn-every` epochs.

    Where that is left open, ten times over the run, but no sooner than after twice the images that a measurement takes:
    a forward pass of each costs an eighth of a training step with two views and a teacher.

    Args:
        train, val: packed sets on this machine; without labels, or without `val`, nothing is ever due.
        planned: images of the whole run.
    """

    def __init__(self, config: Config, train: Packed, val: Packed | None, device: torch.device, planned: int) -> None:
        self.config, self.train, self.val, self.device = config, train, val, device
        epochs = int(config.epochs or 1)
        self.bank = min(ONLINE_IMAGES, max(planned // SHORT, 1), train.images)
        self.queries = min(ONLINE_IMAGES, val.images) if val else 0
        if val is None or not train.classes or not val.classes:
            self.every = 0.0
        elif config.knn_every is None:
            self.every = float(max(planned / MEASUREMENTS, 2 * (self.bank + self.queries)))
        else:
            self.every = config.knn_every * planned / epochs
        self.planned = planned
        self._last = 0

    def recall(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Go on after the measurements among the rows that a run has recorded."""
        self._last = max((int(row["images"]) for row in rows if "knn_online" in row), default=0)

    def due(self, seen: int) -> bool:
        """Whether an interval has ended since the last measurement; the run's end is left to the final one."""
        return bool(self.every) and seen < self.planned and int(seen / self.every) > int(self._last / self.every)

    def __call__(self, backbone: Backbone, seen: int, asked_to_stop: Callable[[], bool]) -> float | None:
        """The accuracy now on `queries` images, with `bank` of the training set to learn from; None once it is asked to
        stop."""
        try:
            top1 = self._measured(Stoppable(backbone, asked_to_stop))
        except Stopped:
            return None
        self._last = seen
        return top1

    def _measured(self, backbone: nn.Module) -> float:
        assert self.val is not None
        result = evaluation.evaluate_backbone(
            backbone, self.train, self.val, image_size=int(self.config.image_size or 0), protocols=("knn",),
            device=self.device, limit=self.bank, val_limit=self.queries,
            precision=precision_of(self.config, self.device),
        )  # fmt: skip
        return float(result["knn_top1"] or 0.0)


def finish(
    config: Config, backbone: Backbone, train: Packed, val: Packed | None, device: torch.device
) -> dict[str, Any]:
    """Measure the backbone beside the untrained one and raw pixels; this part of `summary.json`.

    Features are not kept: those of a large set take gigabytes, and of many runs nobody asks for them again.
    """
    scores, _ = evaluation.with_floors(
        backbone, placed(floors.untrained(backbone.config, config.seed), device), train, val,
        image_size=int(config.image_size or 0), device=device, seed=config.seed, precision=precision_of(config, device),
    )  # fmt: skip
    return {"backbone_config": dict(backbone.config), "timm": exported.in_timm(backbone), **scores}


def export(backbone: Backbone, folder: RunFolder) -> None:
    """Write the backbone's weights and how to build it again."""
    folder.write("backbone.safetensors", exported.dump(backbone))
