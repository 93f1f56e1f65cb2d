"""SparK: sparse and hierarchical masked modelling for convolutional networks (Tian et al. 2023, arXiv 2301.03580).

Sections are the paper's; what it leaves open follows the authors' code (pretrain/spark.py, pretrain/decoder.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.layers import layer_shapes
from objectives.masked_pass import encode
from objectives.masks import finer, random_cells, take
from objectives.pixels import VITAL_SIGNS, normalise, patchify, signs
from objectives.precision import full_precision
from objectives.views import View

if TYPE_CHECKING:
    from backbones import Backbone
    from backbones.contract import Features


class Densify(nn.Module):
    """phi_i of sec. 3.2: the visible positions of one scale normalised, a mask embedding [M_i] in all others, and a
    projection to the decoder's width."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(n_in)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(n_in), std=0.02))
        self.project = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2)

    def forward(self, features: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features [B, M, D_i] of the positions `index` [B, M] of a grid (h, w) -> a full map [B, D, h, w]."""
        seen = self.norm(features.flatten(0, 1)).view_as(features)
        dense = self.mask_token.to(seen.dtype).expand(len(seen), grid[0] * grid[1], -1)
        dense = dense.scatter(1, index[..., None].expand_as(seen), seen)
        return self.project(rearrange(dense, "b (h w) d -> b d h w", h=grid[0]))


def upsampling_block(n_in: int, n_out: int) -> nn.Sequential:
    """B_i of sec. 3.2: twice the resolution by a transposed convolution, then two of 3x3 with batch norm."""
    return nn.Sequential(
        nn.ConvTranspose2d(n_in, n_in, 4, stride=2, padding=1),
        nn.Conv2d(n_in, n_in, 3, padding=1, bias=False),
        nn.BatchNorm2d(n_in),
        nn.ReLU6(),
        nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
    )


class Decoder(nn.Module):
    """The light UNet of sec. 3.2, from cells up to pixels: D_i = B_i(D_(i+1)) + phi_i(S_i).

    As many blocks as the stride has factors of two, each halving the width; what is left of the stride (7 of a
    patch of 14) is a pixel shuffle.

    Args:
        backbone, size: the encoder and the images' (height, width).
        width: of the map at the cells' resolution. scales: how many resolutions of the encoder are used at most.
    """

    def __init__(self, backbone: "Backbone", size: tuple[int, int], width: int, scales: int) -> None:
        super().__init__()
        self.grid = h, w = backbone.grid(*size)
        doublings = (backbone.stride & -backbone.stride).bit_length() - 1
        if width % 2**doublings:
            raise ValueError(
                f"decoder_width {width} cannot be halved {doublings} times, once for each doubling from the cells of "
                f"{backbone.name} to pixels; take a multiple of {2**doublings}"
            )
        shapes = layer_shapes(backbone, size)
        deepest = {n: i for i, (n, _) in enumerate(shapes)}
        levels = [level for level in range(1, min(scales, doublings)) if h * w * 4**level in deepest]
        self.layers = {level: deepest[h * w * 4**level] for level in levels}
        self.densify = nn.ModuleDict({"0": Densify(backbone.width, width, 1)})
        for level, layer in self.layers.items():
            self.densify[str(level)] = Densify(shapes[layer][1], width // 2**level, 3)
        self.blocks = nn.ModuleList(
            upsampling_block(width // 2**level, width // 2 ** (level + 1)) for level in range(doublings)
        )
        self.rest = backbone.stride // 2**doublings
        self.predict = nn.Conv2d(width // 2**doublings, backbone.in_channels * self.rest**2, 1)

    def forward(self, seen: "Features", visible: Tensor) -> Tensor:
        """Images [B, C, H, W] from what the encoder made of the `visible` [B, K] cells, layers included."""
        x = self.densify["0"](seen.cells, visible, self.grid)
        for level, block in enumerate(self.blocks, start=1):
            x = block(x)
            if level in self.layers:
                layer, index = seen.layers[self.layers[level]], finer(visible, self.grid[1], 2**level)
                x = x + self.densify[str(level)](take(layer, index), index, (x.shape[-2], x.shape[-1]))
        return F.pixel_shuffle(self.predict(x), self.rest)


class SparK(Objective):
    """Hide 60 % of the cells, encode the rest sparsely, and paint the hidden ones from features of several scales.

    The encoder's `visible` pass is the paper's sparse convolution (sec. 3.1). The scales are the deepest layers at the
    cells' resolution and at 2, 4 and 8 times it, as far as the backbone has them. A plain ViT has but one resolution
    and drops what it does not see: there SparK is without its hierarchy, an MAE with a convolutional decoder. Defaults
    are those of the ResNet-50 run.

    Args:
        backbone: the encoder. `SparK.pool` names the pooling to create it with.
        image_size: of the view, in pixels: a side or (height, width).
        scale: area range of the crop.
        mask_ratio: share of the cells that is hidden.
        decoder_width: channels of the decoder at the cells' resolution, halved with every doubling.
        scales: how many resolutions of the encoder the decoder gets at most, from the cells' up.

    Raises:
        ValueError: where the grid leaves no cell to see, or none to predict.
    """

    family = "masked modelling"
    paper = "Tian et al. 2023, arXiv 2301.03580"
    pool = "mean"
    masking = "visible"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.67, 1.0),
        mask_ratio: float = 0.6,
        decoder_width: int = 768,
        scales: int = 4,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        self.grid = h, w = backbone.grid(*size)
        self.visible = round(h * w * (1 - mask_ratio))
        if not 0 < self.visible < h * w:
            raise ValueError(
                f"SparK cannot mask {mask_ratio:.0%} of {h * w} cell(s): {backbone.name} has a grid of {h}x{w} at "
                f"{size[0]}x{size[1]} pixels; take larger images, a backbone of smaller stride, or another mask_ratio"
            )
        self.views = (View("image", size, scale),)
        self.encoder = backbone
        self.decoder = Decoder(backbone, size, decoder_width, scales)
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The encoder."""
        return self.encoder

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error on the hidden patches of [B, C, H, W], each normalised (sec. 3.3), and its signs."""
        (images,) = views
        visible, masked = random_cells(len(images), self.grid[0] * self.grid[1], self.visible, images.device)
        seen = encode(self.encoder, images, visible=visible, layers=True)
        painted = full_precision(self.decoder(seen, visible))
        predictions = take(patchify(painted, self.grid), masked)
        patches = take(patchify(full_precision(images), self.grid), masked)
        targets = normalise(patches)
        loss = (predictions - targets).square().mean()
        return loss, signs(predictions, patches, targets, seen.pooled)
