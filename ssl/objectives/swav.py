"""SwAV: swapping assignments between views (Caron et al. 2020, arXiv 2006.09882).

Equation numbers are the paper's; what it leaves open follows the authors' code (main_swav.py).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.contract import Objective, TooFewImages, pair
from objectives.dino import dino_loss
from objectives.distributed import world_size
from objectives.heads import mlp
from objectives.memory import Queue
from objectives.multicrop import local_crop_size, pooled_features
from objectives.precision import full_precision
from objectives.simclr import simclr_colours
from objectives.sinkhorn import sinkhorn_knopp
from objectives.spread import effective_rank, feature_spread
from objectives.views import View, VitalSign

if TYPE_CHECKING:
    from backbones import Backbone

VITAL_SIGNS = (
    VitalSign("code_entropy", 0.0, 0.99, "every image is assigned to all prototypes alike"),
    VitalSign("feature_spread", 0.05, 1.0, "the backbone gives every image the same features"),
)


class SwAV(Objective):
    """Every crop predicts which prototypes a large crop of the same image was assigned to, all used equally often.

    The loss is eq. 1 over all pairs of a global view s and another view t, the cross-entropy of eq. 2 between the
    code q_s and softmax(z_t C / tau): DINO's of Caron et al. 2021, with codes in place of the teacher. Defaults are
    those of the ResNet-50, 100 epochs, batches of 4096.

    Args:
        backbone: the encoder f.
        image_size: of the global views, in pixels: a side or (height, width).
        global_scale, local_scale: area ranges of the crops.
        local_views: number of local crops, possibly 0.
        local_size: side in pixels; by default 96/224 of the image size, rounded to the backbone's stride;
            that of the global views where the backbone takes one size only.
        jitter: strength of the colour jitter. blur_p: share of blurred views.
        hidden_dim, out_dim: of the projection to z. prototypes: the number K of rows of C.
        temperature: tau of eq. 2. epsilon, sinkhorn_iterations: of the codes (eq. 3 to 5).
        freeze_prototypes: how long C stays as it is, a share of the run (1 epoch of 100).
        queue_size: past images whose global views are assigned along with the batch's, for batches that are small
            beside K; 0 for none. queue_start: share of the run from when on they are collected.
    """

    family = "clustering"
    paper = "Caron et al. 2020, arXiv 2006.09882"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        global_scale: tuple[float, float] = (0.14, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.14),
        local_views: int = 6,
        local_size: int | None = None,
        jitter: float = 1.0,
        blur_p: float = 0.5,
        hidden_dim: int = 2048,
        out_dim: int = 128,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        freeze_prototypes: float = 0.01,
        queue_size: int = 0,
        queue_start: float = 0.15,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        backbone.grid(*size)
        local = local_crop_size(backbone, size, local_size, 96)
        colours = simclr_colours(jitter, blur_p)
        self.views = (
            *(View(f"global {i + 1}", size, global_scale, photometric=colours) for i in range(2)),
            *(View(f"local {i + 1}", local, local_scale, photometric=colours) for i in range(local_views)),
        )
        self.temperature = temperature
        self.sinkhorn = (epsilon, sinkhorn_iterations)
        self.freeze_prototypes = freeze_prototypes
        self.queue_start = queue_start
        self.encoder = backbone
        self.head = mlp([backbone.width, hidden_dim, out_dim], norm="batch", activation=nn.ReLU)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, out_dim), dim=-1))
        self.queue = Queue(queue_size, 2, out_dim) if queue_size else None
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The encoder f."""
        return self.encoder

    def scores(self, z: Tensor) -> Tensor:
        """z^T C of embeddings [..., D]: cosines [..., K], for z and the rows of C have length 1."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, self.prototypes)

    @torch.no_grad()
    def codes(self, scores: Tensor) -> Tensor:
        """Q of eq. 3 for each global view of its own [2, B, K], among the batches of all ranks and the full queue."""
        batch = scores.shape[1]
        if self.queue and self.queue.full:
            scores = torch.cat([scores, self.scores(self.queue.share().transpose(0, 1))], dim=1)
        return torch.stack([sinkhorn_knopp(view, *self.sinkhorn)[:batch] for view in scores])

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and signs of the views [B, C, h, w], the two globals first.

        Raises:
            TooFewImages: one image over all ranks, of which prototypes used equally often say nothing.
        """
        if len(views[0]) * world_size() < 2:
            raise TooFewImages("SwAV shares its prototypes out among the images of a batch; take at least 2 images")
        pooled = pooled_features(self.encoder, views)
        z = F.normalize(full_precision(self.head(pooled.flatten(0, 1))), dim=-1).unflatten(0, pooled.shape[:2])
        scores = self.scores(z)
        q = self.codes(scores[:2])
        loss = dino_loss(scores, q, self.temperature)
        if self.queue and self.training and progress >= self.queue_start:
            self.queue.observe(z[:2].transpose(0, 1))
        features = pooled[:2].flatten(0, 1)
        entropy = -torch.xlogy(q, q).sum(-1).mean() / math.log(q.shape[-1])
        spread = {"feature_spread": feature_spread(features), "effective_rank": effective_rank(features)}
        return loss, {"code_entropy": entropy, **spread}

    def after_backward(self, progress: float) -> None:
        """Leave the prototypes where they are while the features are still random."""
        if progress < self.freeze_prototypes:
            self.prototypes.grad = None

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The prototypes go back to length 1; what was observed enters the queue."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=-1))
        if self.queue:
            self.queue.update()
