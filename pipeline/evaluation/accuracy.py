"""From predicted classes to numbers: accuracy with its interval, and what imbalanced classes need beside it."""

import torch
from torch import Tensor

from pipeline.evaluation import interval


def headline(predicted: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
    """What every classifier is judged by: top1, low, high (its 95 % interval), balanced, macro_f1; as evidence, each
    image's answer `predicted` [N].

    Args:
        predicted: int64 [N]; labels: the true classes [N], on the same device.
    """
    correct = predicted == labels
    low, high = interval.bootstrap(correct)
    table = confusion(predicted, labels)
    return {
        "top1": correct.double().mean().item(),
        "low": low,
        "high": high,
        "balanced": balanced(table),
        "macro_f1": macro_f1(table),
        "predicted": predicted,
    }


def confusion(predicted: Tensor, labels: Tensor) -> Tensor:
    """How many images of each class (row) were taken for each class (column): int64 [C, C]."""
    classes = int(torch.cat([predicted, labels]).max()) + 1
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def balanced(table: Tensor) -> float:
    """The mean over classes of the share that was found, for classes that occur: chance is 1 / C whatever their sizes.

    Args:
        table: as of `confusion`.
    """
    images = table.sum(1)
    return (table.diag()[images > 0] / images[images > 0]).double().mean().item()


def macro_f1(table: Tensor) -> float:
    """The mean over classes, of those that occur or were named, of the harmonic mean of precision and recall."""
    size = table.sum(0) + table.sum(1)
    return (2 * table.diag()[size > 0] / size[size > 0]).double().mean().item()
