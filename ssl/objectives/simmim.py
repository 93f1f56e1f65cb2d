"""SimMIM: a simple framework for masked image modelling (Xie et al. 2022, arXiv 2111.09886).

Sections are the paper's; what it leaves open follows the authors' code (models/simmim.py, data/data_simmim.py).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.masked_pass import encode
from objectives.masks import finer, random_cells, take
from objectives.pixels import VITAL_SIGNS, patchify, pixels_per_cell, signs
from objectives.precision import full_precision
from objectives.views import View

if TYPE_CHECKING:
    from backbones import Backbone


class SimMIM(Objective):
    """Replace random squares of the image by a mask token and regress their raw pixels with one linear layer.

    The encoder sees all cells, the replaced ones as a learned vector; on a CNN as a learned colour, so that nothing
    in it needs to know of masks. Defaults are those of the ViT-B/16 run.

    Args:
        backbone: the encoder. `SimMIM.pool` names the pooling to create it with: no class token takes part in the loss.
        image_size: of the view, in pixels: a side or (height, width).
        scale: area range of the crop.
        mask_unit: side in pixels of the squares that are replaced (sec. 3.2): as many whole cells as fit into it
            and tile the grid, at least one.
        mask_ratio: share of the squares that is replaced, rounded up to a whole square.

    Raises:
        ValueError: where no square would be left to see, or none to predict.
    """

    family = "masked modelling"
    paper = "Xie et al. 2022, arXiv 2111.09886"
    pool = "mean"
    masking = "replaced"
    tokens_decay = False  # the authors' optimizer.py

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.67, 1.0),
        mask_unit: int = 32,
        mask_ratio: float = 0.6,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        h, w = backbone.grid(*size)
        fitting = range(1, max(mask_unit // backbone.stride, 1) + 1)
        self.unit = max(side for side in fitting if h % side == w % side == 0)
        self.grid, self.units = (h, w), (h // self.unit, w // self.unit)
        squares = self.units[0] * self.units[1]
        self.visible = squares - math.ceil(round(squares * mask_ratio, 6))
        if not 0 < self.visible < squares:
            raise ValueError(
                f"SimMIM cannot mask {mask_ratio:.0%} of {squares} square(s): {backbone.name} has a grid of {h}x{w} at "
                f"{size[0]}x{size[1]} pixels, masked in squares of {self.unit}x{self.unit} cells; "
                "take larger images, a smaller mask_unit, a backbone of smaller stride, or another mask_ratio"
            )
        self.views = (View("image", size, scale),)
        self.encoder = backbone
        self.encoder.learn_mask_token()
        self.head = nn.Linear(backbone.width, pixels_per_cell(backbone, size))
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The encoder."""
        return self.encoder

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """L = |y_M - x_M|_1 / Omega(x_M) (sec. 3.4) over the replaced pixels of the images [B, C, H, W]; its signs."""
        (images,) = views
        masked = self.masked(len(images), images.device)
        replaced = torch.zeros(len(images), self.grid[0] * self.grid[1], dtype=torch.bool, device=images.device)
        seen = encode(self.encoder, images, replaced=replaced.scatter(1, masked, True))
        predictions = full_precision(self.head(take(seen.cells, masked)))
        targets = take(patchify(full_precision(images), self.grid), masked)
        loss = (predictions - targets).abs().mean()
        return loss, signs(predictions, targets, targets, seen.pooled)

    def masked(self, batch: int, device: torch.device) -> Tensor:
        """Random squares as the indices of their cells [B, M] (sec. 3.2)."""
        _, squares = random_cells(batch, self.units[0] * self.units[1], self.visible, device)
        return finer(squares, self.units[1], self.unit)
