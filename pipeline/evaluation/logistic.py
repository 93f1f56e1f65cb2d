"""Logistic regression to the optimum, by L-BFGS: the linear classifier of small sets.

Where a few thousand images are all there is, the optimum of the convex problem is reached in seconds, no learning rate
is left to choose, and only the penalty's weight is (Kornblith et al. 2019, section 3; CLIP's linear probe, Radford et
al. 2021, appendix A.3). A fifth of the training set is held out to choose it, and the pooling to read, and the whole
set then used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluation.accuracy import headline
from pipeline.evaluation.feature_set import FeatureSet, Found
from pipeline.evaluation.linear import Standardised, Trial, moments, standardise

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
    """Logistic regression: the headline numbers, the c and then, by that c, the `pooling` that a held-out slice of
    train chose, the accuracy on that slice of every pooling, `held_out_<pooling>`, and the `head`. Small sets only."""
    train, val = train.labelled(), val.labelled()
    if len(train.labels) < 2 or not len(val.labels) or len(train.labels) > MOST:
        return None
    classes = int(train.labels.max()) + 1
    c = chosen(train.features, train.labels, classes, STRENGTHS, seed)
    tried = {name: trials(train.pooled(name), train.labels, classes, (c,), seed)[c] for name in train.poolings()}
    pooling = min(tried, key=tried.__getitem__)
    probe = fit(train.pooled(pooling), train.labels, classes=classes, strengths=(c,), seed=seed)
    return {
        **headline(probe.predict(val.pooled(pooling)), val.labels), "c": c, "pooling": pooling,
        **{f"held_out_{name}": trial.accuracy for name, trial in tried.items()}, "head": probe.head(),
    }  # fmt: skip


def fit(x: Tensor, y: Tensor, *, classes: int, strengths: Sequence[float] = STRENGTHS, seed: int = 0) -> Logistic:
    """The classifier of features [N, D] and labels [N] whose c, of `strengths`, does best on a held-out fifth.

    Raises:
        ValueError: fewer than two images, or a label outside the classes.
    """
    if len(x) < 2 or len(x) != len(y):
        raise ValueError(f"logistic regression needs at least 2 images with a label each, not {len(x)} and {len(y)}")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"labels {int(y.min())} to {int(y.max())} do not fit {classes} classes, numbered from 0")
    c = chosen(x, y, classes, strengths, seed)
    mean, deviation = moments(x)
    weight, bias = minimise(standardise(x, mean, deviation), y, classes, c)
    return Logistic(mean, deviation, weight, bias, c)


def chosen(x: Tensor, y: Tensor, classes: int, strengths: Sequence[float], seed: int) -> float:
    """The c that does best on a held-out fifth; arguments as of `fit`."""
    if len(strengths) == 1:
        return strengths[0]
    by_strength = trials(x, y, classes, strengths, seed)
    return min(by_strength, key=by_strength.__getitem__)


def trials(x: Tensor, y: Tensor, classes: int, strengths: Sequence[float], seed: int) -> dict[float, Trial]:
    """How every c does on a held-out fifth, always the same of as many images; arguments as of `fit`."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    aside, kept = order[: max(1, round(HELD_OUT * len(x)))], order[max(1, round(HELD_OUT * len(x))) :]
    scale = moments(x[kept])
    inside, outside = (standardise(x[part], *scale) for part in (kept, aside))
    found, start = {}, None
    for strength in strengths:
        weight, bias = start = minimise(inside, y[kept], classes, strength, start)
        logits = outside.to(weight) @ weight + bias
        right = (logits.argmax(1) == y[aside]).double().mean().item()
        found[strength] = Trial(1 - right, F.cross_entropy(logits, y[aside]).item())
    return found


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
