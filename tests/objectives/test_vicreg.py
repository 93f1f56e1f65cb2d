"""VICReg against the paper's equations in float64, against LightlySSL, and its behaviour around the loss."""

import math

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import random_views, relative
from objective_toys import ToyBackbone
from torch import Tensor, nn

import objectives
from objectives.vicreg import VICReg, covariance, invariance, variance

SMALL = {"hidden_dim": 32, "out_dim": 16}
HEALTHY = {"hidden_dim": 64, "out_dim": 32, "scale": (0.5, 1.0)}


def small(backbone: nn.Module | None = None, image_size: object = 32, **options: object) -> VICReg:
    torch.manual_seed(0)
    return VICReg(backbone or ToyBackbone(), image_size=image_size, **{**SMALL, **options})


def paper(z1: np.ndarray, z2: np.ndarray, lam: float, mu: float, nu: float) -> tuple[float, np.ndarray]:
    """Eq. 1 to 6, scaled as in the authors' code, and the gradient to the first embeddings."""
    n, d = z1.shape
    loss = lam * ((z1 - z2) ** 2).sum() / (n * d)
    gradient = lam * 2 * (z1 - z2) / (n * d)
    for z in (z1, z2):
        centred = z - z.mean(0)
        for j in range(d):
            deviation = math.sqrt((centred[:, j] ** 2).sum() / (n - 1) + 1e-4)
            if deviation < 1:
                loss += mu / 2 * (1 - deviation) / d
                if z is z1:
                    gradient[:, j] -= mu / 2 * centred[:, j] / ((n - 1) * deviation * d)
            for k in range(d):
                if j != k:
                    c = (centred[:, j] * centred[:, k]).sum() / (n - 1)
                    loss += nu * c**2 / d
                    if z is z1:
                        gradient[:, j] += nu * 4 * c * centred[:, k] / ((n - 1) * d)
    return loss, gradient


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    spread = (variance(z1) + variance(z2)) / 2
    return 25 * invariance(z1, z2) + 25 * spread + covariance(z1) + covariance(z2)


def test_loss_and_gradient_equal_the_papers_and_lightlys() -> None:
    rng = np.random.default_rng(0)
    z1 = rng.normal(size=(9, 12)) * np.linspace(0.3, 1.7, 12)
    z2 = z1 + 0.3 * rng.normal(size=(9, 12))
    loss, gradient = paper(z1, z2, 25, 25, 1)
    x = torch.tensor(z1, dtype=torch.float32, requires_grad=True)
    ours = vicreg(x, torch.tensor(z2, dtype=torch.float32))
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(x.grad, gradient, gradient_of="the paper") <= 1e-5
    lightly = pytest.importorskip("lightly.loss").VICRegLoss()
    y = torch.tensor(z1, requires_grad=True)
    theirs = lightly(y, torch.tensor(z2))
    theirs.backward()
    assert relative(ours, theirs.detach(), loss_of="LightlySSL") <= 1e-5
    assert relative(x.grad, y.grad, gradient_of="LightlySSL") <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    z = 0.5 * torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: vicreg(*z), (z.requires_grad_(),))


def test_a_whole_step_equals_the_papers() -> None:
    objective = small(invariance_weight=10.0, variance_weight=20.0, covariance_weight=3.0).double()
    views = [view.double() for view in random_views(objective)]
    with torch.no_grad():
        z = [objective.encoder(view)[0].numpy() for view in views]
    ours, scalars = objective(views, 0.5)
    assert relative(ours, paper(*z, 10, 20, 3)[0], loss_of="the paper") <= 1e-12
    assert scalars["deviation"].item() == pytest.approx(z[0].std(0, ddof=1).mean())


def test_views_and_head_are_the_published_ones() -> None:
    objective = VICReg(ToyBackbone(), image_size=224, hidden_dim=64, out_dim=64)
    assert [(v.scale, v.photometric.blur_p, v.photometric.solarize_p) for v in objective.views] == [
        ((0.08, 1.0), 1.0, 0.0),
        ((0.08, 1.0), 0.1, 0.2),
    ]
    kinds = [type(layer).__name__ for layer in objective.encoder.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert objective.encoder.projector[-1].bias is None


def test_what_every_objective_keeps() -> None:
    check.learns_with_every_parameter(small())
    check.continues_exactly(small)
    check.is_near_itself_in_bf16(small())
    check.evaluation_moves_nothing(small())
    check.takes_any_images(small)
    with pytest.raises(ValueError, match="VICReg compares the images of a batch and got a single one"):
        small()(random_views(small(), batch=1), 0.0)
    assert isinstance(objectives.create("vicreg", ToyBackbone(), image_size=32, **SMALL), VICReg)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_halves_the_untrained_floors_errors_in_knn(kind: str) -> None:
    before, after = check.lifts_knn(lambda backbone, **size: VICReg(backbone, **size, **HEALTHY), kind, steps=100)
    assert 1 - after < (1 - before) / 2


@pytest.mark.slow
def test_without_its_variance_term_it_collapses_and_says_so() -> None:
    assert "deviation" in check.collapsed(small(**HEALTHY, variance_weight=0.0), steps=60)
