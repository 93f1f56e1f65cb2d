"""MAE: masked autoencoders are scalable vision learners (He et al. 2022, arXiv 2111.06377).

Sections are the paper's; what it leaves open follows the authors' code (models_mae.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from objectives.cell_transformer import CellTransformer
from objectives.contract import Objective, pair
from objectives.masked_pass import encode
from objectives.masks import random_cells, take, visible_count
from objectives.pixels import VITAL_SIGNS, normalise, patchify, pixels_per_cell, signs
from objectives.precision import full_precision
from objectives.views import View

if TYPE_CHECKING:
    from backbones import Backbone


class Decoder(CellTransformer):
    """A light transformer from visible cells to the pixels of all cells (sec. 3)."""

    def forward(self, pooled: Tensor, cells: Tensor, visible: Tensor) -> Tensor:
        """Predicted pixels [B, N, P] of all cells, from the cells [B, K, D] that `visible` [B, K] names.

        The pooled feature [B, D] goes along as one more token without position, as the class token does in the
        authors' code.
        """
        x = self.embed(torch.cat([pooled[:, None], cells], dim=1))
        summary, seen = x[:, :1], x[:, 1:]
        tokens = self.mask_token.to(x.dtype).expand(len(x), len(self.positions), -1)
        tokens = tokens.scatter(1, visible[..., None].expand_as(seen), seen) + self.positions
        return self.transform(torch.cat([summary.to(tokens.dtype), tokens], dim=1))[:, 1:]


class MAE(Objective):
    """Hide three quarters of the cells, encode the rest, and decode the hidden pixels from that.

    On a CNN the same happens to the cells of its last feature map: its `visible` pass computes with visible pixels
    only, and each cell predicts the patch of stride x stride pixels that it stands for. Defaults are those of the
    ViT-B/16 run.

    Args:
        backbone: the encoder. `MAE.pool` names the pooling to create it with: without a loss of its own, a class
            token is the poorer summary of the cells.
        image_size: of the view, in pixels: a side or (height, width).
        scale: area range of the crop.
        mask_ratio: share of the cells that is hidden.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        normalise_targets: predict pixels normalised within their patch.

    Raises:
        ValueError: where the grid leaves no cell to see, or none to predict.
    """

    family = "masked modelling"
    paper = "He et al. 2022, arXiv 2111.06377"
    pool = "mean"
    masking = "visible"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.2, 1.0),
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalise_targets: bool = True,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        self.grid = backbone.grid(*size)
        cells = self.grid[0] * self.grid[1]
        self.visible = visible_count(cells, mask_ratio)
        if not 0 < self.visible < cells:
            raise ValueError(
                f"MAE cannot mask {mask_ratio:.0%} of {cells} cell(s): {backbone.name} has a grid of "
                f"{self.grid[0]}x{self.grid[1]} at {size[0]}x{size[1]} pixels; "
                "take larger images, a backbone of smaller stride, or another mask_ratio"
            )
        if decoder_width % decoder_heads:
            raise ValueError(f"decoder_width {decoder_width} is no multiple of decoder_heads {decoder_heads}")
        self.views = (View("image", size, scale),)
        self.normalise_targets = normalise_targets
        pixels = pixels_per_cell(backbone, size)
        self.encoder = backbone
        self.decoder = Decoder(backbone.width, pixels, self.grid, decoder_width, decoder_depth, decoder_heads)
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The encoder."""
        return self.encoder

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error on the hidden cells of the images [B, C, H, W], and its signs."""
        (images,) = views
        cells = self.grid[0] * self.grid[1]
        visible, masked = random_cells(len(images), cells, self.visible, images.device)
        seen = encode(self.encoder, images, visible=visible)
        predictions = full_precision(take(self.decoder(seen.pooled, seen.cells, visible), masked))
        patches = take(patchify(full_precision(images), self.grid), masked)
        targets = normalise(patches) if self.normalise_targets else patches
        loss = (predictions - targets).square().mean()
        return loss, signs(predictions, patches, targets, seen.pooled)
