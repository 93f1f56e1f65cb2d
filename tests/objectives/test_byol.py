"""BYOL against the paper's equations in float64, against LightlySSL, and its behaviour around the loss."""

import math

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import random_views, relative
from objective_toys import ToyBackbone
from torch import nn

import objectives
from objectives.byol import BYOL, byol_loss

SMALL = {"hidden_dim": 32, "out_dim": 16}
HEALTHY = {"hidden_dim": 128, "out_dim": 32, "scale": (0.5, 1.0), "ema_start": 0.9, "ema_end": 0.9}


def small(backbone: nn.Module | None = None, image_size: object = 32, **options: object) -> BYOL:
    torch.manual_seed(0)
    return BYOL(backbone or ToyBackbone(), image_size=image_size, **{**SMALL, **options})


def paper(q: np.ndarray, z: np.ndarray) -> tuple[float, np.ndarray]:
    """Eq. 2, averaged over images, and its gradient to the predictions q."""
    loss, gradient = 0.0, np.zeros_like(q)
    for b in range(len(q)):
        unit_q, unit_z = q[b] / math.sqrt((q[b] ** 2).sum()), z[b] / math.sqrt((z[b] ** 2).sum())
        cosine = (unit_q * unit_z).sum()
        loss += (2 - 2 * cosine) / len(q)
        gradient[b] = -2 * (unit_z - cosine * unit_q) / math.sqrt((q[b] ** 2).sum()) / len(q)
    return loss, gradient


def test_loss_and_gradient_equal_the_papers_and_lightlys() -> None:
    rng = np.random.default_rng(0)
    q, z = rng.normal(size=(2, 7, 48))
    loss, gradient = paper(q, z)
    x = torch.tensor(q, dtype=torch.float32, requires_grad=True)
    ours = byol_loss(x, torch.tensor(z, dtype=torch.float32))
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(x.grad, gradient, gradient_of="the paper") <= 1e-5
    lightly = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    y = torch.tensor(q, requires_grad=True)
    theirs = 2 + 2 * lightly(y, torch.tensor(z))
    theirs.backward()
    assert relative(ours, theirs.detach(), loss_of="LightlySSL") <= 1e-5
    assert relative(x.grad, y.grad, gradient_of="LightlySSL") <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    q, z = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: byol_loss(q, z), (q.requires_grad_(),))


def test_a_whole_step_equals_the_papers() -> None:
    """Which network sees which view, both directions summed, and the target's momentum (eq. 1)."""
    objective = small(ema_start=0.9).double()
    views = [view.double() for view in random_views(objective)]
    with torch.no_grad():
        for weight in objective.target.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        q = [objective.predictor(objective.online(view)[0]).numpy() for view in views]
        z = [objective.target(view)[0].numpy() for view in views]
    ours, _ = objective(views, 0.25)
    assert relative(ours, paper(q[0], z[1])[0] + paper(q[1], z[0])[0], loss_of="the paper") <= 1e-12
    ours.backward()
    assert all(p.grad is None for p in objective.target.parameters())
    before = [(t.clone(), s.clone()) for t, s in zip(objective.target.parameters(), objective.online.parameters())]
    objective.after_step(0.25)
    tau = 1 - (1 - 0.9) * (math.cos(math.pi * 0.25) + 1) / 2
    for new, (target, online) in zip(objective.target.parameters(), before):
        assert torch.allclose(new, tau * target + (1 - tau) * online, rtol=1e-12, atol=1e-15)


def test_views_and_heads_are_the_published_ones() -> None:
    objective = BYOL(ToyBackbone(), image_size=224)
    one, two = objective.views
    assert one.size == two.size == (224, 224)
    assert one.scale == two.scale == (0.08, 1.0)
    assert [(v.photometric.blur_p, v.photometric.solarize_p) for v in (one, two)] == [(1.0, 0.0), (0.1, 0.2)]
    p = one.photometric
    assert (p.brightness, p.contrast, p.saturation, p.hue, p.jitter_p, p.gray_p) == (0.4, 0.4, 0.2, 0.1, 0.8, 0.2)
    for head, width in ((objective.online.projector, 32), (objective.predictor, 256)):
        assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert (head[0].weight.shape, head[3].weight.shape) == ((4096, width), (256, 4096))
        assert head[3].bias is None
    assert objective.backbone is objective.online.backbone


def test_what_every_objective_keeps() -> None:
    check.keeps_what_all_keep(small)
    assert isinstance(objectives.create("byol", ToyBackbone(), image_size=32, **SMALL), BYOL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_halves_the_untrained_floors_errors_in_knn(kind: str) -> None:
    before, after = check.lifts_knn(
        lambda backbone, **size: BYOL(backbone, **size, **HEALTHY), kind, steps=200, lr=3e-3
    )
    assert 1 - after < (1 - before) / 2


@pytest.mark.slow
def test_without_its_predictor_it_collapses_and_says_so() -> None:
    objective = small(**HEALTHY)
    objective.predictor = nn.Identity()
    assert check.collapsed(objective, steps=60)
