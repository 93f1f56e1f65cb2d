"""Fixed positions of cells, as sines and cosines."""

import torch
from torch import Tensor


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """Positions [h * w, width] of the cells of a grid (h, w), row by row (MoCo v3, Chen et al. 2021; MAE).

    The first half of the channels tells the column, the second the row: sin(x w_i), then cos(x w_i), with
    w_i = 10000^(-4i / width), i < width / 4 (Vaswani et al. 2017, sec. 3.5).

    Raises:
        ValueError: where width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} of 2-D sine-cosine positions must be a multiple of 4")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.outer(torch.arange(n, dtype=torch.float64), frequencies) for n in grid)
    row = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, grid[1], -1)
    column = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(grid[0], -1, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()
