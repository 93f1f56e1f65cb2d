"""data2vec: a general framework for self-supervised learning (Baevski et al. 2022, arXiv 2202.03555), on images.

Headings and symbols are the paper's; what it leaves open follows the authors' code (data2vec_vision).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.distributed import mean_over_ranks
from objectives.latents import VITAL_SIGNS, normalised, signs
from objectives.layers import layer_shapes
from objectives.masked_pass import encode
from objectives.masks import block_mask
from objectives.precision import full_precision
from objectives.schedules import warmup
from objectives.teacher import Teacher
from objectives.views import Photometric, View

if TYPE_CHECKING:
    from backbones import Backbone


class Data2Vec(Objective):
    """Predict, from a masked image, the mean of the last K layers that an EMA teacher has of the whole image.

    A layer of a ViT is a block. On a CNN it is a stage, and the mean runs over those of the last K that have the grid
    and the width of the last one, which alone can be averaged cell by cell: often only the last stage itself. Replaced
    cells show a learned colour there. Defaults are those of the ViT-B/16 run.

    Args:
        backbone: the student's; the teacher is a copy of it. `Data2Vec.pool` names the pooling to create it with: no
            class token takes part in the loss.
        image_size: of the view, in pixels: a side or (height, width).
        scale: area range of the crop.
        mask_ratio, min_block: share of the cells that is masked, and that of the smallest block (120 and 16 of 196).
        target_layers: K, the layers a target is the mean of ("Training targets").
        beta: where the loss turns from squared to absolute ("Objective").
        ema_start, ema_end, ema_warmup: momentum of the teacher, tau_0 to tau_e in a line over this share of the run,
            then constant ("Teacher parameterization").

    Raises:
        ValueError: where the grid leaves no cell to see, or none to predict.
    """

    family = "masked modelling"
    paper = "Baevski et al. 2022, arXiv 2202.03555"
    pool = "mean"
    masking = "replaced"
    tokens_decay = False  # the authors' modeling_cyclical.py

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        mask_ratio: float = 0.61,
        min_block: float = 0.08,
        target_layers: int = 6,
        beta: float = 2.0,
        ema_start: float = 0.9998,
        ema_end: float = 0.9998,
        ema_warmup: float = 0.0,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        self.grid = h, w = backbone.grid(*size)
        self.masked, self.min_block = round(h * w * mask_ratio), max(round(h * w * min_block), 1)
        if not 0 < self.masked < h * w:
            raise ValueError(
                f"data2vec cannot mask {mask_ratio:.0%} of {h * w} cell(s): {backbone.name} has a grid of {h}x{w} at "
                f"{size[0]}x{size[1]} pixels; take larger images, a backbone of smaller stride, or another mask_ratio"
            )
        if target_layers < 1:
            raise ValueError(f"target_layers {target_layers} must be at least 1")
        colours = Photometric(0.4, 0.4, 0.4, jitter_p=1.0)
        self.views = (View("image", size, scale, photometric=colours),)
        shapes = layer_shapes(backbone, size)
        first = max(len(shapes) - target_layers, 0)
        self.layers = [i for i, shape in enumerate(shapes) if i >= first and shape == shapes[-1]]
        self.beta = beta
        self.ema = (ema_start, ema_end, ema_warmup)
        self.student = backbone
        self.student.learn_mask_token()
        self.teacher = Teacher(backbone)
        self.head = nn.Linear(backbone.width, shapes[-1][1])
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The student's, which is the one the paper fine-tunes: at 0.9998 a teacher is long behind."""
        return self.student

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """L(y_t, f_t(x)) over the masked cells of the images [B, C, H, W] of all ranks, and its signs."""
        (images,) = views
        counts = torch.full((len(images),), self.masked)
        masked = block_mask(counts, self.grid, min_block=self.min_block).to(images.device, non_blocking=True)
        layers = self.teacher(images, layers=True).layers
        targets = normalised(torch.stack([normalised(layers[i]) for i in self.layers]).mean(0))
        seen = encode(self.student, images, replaced=masked)
        predictions = full_precision(self.head(seen.cells))
        losses = F.smooth_l1_loss(predictions, targets, beta=self.beta, reduction="none").mean(-1)
        # Images differ a little in how much of them is masked: the mean is over all ranks' cells.
        loss = (losses * masked).sum() / mean_over_ranks(masked.sum().to(losses.dtype)).clamp(min=1)
        return loss, signs(predictions, targets, masked, targets, seen.pooled)

    def after_step(self, progress: float) -> None:
        """Delta <- tau Delta + (1 - tau) theta."""
        start, end, length = self.ema
        self.teacher.update(self.student, warmup(start, end, progress, length))
