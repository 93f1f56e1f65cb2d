"""Distillation: any backbone learns a frozen teacher's pooled features and cells.

The loss is AM-RADIO's (Ranzinger et al. 2024, arXiv 2312.06709, sec. 3.4; its constants as remembered) with one
teacher; student and teacher see the same crop, over a long schedule (Beyer et al. 2022, "a good teacher is patient and
consistent", arXiv 2106.05237).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.joint_embedding import Jitter
from objectives.precision import full_precision
from objectives.pretrained import teacher as frozen_teacher
from objectives.spread import effective_rank, feature_spread
from objectives.views import Photometric, View, VitalSign

if TYPE_CHECKING:
    from backbones import Backbone


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L_cos: 1 - cos of student and teacher features [..., D], averaged."""
    return 1 - F.cosine_similarity(full_precision(student), full_precision(teacher), dim=-1).mean()


def match_loss(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """L_match = alpha L_cos + beta L_smooth-l1 of features [..., D]: the direction above all, and the length too."""
    smooth_l1 = F.smooth_l1_loss(full_precision(student), full_precision(teacher))
    return alpha * cosine_distance(student, teacher) + beta * smooth_l1


def resample(cells: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Cells [B, h * w, D] of a grid (h, w) as those of another: bilinear, averaging where the other is coarser."""
    if grid == to:
        return cells
    maps = rearrange(full_precision(cells), "b (h w) d -> b d h w", h=grid[0])
    maps = F.interpolate(maps, to, mode="bilinear", align_corners=False, antialias=True)
    return rearrange(maps, "b d h w -> b (h w) d")


class Distillation(Objective):
    """Linear maps take the student's pooled feature and cells to the teacher's, on the student's own grid.

    The teacher may be of any kind, size, stride and image size; its weights are part of the state, so a checkpoint
    is whole, but take no gradient.

    Args:
        backbone: the student's.
        image_size: of the view, in pixels: a side or (height, width).
        teacher: a run folder or checkpoint of this program, an exported backbone.safetensors, a name that timm has
            weights for, or "random:" and a name (see `objectives.pretrained.teacher`).
        scale: area range of the crop. jitter: strengths of brightness, contrast, saturation and hue.
        cells_weight: gamma, of the cells' loss against that of the pooled features.
        alpha, beta: of the cells' loss.

    Raises:
        ValueError: there is no such teacher, or it takes images of other channels.
    """

    family = "distillation"
    paper = "Ranzinger et al. 2024, arXiv 2312.06709"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        teacher: str = "",
        scale: tuple[float, float] = (0.08, 1.0),
        jitter: Jitter = (0.0, 0.0, 0.0, 0.0),
        cells_weight: float = 1.0,
        alpha: float = 0.9,
        beta: float = 0.1,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        self.grid = backbone.grid(*size)
        self.views = (View("image", size, scale, photometric=Photometric(*jitter) if any(jitter) else None),)
        self.cells_weight, self.alpha, self.beta = cells_weight, alpha, beta
        self.teacher = frozen_teacher(teacher)
        taught, learner = self.teacher.backbone, backbone
        if taught.in_channels != learner.in_channels:
            raise ValueError(
                f"teacher {teacher} takes images of {taught.in_channels} channels and the student {learner.name} of "
                f"{learner.in_channels}; both see the same images, so choose a teacher of {learner.in_channels}"
            )
        self.student = backbone
        self.pooled_map = nn.Linear(learner.width, taught.width)
        self.cells_map = nn.Linear(learner.width, taught.width)
        self.vital_signs = (
            VitalSign("teacher_spread", 0.02, 1.0, "the teacher gives every image the same features: nothing to learn"),
            VitalSign("feature_spread", 0.02, 1.0, "the student gives every image the same features"),
            VitalSign("agreement", 0.0, 1.01, "the student's features point away from the teacher's"),
        )

    @property
    def backbone(self) -> "Backbone":
        """The student's."""
        return self.student

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """L_cos of the pooled features + gamma L_match of the cells, of the images [B, C, h, w], and signs."""
        (images,) = views
        taught, grid = self.teacher(images)
        learned = self.student(images)
        pooled, cells = self.pooled_map(learned.pooled), self.cells_map(learned.cells)
        summary = cosine_distance(pooled, taught.pooled)
        features = match_loss(cells, resample(taught.cells, grid, self.grid), self.alpha, self.beta)
        return summary + self.cells_weight * features, {
            "agreement": 1 - summary.detach(),
            "cells_loss": features.detach(),
            "teacher_spread": feature_spread(taught.pooled),
            "feature_spread": feature_spread(learned.pooled),
            "effective_rank": effective_rank(learned.pooled),
        }
