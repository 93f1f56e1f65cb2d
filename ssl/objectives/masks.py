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
