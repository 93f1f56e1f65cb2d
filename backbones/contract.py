"""What every backbone takes and gives. Objectives and evaluations know this and nothing more."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Features(NamedTuple):
    """pooled [B, D]; cells [B, N, D], or [B, K, D] when `visible` was given; layers: one [B, N_l, D_l] per block or
    stage, () unless asked for. Cells are in row-major order, or in the order of `visible`.

    summaries: one [B, S, D_l] per block or stage, () unless asked for: its class token where there is one, and the mean
    of its cells, both after the final norm where there is one of that width. `pooled` is in the last."""

    pooled: Tensor
    cells: Tensor
    layers: tuple[Tensor, ...] = ()
    summaries: tuple[Tensor, ...] = ()


class Backbone(nn.Module):
    """Images [B, C, H, W] → `Features`. Made by `backbones.create`, never directly.

    name        as given to `create`
    width       D, the length of a feature
    stride      pixels per cell, along both axes; H and W must be multiples of it
    in_channels C
    pool        "cls" (the class token) or "mean" (over the cells returned)
    config      keyword arguments that make it again, without its weights: `create(**config)`

    Its parameters are those of the feature extractor and one `mask_token`. The token is frozen (`requires_grad` False)
    until an objective that passes `replaced` calls `learn_mask_token()`, so that otherwise every trainable parameter
    takes part in every forward, as distributed training demands.
    """

    name: str
    width: int
    stride: int
    in_channels: int
    pool: str
    config: dict[str, Any]
    mask_token: nn.Parameter
    norm_key = "head.norm"
    """What timm calls the norm of cells."""

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        replaced: Tensor | None = None,
        layers: bool = False,
        summaries: bool = False,
    ) -> Features:
        """images [B, C, H, W] float, normalised.

        visible [B, K] int64: the cells that may be seen, distinct within a row. Features are computed from their pixels
        alone and only those K cells come back.
        replaced [B, N] bool: the cells whose content is replaced by the learned mask token; all N cells come back.
        layers, summaries: whether to return the cells, or what sums them up, of every block (ViT) or stage (CNN) too.
        Raises ValueError on a wrong channel count or a size that is no multiple of `stride`.
        """
        raise NotImplementedError

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells of an image of this size. Raises ValueError where it is no multiple of `stride`."""
        if height % self.stride or width % self.stride or min(height, width) < self.stride:
            near = " x ".join(str(max(self.stride, round(s / self.stride) * self.stride)) for s in (height, width))
            raise ValueError(
                f"image size {height} x {width} does not fit {self.name}: both sides must be multiples of its stride "
                f"{self.stride}; the nearest size is {near}."
            )
        return height // self.stride, width // self.stride

    def depths(self) -> dict[str, int]:
        """How deep each parameter lies, by name: 0 the stem (patch embedding, tokens, positions; a CNN's first layers),
        then one number a block, to the final norm. What layer-wise learning-rate decay goes by (Clark et al. 2020,
        ELECTRA, appendix A), and what freezing a stem means."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The modules whose outputs are its layers, as fine as it is built, from the input on: every block of a ViT; of
        a CNN the last module of every depth of `depths()`, which is every residual, dense or inception block, or every
        convolution where it has none. Their outputs are as its make has them, [B, ...]."""
        raise NotImplementedError

    def learn_mask_token(self) -> None:
        """Let the mask token train. Call it before making the optimiser; then pass `replaced` in every step."""
        self.mask_token.requires_grad_(True)

    def _check(self, images: Tensor, visible: Tensor | None, replaced: Tensor | None) -> tuple[int, int]:
        """The grid of `images`, after checking that all arguments fit this backbone and each other."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"{self.name} takes images [B, {self.in_channels}, H, W] but got {list(images.shape)}; "
                f"create it with in_channels={images.shape[1] if images.ndim == 4 else '…'}."
            )
        h, w = self.grid(*images.shape[-2:])
        if visible is not None and (visible.ndim != 2 or len(visible) != len(images) or visible.dtype != torch.int64):
            raise ValueError(
                f"visible must be int64 cell indices [{len(images)}, K], got {visible.dtype} {list(visible.shape)}."
            )
        if replaced is not None and (replaced.shape != (len(images), h * w) or replaced.dtype != torch.bool):
            raise ValueError(
                f"replaced must be a bool mask [{len(images)}, {h * w}], got {replaced.dtype} {list(replaced.shape)}."
            )
        unlearned = replaced is not None and not self.mask_token.requires_grad
        if unlearned and self.training and torch.is_grad_enabled():
            raise ValueError(
                f"replaced was given but the mask token of {self.name} is frozen; "
                "call backbone.learn_mask_token() before making the optimiser."
            )
        return h, w


def number_depths(order: Mapping[str, float]) -> dict[str, int]:
    """Depths 0, 1, 2, … in place of any numbers in the same order."""
    number = {value: depth for depth, value in enumerate(sorted({max(value, 0) for value in order.values()}))}
    return {name: number[max(value, 0)] for name, value in order.items()}


def gather_cells(cells: Tensor, indices: Tensor) -> Tensor:
    """The cells [B, K, D] of `cells` [B, N, D] that `indices` [B, K] names."""
    return cells.gather(1, indices.unsqueeze(-1).expand(-1, -1, cells.shape[-1]))


def replace_pixels(images: Tensor, replaced: Tensor, grid: tuple[int, int], token: Tensor) -> Tensor:
    """Images [B, C, H, W] whose `replaced` [B, N] cells show the colour `token` [C] in each of their pixels."""
    return torch.where(over_pixels(replaced, grid, images), token.to(images.dtype).view(1, -1, 1, 1), images)


def as_mask(visible: Tensor, cells: int) -> Tensor:
    """The `visible` [B, K] indices of cells as a bool mask [B, N] over all `cells`."""
    return torch.zeros(len(visible), cells, dtype=torch.bool, device=visible.device).scatter(1, visible, True)


def show_only(images: Tensor, seen: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] that are zero outside the cells of the mask `seen` [B, N], and that as a map [B, 1, h, w]."""
    shown = torch.where(over_pixels(seen, grid, images), images, images.new_zeros(()))
    return shown, seen.view(-1, 1, *grid)


def over_pixels(cells: Tensor, grid: tuple[int, int], images: Tensor) -> Tensor:
    """A bool mask over cells [B, N] as a mask over pixels [B, 1, H, W]."""
    blocks = cells.view(len(cells), 1, *grid).to(torch.float32)
    return F.interpolate(blocks, size=images.shape[-2:], mode="nearest") > 0.5
