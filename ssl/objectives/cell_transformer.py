"""The narrow transformer over cells that MAE decodes with and I-JEPA predicts with."""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from objectives.positions import sincos


class CellTransformer(nn.Module):
    """What such a network is made of: cells [.., n_in] into `width`, a mask token, blocks, and out to [.., n_out].

    Positions [h * w, width] of the grid are fixed. Initialised as in MAE's code.
    """

    positions: Tensor

    def __init__(self, n_in: int, n_out: int, grid: tuple[int, int], width: int, depth: int, heads: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(n_in, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(width)
        self.predict = nn.Linear(width, n_out)
        self.register_buffer("positions", sincos(grid, width), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def transform(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, width], positions added -> predictions [B, N, n_out]."""
        return self.predict(self.norm(self.blocks(tokens)))
