"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

Equation numbers are the paper's; what the paper leaves open follows the authors' code (main_dino.py).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from objectives.centring import Centre
from objectives.contract import Objective, pair
from objectives.heads import DINOHead, WeightNormLinear
from objectives.multicrop import local_crop_size, multicrop_features
from objectives.precision import full_precision
from objectives.schedules import cosine, warmup
from objectives.spread import effective_rank, feature_spread
from objectives.teacher import Teacher
from objectives.views import Photometric, View, VitalSign

if TYPE_CHECKING:
    from backbones import Backbone


def dino_loss(student: Tensor, teacher: Tensor, student_temp: float, local_weight: float = 1.0) -> Tensor:
    """Cross-entropy H(P_t(x), P_s(x')) over all pairs of a global view x and another view x' (eq. 3), averaged.

    Args:
        student: scores g_s(x') of every view [V, B, K], the globals first.
        teacher: probabilities P_t(x) of the global views [G, B, K].
        student_temp: the temperature tau_s of eq. 1.
        local_weight: how much a pair counts whose x' is local; the number of pairs is that of all.
    """
    log_p = (full_precision(student) / student_temp).log_softmax(dim=-1)
    pairs = [(x, y) for x in range(len(teacher)) for y in range(len(student)) if x != y]
    weights = [1.0 if y < len(teacher) else local_weight for _, y in pairs]
    terms = [-w * (teacher[x] * log_p[y]).sum(-1).mean() for w, (x, y) in zip(weights, pairs)]
    return torch.stack(terms).mean()


def dino_views(
    size: tuple[int, int],
    local_size: tuple[int, int],
    local_views: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    blur: tuple[float, float, float],
) -> tuple[View, ...]:
    """Two global views, the second at times solarised, and the local ones.

    Args:
        size, local_size: (height, width) in pixels. local_views: number of local ones.
        global_scale, local_scale: area ranges of the crops.
        blur: probabilities for the first global view, the second, and each local one.
    """

    def colours(blur_p: float, solarize_p: float) -> Photometric:
        return Photometric(0.4, 0.4, 0.2, 0.1, gray_p=0.2, blur_p=blur_p, solarize_p=solarize_p)

    return (
        View("global 1", size, global_scale, photometric=colours(blur[0], 0.0)),
        View("global 2", size, global_scale, photometric=colours(blur[1], 0.2)),
        *(
            View(f"local {i + 1}", local_size, local_scale, photometric=colours(blur[2], 0.0))
            for i in range(local_views)
        ),
    )


VITAL_SIGNS = (
    VitalSign("teacher_entropy", 0.0, 0.99, "the teacher finds all prototypes alike: collapse to uniform (fig. 7)"),
    VitalSign("largest_prototype", 0.0, 0.9, "one prototype takes every image: collapse to one dimension (fig. 7)"),
    VitalSign("feature_spread", 0.05, 1.0, "the backbone gives every image the same features"),
)


def teacher_signs(p: Tensor) -> dict[str, Tensor]:
    """Mean entropy over ln K, and the largest share of any prototype, of teacher probabilities [G, B, K]."""
    entropy = -torch.xlogy(p, p).sum(-1).mean() / math.log(p.shape[-1])
    return {"teacher_entropy": entropy, "largest_prototype": p.flatten(0, -2).mean(0).max()}


def feature_signs(pooled: Tensor) -> dict[str, Tensor]:
    """Spread and effective rank of the student's features [V, B, D] over the global views."""
    features = pooled[:2].flatten(0, 1)
    return {"feature_spread": feature_spread(features), "effective_rank": effective_rank(features)}


class Network(nn.Module):
    """g = h o f (sec. 3.1): a backbone f and a head h, on views of several sizes."""

    def __init__(self, backbone: "Backbone", head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Scores [V, B, K] of V views in one head pass; their pooled features [V, B, D], the globals' cells."""
        pooled, cells = multicrop_features(self.backbone, views)
        return self.head(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2]), (pooled, cells)


class DINO(Objective):
    """A student predicts, from every crop, what an EMA teacher says about the two large crops of the same image.

    Two opposite collapses hold each other off: centring forbids one prototype to take all, sharpening (a low
    teacher temperature) forbids all to be equal (sec. 5.3). Defaults are those of the 100-epoch ViT-S/16 run.

    Args:
        backbone: the student's; the teacher is a copy of it.
        image_size: of the global views, in pixels: a side or (height, width).
        global_scale, local_scale: area ranges of the crops.
        local_views: number of local crops, possibly 0.
        local_size: side in pixels; by default 96/224 of the image size, rounded to the backbone's stride;
            that of the global views where the backbone takes one size only.
        blur: probabilities for the first global view, the second, and each local one.
        out_dim: the number of prototypes K. hidden_dim, bottleneck_dim, head_norm: of the head.
        student_temp: tau_s. teacher_temp: tau_t, reached in a line from teacher_temp_start over the first
            teacher_temp_warmup of the run (a fraction, like freeze_last_layer).
        centre_momentum: m of eq. 4. ema_start, ema_end: lambda of the teacher, on a cosine.
        freeze_last_layer: how long the prototypes stay as they are (1 epoch of 100).
        norm_last_layer: prototypes keep length 1.
    """

    family = "self-distillation"
    paper = "Caron et al. 2021, arXiv 2104.14294"
    network: ClassVar[type[Network]] = Network
    """What student and teacher are, for objectives that build on this one."""

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        local_views: int = 8,
        local_size: int | None = None,
        blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        teacher_temp_start: float = 0.04,
        teacher_temp_warmup: float = 0.0,
        centre_momentum: float = 0.9,
        ema_start: float = 0.996,
        ema_end: float = 1.0,
        freeze_last_layer: float = 0.01,
        norm_last_layer: bool = True,
        head_norm: str = "none",
    ) -> None:
        super().__init__()
        size = pair(image_size)
        backbone.grid(*size)
        local = local_crop_size(backbone, size, local_size, 96)
        self.views = dino_views(size, local, local_views, global_scale, local_scale, blur)
        self.student_temp = student_temp
        self.teacher_temp = (teacher_temp_start, teacher_temp, teacher_temp_warmup)
        self.centre_momentum = centre_momentum
        self.ema = (ema_start, ema_end)
        self.freeze_last_layer = freeze_last_layer
        head = DINOHead(
            backbone.width, hidden_dim, bottleneck_dim, out_dim, norm=head_norm, norm_last_layer=norm_last_layer
        )
        self.student: Any = self.network(backbone, head)
        self.teacher = Teacher(self.student)
        self.centre = Centre(out_dim)
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The teacher's backbone, which is the better one throughout training (sec. 5.2)."""
        return self.teacher.network.backbone

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of the views [B, C, h, w], the two globals first."""
        loss, scalars, _ = self.distil(views, progress)
        return loss, scalars

    def distil(
        self, views: Sequence[Tensor], progress: float, local_weight: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Loss and scalars, and the student's features, for objectives that add to this one.

        The features are the pooled ones of all views [V, B, D] and the cells of the globals [2, B, N, D].
        `local_weight` is `dino_loss`'s.
        """
        teacher_scores, _ = self.teacher(views[:2])
        student_scores, features = self.student(views)
        p = self.targets(teacher_scores, self.centre, progress)
        loss = dino_loss(student_scores, p, self.student_temp, local_weight)
        return loss, teacher_signs(p) | feature_signs(features[0]), features

    def targets(self, scores: Tensor, centre: Centre, progress: float) -> Tensor:
        """P_t of the teacher's scores [..., K] (eq. 1), centred; in training they move the centre of later steps."""
        p = (centre(scores) / self.target_temp(progress)).softmax(dim=-1)
        if self.training:
            centre.observe(scores)
        return p

    def target_temp(self, progress: float) -> float:
        """The teacher's temperature tau_t."""
        start, end, length = self.teacher_temp
        return warmup(start, end, progress, length)

    def after_backward(self, progress: float) -> None:
        """Leave the prototypes where they are while the features below them are still random (appendix C)."""
        if progress < self.freeze_last_layer:
            for layer in self.student.modules():
                if isinstance(layer, WeightNormLinear):
                    layer.direction.grad = layer.scale.grad = None

    def after_step(self, progress: float) -> None:
        """Teacher: theta_t <- lambda theta_t + (1 - lambda) theta_s (sec. 3.1). Centre: eq. 4."""
        self.teacher.update(self.student, cosine(*self.ema, progress))
        self.centre.update(self.centre_momentum)
