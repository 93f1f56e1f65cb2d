"""Does the probe find what logistic regression finds, without ever looking at the validation set?"""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pipeline.evaluation import linear
from pipeline.evaluation.linear import descend, fit, linear_probe, moments, standardise

Set = tuple[torch.Tensor, torch.Tensor]


def gaussians(n: int, classes: int, dim: int, noise: float, seed: int) -> Set:
    """Correlated features of very unequal scales: what backbones give."""
    rng = np.random.default_rng(7)
    centres, mixing = rng.normal(size=(classes, dim)), rng.normal(size=(dim, dim)) * np.geomspace(1e-2, 10, dim)
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = (centres[y] + noise * rng.normal(size=(n, dim))) @ mixing + 5
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def logistic_regression(train: Set, val: Set) -> float:
    """Its best accuracy over a range of penalties, chosen on the validation set: an upper bound for an honest probe."""
    scaler = StandardScaler().fit(train[0])
    return max(
        LogisticRegression(C=c, max_iter=3000)
        .fit(scaler.transform(train[0]), train[1])
        .score(scaler.transform(val[0]), val[1])
        for c in (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    )


@pytest.mark.parametrize(
    ("n", "noise", "tolerance"),
    [(1000, 0.3, 0.01), (1000, 2.0, 0.025), (100, 1.0, 0.05)],
    ids=["clean", "noisy", "small"],
)
def test_it_equals_logistic_regression(n: int, noise: float, tolerance: float) -> None:
    train, val = gaussians(n, 6, 32, noise, seed=0), gaussians(2000, 6, 32, noise, seed=1)
    ours = linear_probe(*train, *val, classes=6)["top1"]
    assert ours == pytest.approx(logistic_regression(train, val), abs=tolerance)


def test_learning_rates_trained_together_equal_each_alone() -> None:
    x, y = gaussians(300, 4, 8, 1.0, seed=0)
    scale = moments(x)
    together, bias = descend(x, y, 4, [0.001, 0.1, 1e6], 5, 0, scale)
    for i, lr in enumerate([0.001, 0.1]):
        weight, b = descend(x, y, 4, [lr], 5, 0, scale)
        torch.testing.assert_close(together[i], weight[0])
        torch.testing.assert_close(bias[i], b[0])


def test_the_written_gradient_is_autograds() -> None:
    """One step of plain descent from zero, against torch's cross-entropy."""
    x, y = gaussians(64, 5, 8, 1.0, seed=0)
    weight, bias = descend(x, y, 5, [0.5], 1, 0, moments(x))
    x = standardise(x, *moments(x))
    layer = torch.nn.Linear(8, 5)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    torch.nn.functional.cross_entropy(layer(x), y).backward()
    torch.testing.assert_close(weight[0], -0.5 * layer.weight.grad.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias[0], -0.5 * layer.bias.grad, rtol=1e-4, atol=1e-6)


def test_near_a_learning_rate_are_two_smaller_ones_and_a_larger_one() -> None:
    assert linear.near(1e-2) == (1e-3, 3e-3, 1e-2, 3e-2)
    assert linear.near(1e-4) == (1e-4, 3e-4)
    assert linear.near(3.0) == (0.3, 1.0, 3.0)


def test_half_precision_is_standardised_as_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = gaussians(500, 4, 8, 1.0, seed=0)
    x = x.half()
    expected = moments(x.float())
    torch.testing.assert_close(expected[1][-1], x.float()[:, -1].std(unbiased=False), rtol=1e-3, atol=0)
    monkeypatch.setattr(linear, "AT_ONCE", 70)
    torch.testing.assert_close(moments(x), expected)
    few, many = (fit(of, y, classes=4, epochs=5) for of in (x, x.float()))
    assert few.lr == many.lr
    torch.testing.assert_close(few.weight, many.weight)


def test_a_diverging_learning_rate_is_not_chosen() -> None:
    train, val = gaussians(300, 4, 8, 0.5, seed=0), gaussians(300, 4, 8, 0.5, seed=1)
    result = linear_probe(*train, *val, classes=4, lrs=(0.03, 3e38), epochs=20)
    assert result["lr"] == 0.03
    assert result["by_lr"][3e38] == 0.0
    assert result["top1"] > 0.7


def test_the_validation_set_chooses_nothing() -> None:
    """Whatever is shown as validation set, the probe and its learning rate stay the same."""
    train, val = gaussians(400, 4, 8, 1.0, seed=0), gaussians(200, 4, 8, 1.0, seed=1)
    honest = linear_probe(*train, *val, classes=4, epochs=10)
    other = linear_probe(*train, torch.randn(50, 8), torch.zeros(50, dtype=torch.int64), classes=4, epochs=10)
    assert (honest["lr"], honest["by_lr"]) == (other["lr"], other["by_lr"])


def test_permuted_labels_give_chance() -> None:
    train, val = gaussians(2000, 5, 32, 2.0, seed=0), gaussians(1000, 5, 32, 2.0, seed=1)
    permuted = train[1][torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(train[0], permuted, *val, classes=5, epochs=20)["top1"] == pytest.approx(0.2, abs=0.06)


def test_the_same_seed_gives_the_same_probe_and_leaves_torchs_seed_alone() -> None:
    x, y = gaussians(200, 3, 8, 1.0, seed=0)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (fit(x, y, classes=3, epochs=5, seed=4) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_constant_features_are_harmless() -> None:
    x, y = gaussians(200, 3, 8, 0.3, seed=0)
    x[:, 3] = 7.0
    assert linear_probe(x, y, x, y, classes=3, epochs=20)["top1"] > 0.9
    assert (
        linear_probe(torch.ones(20, 4), torch.arange(20) % 2, torch.ones(2, 4), torch.tensor([0, 1]), classes=2)["top1"]
        == 0.5
    )


def test_impossible_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        fit(torch.ones(1, 4), torch.tensor([0]), classes=2)
    with pytest.raises(ValueError, match="do not fit 2 classes"):
        fit(torch.ones(2, 4), torch.tensor([0, 2]), classes=2)
