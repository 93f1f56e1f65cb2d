"""How sure is an accuracy, or any other mean over images?"""

import itertools
import math

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


def of_mean(values: Tensor, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval (Efron 1979) of the mean of values [N], one an image."""
    if not len(values):
        raise ValueError("no value, no mean: the validation set is empty")
    return percentiles(resampled(values.double().cpu().numpy()[None], seed), level)


def percentiles(drawn: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval that bootstrap samples [draws] of a score span; NaN where all are the same, as of scores of 0 or
    100 %: they say nothing then of other images."""
    if np.nanmax(drawn) == np.nanmin(drawn):
        return math.nan, math.nan
    low, high = np.nanpercentile(drawn, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def of_draws(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Student's interval, within [0, 1], of the mean of shares [R], one a repetition; NaN of a single repetition, and
    where all are the same."""
    spread = float(values.double().std()) if len(values) > 1 else 0.0
    if not spread:
        return math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * spread / math.sqrt(len(values))
    mean = float(values.double().mean())
    return max(0.0, mean - half), min(1.0, mean + half)


def resampled(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means [DRAWS] of values [R, N], both repetitions and images drawn with replacement."""
    rng = np.random.default_rng(seed)
    repetitions, images = values.shape
    means = np.empty(DRAWS)
    for first in range(0, DRAWS, 100):
        weights = rng.multinomial(images, np.full(images, 1 / images), 100) / images
        rows = rng.multinomial(repetitions, np.full(repetitions, 1 / repetitions), 100) / repetitions
        means[first : first + 100] = np.einsum("dr,rn,dn->d", rows, values, weights, optimize=True)
    return means


def rank_correlation(x: Tensor, y: Tensor, seed: int = 0) -> tuple[float, float]:
    """Spearman's rank correlation of two scores [n] of the same n runs, and how likely one as far from 0 is where the
    scores have nothing to do with each other: the share of all orders of the runs in which it is, of up to 8 runs; of
    more, of orders drawn at random. Of 4 runs no p-value is below 2 / 4! = 0.083.

    NaN, and 1, where a score is the same for all.
    """
    rank_x, rank_y = (ranks - ranks.mean() for ranks in stats.rankdata(torch.stack([x, y]).double().numpy(), axis=1))
    scale = math.sqrt((rank_x @ rank_x) * (rank_y @ rank_y))
    if not scale:
        return math.nan, 1.0
    exact = len(rank_x) <= EXACT
    rng = np.random.default_rng(seed)
    orders = itertools.permutations(rank_y) if exact else (rng.permutation(rank_y) for _ in range(DRAWS))
    found = float(rank_x @ rank_y) / scale
    as_far = np.abs(np.array(list(orders)) @ rank_x) / scale >= abs(found) - 1e-9
    return found, float(as_far.mean()) if exact else (1 + int(as_far.sum())) / (1 + DRAWS)
