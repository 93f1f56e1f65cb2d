"""SwAV against the paper's equations in float64, against LightlySSL, and its behaviour around the loss."""

from functools import partial

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import random_views, relative
from objective_toys import ToyBackbone, sick, toy_images, train
from test_sinkhorn_memory import paper as paper_codes
from torch import nn

import objectives
from objectives.dino import dino_loss
from objectives.sinkhorn import sinkhorn_knopp
from objectives.swav import SwAV

SMALL = {
    "hidden_dim": 32,
    "out_dim": 16,
    "prototypes": 24,
    "local_views": 2,
    "global_scale": (0.5, 1.0),
    "local_scale": (0.25, 0.5),
}


def small(backbone: nn.Module | None = None, **options: object) -> SwAV:
    torch.manual_seed(0)
    return SwAV(backbone or ToyBackbone(), image_size=32, **{**SMALL, **options})


def paper(scores: np.ndarray, codes: np.ndarray, tau: float) -> tuple[float, np.ndarray]:
    """l(z_t, q_s) of eq. 2 averaged over all pairs t != s and images, and its gradient to the scores [V, B, K]."""
    n_views, batch, _ = scores.shape
    pairs = [(s, t) for s in range(len(codes)) for t in range(n_views) if s != t]
    loss, gradient = 0.0, np.zeros_like(scores)
    for s, t in pairs:
        for b in range(batch):
            p = np.exp(scores[t, b] / tau)
            p /= p.sum()
            loss -= (codes[s, b] * np.log(p)).sum() / len(pairs) / batch
            gradient[t, b] += (p - codes[s, b]) / tau / len(pairs) / batch
    return loss, gradient


@pytest.mark.parametrize(("n_views", "batch", "k"), [(2, 6, 4), (8, 16, 30)])
def test_loss_and_gradient_equal_the_papers_in_float64(n_views: int, batch: int, k: int) -> None:
    data = np.random.default_rng(k).uniform(-1, 1, (n_views, batch, k))
    loss, gradient = paper(data, np.stack([paper_codes(x, 0.05, 3) for x in data[:2]]), 0.1)
    scores = torch.tensor(data, dtype=torch.float32, requires_grad=True)
    ours = dino_loss(scores, torch.stack([sinkhorn_knopp(x, 0.05) for x in scores[:2]]), 0.1)
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(scores.grad, gradient, gradient_of="the paper") <= 1e-5


@pytest.mark.parametrize("queued", [0, 20])
def test_loss_and_gradient_equal_lightlys(queued: int) -> None:
    """Views, codes and queue as the objective wires them."""
    lightly = pytest.importorskip("lightly.loss").SwaVLoss(temperature=0.1, sinkhorn_epsilon=0.05)
    objective = small(queue_size=queued)
    if queued:
        objective.queue.enqueued.fill_(queued)
    data = torch.rand(4, 8, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores, theirs_in = data.clone().requires_grad_(), data.clone().requires_grad_()
    past = list(objective.scores(objective.queue.rows.transpose(0, 1)).detach()) if queued else None
    theirs = lightly(list(theirs_in[:2]), list(theirs_in[2:]), past)
    ours = dino_loss(scores, objective.codes(scores[:2]), 0.1)
    ours.backward()
    theirs.backward()
    assert relative(ours, theirs.detach(), loss_of="LightlySSL") <= 1e-5
    assert relative(scores.grad, theirs_in.grad, gradient_of="LightlySSL") <= 1e-5


def test_gradient_equals_finite_differences_and_codes_have_none() -> None:
    objective = small().double()
    z = torch.randn(3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    q = objective.codes(objective.scores(z)[:2])
    assert not q.requires_grad
    assert torch.autograd.gradcheck(lambda z: dino_loss(objective.scores(z), q, 0.1), (z,))


def test_a_whole_step_equals_the_papers() -> None:
    """Networks, normalisation, temperatures and codes with a full queue as the objective wires them."""
    objective = small(queue_size=10, queue_start=0.5).double()
    views = [view.double() for view in random_views(objective, batch=5)]
    for progress in (0.5, 0.6):
        objective(views, progress)
        objective.after_step(progress)
    c = objective.prototypes.detach().numpy()
    scores, codes = [], []
    # The head's batch norm sees all views at once, the backbone has none.
    pooled = torch.cat([objective.encoder(view).pooled for view in views])
    for i, z in enumerate(objective.head(pooled).detach().split(5)):
        z = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
        scores.append(z @ c.T)
        if i < 2:
            past = objective.queue.rows[:, i].numpy()
            assert np.allclose(np.sort(past, axis=None), np.sort(np.concatenate([z, z]), axis=None))
            codes.append(paper_codes(np.concatenate([scores[i], past @ c.T]), 0.05, 3)[:5])
    loss, _ = paper(np.stack(scores), np.stack(codes), 0.1)
    ours, _ = objective(views, 0.7)
    assert relative(ours, loss, loss_of="the paper") <= 1e-12


def test_the_queue_waits_for_its_start_and_until_it_is_full() -> None:
    objective = small(queue_size=6, queue_start=0.5)
    views = random_views(objective, batch=4)
    for progress, enqueued in ((0.4, 0), (0.5, 4), (0.6, 8)):
        assert not objective.queue.full
        objective(views, progress)
        objective.after_step(progress)
        assert objective.queue.enqueued == enqueued
    assert objective.queue.full


def test_prototypes_wait_while_frozen_and_keep_length_one() -> None:
    objective = small(freeze_prototypes=0.1)
    for progress, moves in ((0.05, False), (0.1, True)):
        objective.zero_grad()
        objective(random_views(objective), progress)[0].backward()
        assert objective.prototypes.grad is not None
        objective.after_backward(progress)
        assert (objective.prototypes.grad is not None) == moves
        assert all(p.grad is not None for p in objective.head.parameters())
    torch.optim.SGD(objective.parameter_groups(), lr=5.0).step()
    lengths = objective.prototypes.norm(dim=1)
    assert (lengths - 1).abs().max() > 0.01
    objective.after_step(0.1)
    assert torch.allclose(objective.prototypes.norm(dim=1), torch.ones(24))


def test_views_and_heads_are_the_published_ones() -> None:
    objective = SwAV(ToyBackbone(), image_size=224)
    one, two, *locals_ = objective.views
    assert [v.size for v in objective.views] == [(224, 224)] * 2 + [(96, 96)] * 6
    assert one.scale == two.scale == (0.14, 1.0)
    assert {v.scale for v in locals_} == {(0.05, 0.14)}
    for p in (v.photometric for v in objective.views):
        assert (p.brightness, p.contrast, p.saturation, p.hue) == (0.8, 0.8, 0.8, 0.2)
        assert (p.jitter_p, p.gray_p, p.blur_p, p.solarize_p) == (0.8, 0.2, 0.5, 0.0)
    assert [type(layer).__name__ for layer in objective.head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert objective.prototypes.shape == (3000, 128)


@pytest.mark.parametrize("local_views", [0, 3])
def test_every_trainable_parameter_learns(local_views: int) -> None:
    check.learns_with_every_parameter(small(local_views=local_views, queue_size=3, queue_start=0.0))


def test_one_image_has_no_share_of_the_prototypes() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        small()(random_views(small(), batch=1), 0.0)
    assert small()(random_views(small(), batch=2), 0.0)[0].isfinite()


def test_exact_continuation_from_a_state_dict() -> None:
    check.continues_exactly(lambda: small(queue_size=7, queue_start=0.0))


def test_bf16_autocast_gives_a_finite_float32_loss_near_the_exact_one() -> None:
    check.is_near_itself_in_bf16(small())


def test_evaluation_moves_nothing() -> None:
    check.evaluation_moves_nothing(small(queue_size=3, queue_start=0.0))


def test_channels_and_shapes() -> None:
    check.takes_any_images(partial(objectives.create, "swav", **SMALL))


@pytest.mark.parametrize(
    ("epsilon", "signs"),
    [pytest.param(0.05, set(), id="healthy"), pytest.param(5.0, {"code_entropy"}, id="codes without an edge")],
)
def test_vital_signs_trip_on_codes_that_tell_nothing(epsilon: float, signs: set[str]) -> None:
    objective = small(epsilon=epsilon, local_views=0)
    history = train(objective, toy_images(128)[0], steps=30, batch_size=16, lr=2e-3)
    assert sick(objective, history, last=5) == signs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_learns_and_stays_healthy(kind: str) -> None:
    def make(backbone: nn.Module, image_size: int) -> SwAV:
        return small(backbone, temperature=0.3, local_views=0)

    # A loss far above ln K, from views that disagree with confidence, would collapse this small a set of prototypes.
    before, after = check.lifts_knn(make, kind, steps=200, lr=2e-3)
    assert 1 - after < (1 - before) / 2


def test_created_by_name() -> None:
    objective = objectives.create("swav", ToyBackbone(), image_size=32, **SMALL)
    assert isinstance(objective, SwAV)
    assert objective.backbone is objective.encoder
