"""Logistic regression to the optimum, by L-BFGS: the linear classifier of small sets.

Where a few thousand images are all there is, the optimum of the convex problem is reached in seconds, no learning rate
is left to choose, and only the penalty's weight is (Kornblith et al. 2019, section 3; CLIP's linear probe, Radford et
al. 2021, appendix A.3). A fifth of the training set is held out to choose it, and the whole set then used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluation.accuracy import headline
from pipeline.evaluation.feature_set import FeatureSet, Found
from pipeline.evaluation.linear import Standardised, moments, standardise

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 0.2
MOST = 20_000
"""Training images up to which `logistic` measures: beyond, `linear` does by descent."""
ITERATIONS = 300


@dataclass(frozen=True)
class Logistic(Standardised):
    """A classifier trained with the inverse penalty `c`."""

    c: float


def logistic(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, Found] | None:
    """Logistic regression: the headline numbers, the c that a held-out slice of train chose, and the `head`. Small sets
    only."""
    train, val = train.labelled(), val.labelled()
    if len(train.labels) < 2 or not len(val.labels) or len(train.labels) > MOST:
        return None
    probe = fit(train.features, train.labels, classes=int(train.labels.max()) + 1, seed=seed)
    return {**headline(probe.predict(val.features), val.labels), "c": probe.c, "head": probe.head()}


def fit(x: Tensor, y: Tensor, *, classes: int, strengths: Sequence[float] = STRENGTHS, seed: int = 0) -> Logistic:
    """The classifier of features [N, D] and labels [N] whose c, of `strengths`, does best on a held-out fifth.

    Raises:
        ValueError: fewer than two images, or a label outside the classes.
    """
    if len(x) < 2 or len(x) != len(y):
        raise ValueError(f"logistic regression needs at least 2 images with a label each, not {len(x)} and {len(y)}")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"labels {int(y.min())} to {int(y.max())} do not fit {classes} classes, numbered from 0")
    c = strengths[0]
    if len(strengths) > 1:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        aside, kept = order[: max(1, round(HELD_OUT * len(x)))], order[max(1, round(HELD_OUT * len(x))) :]
        mean, deviation = moments(x[kept].float())
        inside, outside = (standardise(x[part], mean, deviation) for part in (kept, aside))
        scores, start = [], None
        for strength in strengths:
            weight, bias = start = minimise(inside, y[kept], classes, strength, start)
            logits = outside.to(weight) @ weight + bias
            right = (logits.argmax(1) == y[aside]).double().mean().item()
            scores.append((-right, F.cross_entropy(logits, y[aside]).item()))
        c = strengths[min(range(len(strengths)), key=lambda i: scores[i])]
    mean, deviation = moments(x.float())
    weight, bias = minimise(standardise(x, mean, deviation), y, classes, c)
    return Logistic(mean, deviation, weight, bias, c)


def minimise(
    x: Tensor,
    y: Tensor,
    classes: int,
    c: float,
    start: tuple[Tensor, Tensor] | None = None,
    iterations: int = ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """Weight [D, C] and bias [C], float64, that minimise c Σ cross-entropy + ½ |weight|²; the bias is not penalised.

    Args:
        start: where to begin, by default at zero; it changes the way to the optimum, not the optimum.
    """
    x = x.double()
    theta = x.new_zeros(x.shape[1] + 1, classes) if start is None else torch.cat([start[0], start[1][None]])
    theta.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [theta], max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        penalty = theta[:-1].square().sum() / (2 * c * len(x))
        value = F.cross_entropy(x @ theta[:-1] + theta[-1], y) + penalty
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    theta = theta.detach()
    return theta[:-1], theta[-1]
