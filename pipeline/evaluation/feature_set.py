"""Features of images, and what the images show: what every protocol takes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class FeatureSet(NamedTuple):
    """Frozen features of one set of images.

    features  float32 [N, D]
    labels    int64 [N], an index into `classes`; -1 for an image without a label
    classes   the names of the labels; empty where no image has one
    """

    features: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()

    def labelled(self) -> "FeatureSet":
        """The images that have a label."""
        keep = self.labels >= 0
        return self if bool(keep.all()) else FeatureSet(self.features[keep], self.labels[keep], self.classes)


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
