"""MAE: masked autoencoders are scalable vision learners (He et al. 2022, arXiv 2111.06377).

Sections are the paper's; what it leaves open follows the authors' code (models_mae.py).
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.masks import random_cells, visible_count
from objectives.positions import sincos
from objectives.precision import full_precision
from objectives.spread import feature_spread
from objectives.views import View, VitalSign

if TYPE_CHECKING:
    from backbones import Backbone


def patchify(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of each cell: images [B, C, H, W] -> [B, h * w, p * q * C] for a grid (h, w).

    Where the grid does not divide the image (LeNet-5's 5 x 5 cells of 32 pixels), pixels are repeated, never mixed,
    to the next size that it does.
    """
    size = [-(-side // cells) * cells for side, cells in zip(images.shape[-2:], grid, strict=True)]
    if list(images.shape[-2:]) != size:
        images = F.interpolate(images, size=size, mode="nearest-exact")
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", h=grid[0], w=grid[1])


def normalise(patches: Tensor) -> Tensor:
    """Each patch [..., P] less its mean, over its standard deviation (sec. 3): unbiased variance, epsilon 1e-6."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D] at index [B, M] -> [B, M, D]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


VITAL_SIGNS = (
    VitalSign("explained", 0.0, 1.0, "predictions are no better than each patch's mean"),
    VitalSign("prediction_spread", 0.05, 2.0, "the decoder paints the same patch whatever it sees"),
    VitalSign("target_spread", 0.01, 100.0, "the images are flat: there is nothing to predict"),
    VitalSign("feature_spread", 0.02, 1.0, "the encoder gives every image the same features"),
)


@torch.no_grad()
def signs(predictions: Tensor, patches: Tensor, targets: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    """Share of the targets' variance that is explained, and the spread of predictions, pixels and features.

    Args:
        predictions, targets: [B, M, P] of the hidden cells. patches: their pixels [B, M, P].
        pooled: features [B, D].
    """
    variance = targets.var(correction=0)
    return {
        "explained": 1 - (predictions - targets).square().mean() / variance,
        "prediction_spread": (predictions.flatten(0, 1).var(0, correction=0).mean() / variance).sqrt(),
        "target_spread": patches.std(-1, correction=0).mean(),
        "feature_spread": feature_spread(pooled),
    }


class Decoder(nn.Module):
    """A light transformer from visible cells to the pixels of all cells (sec. 3)."""

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

    def forward(self, pooled: Tensor, cells: Tensor, visible: Tensor) -> Tensor:
        """Predicted pixels [B, N, P] of all cells, from the cells [B, K, D] that `visible` [B, K] names.

        The pooled feature [B, D] goes along as one more token without position, as the class token does in the
        authors' code.
        """
        x = self.embed(torch.cat([pooled[:, None], cells], dim=1))
        summary, seen = x[:, :1], x[:, 1:]
        tokens = self.mask_token.to(x.dtype).expand(len(x), len(self.positions), -1)
        tokens = tokens.scatter(1, visible[..., None].expand_as(seen), seen) + self.positions
        x = self.norm(self.blocks(torch.cat([summary.to(tokens.dtype), tokens], dim=1)))
        return self.predict(x[:, 1:])


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
        pixels = patchify(torch.empty(1, backbone.in_channels, *size, device="meta"), self.grid).shape[-1]
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
        seen = self.encoder(images, visible=visible)
        predictions = full_precision(take(self.decoder(seen.pooled, seen.cells, visible), masked))
        patches = take(patchify(full_precision(images), self.grid), masked)
        targets = normalise(patches) if self.normalise_targets else patches
        loss = (predictions - targets).square().mean()
        return loss, signs(predictions, patches, targets, seen.pooled)
