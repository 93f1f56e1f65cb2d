"""Sinkhorn-Knopp and the queue of embeddings, on one rank and on two."""

from pathlib import Path

import numpy as np
import pytest
import torch
from two_ranks import on_two_ranks

from objectives.memory import Queue
from objectives.sinkhorn import sinkhorn_knopp


def paper(scores: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """Alternate column and row normalisation of exp(scores / epsilon), entry by entry (Caron et al. 2020, sec. 3.1)."""
    q = np.exp(scores / temperature)
    batch, prototypes = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[:, k] *= batch / prototypes / sum(q[b, k] for b in range(batch))
        for b in range(batch):
            q[b] /= sum(q[b, k] for k in range(prototypes))
    return q


@pytest.mark.parametrize(("batch", "k", "iterations"), [(6, 4, 1), (16, 30, 3), (5, 8, 20)])
def test_sinkhorn_equals_the_papers_in_float64(batch: int, k: int, iterations: int) -> None:
    scores = np.random.default_rng(k).uniform(-1, 1, (batch, k))
    expected = paper(scores, 0.05, iterations)
    ours = sinkhorn_knopp(torch.tensor(scores, dtype=torch.float32), 0.05, iterations)
    assert np.abs(ours.numpy() - expected).max() / expected.max() <= 1e-5
    assert np.abs(sinkhorn_knopp(torch.tensor(scores), 0.05, iterations).numpy() - expected).max() <= 1e-12


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_lightlys(iterations: int) -> None:
    lightly = pytest.importorskip("lightly.loss.swav_loss")
    scores = torch.rand(32, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = lightly.sinkhorn(scores, iterations, 0.05)
    assert (sinkhorn_knopp(scores, 0.05, iterations) - theirs).abs().max() / theirs.max() <= 1e-5


def test_rows_sum_to_one_and_columns_become_balanced() -> None:
    torch.manual_seed(0)
    scores = torch.randn(64, 8, dtype=torch.float64) + 3 * torch.randn(8, dtype=torch.float64)
    uneven = (scores.softmax(1).sum(0) - 8).abs().max()
    q = sinkhorn_knopp(scores, 1.0, iterations=50)
    assert uneven > 4
    assert torch.allclose(q.sum(1), torch.ones(64).double(), atol=1e-12)
    assert torch.allclose(q.sum(0), torch.full((8,), 8.0).double(), atol=1e-6)


def test_no_temperature_is_too_low_and_half_precision_too_coarse() -> None:
    scores = torch.tensor([[1.0, -1.0, 0.9], [0.9, -1.0, 1.0], [1.0, -1.0, 0.0]])
    with np.errstate(all="ignore"):
        assert not np.isfinite(paper(scores.numpy(), 1e-3, 3)).all(), "this should be too much for exp"
    q = sinkhorn_knopp(scores, 1e-3)
    assert q.isfinite().all()
    assert torch.allclose(q.sum(1), torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        half = sinkhorn_knopp(scores.bfloat16(), 0.05)
    assert half.dtype == torch.float32
    assert torch.equal(half, sinkhorn_knopp(scores.bfloat16().float(), 0.05))


@pytest.mark.parametrize(("temperature", "iterations"), [(0.0, 3), (0.05, 0)])
def test_sinkhorn_refuses_what_it_cannot_do(temperature: float, iterations: int) -> None:
    with pytest.raises(ValueError, match="at least 1 iteration and a temperature above 0"):
        sinkhorn_knopp(torch.zeros(2, 2), temperature, iterations)


def test_the_queue_holds_the_newest_rows_whatever_the_batch() -> None:
    queue, came = Queue(5, 2), torch.empty(0, 2)
    for batch in (2, 2, 3, 1, 7, 12, 4):
        x = torch.arange(len(came), len(came) + batch).view(-1, 1).expand(-1, 2).float()
        before = queue.rows.clone()
        queue.observe(x[:1])
        queue.observe(x[1:])
        assert torch.equal(queue.rows, before), "rows joined before the update"
        queue.update()
        came = torch.cat([came, x])
        assert queue.full == (len(came) >= 5)
        if queue.full:
            assert sorted(queue.rows[:, 0].tolist()) == came[-5:, 0].tolist()
    rows = queue.rows.clone()
    queue.update()
    assert torch.equal(queue.rows, rows)


def test_a_queue_starts_as_random_directions_and_is_a_buffer() -> None:
    queue = Queue(100, 16)
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(100))
    assert not list(queue.parameters())
    queue.observe(torch.ones(3, 16, requires_grad=True))
    queue.update()
    again = Queue(100, 16)
    again.load_state_dict(queue.state_dict())
    for q in (queue, again):
        q.observe(torch.zeros(2, 16))
        q.update()
    assert torch.equal(queue.rows, again.rows)
    assert (queue.rows[:3] == 1).all()
    assert (queue.rows[3:5] == 0).all()


def two(rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    queue = Queue(7, 3)
    scores = torch.randn(9, 4)
    queue.observe(scores[:8, :3].chunk(2)[rank])
    queue.update()
    own = scores[:4] if rank == 0 else scores[4:]
    return {"q": sinkhorn_knopp(own, 0.1), "rows": queue.rows, "share": queue.share()}


def test_two_ranks_assign_and_remember_as_one_does(tmp_path: Path) -> None:
    ranks = on_two_ranks(tmp_path, two)
    torch.manual_seed(0)
    queue = Queue(7, 3)
    scores = torch.randn(9, 4)
    queue.observe(scores[:8, :3])
    queue.update()
    assert torch.allclose(torch.cat([r["q"] for r in ranks]), sinkhorn_knopp(scores, 0.1), rtol=1e-5)
    for r in ranks:
        assert torch.equal(r["rows"], queue.rows)
    assert sorted(torch.cat([r["share"] for r in ranks]).tolist()) == sorted(queue.rows.tolist())
