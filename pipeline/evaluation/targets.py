"""Labels that are no classes: several at once for an image, and quantities. Linear models on frozen features.

Both are fitted to the optimum, one column of the table at a time, from the images of which the column says something;
the strength of the penalty is chosen on a held-out fifth of the training set, as of logistic regression.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluation.feature_set import FeatureSet
from pipeline.evaluation.interval import DRAWS, percentiles
from pipeline.evaluation.linear import moments, standardise

HELD_OUT = 0.2
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3)
"""Of |weight|² beside the loss summed over images."""
LEAST = 10
"""Known images below which a column is left out."""

Fit = Callable[[Tensor, Tensor, Sequence[float]], list[Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def multilabel(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """One logistic regression a label: `map`, the mean over labels of average precision, its bootstrap interval over
    images `low`, `high`, and the same of `auc`, the mean area under the ROC curve: `auc_low`, `auc_high`. Chance is the
    labels' frequency, and 0.5.

    Labels that all or none of the known images have, in either set, are left out; None where none is left. As evidence
    `drawn` [1 + draws]: `map`, and what it is of each bootstrap sample.
    """
    found = _read_off(train, val, seed, _logistic, F.binary_cross_entropy_with_logits)
    if found is None:
        return None
    score, truth = found
    precision, area = (_drawn(of, score, truth, seed) for of in (_mean_precision, _mean_area))
    return {
        "map": precision[0].item(), **_interval(precision), "auc": area[0].item(), **_interval(area, "auc_"),
        "labels": len(score), "drawn": precision,
    }  # fmt: skip


def regression(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """One ridge regression a quantity: `r2`, the share of its variance that is explained (the mean over quantities),
    its bootstrap interval over images `low`, `high`, and the same of `rank`, Spearman's correlation: `rank_low`,
    `rank_high`. Guessing the mean explains 0.

    Quantities that do not vary, in either set, are left out; None where none is left. As evidence `drawn` [1 + draws]:
    `r2`, and what it is of each bootstrap sample.
    """
    found = _read_off(train, val, seed, _ridge, F.mse_loss)
    if found is None:
        return None
    guess, truth = found
    explained, rank = (_drawn(of, guess, truth, seed) for of in (_explained, _mean_rank))
    return {
        "r2": explained[0].item(), **_interval(explained), "rank": rank[0].item(), **_interval(rank, "rank_"),
        "quantities": len(guess), "drawn": explained,
    }  # fmt: skip


def _read_off(
    train: FeatureSet, val: FeatureSet, seed: int, fit: Fit, loss: Loss
) -> tuple[np.ndarray, np.ndarray] | None:
    """What linear models say of the columns that vary in both sets, and the truth, NaN where unknown: both [T, N]."""
    if train.targets is None or val.targets is None:
        return None
    said, truths = [], []
    for y, truth in zip(train.targets.T, val.targets.T):
        known, asked = ~y.isnan(), truth[~truth.isnan()]
        x, y = train.features[known].double(), y[known]
        if min(len(y), len(asked)) >= LEAST and y.min() < y.max() and asked.min() < asked.max():
            said.append(_chosen(x, y, val.features.double(), seed, fit, loss).cpu().numpy())
            truths.append(truth.cpu().numpy())
    return (np.stack(said), np.stack(truths)) if said else None


def _chosen(x: Tensor, y: Tensor, queries: Tensor, seed: int, fit: Fit, loss: Loss) -> Tensor:
    """What a linear model says of queries [N], the penalty chosen on a held-out fifth."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held = max(1, round(HELD_OUT * len(x)))
    aside, kept = order[:held], order[held:]
    mean, deviation = moments(x[kept])
    inside, outside = (standardise(x[part], mean, deviation).double() for part in (kept, aside))
    losses = [float(loss(_apply(outside, theta), y[aside])) for theta in fit(inside, y[kept], PENALTIES)]
    best = PENALTIES[min(range(len(losses)), key=losses.__getitem__)]
    mean, deviation = moments(x)
    (theta,) = fit(standardise(x, mean, deviation).double(), y, (best,))
    return _apply(standardise(queries, mean, deviation).double(), theta)


def _apply(x: Tensor, theta: Tensor) -> Tensor:
    return x @ theta[:-1] + theta[-1]


def _ridge(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """For each penalty the weights and offset [D + 1] of least |y − xw − b|² + penalty |w|² (Hoerl & Kennard 1970)."""
    centre, offset = x.mean(0), y.mean()
    x = x - centre
    values, vectors = torch.linalg.eigh(x.T @ x)
    along = vectors.T @ (x.T @ (y - offset))
    found = [vectors @ (along / (values.clamp(min=0) + penalty)) for penalty in penalties]
    return [torch.cat([weight, (offset - centre @ weight)[None]]) for weight in found]


def _logistic(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """Weights and offset [D + 1] that minimise Σ cross-entropy + ½ penalty |w|², from the largest penalty on, each from
    where the last ended."""
    theta, found = x.new_zeros(x.shape[1] + 1), {}
    for penalty in sorted(penalties, reverse=True):
        theta = found[penalty] = _minimised(theta, x, y, penalty)
    return [found[penalty] for penalty in penalties]


def _minimised(start: Tensor, x: Tensor, y: Tensor, penalty: float) -> Tensor:
    theta = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [theta], max_iter=300, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(_apply(x, theta), y)
        value = value + penalty * theta[:-1].square().sum() / (2 * len(x))
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return theta.detach()


def _drawn(statistic: Statistic, said: np.ndarray, truth: np.ndarray, seed: int) -> Tensor:
    """A statistic of all images, and of each bootstrap sample of them, drawn alike for every backbone: [1 + draws]."""
    images = said.shape[1]
    rng = np.random.default_rng(seed)
    weights = (rng.multinomial(images, np.full(images, 1 / images)).astype(float) for _ in range(DRAWS // 4))
    drawn = [statistic(said, truth, each) for each in (np.ones(images), *weights)]
    return torch.tensor(drawn, dtype=torch.float64)


def _interval(drawn: Tensor, before: str = "") -> dict[str, float]:
    """The 95 % percentile bootstrap interval of `_drawn`."""
    low, high = percentiles(drawn[1:].numpy())
    return {f"{before}low": low, f"{before}high": high}


def _mean_precision(score: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """The mean over labels of average precision, Σ (recall step × precision), of weighted images; [T, N] and [N]."""
    found = []
    for s, t in zip(score, truth):
        order = np.argsort(-s, kind="stable")
        w, hit = weights[order] * ~np.isnan(t[order]), np.nan_to_num(t[order])
        hits = np.cumsum(w * hit)
        if hits[-1]:
            last = np.append(np.diff(s[order]) != 0, True)  # of equal scores, the precision after the last counts
            precision, recall = hits[last] / np.maximum(np.cumsum(w)[last], 1e-12), hits[last] / hits[-1]
            found.append(np.sum(np.diff(recall, prepend=0) * precision))
    return float(np.mean(found)) if found else float("nan")


def _mean_area(score: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """The mean over labels of the area under the ROC curve, how often an image with the label is scored above one
    without, of weighted images; [T, N] and [N]."""
    found = []
    for s, t in _repeated(score, truth, weights):
        with_label = int(t.sum())
        if pairs := with_label * (len(t) - with_label):
            above = stats.rankdata(s)[t == 1].sum() - with_label * (with_label + 1) / 2
            found.append(above / pairs)
    return float(np.mean(found)) if found else float("nan")


def _mean_rank(guess: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """The mean over quantities of Spearman's correlation, of weighted images; [T, N] and [N]. 0 where all guesses are
    the same."""
    found = []
    for g, t in _repeated(guess, truth, weights):
        if len(t) and np.ptp(t):
            found.append(np.corrcoef(stats.rankdata(g), stats.rankdata(t))[0, 1] if np.ptp(g) else 0.0)
    return float(np.mean(found)) if found else float("nan")


def _repeated(said: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of every column what was said of the images whose truth is known, and that truth, each as often as it was
    drawn."""
    for s, t in zip(said, truth):
        times = np.where(np.isnan(t), 0, weights).astype(int)
        yield np.repeat(s, times), np.repeat(t, times)


def _explained(guess: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """The mean over quantities of 1 − residual / variance, of weighted images; [T, N] and [N]."""
    found = []
    for g, t in zip(guess, truth):
        w, t, g = (one[~np.isnan(t)] for one in (weights, t, g))
        spread = np.sum(w * (t - np.average(t, weights=w)) ** 2) if w.any() else 0.0
        if spread > 0:
            found.append(1 - np.sum(w * (t - g) ** 2) / spread)
    return float(np.mean(found)) if found else float("nan")
