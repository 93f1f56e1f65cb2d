"""How good is a representation where labels are few: 1, 5 or 10 a class, 1 % or 10 % of them?

Each number of labels is drawn several times, since which images happen to be labelled matters as much as the backbone.
Draws depend on the labels and the seed alone: two backbones meet the same, and can be compared in pairs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.evaluation import interval
from pipeline.evaluation.feature_set import FeatureSet
from pipeline.evaluation.linear import moments, standardise
from pipeline.evaluation.logistic import minimise

PER_CLASS = (1, 5, 10)
PERCENT = (1, 10)
OFF = 0.1
"""How far the labels of a budget in per cent may be from that share of the set."""
DRAWS = 5
C = 10.0
"""Inverse penalty of the classifier, on features of about unit length: with one image a class, nothing can be held out
to choose it. Chosen here."""


def low_shot(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """Accuracy of logistic regression on few labels: for n1, n5, n10 (a class), p1, p10 (per cent), as far as `budgets`
    has them, the mean over draws, `_low` and `_high` (Student's 95 % interval over draws), and as evidence `_right`
    bool [draws, N].

    Features are standardised by all training images, since those need no labels.
    """
    train, val = train.labelled(), val.labelled()
    if len(train.labels) < 2 or not len(val.labels):
        return None
    mean, deviation = moments(train.features.float())
    length = train.features.shape[1] ** 0.5
    x, queries = (standardise(part, mean, deviation).double() / length for part in (train.features, val.features))
    found: dict[str, float | Tensor] = {}
    for name, counts in budgets(train.labels):
        right = []
        for number in range(DRAWS):
            chosen = draw(train.labels, counts, seed * DRAWS + number)
            weight, bias = minimise(x[chosen], train.labels[chosen], int(train.labels.max()) + 1, C, iterations=50)
            right.append((queries @ weight + bias).argmax(1) == val.labels)
        answers = torch.stack(right)
        low, high = interval.of_mean(answers.double().mean(1))
        found |= {name: answers.double().mean().item(), f"{name}_low": low, f"{name}_high": high}
        found[f"{name}_right"] = answers
    return found or None


def budgets(labels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The name of every budget that is smaller than the set, and how many images of each class [C] it labels.

    Every class has one label at least. Where a share of the set is off by more than a tenth for that, or labels as many
    of each class as another budget, it is left out.
    """
    held = torch.bincount(labels)
    per_class = {f"n{n}": held.clamp(max=n) for n in PER_CLASS if bool((held > n).any())}
    yield from per_class.items()
    for percent in PERCENT:
        counts, share = (held * percent / 100).round().long().clamp(min=1).minimum(held), len(labels) * percent / 100
        known = any(torch.equal(counts, other) for other in per_class.values())
        if not known and abs(int(counts.sum()) - share) <= OFF * share:
            yield f"p{percent}", counts


def draw(labels: Tensor, counts: Tensor, seed: int) -> Tensor:
    """Indices of `counts[c]` images of every class c, at random, by the seed and the labels alone."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    return torch.cat([order[labels[order] == c][: int(n)] for c, n in enumerate(counts)])
