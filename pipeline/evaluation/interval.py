"""How sure is an accuracy, or any other mean over images?"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

DRAWS = 2_000
"""Samples, where samples are drawn."""
EXACT = 8
"""Runs of which all orders are tried."""


def of_share(correct: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of an accuracy, from which answers [N] were right.

    It tells what another set of images of this size might have given, with this backbone and this probe; not what
    another seed of pretraining might. Where all answers were right, or none, it is no point, as a bootstrap's would be.
    """
    if not len(correct):
        raise ValueError("no answer, no accuracy: the validation set is empty")
    low, high = stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(level, method="wilson")
    return float(low), float(high)


def percentiles(drawn: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval that bootstrap samples [draws] of a score span; NaN where all are the same, as of scores of 0 or
    100 %: they say nothing then of other images."""
    if np.nanmax(drawn) == np.nanmin(drawn):
        return math.nan, math.nan
    low, high = np.nanpercentile(drawn, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def of_mean(shares: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Student's interval, within [0, 1], of the mean of shares [N], one an image or a repetition; NaN of a single one,
    and where all are the same."""
    if len(shares) < 2 or shares.min() == shares.max():
        return math.nan, math.nan
    mean, error, freedom = mean_error(shares.double().cpu().numpy()[None])
    half = stats.t.ppf((1 + level) / 2, freedom) * error
    return max(0.0, mean - half), min(1.0, mean + half)


def mean_error(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of values [R, N], of R repetitions on the same N images, its standard error, and the error's degrees of
    freedom: 0 of a single value.

    Other repetitions might have gone otherwise, and other images: the mean squares between both are added, less what is
    in both (the random two-way layout without replication; freedom by Satterthwaite 1946). Where that is more than the
    smaller one, the larger stands alone. Of R = 1 they are those of Student's test.
    """
    repetitions, images = values.shape
    mean = float(values.mean())
    rows, columns = values.mean(1) - mean, values.mean(0) - mean
    rest = values - mean - rows[:, None] - columns
    parts = []
    for squares, freedom in (
        (images * float(rows @ rows), repetitions - 1),
        (repetitions * float(columns @ columns), images - 1),
        (float((rest**2).sum()), (repetitions - 1) * (images - 1)),
    ):
        parts.append((squares / freedom if freedom else 0.0, freedom))
    *between, (within, _) = parts
    least, most = sorted(between)
    squares, freedom = most
    if within < least[0]:
        squares = most[0] + least[0] - within
        freedom = squares**2 / sum(part**2 / count for part, count in parts)
    return mean, math.sqrt(squares / values.size), freedom


class Correlation(NamedTuple):
    """A rank correlation, its 95 % interval, and how likely one as far from 0 is where there is none."""

    rho: float
    low: float
    high: float
    p: float


def rank_correlation(x: Tensor, y: Tensor, seed: int = 0) -> Correlation:
    """Spearman's rank correlation of two scores [n] of the same n runs.

    The interval is that of Fisher's z with the standard error sqrt((1 + ρ² / 2) / (n − 3)) (Bonett & Wright 2000); NaN
    of fewer than 5 runs, and of ρ = 1 or −1, where it would be a point. p is the share of all orders of the runs in
    which ρ is as far from 0, of up to 8 runs; of more, of orders drawn at random. Of 4 runs no p is below 2 / 4! =
    0.083.

    NaN, and p 1, where a score is the same for all.
    """
    rank_x, rank_y = (ranks - ranks.mean() for ranks in stats.rankdata(torch.stack([x, y]).double().numpy(), axis=1))
    scale = math.sqrt((rank_x @ rank_x) * (rank_y @ rank_y))
    if not scale:
        return Correlation(math.nan, math.nan, math.nan, 1.0)
    runs = len(rank_x)
    exact = runs <= EXACT
    rng = np.random.default_rng(seed)
    orders = itertools.permutations(rank_y) if exact else (rng.permutation(rank_y) for _ in range(DRAWS))
    rho = float(rank_x @ rank_y) / scale
    as_far = np.abs(np.array(list(orders)) @ rank_x) / scale >= abs(rho) - 1e-9
    p = float(as_far.mean()) if exact else (1 + int(as_far.sum())) / (1 + DRAWS)
    if runs < 5 or abs(rho) > 1 - 1e-9:
        return Correlation(rho, math.nan, math.nan, p)
    half = stats.norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (runs - 3))
    return Correlation(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half), p)
