"""MoCo v2: improved baselines with momentum contrastive learning (Chen, Fan, Girshick & He 2020, arXiv 2003.04297).

Equation numbers are those of MoCo (He et al. 2020, arXiv 1911.05722); what is left open follows the authors' code.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.contrast import VITAL_SIGNS, contrast_signs, cosines
from objectives.heads import mlp
from objectives.memory import Queue
from objectives.moco_v3 import Encoder
from objectives.precision import full_precision
from objectives.schedules import cosine
from objectives.simclr import simclr_colours
from objectives.teacher import Teacher
from objectives.views import View

if TYPE_CHECKING:
    from backbones import Backbone


def contrast(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Queries q [B, D] against their own keys k [B, D] and the queue's [K, D], over tau: logits [B, 1 + K], and where
    the positives are, at 0."""
    own = F.cosine_similarity(full_precision(q), full_precision(k), dim=-1)
    logits = torch.cat([own[:, None], cosines(q, negatives)], dim=1) / temperature
    return logits, torch.zeros(len(q), dtype=torch.int64, device=q.device)


def info_nce(logits: Tensor, positive: Tensor) -> Tensor:
    """-log of the positive's share among all candidates (eq. 1), averaged over queries."""
    return F.cross_entropy(logits, positive)


class MoCoV2(Objective):
    """A query of one view finds the key of the other among those of many past batches.

    The keys come from a momentum encoder, which changes so slowly that old ones stay comparable (sec. 3.2); small
    batches do. Shuffled batch norm (sec. 3.3) is left out. In its place statistics run over the batches of all ranks,
    each encoder's own: the larger the batch, the less they betray that query and key come from the same.
    Defaults are those of the ResNet-50, 200 epochs.

    Args:
        backbone: of the query encoder f_q; f_k's is a copy of it.
        image_size: of the views, in pixels: a side or (height, width).
        scale: area range of the crops. jitter: strength of SimCLR's colour jitter. blur_p: share of blurred views.
        hidden_dim, out_dim: of the head, which has no batch norm.
        temperature: tau of eq. 1. queue_size: the number K of negatives.
        momentum_start, momentum_end: m of eq. 2, on a cosine.
        symmetric: each view is query and key in turn, as in the authors' CIFAR notebook, for twice the computation.
    """

    family = "contrastive"
    paper = "Chen et al. 2020, arXiv 2003.04297"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.2, 1.0),
        jitter: float = 0.5,
        blur_p: float = 0.5,
        hidden_dim: int = 2048,
        out_dim: int = 128,
        temperature: float = 0.2,
        queue_size: int = 65536,
        momentum_start: float = 0.999,
        momentum_end: float = 0.999,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        backbone.grid(*size)
        colours = simclr_colours(jitter, blur_p)
        self.views = tuple(View(f"view {i + 1}", size, scale, photometric=colours) for i in range(2))
        self.temperature = temperature
        self.momentum = (momentum_start, momentum_end)
        self.queries = 2 if symmetric else 1
        self.encoder = Encoder(backbone, mlp([backbone.width, hidden_dim, out_dim], activation=nn.ReLU))
        self.momentum_encoder = Teacher(self.encoder)
        self.queue = Queue(queue_size, out_dim)
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """That of the query encoder, which the authors evaluate."""
        return self.encoder.backbone

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and signs of the views [B, C, h, w]: the first asks for the second, and in turn if symmetric."""
        q, pooled = self.encoder(views[: self.queries])
        k, _ = self.momentum_encoder(views[-self.queries :])
        k = k.flip(0)
        logits, positive = contrast(q.flatten(0, 1), k.flatten(0, 1), self.queue.rows, self.temperature)
        if self.training:
            # Image by image, so that the order does not depend on how many ranks there are.
            self.queue.observe(F.normalize(full_precision(rearrange(k, "v b d -> (b v) d")), dim=-1))
        return info_nce(logits, positive), contrast_signs(logits, positive, pooled.flatten(0, 1))

    def after_step(self, progress: float) -> None:
        """f_k <- m f_k + (1 - m) f_q (eq. 2); this step's keys replace the oldest."""
        self.momentum_encoder.update(self.encoder, cosine(*self.momentum, progress))
        self.queue.update()
