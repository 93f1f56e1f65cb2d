"""Two ranks whose images have unequal numbers of masked cells do what one does on the joined batch."""

from pathlib import Path

import pytest
import torch
from test_objectives_distributed import on_two_ranks
from tiny_backbones import tiny_vit
from torch import Tensor, nn

from objectives import data2vec
from objectives.data2vec import Data2Vec
from objectives.distributed import mean_over_ranks

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASKED = torch.arange(16) < torch.tensor([8, 7, 3, 1])[:, None]


def step(rank: int, world: int) -> dict[str, Tensor]:
    rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
    torch.manual_seed(0)
    objective = Data2Vec(tiny_vit(), image_size=32)
    drawn, data2vec.block_mask = data2vec.block_mask, lambda *args, **options: MASKED[rows]
    module = nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
    loss, _ = module([IMAGES[rows]], 0.0)
    loss.backward()
    data2vec.block_mask = drawn
    gradients = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    return {"loss": mean_over_ranks(loss), "gradient": torch.cat(gradients)}


def one_of_two(rank: int) -> dict[str, Tensor]:
    return step(rank, 2)


@pytest.mark.filterwarnings("ignore")
def test_data2vec_on_two_ranks_equals_one_with_the_joined_batch(tmp_path: Path) -> None:
    alone = step(0, 1)
    for together in on_two_ranks(tmp_path, one_of_two):
        for what, value in alone.items():
            assert ((together[what] - value).abs().max() / value.abs().max()).item() <= 1e-5, what
