"""Sums, means and gathers over two ranks, and their gradients."""

import pytest
import torch
from two_ranks import on_two_ranks

from objectives.distributed import (
    from_first_rank,
    gather,
    mean_over_ranks,
    mean_with_gradient,
    sum_over_ranks,
    world_size,
)


def work(rank: int) -> dict[str, torch.Tensor]:
    x = torch.arange(6.0).view(3, 2).add(10 * rank).requires_grad_()
    joined = gather(x)
    # As in a contrastive loss: this rank's rows against everybody's, averaged over this rank's rows.
    (x @ joined.T).square().sum(1).mean().backward()
    y = torch.arange(3.0).add(10 * rank).requires_grad_()
    mean_with_gradient(y).square().sum().backward()
    return {
        "joined": joined.detach(),
        "gradient": x.grad,
        "sum": sum_over_ranks(x),
        "world": torch.tensor(world_size()),
        "from_first_rank": from_first_rank(y),
        "gradient of the mean": y.grad,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list:
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), work)


def test_gathering_keeps_rank_order_and_the_gradient_of_the_joined_batch(ranks: list) -> None:
    x = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10]).requires_grad_()
    (x @ x.T).square().sum(1).mean().backward()
    for result in ranks:
        assert torch.equal(result["joined"], x.detach())
        assert torch.equal(result["sum"], x.detach()[:3] + x.detach()[3:])
        assert result["world"] == 2
    # Each rank's loss is a mean over half of the rows: DDP's mean over ranks makes it that over all.
    ours = torch.cat([result["gradient"] for result in ranks]) / 2
    assert torch.allclose(ours, x.grad, rtol=1e-5)


def test_a_mean_and_its_gradient_and_what_the_first_rank_drew(ranks: list) -> None:
    mean = torch.arange(3.0) + 5
    for result in ranks:
        assert torch.equal(result["from_first_rank"], torch.arange(3.0))
        # Each rank sends 2 * mean; what reaches a rank is the mean of that, and DDP's average then halves it.
        assert torch.allclose(result["gradient of the mean"], 2 * mean)


def test_without_ranks_nothing_changes() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert world_size() == 1
    assert gather(x) is x
    assert torch.equal(sum_over_ranks(x), x)
    assert torch.equal(mean_over_ranks(x), x)
