"""Barlow Twins against the paper's equations in float64, against LightlySSL, and its behaviour around the loss."""

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import random_views, relative
from objective_toys import ToyBackbone
from torch import nn

import objectives
from objectives.barlow_twins import BarlowTwins, barlow_twins_loss, correlation_signs, cross_correlation

SMALL = {"hidden_dim": 32, "out_dim": 16}
HEALTHY = {"hidden_dim": 64, "out_dim": 32, "scale": (0.5, 1.0), "bias_lr": 1.0, "redundancy_weight": 0.05}


def small(backbone: nn.Module | None = None, image_size: object = 32, **options: object) -> BarlowTwins:
    torch.manual_seed(0)
    return BarlowTwins(backbone or ToyBackbone(), image_size=image_size, **{**SMALL, **options})


def paper(z1: np.ndarray, z2: np.ndarray, weight: float) -> tuple[float, np.ndarray]:
    """Eq. 1 and 2 of standardised embeddings, and the gradient to the first."""
    batch, width = z1.shape
    loss, gradient = 0.0, np.zeros_like(z1)
    for i in range(width):
        for j in range(width):
            c = sum(z1[b, i] * z2[b, j] for b in range(batch)) / batch
            loss += (1 - c) ** 2 if i == j else weight * c**2
            slope = -2 * (1 - c) if i == j else 2 * weight * c
            for b in range(batch):
                gradient[b, i] += slope * z2[b, j] / batch
    return loss, gradient


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def test_loss_and_gradient_equal_the_papers_in_float64() -> None:
    rng = np.random.default_rng(0)
    z1 = standardised(rng.normal(size=(9, 12)))
    z2 = standardised(z1 + 0.5 * rng.normal(size=(9, 12)))
    loss, gradient = paper(z1, z2, 0.0051)
    x = torch.tensor(z1, dtype=torch.float32, requires_grad=True)
    ours = barlow_twins_loss(cross_correlation(x, torch.tensor(z2, dtype=torch.float32)), 0.0051)
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(x.grad, gradient, gradient_of="the paper") <= 1e-5


def test_with_its_norm_it_equals_lightlys() -> None:
    lightly = pytest.importorskip("lightly.loss").BarlowTwinsLoss(lambda_param=0.0051)
    torch.manual_seed(0)
    a = torch.randn(16, 24, dtype=torch.float64)
    b = a + torch.randn(16, 24, dtype=torch.float64)
    norm = nn.BatchNorm1d(24, affine=False).double()
    results = []
    for loss in (lambda x, y: barlow_twins_loss(cross_correlation(norm(x), norm(y)), 0.0051), lightly):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        value = loss(x, y)
        value.backward()
        results.append((value.detach(), x.grad, y.grad))
    (ours, *gradients), (theirs, *their_gradients) = results
    assert relative(ours, theirs, loss_of="LightlySSL") <= 1e-10
    assert all(relative(*pair, gradient_of="LightlySSL") <= 1e-10 for pair in zip(gradients, their_gradients))


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: barlow_twins_loss(cross_correlation(*z), 0.1), (z,))


def test_a_whole_step_equals_the_papers() -> None:
    objective = small(loss_scale=0.5, redundancy_weight=0.02).double()
    views = [view.double() for view in random_views(objective)]
    with torch.no_grad():
        raw = [objective.encoder.projector[:-1](objective.encoder.backbone(view).pooled).numpy() for view in views]
    ours, scalars = objective(views, 0.5)
    assert relative(ours, 0.5 * paper(*(standardised(z) for z in raw), 0.02)[0], loss_of="the paper") <= 1e-10
    c = standardised(raw[0]).T @ standardised(raw[1]) / len(raw[0])
    assert scalars["invariance"].item() == pytest.approx(np.diag(c).mean())
    beside = c[~np.eye(len(c), dtype=bool)]
    assert scalars["redundancy"].item() == pytest.approx(np.sqrt((beside**2).mean()))


def test_views_head_and_rates_are_the_published_ones() -> None:
    objective = BarlowTwins(ToyBackbone(), image_size=224, hidden_dim=64, out_dim=64)
    assert [(v.scale, v.photometric.blur_p, v.photometric.solarize_p) for v in objective.views] == [
        ((0.08, 1.0), 1.0, 0.0),
        ((0.08, 1.0), 0.1, 0.2),
    ]
    kinds = [type(layer).__name__ for layer in objective.encoder.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert not list(objective.encoder.projector[-1].parameters())
    assert {(g["wd_scale"], g["lr_scale"]) for g in objective.parameter_groups()} == {(1.0, 1.0), (0.0, 0.024)}


def test_what_every_objective_keeps() -> None:
    check.keeps_what_all_keep(small)
    assert isinstance(objectives.create("barlow_twins", ToyBackbone(), image_size=32, **SMALL), BarlowTwins)


def test_signs_of_equal_and_of_independent_components() -> None:
    equal, independent = correlation_signs(torch.ones(4, 4)), correlation_signs(torch.eye(4))
    assert (equal["redundancy"].item(), equal["invariance"].item()) == (1, 1)
    assert (independent["redundancy"].item(), independent["invariance"].item()) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_halves_the_untrained_floors_errors_in_knn(kind: str) -> None:
    before, after = check.lifts_knn(lambda backbone, **size: BarlowTwins(backbone, **size, **HEALTHY), kind, steps=100)
    assert 1 - after < (1 - before) / 2


@pytest.mark.slow
def test_rewarded_redundancy_trips_its_sign() -> None:
    assert "redundancy" in check.collapsed(small(**{**HEALTHY, "redundancy_weight": -0.01}), steps=60)
