"""A vision transformer as a backbone: its cells are its patch tokens after the final norm.

Over timm's modules (VisionTransformer with its descendants DeiT, DINOv2, AugReg, and Eva: DINOv3, EVA-02), with a forward of
our own: it takes any size divisible by the patch, embeds only the patches that are visible, and can replace tokens.
"""

import math
from typing import Any

import torch
from einops import rearrange
from timm.layers import PatchEmbed, resample_abs_pos_embed, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.contract import Backbone, Features, gather_cells


class Transformer(Backbone):
    """A plain vision transformer (Dosovitskiy et al. 2021, section 3.1).

    visible: the other patches are dropped before they are embedded (He et al. 2022, MAE, section 3), so they cost nothing.
    replaced: the embedding of a replaced patch is `mask_token` [D], the position stays (Bao et al. 2022, BEiT, section 2.3).
    Position tables are resampled to the grid of the images (bicubic, antialiased).
    """

    def __init__(
        self, name: str, network: nn.Module, *, in_channels: int, pool: str | None, config: dict[str, Any]
    ) -> None:
        super().__init__()
        net: Any = network
        self.prefix = [t for t in ("cls_token", "dist_token", "reg_token") if getattr(net, t, None) is not None]
        has_class = "cls_token" in self.prefix
        pool = pool or ("cls" if has_class else "mean")
        if pool == "cls" and not has_class:
            raise ValueError(f"pool='cls': {name} has no class token; use pool='mean'.")
        if net.patch_embed.patch_size[0] != net.patch_embed.patch_size[1]:
            raise ValueError(f"{name} has patches of {net.patch_embed.patch_size} pixels; only square ones are supported.")
        self.name, self.width, self.in_channels = name, int(net.embed_dim), in_channels
        self.stride, self.pool, self.config = int(net.patch_embed.patch_size[0]), pool, config
        self.native = tuple(net.patch_embed.grid_size)
        self.norm = net.norm if isinstance(net.fc_norm, nn.Identity) else net.fc_norm
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
    ) -> Features:
        net, (h, w) = self.network, self._check(images, visible, replaced)
        x = self._embed(images, visible)
        if replaced is not None:
            hidden = replaced if visible is None else replaced.gather(1, visible)
            x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        prefix_positions, positions = self._positions(h, w)
        if positions is not None:
            x = x + (positions if visible is None else gather_cells(positions.expand(len(x), -1, -1), visible))
        x = torch.cat([*self._prefix_tokens(len(x), prefix_positions, x.dtype), x], dim=1)
        x = net.norm_pre(net.pos_drop(x))

        rope = self._rope(h, w, visible)
        prefix, stages = x.shape[1] - (h * w if visible is None else visible.shape[1]), []
        for i, block in enumerate(net.blocks):
            x = block(x) if rope is None else block(x, rope=rope[i] if net_mixes(net) else rope)
            if layers:
                stages.append(x[:, prefix:])
        x = self.norm(x)
        cells = x[:, prefix:]
        return Features(x[:, 0] if self.pool == "cls" else cells.mean(1), cells, tuple(stages))

    def _embed(self, images: Tensor, visible: Tensor | None) -> Tensor:
        """Patch embeddings [B, N or K, D] before positions; with `visible`, no other patch is even multiplied."""
        embed, p = self.network.patch_embed, self.stride
        if visible is None or type(embed) is not PatchEmbed:
            x = embed.proj(images) if type(embed) is PatchEmbed else embed(images)
            if x.ndim == 4 and x.shape[1] == self.width:
                x = rearrange(x, "b d h w -> b (h w) d")
            x = x.flatten(1, 2) if x.ndim == 4 else x
            x = embed.norm(x) if type(embed) is PatchEmbed else x
            return x if visible is None else gather_cells(x, visible)
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        x = F.linear(gather_cells(patches, visible), embed.proj.weight.flatten(1), embed.proj.bias)
        return embed.norm(x)

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
        """Rotary embeddings: [N, E], or [B, 1, K, E] of the visible cells; one per block in front where blocks differ."""
        if getattr(self.network, "rope", None) is None:
            return None
        rope = self.network.rope.get_embed(shape=(h, w))
        if visible is None:
            return rope
        if net_mixes(self.network):  # [L, heads, N, E] → [L, B, heads, K, E]
            return rearrange(rope[:, :, visible], "l n b k e -> l b n k e")
        return rope[visible].unsqueeze(1)


def net_mixes(network: Any) -> bool:
    """Whether every block has rotary embeddings of its own (Heo et al. 2024, RoPE-Mixed)."""
    return bool(getattr(network, "rope_mixed", False))
