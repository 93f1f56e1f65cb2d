"""What a backbone makes of one set of images, and what the images show: what every protocol takes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.evaluation import pooling
from pipeline.evaluation.images import Images

Found = float | Tensor | nn.Module | str
"""What a protocol finds: a score, evidence behind it, (`head`) the classifier that it trained, (`pooling`) what that
reads."""


class FeatureSet(NamedTuple):
    """Frozen features of one set of images. What follows `classes` is there for protocols that declare its need.

    features  float32 [N, D]
    labels    int64 [N], an index into `classes`; -1 for an image without a label
    classes   the names of the labels; empty where no image has one
    summaries half precision, one [N, S, D_l] for each of the last blocks or stages, as `Features.summaries`
    views     float32 [n, V, D]: V random views of each of n of the images
    factors   the value that each factor of a generated image has, int64 [N] by name; empty for photographs
    images    the backbone and its images themselves
    which     int64 [N], on the CPU: the images' numbers in their file
    targets   float64 [N, T]: the numbers in a table of labels, NaN where it has none; None without a table
    """

    features: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()
    summaries: tuple[Tensor, ...] = ()
    views: Tensor | None = None
    factors: Mapping[str, Tensor] = {}
    images: Images | None = None
    which: Tensor | None = None
    targets: Tensor | None = None

    def labelled(self) -> "FeatureSet":
        """The images that have a label."""
        keep = self.labels >= 0
        return self if bool(keep.all()) else self.chosen(keep)

    def at_most(self, count: int) -> "FeatureSet":
        """So many of the images drawn at random, always the same, in their order: a file's beginning is one class."""
        if len(self.labels) <= count:
            return self
        drawn = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))[:count]
        return self.chosen(drawn.sort().values.to(self.labels.device))

    def poolings(self) -> list[str]:
        """What a linear classifier may read, by the names of `pooling`."""
        return pooling.names(self.summaries) or ["pooled"]

    def pooled(self, name: str) -> Tensor:
        """Features [N, D] by one of those names."""
        return self.features if name == "pooled" else pooling.pool(name, self.summaries)

    def known(self) -> int:
        """How many images have a label, or a number in the table."""
        has = self.labels >= 0
        return int((has if self.targets is None else has | ~self.targets.isnan().all(dim=1)).sum())

    def chosen(self, keep: Tensor) -> "FeatureSet":
        """The images that `keep`, a bool mask [N] or int64 indices, names; `views` and `images` stay as they are."""
        return self._replace(
            which=None if self.which is None else self.which[keep.cpu()],
            features=self.features[keep],
            labels=self.labels[keep],
            targets=None if self.targets is None else self.targets[keep],
            summaries=tuple(layer[keep] for layer in self.summaries),
            factors={name: values[keep] for name, values in self.factors.items()},
        )


def in_classes_of(train: Sequence[str], labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Validation labels [N] as indices into the training set's classes, matched by name.

    Two folders listed apart number the classes they find each on its own. A class that the training set lacks gets a
    number beyond its classes, so that no prediction can meet it: such an image counts as wrong.
    """
    if tuple(train) == tuple(classes):
        return labels
    known = {name: index for index, name in enumerate(train)}
    table = torch.tensor([known.get(name, len(train) + i) for i, name in enumerate(classes)] or [-1])
    return torch.where(labels >= 0, table[labels.clamp(min=0)], labels)
