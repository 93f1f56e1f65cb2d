"""Does an interval hold what it should, and claim no certainty that a few images cannot give?"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.evaluation.interval import mean_error, of_mean, of_share


@pytest.mark.parametrize(("n", "right"), [(40, 10), (1000, 730)])
def test_it_holds_the_shares_that_are_not_refuted(n: int, right: int) -> None:
    """Wilson: the bounds are the shares p from which right / n lies 1.96 of p's own standard errors away."""
    low, high = of_share(torch.arange(n) < right)
    for bound in (low, high):
        assert abs(right / n - bound) / math.sqrt(bound * (1 - bound) / n) == pytest.approx(stats.norm.ppf(0.975))
    assert low < right / n < high


def test_few_answers_are_no_certainty() -> None:
    low, high = of_share(torch.ones(5, dtype=torch.bool))
    assert (low, high) == (pytest.approx(5 / (5 + stats.norm.ppf(0.975) ** 2)), pytest.approx(1))
    low, high = of_share(torch.zeros(5, dtype=torch.bool))
    assert low == pytest.approx(0)
    assert high > 0.4
    assert np.isnan(of_mean(torch.ones(5))).all()
    with pytest.raises(ValueError, match="empty"):
        of_share(torch.ones(0, dtype=torch.bool))


def test_no_share_is_above_all() -> None:
    low, high = of_mean(torch.tensor([1.0, 0.9, 1.0, 0.8]))
    assert 0 < low < 0.925 < high == 1
    assert of_mean(torch.tensor([0.0, 0.1, 0.0]))[0] == 0
    assert np.isnan(of_mean(torch.tensor([1.0, 1.0]))).all()
    assert np.isnan(of_mean(torch.tensor([1.0]))).all()


def test_a_mean_over_images_is_students() -> None:
    values = torch.rand(400, generator=torch.Generator().manual_seed(0))
    theirs = stats.ttest_1samp(values.double().numpy(), 0.0).confidence_interval()
    assert of_mean(values) == pytest.approx(tuple(theirs))


def layout(rng: np.random.Generator, repetitions: int, images: int, *spread: float) -> np.ndarray:
    """Values [R, N] about 0 that differ between repetitions, between images and besides, by as much as is said."""
    rows, columns, rest = (
        rng.normal(size=shape) * one
        for shape, one in zip([(repetitions, 1), (1, images), (repetitions, images)], spread)
    )
    return np.asarray(rows + columns + rest)


@pytest.mark.parametrize("spread", [(0.3, 1, 1), (0.3, 0, 1), (0, 1, 1), (0.02, 0.3, 1), (1, 0, 0)])
def test_repetitions_and_images_both_make_a_mean_unsure(spread: tuple[float, ...]) -> None:
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(600):  # means of nothing: those further from 0 than 95 % of the time are one in twenty
        mean, error, freedom = mean_error(layout(rng, 5, 50, *spread))
        alarms += abs(mean) > stats.t.ppf(0.975, freedom) * error
    assert 6 <= alarms <= 45, alarms


def test_the_two_way_layout_by_hand() -> None:
    """Of [[1, 2, 6], [3, 6, 12]]: mean 5, mean squares 24 between rows, 26 between columns, 2 besides."""
    mean, error, freedom = mean_error(np.array([[1.0, 2, 6], [3, 6, 12]]))
    assert mean == pytest.approx(5)
    assert error == pytest.approx(math.sqrt((24 + 26 - 2) / 6))
    assert freedom == pytest.approx(48**2 / (24**2 / 1 + 26**2 / 2 + 2**2 / 2))
    rows = np.array([0.2, 0.5, 0.3])  # of repetitions alone, and of images alone: Student's
    for values, count in ((np.repeat(rows[:, None], 7, 1), 3), (rows[None], 3)):
        found = mean_error(values)
        assert found == pytest.approx((rows.mean(), rows.std(ddof=1) / math.sqrt(3), count - 1))
