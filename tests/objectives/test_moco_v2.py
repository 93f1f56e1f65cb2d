"""MoCo v2 against the paper's equations in float64, against LightlySSL, and its behaviour around the loss."""

from functools import partial

import numpy as np
import objective_checks as check
import pytest
import torch
import torch.nn.functional as F
from objective_checks import random_views, relative
from objective_toys import ToyBackbone, sick, toy_images, train
from torch import nn

import objectives
from objectives import moco_v2
from objectives.moco_v2 import MoCoV2, contrast, info_nce

SMALL = {"hidden_dim": 32, "out_dim": 16, "queue_size": 64, "scale": (0.5, 1.0)}


def small(backbone: nn.Module | None = None, **options: object) -> MoCoV2:
    torch.manual_seed(0)
    return MoCoV2(backbone or ToyBackbone(), image_size=32, **{**SMALL, **options})


def paper(q: np.ndarray, k: np.ndarray, queue: np.ndarray, tau: float) -> tuple[float, np.ndarray]:
    """Eq. 1 averaged over queries, and its gradient to them [B, D]; keys and queue are constants."""
    length = np.linalg.norm(q, axis=1)
    k = k / np.linalg.norm(k, axis=1, keepdims=True)
    loss, gradient = 0.0, np.zeros_like(q)
    for i in range(len(q)):
        unit = q[i] / length[i]
        candidates = [k[i], *queue]
        p = np.array([np.exp(unit @ c / tau) for c in candidates])
        p /= p.sum()
        loss -= np.log(p[0]) / len(q)
        to_unit = (sum(w * c for w, c in zip(p, candidates)) - k[i]) / tau / len(q)
        gradient[i] = (to_unit - (to_unit @ unit) * unit) / length[i]
    return loss, gradient


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize(("batch", "width", "size", "tau"), [(1, 3, 5, 0.5), (8, 16, 50, 0.07)])
def test_loss_and_gradient_equal_the_papers_in_float64(batch: int, width: int, size: int, tau: float) -> None:
    q_data, k, queue = 3 * unit(batch, width), 2 * unit(batch, width, seed=1), unit(size, width, seed=2)
    loss, gradient = paper(q_data, k, queue, tau)
    q = torch.tensor(q_data, dtype=torch.float32, requires_grad=True)
    ours = info_nce(*contrast(q, torch.tensor(k).float(), torch.tensor(queue).float(), tau))
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(q.grad, gradient, gradient_of="the paper") <= 1e-5


def test_three_steps_equal_lightlys_with_the_queue_moving() -> None:
    lightly = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2, memory_bank_size=(24, 16))
    queue = small(queue_size=24).queue
    # The first call makes their bank; from then on both hold the same rows.
    lightly(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16))
    queue.rows.copy_(lightly.memory_bank.bank)
    queue.enqueued.copy_(lightly.memory_bank.bank_ptr[0])
    for step in range(3):
        torch.manual_seed(step)
        q, k = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        theirs_in = q.detach().clone().requires_grad_()
        theirs = lightly(theirs_in, k)
        ours = info_nce(*contrast(q, k, queue.rows, 0.2))
        ours.backward()
        theirs.backward()
        queue.observe(F.normalize(k, dim=-1))
        queue.update()
        assert relative(ours, theirs.detach(), loss_of="LightlySSL") <= 1e-5
        assert relative(q.grad, theirs_in.grad, gradient_of="LightlySSL") <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    q, k, queue = torch.randn(3, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: info_nce(*contrast(q, k, queue, 0.3)), (q.requires_grad_(),))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_whole_step_equals_the_papers(symmetric: bool) -> None:
    """Networks, temperature, momentum, queue, and which view asks for which, as the objective wires them."""
    objective = small(temperature=0.3, momentum_start=0.9, momentum_end=0.9, symmetric=symmetric).double()
    views = [view.double() for view in random_views(objective, batch=4)]
    with torch.no_grad():
        for weight in objective.momentum_encoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        q = objective.encoder(views)[0].numpy()
        k = objective.momentum_encoder(views)[0].numpy()
    queue = F.normalize(objective.queue.rows, dim=-1)
    objective.queue.rows.copy_(queue)
    losses = [paper(q[0], k[1], queue.numpy(), 0.3)[0], paper(q[1], k[0], queue.numpy(), 0.3)[0]]
    expected = np.mean(losses) if symmetric else losses[0]
    ours, scalars = objective(views, 0.25)
    assert relative(ours, expected, loss_of="the paper") <= 1e-12
    assert relative(scalars["loss_over_chance"], expected / np.log(65)) <= 1e-12
    ours.backward()
    assert all(p.grad is None for p in objective.momentum_encoder.parameters())
    assert torch.equal(objective.queue.rows, queue), "the queue moved before the step"
    keys, queries = list(objective.momentum_encoder.parameters()), list(objective.encoder.parameters())
    old = [(key.clone(), query.clone()) for key, query in zip(keys, queries)]
    objective.after_step(0.25)
    for new, (key, query) in zip(keys, old):
        assert torch.allclose(new, 0.9 * key + 0.1 * query, rtol=1e-12, atol=1e-14)
    came = np.stack([k[1], k[0]], axis=1).reshape(8, -1) if symmetric else k[1]
    assert relative(objective.queue.rows[: len(came)], came / np.linalg.norm(came, axis=1, keepdims=True)) <= 1e-12
    assert torch.equal(objective.queue.rows[len(came) :], queue[len(came) :])


def test_views_and_heads_are_the_published_ones() -> None:
    objective = MoCoV2(ToyBackbone(), image_size=224)
    one, two = objective.views
    assert (one.size, one.scale) == (two.size, two.scale) == ((224, 224), (0.2, 1.0))
    assert one.photometric == two.photometric
    p = one.photometric
    assert (p.brightness, p.contrast, p.saturation, p.hue) == pytest.approx((0.4, 0.4, 0.4, 0.1))
    assert (p.jitter_p, p.gray_p, p.blur_p, p.solarize_p) == (0.8, 0.2, 0.5, 0.0)
    assert [type(layer).__name__ for layer in objective.encoder.projector] == ["Linear", "ReLU", "Linear"]
    assert objective.queue.rows.shape == (65536, 128)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_trainable_parameter_learns(symmetric: bool) -> None:
    check.learns_with_every_parameter(small(symmetric=symmetric))


def test_one_image_is_enough() -> None:
    objective = small()
    loss, scalars = objective(random_views(objective, batch=1), 0.0)
    assert loss.isfinite()
    assert all(s.isfinite() for s in scalars.values())


def test_exact_continuation_from_a_state_dict() -> None:
    check.continues_exactly(lambda: small(queue_size=9))


def test_bf16_autocast_gives_a_finite_float32_loss_near_the_exact_one() -> None:
    check.is_near_itself_in_bf16(small())


def test_evaluation_moves_nothing() -> None:
    check.evaluation_moves_nothing(small())


def test_channels_and_shapes() -> None:
    check.takes_any_images(partial(objectives.create, "moco_v2", **SMALL))


def test_vital_signs_trip_where_nothing_repels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attraction alone has a trivial solution: all embeddings equal."""
    monkeypatch.setattr(moco_v2, "info_nce", lambda logits, positive: -logits.gather(1, positive[:, None]).mean())
    objective = small(momentum_start=0.9, momentum_end=0.9)
    history = train(objective, toy_images(128)[0], steps=40, batch_size=16, lr=2e-3)
    assert "loss_over_chance" in sick(objective, history, last=5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_learns_and_stays_healthy(kind: str) -> None:
    def make(backbone: nn.Module, image_size: int) -> MoCoV2:
        return small(backbone, momentum_start=0.9, momentum_end=0.9, symmetric=True)

    before, after = check.lifts_knn(make, kind, steps=120, lr=2e-3)
    assert 1 - after < (1 - before) / 2


def test_created_by_name() -> None:
    objective = objectives.create("moco_v2", ToyBackbone(), image_size=32, **SMALL)
    assert isinstance(objective, MoCoV2)
    assert objective.backbone is objective.encoder.backbone
