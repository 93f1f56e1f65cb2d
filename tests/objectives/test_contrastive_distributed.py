"""On two ranks the contrastive objectives and SwAV, queues included, do what one does on the joined batch."""

import pytest
import torch
from objective_checks import ToyCNN
from test_objectives_distributed import on_two_ranks
from torch import Tensor

import objectives
from backbones.batch_norm import synchronise
from objectives.contract import Objective
from objectives.distributed import mean_over_ranks, world_size

HEAD = {"hidden_dim": 16, "out_dim": 8}
CASES: dict[str, tuple[str, dict]] = {
    "simclr": ("simclr", HEAD),
    "dcl": ("simclr", {**HEAD, "decoupled": True}),
    "swav": ("swav", {**HEAD, "prototypes": 12, "local_views": 1, "queue_size": 11, "queue_start": 0.0}),
    "moco_v3": ("moco_v3", {**HEAD, "momentum_start": 0.5}),
    "moco_v2": ("moco_v2", {**HEAD, "queue_size": 11, "momentum_start": 0.5, "momentum_end": 0.5, "symmetric": True}),
}
STEPS = 4


def make(case: str) -> Objective:
    torch.manual_seed(0)
    name, options = CASES[case]
    return objectives.create(name, ToyCNN(), image_size=16, **options).double()


def train(case: str, rank: int) -> dict[str, Tensor]:
    """Losses and gradients of a few steps, and the state they lead to."""
    objective, world = make(case), world_size()
    if world > 1:
        synchronise(objective)
    optimiser = torch.optim.SGD(objective.parameter_groups(), lr=0.1)
    losses, gradients = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        whole = [torch.randn(8, 3, *v.size, generator=generator, dtype=torch.float64) for v in objective.views]
        loss, _ = objective([view.chunk(world)[rank] for view in whole], step / STEPS)
        optimiser.zero_grad()
        loss.backward()
        for parameter in objective.parameters():
            if parameter.grad is not None:  # what DDP does, which refuses synchronised batch norms on a CPU
                parameter.grad = mean_over_ranks(parameter.grad)
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
        objective.after_backward(step / STEPS)
        optimiser.step()
        objective.after_step((step + 1) / STEPS)
        losses.append(mean_over_ranks(loss))
    state = torch.cat([v.flatten() for v in objective.state_dict().values() if v.is_floating_point()])
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients), "state": state}


def train_all(rank: int) -> dict[str, dict[str, Tensor]]:
    return {case: train(case, rank) for case in CASES}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list:
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), train_all)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_with_the_joined_batch(two_ranks: list, case: str) -> None:
    alone = train(case, 0)
    for together in (ranks[case] for ranks in two_ranks):
        for what, value in alone.items():
            assert together[what].shape == value.shape
            error = ((together[what] - value).abs().max() / value.abs().max()).item()
            assert error <= 1e-9, f"{what} differ by {error}"
