"""SimSiam against the paper's equations in float64, against LightlySSL, and its behaviour around the loss."""

import math

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import random_views, relative
from objective_toys import ToyBackbone
from torch import nn

import objectives
from objectives.simsiam import SimSiam, negative_cosine

SMALL = {"hidden_dim": 32, "out_dim": 32, "predictor_dim": 8}
HEALTHY = {"hidden_dim": 128, "out_dim": 64, "predictor_dim": 16, "scale": (0.5, 1.0)}


def small(backbone: nn.Module | None = None, image_size: object = 32, **options: object) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(backbone or ToyBackbone(), image_size=image_size, **{**SMALL, **options})


def paper(p: np.ndarray, z: np.ndarray) -> tuple[float, np.ndarray]:
    """D(p, stopgrad(z)) (eq. 1 and 3), averaged over images, and its gradient to p."""
    loss, gradient = 0.0, np.zeros_like(p)
    for b in range(len(p)):
        norm = math.sqrt((p[b] ** 2).sum())
        unit_p, unit_z = p[b] / norm, z[b] / math.sqrt((z[b] ** 2).sum())
        loss -= (unit_p * unit_z).sum() / len(p)
        gradient[b] = -(unit_z - (unit_p * unit_z).sum() * unit_p) / norm / len(p)
    return loss, gradient


def test_loss_and_gradient_equal_the_papers_and_lightlys() -> None:
    rng = np.random.default_rng(0)
    p, z = rng.normal(size=(2, 7, 48))
    loss, gradient = paper(p, z)
    x, still = (torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in (p, z))
    ours = negative_cosine(x, still)
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(x.grad, gradient, gradient_of="the paper") <= 1e-5
    assert still.grad is None
    lightly = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    y = torch.tensor(p, requires_grad=True)
    theirs = lightly(y, torch.tensor(z))
    theirs.backward()
    assert relative(ours, theirs.detach(), loss_of="LightlySSL") <= 1e-5
    assert relative(x.grad, y.grad, gradient_of="LightlySSL") <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    p, z = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: negative_cosine(p, z), (p.requires_grad_(),))


def test_a_whole_step_equals_the_papers() -> None:
    """Each prediction meets the other view's embedding (eq. 4), through which no gradient flows."""
    objective = small().double()
    views = [view.double() for view in random_views(objective)]
    z = [objective.encoder(view)[0].detach() for view in views]
    ours, _ = objective(views, 0.5)
    ours.backward()
    p = [objective.predictor(embedding) for embedding in z]
    expected = [paper(a.detach().numpy(), b.numpy()) for a, b in zip(p, reversed(z))]
    assert relative(ours, (expected[0][0] + expected[1][0]) / 2, loss_of="the paper") <= 1e-12
    got = objective.encoder.projector[0].weight.grad.clone()
    objective.zero_grad()
    again = [objective.predictor(objective.encoder(view)[0]) for view in views]
    torch.autograd.backward(again, [torch.tensor(gradient) / 2 for _, gradient in expected])
    assert relative(got, objective.encoder.projector[0].weight.grad) <= 1e-9


def test_views_and_heads_are_the_published_ones() -> None:
    objective = SimSiam(ToyBackbone(), image_size=224)
    for view in objective.views:
        p = view.photometric
        assert (view.size, view.scale, p.blur_p, p.solarize_p, p.gray_p) == ((224, 224), (0.2, 1.0), 0.5, 0.0, 0.2)
        assert (p.brightness, p.contrast, p.saturation, p.hue, p.jitter_p) == (0.4, 0.4, 0.4, 0.1, 0.8)
    kinds = [type(layer).__name__ for layer in objective.encoder.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert [p.ndim for p in objective.encoder.projector[6:].parameters()] == [2], "the last norm has no parameters"
    assert [tuple(p.shape) for p in objective.predictor.parameters()] == [
        (512, 2048), (512,), (512,), (2048, 512), (2048,)
    ]  # fmt: skip


def test_the_predictor_alone_keeps_its_learning_rate() -> None:
    objective = small()
    constant = {id(p) for g in objective.parameter_groups() if g.get("constant_lr") for p in g["params"]}
    assert constant == {id(p) for p in objective.predictor.parameters()}


def test_what_every_objective_keeps() -> None:
    check.keeps_what_all_keep(small)
    assert isinstance(objectives.create("simsiam", ToyBackbone(), image_size=32, **SMALL), SimSiam)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_halves_the_untrained_floors_errors_in_knn(kind: str) -> None:
    before, after = check.lifts_knn(
        lambda backbone, **size: SimSiam(backbone, **size, **HEALTHY), kind, steps=120, lr=5e-3
    )
    assert 1 - after < (1 - before) / 2


@pytest.mark.slow
def test_without_its_predictor_it_collapses_and_says_so() -> None:
    objective = small(**HEALTHY)
    objective.predictor = nn.Identity()
    assert check.collapsed(objective, steps=60)
