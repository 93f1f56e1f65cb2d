"""Two ranks do what one does on the joined batch, batch norms, correlations, moments and slices included."""

from typing import Any

import pytest
import torch
from objective_toys import ToyBackbone
from test_objectives_distributed import on_two_ranks
from torch import Tensor

import objectives
from backbones.batch_norm import synchronise
from objectives.contract import Objective
from objectives.distributed import from_first_rank, mean_over_ranks, mean_with_gradient

SMALL: dict[str, dict[str, Any]] = {
    "barlow_twins": {"hidden_dim": 16, "out_dim": 8},
    "byol": {"hidden_dim": 16, "out_dim": 8},
    "distillation": {"teacher": "random:lenet5"},
    "lejepa": {"hidden_dim": 16, "out_dim": 8, "slices": 16, "local_views": 1},
    "simsiam": {"hidden_dim": 16, "out_dim": 8, "predictor_dim": 4},
    "supervised": {"classes": 3},
    "vicreg": {"hidden_dim": 16, "out_dim": 8},
}
STEPS = 2


def make(name: str) -> Objective:
    torch.manual_seed(0)
    return objectives.create(name, ToyBackbone(), image_size=32, **SMALL[name]).double()


def train(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Losses and gradients; the ranks' labels are unequally many."""
    objective = make(name)
    if world > 1:
        synchronise(objective)
    optimiser = torch.optim.SGD(objective.parameter_groups(), lr=0.1)
    losses, gradients = [], []
    for i in range(STEPS):
        generator = torch.Generator().manual_seed(i)
        views = [torch.randn(8, 3, *v.size, generator=generator, dtype=torch.float64) for v in objective.views]
        labels = (torch.tensor([0, 1, 2, 1, -1, -1, 2, -1]).chunk(world)[rank],) if objective.labelled else ()
        torch.manual_seed(i + 1000 * rank)  # as in the loop: every rank's own
        loss, _ = objective([view.chunk(world)[rank] for view in views], i / STEPS, *labels)
        optimiser.zero_grad()
        loss.backward()
        learned = [p for p in objective.parameters() if p.grad is not None]
        for p in learned:  # what DDP does
            p.grad = mean_over_ranks(p.grad)
        gradients.append(torch.cat([p.grad.flatten() for p in learned]))
        optimiser.step()
        objective.after_step(i / STEPS)
        losses.append(mean_over_ranks(loss))
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients)}


def all_of_them(rank: int) -> dict[str, Any]:
    x = torch.arange(3.0).add(10 * rank).requires_grad_()
    mean_with_gradient(x).square().sum().backward()
    parts = {"from_first_rank": from_first_rank(x), "gradient": x.grad}
    return {"parts": parts, **{name: train(name, rank, 2) for name in SMALL}}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list:
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), all_of_them)


@pytest.mark.parametrize("name", SMALL)
def test_two_ranks_equal_one_with_the_joined_batch(two_ranks: list, name: str) -> None:
    alone = train(name, 0, 1)
    for what, value in alone.items():
        for together in (ranks[name][what] for ranks in two_ranks):
            assert together.shape == value.shape
            assert ((together - value).abs().max() / value.abs().max()).item() <= 1e-9, what


def test_a_mean_and_its_gradient_and_what_the_first_rank_drew(two_ranks: list) -> None:
    mean = torch.arange(3.0) + 5
    for ranks in two_ranks:
        assert torch.equal(ranks["parts"]["from_first_rank"], torch.arange(3.0))
        # Each rank sends 2 * mean; what reaches a rank is the mean of that, and DDP's average then halves it.
        assert torch.allclose(ranks["parts"]["gradient"], 2 * mean)
