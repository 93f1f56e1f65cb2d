"""A vision transformer as a backbone: its cells are its patch tokens after the final norm.

Over timm's modules (VisionTransformer with its descendants DeiT, DINOv2, AugReg, and Eva: DINOv3, EVA-02), with our own
forward: it takes any size divisible by the patch, embeds only the patches that are visible, and can replace tokens.
"""

import math
import re
from typing import Any

import torch
from einops import rearrange
from timm.layers import PatchEmbed, resample_abs_pos_embed, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.contract import Backbone, Features, as_mask, gather_cells, show_only
from backbones.masking import visible_only


class Transformer(Backbone):
    """A plain vision transformer (Dosovitskiy et al. 2021, section 3.1).

    visible: the other patches are dropped before they are embedded, so they cost nothing (He et al. 2022, section 3).
    replaced: a replaced patch is embedded as `mask_token` [D]; its position stays (Bao et al. 2022, BEiT, section 2.3).
    A convolutional stem, whose patches overlap, runs masked either way: it sees no pixel of a patch that is hidden.
    Position tables are resampled to the grid of the images (bicubic, antialiased).
    """

    def __init__(
        self, name: str, network: nn.Module, *, in_channels: int, pool: str | None, config: dict[str, Any]
    ) -> None:
        super().__init__()
        net: Any = network
        self.prefix = [t for t in ("cls_token", "dist_token", "reg_token") if getattr(net, t, None) is not None]
        self.has_class = "cls_token" in self.prefix
        pool = pool or ("cls" if self.has_class else "mean")
        if pool == "cls" and not self.has_class:
            raise ValueError(f"pool='cls': {name} has no class token; use pool='mean'.")
        if net.patch_embed.patch_size[0] != net.patch_embed.patch_size[1]:
            raise ValueError(f"{name} has patches of {net.patch_embed.patch_size} pixels; only square ones will do.")
        self.name, self.width, self.in_channels = name, int(net.embed_dim), in_channels
        self.stride, self.pool, self.config = int(net.patch_embed.feat_ratio()), pool, config
        self.native = tuple(net.patch_embed.grid_size)
        self.norm_key = "norm" if isinstance(net.fc_norm, nn.Identity) else "fc_norm"
        self.norm = getattr(net, self.norm_key)
        for head in ("norm", "fc_norm", "head", "attn_pool", "head_drop"):
            if hasattr(net, head):
                setattr(net, head, nn.Identity())
        self.network: Any = net
        self.mask_token = nn.Parameter(torch.empty(self.width), requires_grad=False)
        trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        replaced: Tensor | None = None,
        layers: bool = False,
        summaries: bool = False,
    ) -> Features:
        net, (h, w) = self.network, self._check(images, visible, replaced)
        x = self._embed(images, visible, replaced, (h, w))
        if replaced is not None:
            hidden = replaced if visible is None else replaced.gather(1, visible)
            x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        prefix_positions, positions = self._positions(h, w)
        if positions is not None:
            x = x + (positions if visible is None else gather_cells(positions.expand(len(x), -1, -1), visible))
        x = torch.cat([*self._prefix_tokens(len(x), prefix_positions, x.dtype), x], dim=1)
        x = net.norm_pre(net.pos_drop(x))

        rope = self._rope(h, w, visible)
        prefix = x.shape[1] - (h * w if visible is None else visible.shape[1])
        stages: list[Tensor] = []
        summed: list[Tensor] = []
        for i, block in enumerate(net.blocks):
            x = block(x) if rope is None else block(x, rope=rope[i] if mixes_rope(net) else rope)
            if layers:
                stages.append(x[:, prefix:])
            if summaries:
                y = self.norm(x)
                summed.append(torch.stack([*([y[:, 0]] if self.has_class else []), y[:, prefix:].mean(1)], dim=1))
        x = self.norm(x)
        cells = x[:, prefix:]
        pooled = x[:, 0] if self.pool == "cls" else cells.mean(1)
        return Features(pooled, cells, tuple(stages), tuple(summed))

    def depths(self) -> dict[str, int]:
        def depth(name: str) -> int:
            if block := re.match(r"network\.blocks\.(\d+)\.", name):
                return int(block[1]) + 1
            return len(self.network.blocks) + 1 if name.startswith("norm.") else 0

        return {name: depth(name) for name, _ in self.named_parameters()}

    def blocks(self) -> list[nn.Module]:
        return list(self.network.blocks)

    def _embed(self, images: Tensor, visible: Tensor | None, replaced: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Patch embeddings [B, N or K, D] before positions; with `visible`, no other patch is even multiplied. What
        stands at the `replaced` ones means nothing, and their pixels reach no other."""
        embed, p = self.network.patch_embed, self.stride
        if type(embed) is PatchEmbed:
            if visible is None:
                x = rearrange(embed.proj(images), "b d h w -> b (h w) d")
            else:
                patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
                x = F.linear(gather_cells(patches, visible), embed.proj.weight.flatten(1), embed.proj.bias)
            return embed.norm(x)
        seen = None if visible is None else as_mask(visible, grid[0] * grid[1])
        if replaced is not None:
            seen = ~replaced if seen is None else seen & ~replaced
        if seen is None:
            return _as_tokens(embed(images), grid)
        images, seen = show_only(images, seen, grid)
        with visible_only(embed, seen):
            x = _as_tokens(embed(images), grid)
        return x if visible is None else gather_cells(x, visible)

    def _positions(self, h: int, w: int) -> tuple[Tensor | None, Tensor | None]:
        """Position embeddings of the prefix tokens [1, P, D] (None where they have none) and of the cells [1, N, D]."""
        table = self.network.pos_embed
        if table is None:
            return None, None
        prefix = table.shape[1] - math.prod(self.native)
        cells = table[:, prefix:]
        if (h, w) != self.native:
            cells = resample_abs_pos_embed(cells, [h, w], list(self.native), num_prefix_tokens=0)
        return (table[:, :prefix] if prefix else None), cells

    def _prefix_tokens(self, batch: int, positions: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        if not self.prefix:
            return []
        tokens = torch.cat([getattr(self.network, name) for name in self.prefix], dim=1)
        tokens = tokens if positions is None else tokens + positions
        return [tokens.to(dtype).expand(batch, -1, -1)]

    def _rope(self, h: int, w: int, visible: Tensor | None) -> Tensor | None:
        """Rotary embeddings [N, E], or [B, 1, K, E] of the visible cells; one per block where blocks differ."""
        if getattr(self.network, "rope", None) is None:
            return None
        rope = self.network.rope.get_embed(shape=(h, w))
        if visible is None:
            return rope
        if mixes_rope(self.network):  # [L, heads, N, E] → [L, B, heads, K, E]
            return rearrange(rope[:, :, visible], "l n b k e -> l b n k e")
        return rope[visible].unsqueeze(1)


def _as_tokens(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """An embedding of any layout timm has, as [B, N, D]."""
    if x.ndim == 4:
        return x.flatten(1, 2) if tuple(x.shape[1:3]) == grid else rearrange(x, "b d h w -> b (h w) d")
    return x


def mixes_rope(network: Any) -> bool:
    """Whether every block has rotary embeddings of its own (Heo et al. 2024, RoPE-Mixed)."""
    return bool(getattr(network, "rope_mixed", False))
