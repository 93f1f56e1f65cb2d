"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al. 2022, arXiv 2111.07832).

Equation numbers are the paper's; what it leaves open follows the authors' code (main_ibot.py, loader.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from objectives.centring import Centre
from objectives.contract import pair
from objectives.dino import DINO, VITAL_SIGNS, Network, dino_loss, feature_signs, teacher_signs
from objectives.heads import DINOHead
from objectives.masks import block_mask
from objectives.multicrop import multicrop_features
from objectives.precision import full_precision
from objectives.views import VitalSign

if TYPE_CHECKING:
    from backbones import Backbone


def cell_loss(student: Tensor, teacher: Tensor, weights: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy H(P_t(u_i), P_s(u^_i)) of the masked cells i, weighted and summed: L_MIM (eq. 2).

    Args:
        student: scores of the masked cells [M, K], as the student sees them: masked.
        teacher: probabilities of the same cells [M, K], as the teacher sees them: whole.
        weights: [M], see `cell_weights`.
        student_temp: the temperature tau_s.
    """
    log_p = (full_precision(student) / student_temp).log_softmax(dim=-1)
    return -(weights.to(log_p.dtype) * (teacher * log_p).sum(-1)).sum()


def cell_weights(masks: Tensor, chosen: Tensor) -> Tensor:
    """Float64 weights [M] of the `chosen` cells [M] (indices into the flat `masks` [I, N]).

    They make a mean over all I images, those without a mask included, of the mean over each image's masked cells.
    """
    each = masks.double() / masks.sum(1, keepdim=True).clamp(min=1) / len(masks)
    return each.flatten()[chosen]


class MaskedNetwork(Network):
    """g on views whose globals may be masked: scores of pooled features and of chosen cells.

    One head serves both in one pass, which ties the meaning of a cell to that of an image (sec. 3.2), unless there
    is a `cell_head`.
    """

    def __init__(self, backbone: "Backbone", head: DINOHead, cell_head: DINOHead | None = None) -> None:
        super().__init__(backbone, head)
        self.cell_head = cell_head

    def forward(  # type: ignore[override]
        self, views: Sequence[Tensor], chosen: Tensor, **masking: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Scores [V, B, K] and those [M, K] of the `chosen` cells [M] of the globals; features as of `Network`."""
        pooled, cells = multicrop_features(self.backbone, views, **masking)
        rows, picked = pooled.flatten(0, 1), cells.flatten(0, 2)[chosen]
        if self.cell_head is None:
            scores, cell_scores = self.head(torch.cat([rows, picked])).split([len(rows), len(picked)])
        else:
            scores, cell_scores = self.head(rows), self.cell_head(picked)
        return (scores.unflatten(0, pooled.shape[:2]), cell_scores), (pooled, cells)


class IBOT(DINO):
    """DINO whose student sees the two large crops with blocks masked, and also predicts what the teacher says there.

    The teacher is thereby the tokenizer of a masked image model that learns along. Every backbone runs it through
    `replaced`: on a CNN the pixels of masked cells show one learned colour, and the cells of its last map predict.
    Defaults are those of the 800-epoch ViT-S/16 run, but for one economy, DINOv2's: the teacher's head sees the
    masked cells alone, so that the centre of the cells is theirs.

    Args:
        cell_weight: weight of L_MIM beside the loss of DINO.
        masked_share: share of the global views that are masked at all.
        mask_ratio: range of the share of cells that is masked in those.
        others: as of `DINO`; centre and temperatures hold for cells too.

    Raises:
        ValueError: where the grid has too few cells to mask any.
    """

    paper = "Zhou et al. 2022, arXiv 2111.07832"
    masking = "replaced"
    network = MaskedNetwork

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        global_scale: tuple[float, float] = (0.25, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.25),
        local_views: int = 10,
        local_size: int | None = None,
        blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
        cell_weight: float = 1.0,
        masked_share: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        out_dim: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
        teacher_temp_start: float = 0.04,
        teacher_temp_warmup: float = 0.0375,
        centre_momentum: float = 0.9,
        ema_start: float = 0.996,
        ema_end: float = 1.0,
        freeze_last_layer: float = 0.00125,
        norm_last_layer: bool = False,
        head_norm: str = "none",
    ) -> None:
        backbone.learn_mask_token()
        super().__init__(
            backbone,
            image_size=image_size,
            global_scale=global_scale,
            local_scale=local_scale,
            local_views=local_views,
            local_size=local_size,
            blur=blur,
            out_dim=out_dim,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            teacher_temp_start=teacher_temp_start,
            teacher_temp_warmup=teacher_temp_warmup,
            centre_momentum=centre_momentum,
            ema_start=ema_start,
            ema_end=ema_end,
            freeze_last_layer=freeze_last_layer,
            norm_last_layer=norm_last_layer,
            head_norm=head_norm,
        )
        size = pair(image_size)
        self.grid = backbone.grid(*size)
        if int(self.grid[0] * self.grid[1] * mask_ratio[1]) < 1:
            raise ValueError(
                f"{type(self).__name__} cannot mask {mask_ratio[1]:.0%} of {self.grid[0] * self.grid[1]} cell(s): "
                f"{backbone.name} has a grid of {self.grid[0]}x{self.grid[1]} at {size[0]}x{size[1]} pixels; "
                "take larger images, a backbone of smaller stride, or a larger mask_ratio"
            )
        self.cell_weight = cell_weight
        self.masked_share = masked_share
        self.mask_ratio = mask_ratio
        self.min_block = (min(self.grid) // 3) ** 2  # the authors' loader.py
        self.cell_centre = Centre(out_dim)
        self.vital_signs = (
            *VITAL_SIGNS,
            VitalSign("cell_entropy", 0.0, 0.99, "the teacher finds all prototypes alike for every cell"),
            VitalSign("largest_cell_prototype", 0.0, 0.95, "one prototype takes every cell of every image"),
        )

    def distil(
        self, views: Sequence[Tensor], progress: float, local_weight: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
        """L_[CLS] + L_MIM (sec. 3.2) and scalars; features as of `DINO.distil`, of masked globals."""
        masks = self.masks(2 * len(views[0]))
        chosen = masks.flatten().nonzero()[:, 0]
        if not len(chosen):  # a cell of weight 0, so that nothing below has to do with none
            chosen = chosen.new_zeros(1)
        device = views[0].device
        weights = cell_weights(masks, chosen).to(device, non_blocking=True)
        masks, chosen = masks.to(device, non_blocking=True), chosen.to(device, non_blocking=True)

        (teacher_scores, teacher_cells), _ = self.teacher(views[:2], chosen)
        (student_scores, student_cells), features = self.student(views, chosen, replaced=masks)
        p = self.targets(teacher_scores, self.centre, progress)
        q = self.targets(teacher_cells, self.cell_centre, progress)
        image_term = dino_loss(student_scores, p, self.student_temp, local_weight)
        cell_term = cell_loss(student_cells, q, weights, self.student_temp)
        signs = teacher_signs(p) | feature_signs(features[0])
        entropy, largest = teacher_signs(q).values()
        signs |= {"cell_entropy": entropy, "largest_cell_prototype": largest}
        signs |= {"image_loss": image_term.detach(), "cell_loss": cell_term.detach()}
        return image_term + self.cell_weight * cell_term, signs, features

    def masks(self, images: int) -> Tensor:
        """Masks [I, N] of I images: blocks over a share drawn from `mask_ratio`, or nothing (sec. 3.3).

        Drawn on the CPU, so that which cells they choose is known without waiting for an accelerator.
        """
        low, high = self.mask_ratio
        ratio = (low + (high - low) * torch.rand(images)) * (torch.rand(images) < self.masked_share)
        return self.blocks(ratio)

    def blocks(self, ratio: Tensor) -> Tensor:
        """Block-wise masks [I, N] over shares `ratio` [I] of the cells."""
        return block_mask((ratio * self.grid[0] * self.grid[1]).long(), self.grid, min_block=self.min_block)

    def after_step(self, progress: float) -> None:
        """Teacher and both centres."""
        super().after_step(progress)
        self.cell_centre.update(self.centre_momentum)
