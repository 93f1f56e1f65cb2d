"""Two ranks do what one does on the joined batch."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from objective_toys import ToyBackbone
from torch import Tensor, nn

from objectives.dino import DINO
from objectives.distributed import gather, mean_over_ranks, sum_over_ranks, world_size

STEPS = 3


def make() -> DINO:
    torch.manual_seed(0)
    sizes = {"out_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16, "local_views": 1}
    return DINO(ToyBackbone(), image_size=16, freeze_last_layer=0.5, **sizes)


def batch(objective: DINO, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(8, 3, *view.size, generator=generator) for view in objective.views]


def train(objective: DINO, module: nn.Module, rank: int, world: int) -> dict[str, Tensor]:
    optimiser = torch.optim.SGD(objective.parameter_groups(), lr=0.5)
    losses, gradients, centres = [], [], []
    for step in range(STEPS):
        progress = step / STEPS
        own = [view.chunk(world)[rank] for view in batch(objective, step)]
        loss, _ = module(own, progress)
        optimiser.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
        objective.after_backward(progress)
        optimiser.step()
        objective.after_step(progress)
        losses.append(mean_over_ranks(loss))
        centres.append(objective.centre.value.clone())
    return {
        "losses": torch.stack(losses),
        "gradients": torch.stack(gradients),
        "centres": torch.stack(centres),
        "teacher": torch.cat([p.flatten() for p in objective.teacher.parameters()]),
    }


def rank_of_two(rank: int, port: int, folder: Path, work: Callable[[int], object]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(folder: Path, work: Callable[[int], object]) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_of_two, (port, folder, work), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def train_dino(rank: int) -> dict[str, Tensor]:
    objective = make()
    return train(objective, nn.parallel.DistributedDataParallel(objective), rank, 2)


def gather_with_gradient(rank: int) -> dict[str, Tensor]:
    x = torch.arange(6.0).view(3, 2).add(10 * rank).requires_grad_()
    joined = gather(x)
    # As in a contrastive loss: this rank's rows against everybody's, averaged over this rank's rows.
    (x @ joined.T).square().sum(1).mean().backward()
    return {
        "joined": joined.detach(),
        "gradient": x.grad,
        "sum": sum_over_ranks(x),
        "world": torch.tensor(world_size()),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list:
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), both)


def both(rank: int) -> dict[str, dict[str, Tensor]]:
    return {"dino": train_dino(rank), "gather": gather_with_gradient(rank)}


@pytest.mark.parametrize("what", ["losses", "gradients", "centres", "teacher"])
def test_dino_on_two_ranks_equals_one_with_the_joined_batch(two_ranks: list, what: str) -> None:
    objective = make()
    alone = train(objective, objective, 0, 1)[what]
    for together in (ranks["dino"][what] for ranks in two_ranks):
        assert together.shape == alone.shape
        assert ((together - alone).abs().max() / alone.abs().max()).item() <= 1e-5


def test_gathering_keeps_rank_order_and_the_gradient_of_the_joined_batch(two_ranks: list) -> None:
    results = [ranks["gather"] for ranks in two_ranks]
    x = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10]).requires_grad_()
    (x @ x.T).square().sum(1).mean().backward()
    for result in results:
        assert torch.equal(result["joined"], x.detach())
        assert torch.equal(result["sum"], x.detach()[:3] + x.detach()[3:])
        assert result["world"] == 2
    # Each rank's loss is a mean over half of the rows: DDP's mean over ranks makes it that over all.
    ours = torch.cat([result["gradient"] for result in results]) / 2
    assert torch.allclose(ours, x.grad, rtol=1e-5)


def test_without_ranks_nothing_changes() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert world_size() == 1
    assert gather(x) is x
    assert torch.equal(sum_over_ranks(x), x)
    assert torch.equal(mean_over_ranks(x), x)
