"""Is one backbone better than another, when both were shown the same images?"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats
from torch import Tensor

from pipeline.evaluation import interval


class Difference(NamedTuple):
    """How much better the first is than the second: the mean difference over the images, its 95 % interval, how likely
    one as large is where there is none (two-sided), and on how many images it stands."""

    mean: float
    low: float
    high: float
    p: float
    images: int


def mcnemar(first: Tensor, second: Tensor) -> float:
    """The exact two-sided p-value of McNemar's test (1947) on answers [N], right or wrong, of two classifiers.

    Only images that one of them alone got right tell anything: under the hypothesis of no difference, each of them is
    a fair coin.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    if not only_first + only_second:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def difference(first: Tensor, second: Tensor) -> Difference:
    """Compare two scores of the same images.

    Args:
        first, second: one value an image [N], or [R, N] for R repetitions that both went through alike. Where they are
            bool and not repeated, the p-value is McNemar's; else it is Student's, with the degrees of freedom of
            `interval.mean_error`: a share of samples beyond zero could not be small enough to be adjusted for many
            comparisons.

    Raises:
        ValueError: not the same images.
    """
    if first.shape != second.shape or not first.numel():
        raise ValueError(f"a paired test needs the same images: {list(first.shape)} and {list(second.shape)} differ")
    values = (first.double() - second.double()).cpu().numpy()
    values = values[None] if values.ndim == 1 else values
    mean, error, freedom = interval.mean_error(values)
    half = float(stats.t.ppf(0.975, freedom)) * error if freedom else math.inf
    if first.dtype.is_floating_point or first.ndim > 1:
        p = _student(mean, error, freedom, values.shape[1])
    else:
        p = mcnemar(first.cpu(), second.cpu())
    return Difference(mean, mean - half, mean + half, p, values.shape[1])


def balanced(first: Tensor, second: Tensor, labels: Tensor) -> Difference:
    """Compare balanced accuracies, means over the C classes that occur, of answers [N], right or wrong, to images whose
    classes are `labels` [N].

    Of c images of a class each counts 1 / (C c). As McNemar has it, an image that one alone got right is a fair coin
    where there is no difference; the sum of their squares is the variance, and the distribution normal. A bootstrap
    would take the answers to a class of one or two images for sure, and err in one of ten.
    """
    labels = labels.cpu()
    images = labels.bincount()
    counts = 1 / (images[labels].double() * int((images > 0).sum()))
    lead = (first.double() - second.double()).cpu() * counts
    mean, error = float(lead.sum()), math.sqrt(float(lead.square().sum()))
    half = float(stats.norm.ppf(0.975)) * error
    p = float(2 * stats.norm.sf(abs(mean) / error)) if error else 1.0
    return Difference(mean, mean - half, mean + half, p, len(labels))


def of_statistics(first: np.ndarray, second: np.ndarray, images: int) -> Difference:
    """As `difference`, of two statistics [1 + draws] that are no means over `images`: the first entry of all of them,
    the others of bootstrap samples that were drawn alike. The p-value is Student's."""
    found, *drawn = first - second
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    error = float(np.nanstd(drawn)) * math.sqrt(images / max(1, images - 1))  # a bootstrap's lacks that
    return Difference(float(found), float(low), float(high), _student(float(found), error, images - 1, images), images)


def _student(found: float, error: float, freedom: float, images: int) -> float:
    """How likely a difference is as far from 0 as what was found, where there is none, by Student's t; where every
    image differed alike, so that its standard error is 0, by the sign test."""
    if images < 2 or freedom <= 0 or not found:
        return 1.0
    if error < 1e-9 * abs(found):
        return float(2.0 ** (1 - images))
    return float(2 * stats.t.sf(abs(found) / error, freedom))


def holm(p: list[float]) -> list[float]:
    """p-values adjusted so that among all of them the chance of one false discovery stays at the level (Holm 1979)."""
    adjusted, worst = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = worst
    return adjusted
