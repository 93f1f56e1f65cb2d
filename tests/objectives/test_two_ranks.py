"""Two ranks do what one does on the joined batch: every objective, on a CNN with batch norms and on a ViT.

Batch norms, masked ones too, queues, centres, Sinkhorn, KoLeo, covariances and means over unequally many cells or
labels couple the ranks. Masks are drawn once for all images, in training by each rank for its own.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from every_objective import make, save_run
from tiny_backbones import TINY, tiny_cnn
from torch import Tensor, nn
from two_ranks import on_two_ranks

import objectives
from backbones.batch_norm import synchronise
from objectives.contract import Objective
from objectives.distributed import mean_over_ranks, world_size
from objectives.masked_pass import WHOLE, encode

STEPS, BATCH, SIZE = 3, 8, 32
TOLERANCE = {"cnn": 1e-9, "vit": 1e-7}
"""Of the largest value, in float64, but that timm resamples a ViT's positions for small views in float32."""
LABELS = torch.tensor([0, 1, 2, 1, -1, -1, 2, -1])
OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "dcl": ("simclr", {"decoupled": True}),
    "a queue of MoCo's, in which steps overlap": ("moco_v2", {"queue_size": 11, "symmetric": True}),
    "a queue of SwAV's, in which steps overlap": ("swav", {"queue_size": 11, "queue_start": 0.0}),
    "DINOv2's Sinkhorn and separate heads": ("dinov2", {"centring": "sinkhorn", "separate_heads": True}),
    "DINO's head with batch norm": ("dino", {"head_norm": "batch"}),
    "data2vec's blocks, too large to hide equally many cells": ("data2vec", {"min_block": 0.45}),
}
CASES = [(name, kind) for name in objectives.NAMES for kind in TINY] + [(case, "cnn") for case in OTHERWISE]
MASKS = {"mae": "random_cells", "msn": "random_cells", "simmim": "random_cells", "spark": "random_cells"} | {
    "data2vec": "block_mask"
}
"""What draws masks in the module of that objective; the others have a method `masks`."""


def for_all(draw: Callable[..., Any], rank: int, world: int, views: int) -> Callable[..., Any]:
    """`draw`, for the images of all ranks and always the same; what it gives for this rank's, `views` of each."""

    def part(drawn: Tensor) -> Tensor:
        return drawn.unflatten(0, (views, -1)).chunk(world, 1)[rank].flatten(0, 1)

    def drawn(images: int | Tensor, *args: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            masks = draw(images.repeat(world) if isinstance(images, Tensor) else images * world, *args, **options)
        return part(masks) if isinstance(masks, Tensor) else tuple(map(part, masks))

    return drawn


@contextmanager
def same_masks(name: str, objective: Objective, rank: int, world: int) -> Iterator[None]:
    place = importlib.import_module(f"objectives.{name}") if name in MASKS else objective
    attribute, views = MASKS.get(name, "masks"), 2 if name in ("ibot", "dinov2") else 1
    if not hasattr(place, attribute):
        yield
        return
    with mock.patch.object(place, attribute, for_all(getattr(place, attribute), rank, world, views)):
        yield


def train(case: str, kind: str, folder: Path, rank: int = 0) -> dict[str, Tensor]:
    """Losses and gradients of a few steps, as the loop takes them, and the state they lead to."""
    name, options = OTHERWISE.get(case, (case, {}))
    torch.manual_seed(0)
    world = world_size()
    if objectives.objective(name).continues:
        options = {"checkpoint": str(folder / kind)}
    objective = make(name, TINY[kind](), SIZE, **options).double().train()
    if world > 1:
        synchronise(objective)
    module = nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
    optimiser = torch.optim.SGD(objective.parameter_groups(), lr=0.1)
    losses, gradients = [], []
    for step in range(STEPS):
        progress = step / STEPS
        generator = torch.Generator().manual_seed(step)
        views = [torch.randn(BATCH, 3, *v.size, generator=generator, dtype=torch.float64) for v in objective.views]
        labels = (LABELS.chunk(world)[rank],) if objective.labelled else ()
        torch.manual_seed(step + 1000 * rank)
        with same_masks(name, objective, rank, world):
            loss, _ = module([view.chunk(world)[rank] for view in views], progress, *labels)
        optimiser.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
        objective.after_backward(progress)
        optimiser.step()
        objective.after_step((step + 1) / STEPS)
        losses.append(mean_over_ranks(loss))
    state = torch.cat([v.flatten() for v in objective.state_dict().values() if v.is_floating_point()])
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients), "state": state}


def running_statistics(rank: int = 0) -> Tensor:
    """Those that a masked pass leaves, where the first images of all ranks are those of the joined batch."""
    torch.manual_seed(0)
    backbone, world = tiny_cnn().double().train(), world_size()
    if world > 1:
        synchronise(backbone)
    images = torch.randn(WHOLE + 4, 3, SIZE, SIZE, dtype=torch.float64)
    own = torch.cat([part.chunk(world)[rank] for part in images.split([WHOLE, 4])])
    encode(backbone, own, visible=torch.rand(len(own), 16).argsort(1)[:, :5])
    return torch.cat([value for name, value in backbone.named_buffers() if name.endswith(("mean", "var"))])


def work(folder: Path, rank: int) -> dict[Any, Any]:
    return {case: train(*case, folder, rank) for case in CASES} | {"statistics": running_statistics(rank)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With runs of DINO to go on from."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind, backbone in TINY.items():
        save_run(folder / kind, make("dino", backbone(), SIZE), "dino", SIZE)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list:
    return on_two_ranks(folder, partial(work, folder))


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_two_ranks_equal_one_with_the_joined_batch(case: str, kind: str, folder: Path, ranks: list) -> None:
    alone = train(case, kind, folder)
    for what, value in alone.items():
        for together in (rank[case, kind][what] for rank in ranks):
            assert together.shape == value.shape
            error = ((together - value).abs().max() / value.abs().max()).item()
            assert error <= TOLERANCE[kind], f"{what} differ by {error:.1e}"


def test_as_many_whole_images_move_running_statistics_on_any_number_of_ranks(ranks: list) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["statistics"], running_statistics(), rtol=1e-9, atol=1e-12)
