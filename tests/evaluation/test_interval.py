"""Is the closed form what resampling gives?"""

import numpy as np
import pytest
import torch

from pipeline.evaluation.interval import bootstrap


@pytest.mark.parametrize(("n", "right"), [(40, 10), (1000, 730)])
def test_it_equals_a_bootstrap_with_samples(n: int, right: int) -> None:
    answers = np.arange(n) < right
    draws = np.random.default_rng(0).choice(answers, (20_000, n)).mean(axis=1) if n < 100 else None
    if draws is None:
        rng = np.random.default_rng(0)
        draws = np.array([rng.choice(answers, n).mean() for _ in range(20_000)])
    low, high = bootstrap(torch.from_numpy(answers))
    assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=1.5 / n)


def test_certainty_and_emptiness() -> None:
    assert bootstrap(torch.ones(5, dtype=torch.bool)) == (1.0, 1.0)
    with pytest.raises(ValueError, match="empty"):
        bootstrap(torch.ones(0, dtype=torch.bool))
