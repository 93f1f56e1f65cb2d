"""SimCLR and DCL against the papers' equations in float64, against LightlySSL, and their behaviour around the loss."""

from functools import partial

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import random_views, relative
from objective_toys import ToyBackbone, sick, toy_images, train
from torch import nn

import objectives
from objectives import simclr
from objectives.simclr import SimCLR, contrast, decoupled, nt_xent

SMALL = {"hidden_dim": 32, "out_dim": 16, "scale": (0.5, 1.0)}
LOSSES = {False: nt_xent, True: decoupled}


def small(backbone: nn.Module | None = None, **options: object) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(backbone or ToyBackbone(), image_size=32, **{**SMALL, **options})


def paper(z: np.ndarray, tau: float, without_positive: bool) -> tuple[float, np.ndarray]:
    """The mean of l(i, j) over both orders of every pair (eq. 1; DCL's eq. 6), and its gradient to z [2, B, D]."""
    _, batch, width = z.shape
    rows = z.reshape(-1, width)
    length = np.sqrt((rows**2).sum(1))
    unit = rows / length[:, None]
    loss, to_unit = 0.0, np.zeros_like(unit)
    n = 2 * batch
    for i in range(n):
        j = (i + batch) % n
        candidates = [k for k in range(n) if k != i and not (without_positive and k == j)]
        weight = {k: np.exp(unit[i] @ unit[k] / tau) for k in candidates}
        total = sum(weight.values())
        loss += (np.log(total) - unit[i] @ unit[j] / tau) / n
        for k in candidates:
            to_unit[i] += weight[k] / total * unit[k] / tau / n
            to_unit[k] += weight[k] / total * unit[i] / tau / n
        to_unit[i] -= unit[j] / tau / n
        to_unit[j] -= unit[i] / tau / n
    along = (to_unit * unit).sum(1, keepdims=True) * unit
    return loss, ((to_unit - along) / length[:, None]).reshape(z.shape)


@pytest.mark.parametrize("without_positive", [False, True])
@pytest.mark.parametrize(("batch", "width", "tau"), [(2, 3, 0.5), (7, 16, 0.1), (24, 8, 0.2)])
def test_loss_and_gradient_equal_the_papers_in_float64(
    batch: int, width: int, tau: float, without_positive: bool
) -> None:
    data = np.random.default_rng(batch).normal(size=(2, batch, width))
    loss, gradient = paper(data, tau, without_positive)
    z = torch.tensor(data, dtype=torch.float32, requires_grad=True)
    ours = LOSSES[without_positive](*contrast(z, tau))
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(z.grad, gradient, gradient_of="the paper") <= 1e-5


@pytest.mark.parametrize("without_positive", [False, True])
def test_loss_and_gradient_equal_lightlys(without_positive: bool) -> None:
    lightly = pytest.importorskip("lightly.loss")
    kind = lightly.DCLLoss if without_positive else lightly.NTXentLoss
    z = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    theirs_in = z.detach().clone().requires_grad_()
    theirs = kind(temperature=0.2)(*theirs_in)
    ours = LOSSES[without_positive](*contrast(z, 0.2))
    ours.backward()
    theirs.backward()
    assert relative(ours, theirs.detach(), loss_of="LightlySSL") <= 1e-5
    assert relative(z.grad, theirs_in.grad, gradient_of="LightlySSL") <= 1e-5


@pytest.mark.parametrize("loss", [nt_xent, decoupled])
def test_gradient_equals_finite_differences(loss: object) -> None:
    z = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss(*contrast(z, 0.3)), (z,))


@pytest.mark.parametrize("without_positive", [False, True])
def test_a_whole_step_equals_the_papers(without_positive: bool) -> None:
    objective = small(temperature=0.3, decoupled=without_positive, head_norm="none").double()
    views = [view.double() for view in random_views(objective, batch=4)]
    z = np.stack([objective.head(objective.encoder(view).pooled).detach().numpy() for view in views])
    ours, scalars = objective(views, 0.0)
    assert relative(ours, paper(z, 0.3, without_positive)[0], loss_of="the paper") <= 1e-12
    assert relative(scalars["loss_over_chance"], paper(z, 0.3, False)[0] / np.log(7)) <= 1e-12


def test_decoupling_keeps_the_gradient_of_an_easy_pair() -> None:
    """With the positive at distance 0 and one orthogonal negative, NT-Xent's gradient fades with the temperature."""
    norms = []
    for loss in (nt_xent, decoupled):
        z = torch.eye(2).expand(2, 2, 2).clone().requires_grad_()
        loss(*contrast(z, 0.1)).backward()
        norms.append(z.grad.norm())
    assert norms[0] < 1e-3 * norms[1]


def test_views_are_the_published_ones() -> None:
    objective = SimCLR(ToyBackbone(), image_size=224)
    one, two = objective.views
    assert (one.size, one.scale) == (two.size, two.scale) == ((224, 224), (0.08, 1.0))
    assert one.photometric == two.photometric
    p = one.photometric
    assert (p.brightness, p.contrast, p.saturation, p.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (p.jitter_p, p.gray_p, p.blur_p, p.solarize_p) == (0.8, 0.2, 0.5, 0.0)


def test_heads_are_the_published_ones() -> None:
    names = [type(layer).__name__ for layer in SimCLR(ToyBackbone(), image_size=32).head]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    head = small().head
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    assert not head[-1].bias.requires_grad
    assert head[-1].weight.requires_grad
    plain = small(head_layers=2, head_norm="none").head
    assert [type(layer).__name__ for layer in plain] == ["Linear", "ReLU", "Linear"]


@pytest.mark.parametrize("head_norm", ["batch", "none"])
def test_every_trainable_parameter_learns(head_norm: str) -> None:
    check.learns_with_every_parameter(small(head_norm=head_norm))


def test_one_image_has_nothing_to_be_told_apart_from() -> None:
    with pytest.raises(ValueError, match="batch of 1 has no other"):
        small()(random_views(small(), batch=1), 0.0)
    assert small()(random_views(small(), batch=2), 0.0)[0].isfinite()


def test_exact_continuation_from_a_state_dict() -> None:
    check.continues_exactly(small)


def test_bf16_autocast_gives_a_finite_float32_loss_near_the_exact_one() -> None:
    check.is_near_itself_in_bf16(small(temperature=0.5))


def test_evaluation_moves_nothing() -> None:
    check.evaluation_moves_nothing(small())


def test_channels_and_shapes() -> None:
    check.takes_any_images(partial(objectives.create, "simclr", **SMALL))


def test_vital_signs_trip_where_nothing_repels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attraction alone has a trivial solution: all embeddings equal."""
    monkeypatch.setattr(simclr, "nt_xent", lambda logits, positive: -logits.gather(1, positive[:, None]).mean())
    objective = small(head_norm="none")
    history = train(objective, toy_images(128)[0], steps=30, batch_size=16)
    assert "loss_over_chance" in sick(objective, history, last=5)


@pytest.mark.slow
@pytest.mark.parametrize("without_positive", [False, True])
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_learns_and_stays_healthy(kind: str, without_positive: bool) -> None:
    def make(backbone: nn.Module, image_size: int) -> SimCLR:
        return small(backbone, decoupled=without_positive)

    before, after = check.lifts_knn(make, kind, steps=100, lr=2e-3)
    assert 1 - after < (1 - before) / 2


def test_created_by_name() -> None:
    objective = objectives.create("simclr", ToyBackbone(), image_size=32, **SMALL)
    assert isinstance(objective, SimCLR)
    assert objective.backbone is objective.encoder
