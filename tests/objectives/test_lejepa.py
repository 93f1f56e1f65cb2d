"""LeJEPA against the paper's algorithms in float64, against LightlySSL, and its behaviour around the loss."""

import math

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import random_views, relative
from objective_toys import ToyBackbone
from torch import nn

import objectives
from objectives.lejepa import LeJEPA, prediction_loss, random_slices, sigreg

SMALL = {"hidden_dim": 32, "out_dim": 8, "slices": 16, "local_views": 2}
HEALTHY = {"hidden_dim": 64, "out_dim": 16, "slices": 32, "local_views": 0, "global_scale": (0.5, 1.0)}


def small(backbone: nn.Module | None = None, image_size: object = 32, **options: object) -> LeJEPA:
    torch.manual_seed(0)
    return LeJEPA(backbone or ToyBackbone(), image_size=image_size, **{**SMALL, **options})


def paper_sigreg(z: np.ndarray, slices: np.ndarray) -> tuple[float, np.ndarray]:
    """Algorithm 1 over [-3, 3] in 33 knots, complex characteristic functions, and the gradient to z [N, K]."""
    n, count = len(z), slices.shape[1]
    t = np.linspace(-3, 3, 33)
    gaussian = np.exp(-(t**2) / 2)
    loss, gradient = 0.0, np.zeros_like(z)
    for m in range(count):
        x = z @ slices[:, m]
        empirical = np.array([np.exp(1j * knot * x).mean() for knot in t])
        loss += n * np.trapezoid(np.abs(empirical - gaussian) ** 2 * gaussian, t) / count
        for i in range(n):
            slope = 2 * np.real(np.conj(empirical - gaussian) * 1j * t * np.exp(1j * t * x[i]) / n)
            gradient[i] += n * np.trapezoid(slope * gaussian, t) / count * slices[:, m]
    return loss, gradient


def paper_prediction(z: np.ndarray, global_views: int) -> float:
    views, batch, width = z.shape
    total = 0.0
    for n in range(batch):
        centre = sum(z[v, n] for v in range(global_views)) / global_views
        total += sum(((centre - z[v, n]) ** 2).sum() for v in range(views))
    return total / (views * batch * width)


def test_sigreg_and_its_gradient_equal_the_papers_in_float64() -> None:
    rng = np.random.default_rng(0)
    z, slices = 0.3 + 1.4 * rng.normal(size=(11, 6)), rng.normal(size=(6, 5))
    slices /= np.sqrt((slices**2).sum(0))
    loss, gradient = paper_sigreg(z, slices)
    x = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    ours = sigreg(x, torch.tensor(slices, dtype=torch.float32))
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(x.grad, gradient, gradient_of="the paper") <= 1e-5


def test_the_whole_loss_equals_lightlys_on_the_same_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    lightly = pytest.importorskip("lightly.loss").LeJEPALoss(lambda_param=0.05, sigreg_num_vectors=16)
    torch.manual_seed(0)
    z = torch.randn(4, 9, 6, dtype=torch.float64)
    slices = random_slices(6, 16, z.device).double()
    monkeypatch.setattr(lightly.sigreg, "_generate_unit_vectors", lambda *_: slices)
    lightly.double()
    results = []
    for whose in ("ours", "theirs"):
        x = z.clone().requires_grad_()
        if whose == "ours":
            loss = 0.95 * prediction_loss(x, 2) + 0.05 * sigreg(x, slices)
        else:
            loss = lightly(local_proj=x[2:], global_proj=x[:2])
        loss.backward()
        results.append((loss.detach(), x.grad))
    # Their knots and weights are computed in float32 before they become float64.
    (ours, *gradients), (theirs, *their_gradients) = results
    assert relative(ours, theirs, loss_of="LightlySSL") <= 1e-5
    assert all(relative(*pair, gradient_of="LightlySSL") <= 1e-5 for pair in zip(gradients, their_gradients))


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    z, slices = torch.randn(3, 5, 4, dtype=torch.float64), random_slices(4, 3, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda z: sigreg(z, slices) + prediction_loss(z, 2), (z.requires_grad_(),))


def test_a_whole_step_equals_the_papers() -> None:
    objective = small(sigreg_weight=0.1).double()
    views = [view.double() for view in random_views(objective)]
    with torch.no_grad():
        pooled = torch.stack([objective.encoder(view).pooled for view in views])
        z = objective.projector(pooled.flatten(0, 1)).unflatten(0, (4, 6)).numpy()
    torch.manual_seed(3)
    slices = random_slices(8, 16, torch.device("cpu")).double().numpy()
    torch.manual_seed(3)
    ours, scalars = objective(views, 0.5)
    gaussian = np.mean([paper_sigreg(view, slices)[0] for view in z])
    assert relative(ours, 0.9 * paper_prediction(z, 2) + 0.1 * gaussian, loss_of="the paper") <= 1e-12
    assert scalars["deviation"].item() == pytest.approx(math.sqrt(z.var(1).mean()))


def test_slices_are_unit_vectors_drawn_anew() -> None:
    torch.manual_seed(0)
    first, second = (random_slices(8, 100, torch.device("cpu")) for _ in range(2))
    assert torch.allclose(first.norm(dim=0), torch.ones(100))
    assert not torch.equal(first, second)


def test_a_gaussian_pleases_sigreg_and_a_collapse_does_not() -> None:
    torch.manual_seed(0)
    slices, z = random_slices(8, 64, torch.device("cpu")), torch.randn(2000, 8)
    values = [sigreg(x, slices).item() for x in (z, 2 * z, z.sign(), torch.zeros_like(z))]
    assert values[0] < 1.5
    assert all(value > 10 for value in values[1:2] + values[3:])
    assert values[0] < values[2]


def test_views_are_the_published_ones() -> None:
    objective = LeJEPA(ToyBackbone(), image_size=224, hidden_dim=8, slices=8)
    assert [(v.size, v.scale) for v in objective.views] == [((224, 224), (0.3, 1.0))] * 2 + [
        ((96, 96), (0.05, 0.3))
    ] * 6
    for p in (view.photometric for view in objective.views):
        assert (p.brightness, p.contrast, p.saturation, p.hue, p.jitter_p, p.gray_p) == (0.4, 0.4, 0.2, 0.1, 0.8, 0.2)
        assert (p.blur_p, p.solarize_p) == (0.5, 0.2)
    with pytest.raises(ValueError, match=r"cannot compare 1 global and 0 local view\(s\)"):
        small(global_views=1, local_views=0)


def test_what_every_objective_keeps() -> None:
    check.keeps_what_all_keep(small)
    assert isinstance(objectives.create("lejepa", ToyBackbone(), image_size=32, **SMALL), LeJEPA)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_halves_the_untrained_floors_errors_in_knn(kind: str) -> None:
    before, after = check.lifts_knn(
        lambda backbone, **size: LeJEPA(backbone, **size, **HEALTHY), kind, steps=120, lr=3e-3
    )
    assert 1 - after < (1 - before) / 2


@pytest.mark.slow
def test_without_sigreg_it_collapses_and_says_so() -> None:
    assert "deviation" in check.collapsed(small(**HEALTHY, sigreg_weight=0.0), steps=60)
