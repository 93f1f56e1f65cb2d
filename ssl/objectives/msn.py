"""MSN: masked siamese networks for label-efficient learning (Assran et al. 2022, arXiv 2204.07141).

Equation numbers are the paper's; what it leaves open follows the authors' code (msn_train.py, losses.py).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from objectives.contract import Objective, TooFewImages, pair
from objectives.contrast import cosines
from objectives.distributed import gather, world_size
from objectives.heads import mlp
from objectives.masks import random_cells, visible_count
from objectives.multicrop import local_crop_size, pooled_features
from objectives.precision import full_precision
from objectives.schedules import linear
from objectives.sinkhorn import sinkhorn_knopp
from objectives.spread import effective_rank, feature_spread
from objectives.teacher import Teacher
from objectives.views import Photometric, View, VitalSign

if TYPE_CHECKING:
    from backbones import Backbone

VITAL_SIGNS = (
    VitalSign("target_entropy", 0.0, 0.98, "the teacher finds all prototypes alike: collapse to uniform"),
    VitalSign("mean_entropy", 0.2, 1.0, "few prototypes take every image"),
    VitalSign("feature_spread", 0.05, 1.0, "the backbone gives every image the same features"),
)


@torch.no_grad()
def sharpened(scores: Tensor, temp: float, sharpening: float, sinkhorn: int) -> Tensor:
    """Targets p+ [B, K] of similarities [B, K]: softmax at temp, to the power 1 / sharpening, balanced.

    The power makes predictions confident (sec. 3, "target sharpening": a lower temperature for targets), and rows
    sum to 1 again before `sinkhorn` iterations of Sinkhorn-Knopp let the batch use every prototype alike.
    """
    log_p = (full_precision(scores) / (temp * sharpening)).log_softmax(dim=-1)
    return sinkhorn_knopp(log_p, 1.0, sinkhorn) if sinkhorn else log_p.exp()


def msn_loss(log_p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of eq. 1: mean cross-entropy H(p+, p) over views and images, and ln K - H(p mean), me-max.

    Args:
        log_p: logarithms of the predictions of all anchors [V, B, K].
        targets: p+ [B, K]. The mean prediction is that over all ranks.
    """
    cross_entropy = -(targets * log_p).sum(-1).mean()
    p_mean = gather(log_p.exp().mean((0, 1))[None]).mean(0)
    return cross_entropy, torch.xlogy(p_mean, p_mean).sum() + math.log(len(p_mean))


class Encoder(nn.Module):
    """A backbone and a head, on several views of which the first may be masked."""

    def __init__(self, backbone: "Backbone", head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: Sequence[Tensor], **masking: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [V, B, d] and pooled features [V, B, D]; `masking` holds for the first view.

        That view passes the head on its own, so that in a head with batch norm it has its own statistics.
        """
        groups = [self.backbone(views[0], **masking).pooled[None]]
        if len(views) > 1:
            groups.append(pooled_features(self.backbone, views[1:]))
        z = [self.head(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2]) for pooled in groups]
        return torch.cat(z), torch.cat(groups)


class MSN(Objective):
    """A student sees a masked view and small crops, and predicts the prototypes an EMA teacher finds in a whole view.

    Masked cells are dropped, through `visible`: a ViT never computes them, a CNN computes as if they did not exist.
    Each image drops cells of its own (the authors' code: one choice a batch). The mean prediction is kept wide
    (me-max) and targets are balanced, which forbids all collapses. Defaults are those of the 800-epoch ViT-S/16 run.

    Args:
        image_size: of the target and the anchor, in pixels: a side or (height, width).
        scale, focal_scale: area ranges of their crops and of the focal ones.
        focal_views: number of focal crops, possibly 0; they are not masked.
        focal_size: side in pixels; by default 96/224 of the image size, rounded to the backbone's stride;
            that of the global views where the backbone takes one size only.
        mask_ratio: share of the anchor's cells that is dropped.
        n_prototypes: K. hidden_dim, embedding_dim, head_norm: of the head.
        temp: tau of the predictions. sharpening: T. sinkhorn: iterations on the targets, 0 for none.
        me_max: weight lambda of the regulariser.
        ema_start, ema_end: of the teacher, on a line (published: to 1 after 1.25 times the run).

    Raises:
        ValueError: where no cell would be dropped, or none left; in a step, a batch of one image.
    """

    family = "self-distillation"
    paper = "Assran et al. 2022, arXiv 2204.07141"
    masking = "visible"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.3, 1.0),
        focal_scale: tuple[float, float] = (0.05, 0.3),
        focal_views: int = 10,
        focal_size: int | None = None,
        mask_ratio: float = 0.15,
        n_prototypes: int = 1024,
        hidden_dim: int = 2048,
        embedding_dim: int = 256,
        temp: float = 0.1,
        sharpening: float = 0.25,
        sinkhorn: int = 3,
        me_max: float = 1.0,
        ema_start: float = 0.996,
        ema_end: float = 0.9992,
        head_norm: str = "batch",
    ) -> None:
        super().__init__()
        size = pair(image_size)
        h, w = backbone.grid(*size)
        self.cells, self.visible = h * w, visible_count(h * w, mask_ratio)
        if not 0 < self.visible <= self.cells or (mask_ratio and self.visible == self.cells):
            raise ValueError(
                f"MSN cannot drop {mask_ratio:.0%} of {self.cells} cell(s): {backbone.name} has a grid of {h}x{w} at "
                f"{size[0]}x{size[1]} pixels; take larger images, a backbone of smaller stride, or another mask_ratio"
            )
        colours = Photometric(0.4, 0.4, 0.4, 0.1, gray_p=0.2, blur_p=0.5)
        focal = local_crop_size(backbone, size, focal_size, 96)
        self.views = (
            View("target", size, scale, photometric=colours),
            View("anchor", size, scale, photometric=colours),
            *(View(f"focal {i + 1}", focal, focal_scale, photometric=colours) for i in range(focal_views)),
        )
        self.temp, self.sharpening, self.sinkhorn = temp, sharpening, sinkhorn
        self.me_max = me_max
        self.ema = (ema_start, ema_end)
        self.student = Encoder(backbone, mlp([backbone.width, hidden_dim, hidden_dim, embedding_dim], norm=head_norm))
        self.teacher = Teacher(self.student)
        bound = embedding_dim**-0.5
        self.prototypes = nn.Parameter(torch.empty(n_prototypes, embedding_dim).uniform_(-bound, bound))
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The teacher's backbone, which the authors evaluate (sec. 4)."""
        return self.teacher.network.backbone

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (eq. 1) and scalars of the views [B, C, h, w]: target, anchor, focal ones."""
        target, *anchors = views
        if len(target) * world_size() < 2:
            raise TooFewImages("MSN needs a batch of at least 2 images: its targets are balanced over the batch")
        visible, _ = random_cells(len(target), self.cells, self.visible, target.device)
        z_target, _ = self.teacher([target])
        z, pooled = self.student(anchors, visible=visible)
        with torch.no_grad():
            scores = cosines(z_target[0], self.prototypes)
        targets = sharpened(scores, self.temp, self.sharpening, self.sinkhorn)
        log_p = (cosines(z, self.prototypes) / self.temp).log_softmax(dim=-1)
        cross_entropy, regulariser = msn_loss(log_p, targets)
        width = math.log(len(self.prototypes))
        return cross_entropy + self.me_max * regulariser, {
            "target_entropy": -torch.xlogy(targets, targets).sum(-1).mean() / width,
            "mean_entropy": 1 - regulariser.detach() / width,
            "feature_spread": feature_spread(pooled[0]),
            "effective_rank": effective_rank(pooled[0]),
        }

    def after_step(self, progress: float) -> None:
        """Teacher: an exponential moving average."""
        self.teacher.update(self.student, linear(*self.ema, progress))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Prototypes do not decay."""
        groups = super().parameter_groups()
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not self.prototypes]
        return [*groups, {"params": [self.prototypes], "lr_scale": 1.0, "wd_scale": 0.0}]
