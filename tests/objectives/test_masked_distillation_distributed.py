"""iBOT, DINOv2 and MSN on two ranks do what one does on the joined batch, once both hide the same cells of an image.

KoLeo's neighbours, Sinkhorn's columns over different numbers of cells, centres and me-max's mean couple the ranks.
"""

import pytest
import torch
from masked_toy import MaskedToy
from test_objectives_distributed import on_two_ranks
from torch import Tensor, nn

import objectives
from objectives import msn
from objectives.contract import Objective
from objectives.distributed import mean_over_ranks

STEPS, BATCH, CELLS = 2, 8, 4
HEAD = {"out_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16, "local_views": 1}
CASES = {
    "ibot": HEAD,
    "dinov2": HEAD | {"centring": "sinkhorn", "separate_heads": True},
    "msn": {"n_prototypes": 16, "hidden_dim": 32, "embedding_dim": 16, "focal_views": 1, "mask_ratio": 0.25}
    | {"head_norm": "none"},
}


def hide(objective: Objective, step: int, rank: int, world: int) -> None:
    """Let the objective draw this rank's part of masks that are known for the whole batch."""
    generator = torch.Generator().manual_seed(100 + step)
    if isinstance(objective, msn.MSN):
        order = torch.rand(BATCH, CELLS, generator=generator).argsort(1).chunk(world)[rank]
        msn.random_cells = lambda *_: (order[:, :3], order[:, 3:])
    else:
        masks = torch.rand(2, BATCH, CELLS, generator=generator) < 0.4
        objective.masks = lambda _: masks.chunk(world, dim=1)[rank].flatten(0, 1)


def train(name: str, rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    objective = objectives.create(name, MaskedToy(), image_size=16, **CASES[name])
    module = nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
    optimiser = torch.optim.SGD(objective.parameter_groups(), lr=0.1)
    losses, gradients = [], []
    for step in range(STEPS):
        hide(objective, step, rank, world)
        generator = torch.Generator().manual_seed(step)
        batch = [torch.randn(BATCH, 3, *view.size, generator=generator) for view in objective.views]
        loss, _ = module([view.chunk(world)[rank] for view in batch], 0.5)
        optimiser.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
        optimiser.step()
        objective.after_step(0.5)
        losses.append(mean_over_ranks(loss))
    state = [v.flatten().double() for v in objective.state_dict().values()]
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients), "state": torch.cat(state)}


def train_all(rank: int) -> dict[str, dict[str, Tensor]]:
    return {name: train(name, rank, 2) for name in CASES}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list:
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), train_all)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_with_the_joined_batch(two_ranks: list, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msn, "random_cells", msn.random_cells)  # put back after `hide`
    alone = train(name, 0, 1)
    for what, value in alone.items():
        for together in (ranks[name][what] for ranks in two_ranks):
            assert together.shape == value.shape
            assert ((together - value).abs().max() / value.abs().max()).item() <= 1e-5, what
