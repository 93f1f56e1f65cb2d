"""Which cells of an image a masked objective hides."""

import torch
from torch import Tensor


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
