"""BEiT's blocks: what the algorithm promises, and the same distribution as LightlySSL's one-image-at-a-time loop."""

import random

import pytest
import torch
from torch import Tensor

from objectives.masks import block_mask


def test_each_image_gets_at_most_its_count_and_mostly_nearly_all() -> None:
    torch.manual_seed(0)
    counts = torch.arange(200) % 99
    hidden = block_mask(counts, (14, 14), min_block=16).sum(1)
    assert (hidden <= counts).all()
    assert (hidden[counts == 0] == 0).all()
    assert (counts - hidden).float().mean() < 3


def test_the_same_seed_hides_the_same_cells() -> None:
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(block_mask(torch.full((4,), 20), (8, 8), min_block=4))
    assert torch.equal(*masks)


def test_a_first_block_is_one_rectangle_of_the_asked_shape() -> None:
    """With a count that the smallest block fills, every image shows a single rectangle."""
    torch.manual_seed(0)
    masks = block_mask(torch.full((500,), 16), (14, 14), min_block=16).view(-1, 14, 14)
    whole = 0
    for mask in masks:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        if h * w == mask.sum() and h * w > 10:
            whole += 1
            assert 0.25 <= h / w <= 4
    assert whole > 250


@pytest.mark.parametrize(("grid", "count"), [((1, 8), 3), ((8, 1), 3), ((2, 2), 2), ((4, 4), 8), ((3, 9), 10)])
def test_small_and_oblong_grids(grid: tuple[int, int], count: int) -> None:
    torch.manual_seed(0)
    hidden = block_mask(torch.full((100,), count), grid, min_block=(min(grid) // 3) ** 2).sum(1)
    assert (hidden <= count).all()
    assert (hidden > 0).float().mean() > 0.95
    assert hidden.float().mean() > 0.8 * count


def test_distribution_equals_lightlys() -> None:
    """2000 masks each: cells hidden per image, and how often each cell is hidden, within four standard errors."""
    lightly = pytest.importorskip("lightly.models.utils")
    torch.manual_seed(0)
    random.seed(0)
    ours = block_mask(torch.full((2000,), 60), (10, 14), min_block=4).view(-1, 10, 14).double()
    theirs = torch.stack([lightly.random_block_mask_image((10, 14), 60, 4) for _ in range(2000)]).double()

    def differ(a: Tensor, b: Tensor) -> Tensor:
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        return ((a.mean(0) - b.mean(0)).abs() / error.clamp(min=1e-12)).max()

    assert differ(ours.sum((1, 2)), theirs.sum((1, 2))) < 4
    assert differ(ours.sum((1, 2)).square(), theirs.sum((1, 2)).square()) < 4
    assert differ(ours.flatten(1), theirs.flatten(1)) < 4.5
    edges = [(m[:, 1:] != m[:, :-1]).sum((1, 2)).double() for m in (ours, theirs)]
    assert differ(*edges) < 4
