"""Pixels as targets: those of each cell, and the signs that a network learns to paint them."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from objectives.spread import feature_spread
from objectives.views import VitalSign

if TYPE_CHECKING:
    from backbones import Backbone


def patchify(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of each cell: images [B, C, H, W] -> [B, h * w, p * q * C] for a grid (h, w).

    Where the grid does not divide the image (5 x 5 cells of 32 pixels), pixels are repeated, never mixed, to the next
    size that it does.
    """
    size = [-(-side // cells) * cells for side, cells in zip(images.shape[-2:], grid, strict=True)]
    if list(images.shape[-2:]) != size:
        images = F.interpolate(images, size=size, mode="nearest-exact")
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", h=grid[0], w=grid[1])


def pixels_per_cell(backbone: "Backbone", size: tuple[int, int]) -> int:
    """The number of values P that `patchify` gives each cell of an image of `size` pixels."""
    images = torch.empty(1, backbone.in_channels, *size, device="meta")
    return patchify(images, backbone.grid(*size)).shape[-1]


def normalise(patches: Tensor) -> Tensor:
    """Each patch [..., P] less its mean, over its standard deviation: unbiased variance, epsilon 1e-6.

    MAE (He et al. 2022, sec. 3) and SparK (Tian et al. 2023, sec. 3.3) predict pixels in this form.
    """
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


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
