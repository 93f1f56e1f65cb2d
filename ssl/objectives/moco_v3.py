"""MoCo v3: training self-supervised vision transformers (Chen, Xie & He 2021, arXiv 2104.02057).

Sections are the paper's; what it leaves open follows the authors' code (moco/builder.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.contract import Objective, TooFewImages, pair
from objectives.contrast import VITAL_SIGNS, contrast_signs, cosines
from objectives.distributed import gather, rank, world_size
from objectives.heads import mlp
from objectives.joint_embedding import two_views
from objectives.multicrop import pooled_features
from objectives.precision import full_precision
from objectives.schedules import cosine
from objectives.teacher import Teacher

if TYPE_CHECKING:
    from backbones import Backbone


def contrast(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """This rank's queries q [B, D] against the keys k [B, D] of all ranks, over tau: logits [B, N], and where the
    positives are."""
    logits = cosines(q, gather(full_precision(k))) / temperature
    return logits, rank() * len(q) + torch.arange(len(q), device=q.device)


class Encoder(nn.Module):
    """A backbone and a projector, on views of one size."""

    def __init__(self, backbone: "Backbone", projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Projections [V, B, P] and pooled features [V, B, D] of V views [B, C, h, w]."""
        pooled = pooled_features(self.backbone, views)
        return self.projector(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2]), pooled


class MoCoV3(Objective):
    """A query of one view finds the key of the other, which a momentum encoder made, among those of the whole batch.

    The loss of algorithm 1, ctr(q1, k2) + ctr(q2, k1), each a cross-entropy times 2 tau. Transformers are unstable
    in their first layer; its random patch projection therefore stays as it is (sec. 4.2). Both views pass the
    encoders together, so batch norms see both, where the authors' code takes one view after the other. Defaults
    are those of the ViT-S/16 and ViT-B/16.

    Args:
        backbone: of the query encoder f_q; f_k's is a copy of it.
        image_size: of the views, in pixels: a side or (height, width).
        scale: area range of the crops, whose colour jitter is BYOL's. blur, solarize: probabilities for either view.
        hidden_dim, out_dim: of projector and predictor. projector_layers: 3 for a ViT, 2 for a ResNet.
        predictor_norm: whether the predictor ends in a batch norm without scale and shift, as the projector does.
        temperature: tau. momentum_start, momentum_end: m of f_k, on a cosine.
        freeze_stem: f_q's first layer, a ViT's patch projection or a CNN's first convolutions, never trains.

    Raises:
        ValueError: where freezing the stem would freeze the whole backbone.
    """

    family = "contrastive"
    paper = "Chen et al. 2021, arXiv 2104.02057"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        blur: tuple[float, float] = (1.0, 0.1),
        solarize: tuple[float, float] = (0.0, 0.2),
        hidden_dim: int = 4096,
        out_dim: int = 256,
        projector_layers: int = 3,
        predictor_norm: bool = True,
        temperature: float = 0.2,
        momentum_start: float = 0.99,
        momentum_end: float = 1.0,
        freeze_stem: bool = True,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        backbone.grid(*size)
        self.views = two_views(size, scale, (0.4, 0.4, 0.2, 0.1), blur, solarize)
        self.temperature = temperature
        self.momentum = (momentum_start, momentum_end)
        if freeze_stem:
            freeze_first_layer(backbone)
        widths = [backbone.width, *[hidden_dim] * (projector_layers - 1), out_dim]
        projector = mlp(widths, norm="batch", activation=nn.ReLU, last_norm="standardise")
        self.encoder = Encoder(backbone, projector)
        self.predictor = mlp(
            [out_dim, hidden_dim, out_dim],
            norm="batch",
            activation=nn.ReLU,
            last_norm="standardise" if predictor_norm else "none",
            last_bias=False,
        )
        self.momentum_encoder = Teacher(self.encoder)
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """That of the query encoder, which the authors evaluate."""
        return self.encoder.backbone

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and signs of the two views [B, C, h, w].

        Raises:
            TooFewImages: one image over all ranks, which has nothing to be told apart from.
        """
        if len(views[0]) * world_size() < 2:
            raise TooFewImages("MoCo v3 contrasts images with each other, a batch of 1 has no other; take at least 2")
        k, _ = self.momentum_encoder(views)
        projections, pooled = self.encoder(views)
        q = self.predictor(projections.flatten(0, 1)).unflatten(0, projections.shape[:2])
        one, positive = contrast(q[0], k[1], self.temperature)
        two, _ = contrast(q[1], k[0], self.temperature)
        loss = 2 * self.temperature * (F.cross_entropy(one, positive) + F.cross_entropy(two, positive))
        signs = contrast_signs(torch.cat([one, two]), torch.cat([positive, positive]), pooled.flatten(0, 1))
        return loss, signs

    def after_step(self, progress: float) -> None:
        """f_k <- m f_k + (1 - m) f_q; the predictor is f_q's alone."""
        self.momentum_encoder.update(self.encoder, cosine(*self.momentum, progress))


def freeze_first_layer(backbone: "Backbone") -> None:
    """Keep the convolutions (a ViT's patch projection is one) and linear layers of depth 0 as they are."""
    depths = backbone.depths()
    if not any(depths.values()):
        raise ValueError(f"freeze_stem: {backbone.name} is all stem, nothing of it would train; set freeze_stem False")
    for name, module in backbone.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and depths[f"{name}.weight"] == 0:
            module.requires_grad_(False)
