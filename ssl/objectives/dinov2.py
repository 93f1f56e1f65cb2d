"""DINOv2: learning robust visual features without supervision (Oquab et al. 2024, arXiv 2304.07193).

Sections are the paper's; settings and what the paper leaves open follow the authors' code (ssl_meta_arch.py,
vitl16_short.yaml, vitl14.yaml).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from objectives.centring import Centre
from objectives.heads import DINOHead
from objectives.ibot import IBOT
from objectives.koleo import koleo_loss
from objectives.layer_decay import decay_by_depth
from objectives.sinkhorn import sinkhorn_knopp
from objectives.teacher import Teacher
from objectives.views import View

if TYPE_CHECKING:
    from backbones import Backbone

CENTRINGS = ("centre", "sinkhorn")


def blurred(view: View, p: float) -> View:
    """The view, blurred with probability p."""
    assert view.photometric
    return replace(view, photometric=replace(view.photometric, blur_p=p))


class DINOv2(IBOT):
    """iBOT with features pushed apart (KoLeo), balanced targets if asked, and rates that fall towards the pixels.

    Everything runs on every backbone as in `IBOT`. Half of the globals are masked, exactly, their ratios spread evenly
    over `mask_ratio`. One global is never and the other nearly always blurred, which is what the authors' code does
    (it hands the complement of each probability on). Defaults are those of the short ViT-L/16 run; LayerScale and the
    size of the drop path are the backbone's.

    Args:
        centring: of the teacher's scores: "centre" (short run: running centres) or "sinkhorn" (long run: 3 iterations
            of Sinkhorn-Knopp at the teacher's temperature, images and cells each on their own).
        koleo_weight: weight of KoLeo, on the pooled student features of each global, before the head.
        separate_heads: a head of its own, of the same size, for cells (long run), in place of the shared one.
        layer_decay: factor of the learning rate from each block to the one before.
        stem_lr: factor of the learning rate of the patch projection besides, or of a CNN's first layers; not of tokens
            and positions.
        others: as of `IBOT`.

    Raises:
        ValueError: an unknown centring, a grid with too few cells to mask any; in a step, a batch of one image with
            KoLeo.
    """

    paper = "Oquab et al. 2024, arXiv 2304.07193"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        local_views: int = 8,
        local_size: int | None = None,
        cell_weight: float = 1.0,
        masked_share: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        centring: str = "centre",
        koleo_weight: float = 0.1,
        separate_heads: bool = False,
        layer_decay: float = 0.9,
        stem_lr: float = 0.2,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
        teacher_temp_start: float = 0.04,
        teacher_temp_warmup: float = 0.3,
        centre_momentum: float = 0.9,
        ema_start: float = 0.992,
        ema_end: float = 1.0,
        freeze_last_layer: float = 0.01,
        norm_last_layer: bool = False,
        head_norm: str = "none",
    ) -> None:
        if centring not in CENTRINGS:
            raise ValueError(f"centring {centring!r} is not known; choose one of {', '.join(CENTRINGS)}")
        super().__init__(
            backbone,
            image_size=image_size,
            global_scale=global_scale,
            local_scale=local_scale,
            local_views=local_views,
            local_size=local_size,
            cell_weight=cell_weight,
            masked_share=masked_share,
            mask_ratio=mask_ratio,
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
        one, two, *locals_ = self.views
        self.views = (blurred(one, 0.0), blurred(two, 0.9), *locals_)
        self.min_block = min(self.min_block, 4)
        self.centring = centring
        self.koleo_weight = koleo_weight
        self.layer_decay = layer_decay
        self.stem_lr = stem_lr
        if separate_heads:
            self.student.cell_head = DINOHead(
                backbone.width, hidden_dim, bottleneck_dim, out_dim, norm=head_norm, norm_last_layer=norm_last_layer
            )
            self.teacher = Teacher(self.student)

    def distil(
        self, views: Sequence[Tensor], progress: float, local_weight: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
        """The loss of iBOT and, for each global on its own, KoLeo (sec. 4): two views of an image may be near."""
        loss, scalars, features = super().distil(views, progress, local_weight)
        if self.koleo_weight:
            koleo = torch.stack([koleo_loss(pooled) for pooled in features[0][:2]]).sum()
            loss = loss + self.koleo_weight * koleo
            scalars["koleo"] = koleo.detach()
        return loss, scalars, features

    def targets(self, scores: Tensor, centre: Centre, progress: float) -> Tensor:
        """The teacher's probabilities [..., K], centred or balanced over the samples of all ranks."""
        if self.centring == "centre":
            return super().targets(scores, centre, progress)
        return sinkhorn_knopp(scores.flatten(0, -2), self.target_temp(progress)).view_as(scores)

    def masks(self, images: int) -> Tensor:
        """Masks [I, N]: `masked_share` of the images, the i-th of n with a ratio from the i-th n-th of the range."""
        masked, (low, high) = int(images * self.masked_share), self.mask_ratio
        ratio = torch.zeros(images)
        spread = (torch.arange(masked) + torch.rand(masked)) / max(masked, 1)
        ratio[torch.randperm(images)[:masked]] = low + (high - low) * spread
        return self.blocks(ratio)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups with layer-wise decay of the learning rate in the backbone (param_groups.py)."""
        groups, backbone = super().parameter_groups(), self.student.backbone
        return decay_by_depth(groups, backbone, decay=self.layer_decay, stem=self.stem_lr)
