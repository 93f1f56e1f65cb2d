"""I-JEPA: an image-based joint-embedding predictive architecture (Assran et al. 2023, arXiv 2301.08243).

Sections are the paper's; what it leaves open follows the authors' code (src/train.py, src/masks/multiblock.py).
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.cell_transformer import CellTransformer
from objectives.contract import Objective, pair
from objectives.latents import VITAL_SIGNS, normalised, signs
from objectives.masks import Range, block_sides, multi_block, take
from objectives.precision import full_precision
from objectives.schedules import linear
from objectives.teacher import Teacher
from objectives.views import View

if TYPE_CHECKING:
    from backbones import Backbone


class Predictor(CellTransformer):
    """g_phi of sec. 3: from the context and the places of one target block to the features in that block.

    It starts as MAE's decoder does. By the authors' start (0.02, less in deep blocks) a short run learns little:
    ViT-Ti/8 after 512 steps on generated images, EMA from 0.99, k-NN 19.9, linear 39.5; by this, from 0.9, 35.7 and
    74.2 (untrained 16.1 and 37.0).
    """

    def forward(self, cells: Tensor, context: Tensor, blocks: Tensor) -> Tensor:
        """Predictions [B, M, T, D] from cells [B, K, D] at `context` [B, K], for the cells `blocks` [B, M, T].

        Each block is predicted on its own.
        """
        count = blocks.shape[1]
        seen = (self.embed(cells) + self.positions[context]).repeat_interleave(count, dim=0)
        wanted = self.mask_token + self.positions[blocks.flatten(0, 1)]
        tokens = self.transform(torch.cat([seen, wanted.to(seen.dtype)], dim=1))
        return tokens[:, context.shape[1] :].unflatten(0, (-1, count))


class IJEPA(Objective):
    """Predict, from one large block of cells, what an EMA teacher says about four others of the whole image.

    No view but a crop: what is invariant is left to the predictor. The student sees the context alone, a CNN through
    its masked pass; the teacher sees the whole image. Defaults are those of the ViT-H/14 run. On a CNN this is CNN-JEPA
    (Kalapos and Gyires-Tóth 2024, arXiv 2408.07514) but for its masks, which the recipes have, its predictor, which is
    convolutional, and its targets, which have length 1 there.

    Args:
        backbone: the student's; the teacher is a copy of it. `IJEPA.pool` names the pooling to create it with: the
            mean over the teacher's cells represents an image (sec. 5).
        image_size: of the view, in pixels: a side or (height, width).
        scale: area range of the crop.
        targets: number M of target blocks. target_scale, target_aspect: their share of the grid, and height over width.
        context_scale: the context block's share of the grid, before the targets are taken out of it; a row and a column
            less than the grid at most.
        min_keep: cells of context that every image keeps.
        predictor_width, predictor_depth, predictor_heads: of the predictor, which is to be narrower than the backbone.
        ema_start, ema_end: momentum of the teacher, on a line.

    Raises:
        ValueError: where the grid is too small for two targets beside `min_keep` cells of context.
    """

    family = "masked modelling"
    paper = "Assran et al. 2023, arXiv 2301.08243"
    pool = "mean"
    masking = "visible"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: Range = (0.3, 1.0),
        targets: int = 4,
        target_scale: Range = (0.15, 0.2),
        target_aspect: Range = (0.75, 1.5),
        context_scale: Range = (0.85, 1.0),
        min_keep: int = 10,
        predictor_width: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int = 16,
        ema_start: float = 0.996,
        ema_end: float = 1.0,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        self.grid = h, w = backbone.grid(*size)
        aspects = [target_aspect[0] + (target_aspect[1] - target_aspect[0]) * i / 100 for i in range(101)]
        largest = max(a * b for a, b in (block_sides(self.grid, target_scale[1], aspect) for aspect in aspects))
        rows, columns = block_sides(self.grid, context_scale[0], 1.0)
        if rows * columns - 2 * largest < max(min_keep, 1):
            raise ValueError(
                f"I-JEPA cannot keep {min_keep} cell(s) of context beside two targets of {largest}: {backbone.name} "
                f"has a grid of {h}x{w} at {size[0]}x{size[1]} pixels; "
                "take larger images, a backbone of smaller stride, or a smaller min_keep"
            )
        if predictor_width % predictor_heads:
            raise ValueError(f"predictor_width {predictor_width} is no multiple of predictor_heads {predictor_heads}")
        self.views = (View("image", size, scale),)
        self.masks = partial(
            multi_block,
            targets=targets,
            target_scale=target_scale,
            target_aspect=target_aspect,
            context_scale=context_scale,
            min_keep=max(min_keep, 1),
        )
        self.ema = (ema_start, ema_end)
        self.student = backbone
        self.teacher = Teacher(backbone)
        self.predictor = Predictor(
            backbone.width, backbone.width, self.grid, predictor_width, predictor_depth, predictor_heads
        )
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The teacher's, which is the target encoder that the paper evaluates (sec. 5)."""
        return self.teacher.network

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Smooth L1 between predicted and teacher's features of the target blocks of [B, C, H, W], and its signs.

        The paper writes a squared error (sec. 3); the authors' code, and the published models, have this one.
        """
        (images,) = views
        drawn = self.masks(len(images), self.grid)
        context, blocks = (index.to(images.device, non_blocking=True) for index in drawn)
        everywhere = normalised(self.teacher(images).cells)
        targets = take(everywhere, blocks.flatten(1)).unflatten(1, blocks.shape[1:])
        seen = self.student(images, visible=context)
        predictions = full_precision(self.predictor(seen.cells, context, blocks))
        loss = F.smooth_l1_loss(predictions, targets)
        return loss, signs(predictions, targets, torch.ones_like(blocks), everywhere, seen.pooled)

    def after_step(self, progress: float) -> None:
        """The teacher follows, ever more slowly."""
        self.teacher.update(self.student, linear(*self.ema, progress))
