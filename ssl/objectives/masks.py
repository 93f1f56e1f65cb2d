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


def block_mask(
    counts: Tensor, grid: tuple[int, int], *, min_block: int, aspect: tuple[float, float] = (0.3, 1 / 0.3)
) -> Tensor:
    """Hide rectangles of cells, at most `counts` [B] of them in each image: a bool mask [B, h * w], True is hidden.

    Algorithm 1 of BEiT (Bao et al. 2022), on all images at once, as iBOT, DINOv2 and data2vec use it. Until an image
    has its count, a block is drawn: its area uniform between `min_block` and the number of cells that are still to be
    hidden, the logarithm of its aspect h / w uniform in `aspect`, its sides rounded, its place uniform. It is taken if
    it hides something new, exceeds the count by nothing, and is smaller than the grid along both axes (one of a
    single row or column may be filled along it). An image for which ten draws in a row are refused stays below its
    count, as published: most often by a cell or two.

    Args:
        counts: int64, cells to hide; 0 hides none.
        grid: rows and columns (h, w).
        min_block: smallest area of a block, in cells, but for its rounding and where fewer are still to be hidden.
        aspect: range of a block's height over its width.
    """
    height, width = grid
    rows = torch.arange(height, device=counts.device)[:, None]
    columns = torch.arange(width, device=counts.device)
    mask = torch.zeros(len(counts), height, width, dtype=torch.bool, device=counts.device)
    refused = torch.zeros_like(counts)
    while True:
        left = counts - mask.sum((1, 2))
        growing = (left > 0) & (refused < 10)
        if not growing.any():
            return mask.flatten(1)
        drawn = torch.rand(4, len(counts), 1, 1, device=counts.device)
        area = min_block + drawn[0] * (left[:, None, None] - min_block)
        ratio = aspect[0] * (aspect[1] / aspect[0]) ** drawn[1]
        h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        top, first = ((height - h + 1) * drawn[2]).floor(), ((width - w + 1) * drawn[3]).floor()
        block = (rows >= top) & (rows < top + h) & (columns >= first) & (columns < first + w)
        new = (block & ~mask).sum((1, 2))
        fits = ((h <= max(height - 1, 1)) & (w <= max(width - 1, 1))).flatten()
        taken = growing & fits & (new > 0) & (new <= left)
        mask |= block & taken[:, None, None]
        refused = torch.where(taken, 0, refused + 1)


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
    The context leaves out a row and a column at least, as in the authors' code (multiblock.py), unless the least of
    its scale already rounds to the whole grid. That code draws share and aspect from one random number, never places
    a block at the last row or column, and wants more than `min_keep` cells, of targets too; here share and aspect are
    drawn apart, all places are as likely, and so small grids have room.

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

    target = sides(target_scale, target_aspect)
    least = block_sides(grid, context_scale[0], 1.0)
    h, w = (min(s, max(n - 1, low)) for s, n, low in zip(sides(context_scale, (1.0, 1.0)), grid, least, strict=True))
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
        seen = torch.where(poor[:, None, None], place(1, h, w)[:, 0] & ~drawn.any(1), seen)
    keep = int(seen.sum((1, 2)).min())
    kept = (seen.flatten(1) + torch.rand(batch, height * width)).topk(keep).indices
    return kept, blocks.flatten(2).nonzero()[:, 2].view(batch, targets, -1)
