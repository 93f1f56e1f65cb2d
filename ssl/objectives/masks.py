"""Which cells of an image a masked objective hides."""

import torch
from torch import Tensor

Range = tuple[float, float]


def visible_count(cells: int, mask_ratio: float) -> int:
    """Number of cells that stay visible: the integer part of `cells * (1 - mask_ratio)`, as in MAE's code."""
    return int(round(cells * (1 - mask_ratio), 6))


def random_cells(batch: int, cells: int, visible: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Split the cells of each image at random: indices of the visible ones [B, K] and of the masked [B, N - K].

    The same number for every image, each subset equally likely, both in random order (MAE, He et al. 2022, sec. 3).
    Drawn from torch's generator of `device`.
    """
    order = torch.rand(batch, cells, device=device).argsort(dim=1)
    return order[:, :visible], order[:, visible:]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D] at index [B, M] -> [B, M, D]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def finer(index: Tensor, columns: int, factor: int) -> Tensor:
    """The positions [B, M * factor^2] that cells `index` [B, M] of a grid of `columns` cover where each is split into
    factor x factor."""
    row, column = index // columns, index % columns
    within = torch.arange(factor, device=index.device)
    rows = (row * factor)[..., None, None] + within[:, None]
    return (rows * (columns * factor) + (column * factor)[..., None, None] + within).flatten(1)


def block_sides(grid: tuple[int, int], share: float, aspect: float) -> tuple[int, int]:
    """Sides (h, w) of a block that takes a share of the grid, its aspect h / w relative to that of the grid."""
    sides = (grid[0] * (share * aspect) ** 0.5, grid[1] * (share / aspect) ** 0.5)
    return min(max(round(sides[0]), 1), grid[0]), min(max(round(sides[1]), 1), grid[1])


def multi_block(
    batch: int,
    grid: tuple[int, int],
    *,
    targets: int,
    target_scale: Range,
    target_aspect: Range,
    context_scale: Range,
    min_keep: int,
) -> tuple[Tensor, Tensor]:
    """Multi-block masks (I-JEPA, Assran et al. 2023, sec. 3): cells of the context [B, K] and of the targets [B, M, T].

    M target blocks and one context block of the grid's own aspect are placed anywhere in each image; what a target
    covers is taken out of the context. Their sides are drawn once for the batch, so that all targets have T cells.
    While an image keeps fewer than `min_keep` cells of context, its blocks are placed anew, 20 times at most, the
    last time with all targets on the places of the first two. Images with more context than the one with least lose
    cells at random, where the authors' code drops the last rows. Drawn on the CPU, from torch's generator.
    """
    height, width = grid
    rows, columns = torch.arange(height)[:, None], torch.arange(width)

    def sides(scale: Range, aspect: Range) -> tuple[int, int]:
        share, ratio = (low + (high - low) * torch.rand(()).item() for low, high in (scale, aspect))
        return block_sides(grid, share, ratio)

    def place(count: int, h: int, w: int) -> Tensor:
        top = torch.randint(height - h + 1, (batch, count, 1, 1))
        left = torch.randint(width - w + 1, (batch, count, 1, 1))
        return (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)

    target, context = sides(target_scale, target_aspect), sides(context_scale, (1.0, 1.0))
    blocks = torch.zeros(batch, targets, height, width, dtype=torch.bool)
    seen = torch.zeros(batch, height, width, dtype=torch.bool)
    for attempts_left in reversed(range(20)):
        poor = seen.sum((1, 2)) < min_keep
        if not poor.any():
            break
        drawn = place(targets, *target)
        if attempts_left == 0:
            drawn[:, 2:] = drawn[:, :1]
        blocks = torch.where(poor[:, None, None, None], drawn, blocks)
        seen = torch.where(poor[:, None, None], place(1, *context)[:, 0] & ~drawn.any(1), seen)
    keep = int(seen.sum((1, 2)).min())
    kept = (seen.flatten(1) + torch.rand(batch, height * width)).topk(keep).indices
    return kept, blocks.flatten(2).nonzero()[:, 2].view(batch, targets, -1)
