"""From predicted classes to numbers, each with its interval: accuracy, and what imbalanced classes need beside it."""

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation import interval

AT_ONCE = 1 << 22
"""Counts that are drawn at a time."""


def headline(predicted: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
    """What every classifier is judged by: top1, low, high (its 95 % interval); balanced and macro_f1 with theirs,
    `_low` and `_high`; as evidence, each image's answer `predicted` [N].

    Args:
        predicted: int64 [N]; labels: the true classes [N], on the same device.
    """
    correct = predicted == labels
    low, high = interval.of_share(correct)
    return {
        "top1": correct.double().mean().item(), "low": low, "high": high,
        **by_class(confusion(predicted, labels)), "predicted": predicted,
    }  # fmt: skip


def by_class(table: Tensor, seed: int = 0) -> dict[str, float]:
    """balanced and macro_f1 of a table as of `confusion`, each with the percentiles of its bootstrap, `_low`, `_high`
    (NaN where it has no spread).

    To draw images again is to draw, as often, the cells of the table that they are counted in: a multinomial draw.
    """
    of, taken = (part.cpu() for part in table.nonzero(as_tuple=True))
    counts = table[table > 0].cpu()
    images, classes, rng = int(counts.sum()), len(table), np.random.default_rng(seed)
    drawn = [_scores(counts[None].double(), of, taken, classes)]
    some = max(1, min(interval.DRAWS, AT_ONCE // max(len(counts), classes)))
    for first in range(0, interval.DRAWS, some):
        again = rng.multinomial(images, counts.double().numpy() / images, min(some, interval.DRAWS - first))
        drawn.append(_scores(torch.from_numpy(again).double(), of, taken, classes))
    found, samples = drawn[0][:, 0], torch.cat(drawn[1:], dim=1).numpy()
    result: dict[str, float] = {}
    for name, value, sample in zip(("balanced", "macro_f1"), found.tolist(), samples):
        low, high = interval.percentiles(sample)
        result |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return result


def confusion(predicted: Tensor, labels: Tensor) -> Tensor:
    """How many images of each class (row) were taken for each class (column): int64 [C, C]."""
    classes = int(torch.cat([predicted, labels]).max()) + 1
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def _scores(counts: Tensor, of: Tensor, taken: Tensor, classes: int) -> Tensor:
    """Balanced accuracy and macro F1 [2, R] of R tables whose cells (`of`, `taken`) [K] hold `counts` [R, K].

    Balanced accuracy is the mean, over classes that occur, of the share that was found: chance is 1 / C whatever their
    sizes. Macro F1 is the mean, over those that occur or were named, of the harmonic mean of precision and recall.
    """
    nothing = counts.new_zeros(len(counts), classes)
    images, named = (nothing.index_add(1, side, counts) for side in (of, taken))
    right = nothing.index_add(1, of[of == taken], counts[:, of == taken])
    return torch.stack([(right / images).nanmean(1), (2 * right / (images + named)).nanmean(1)])
