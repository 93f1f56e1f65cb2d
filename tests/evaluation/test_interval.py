"""Does an interval hold what it should, and claim no certainty that a few images cannot give?"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.evaluation.interval import of_draws, of_mean, of_share


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
    low, high = of_draws(torch.tensor([1.0, 0.9, 1.0, 0.8]))
    assert 0 < low < 0.925 < high == 1
    assert of_draws(torch.tensor([0.0, 0.1, 0.0]))[0] == 0
    assert np.isnan(of_draws(torch.tensor([1.0, 1.0]))).all()
    assert np.isnan(of_draws(torch.tensor([1.0]))).all()
