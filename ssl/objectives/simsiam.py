"""SimSiam: exploring simple Siamese representation learning (Chen & He 2021, arXiv 2011.10566).

Equation numbers are the paper's; what it leaves open follows the authors' code (simsiam/builder.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.heads import mlp
from objectives.joint_embedding import VITAL_SIGNS, Encoder, Jitter, refuse_one_image, signs, two_views
from objectives.precision import full_precision

if TYPE_CHECKING:
    from backbones import Backbone


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z) = -p/|p| . z/|z| (eq. 1) of predictions and embeddings [B, K], averaged; z takes no gradient (eq. 3)."""
    p, z = (F.normalize(full_precision(x), dim=-1) for x in (p, z.detach()))
    return -(p * z).sum(-1).mean()


class SimSiam(Objective):
    """BYOL without a target network: each view's embedding, held still, is predicted from the other's.

    The stopped gradient alone keeps it from collapsing, with a predictor that keeps up because its learning rate
    never falls (sec. 4.2). Defaults are those of the 100-epoch ResNet-50 run.

    Args:
        backbone: f's, shared by both views.
        image_size: of both views, in pixels: a side or (height, width).
        scale: area range of the crops. jitter: its strengths. blur, solarize: probabilities for either view.
        hidden_dim: of the projector's two hidden layers. out_dim: of the embeddings z.
        predictor_dim: of the predictor's hidden layer, a bottleneck.
    """

    family = "self-distillation"
    paper = "Chen & He 2021, arXiv 2011.10566"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.2, 1.0),
        jitter: Jitter = (0.4, 0.4, 0.4, 0.1),
        blur: tuple[float, float] = (0.5, 0.5),
        solarize: tuple[float, float] = (0.0, 0.0),
        hidden_dim: int = 2048,
        out_dim: int = 2048,
        predictor_dim: int = 512,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        backbone.grid(*size)
        self.views = two_views(size, scale, jitter, blur, solarize)
        widths = [backbone.width, hidden_dim, hidden_dim, out_dim]
        self.encoder = Encoder(backbone, mlp(widths, norm="batch", activation=nn.ReLU, last_norm="standardise"))
        self.predictor = mlp([out_dim, predictor_dim, out_dim], norm="batch", activation=nn.ReLU)
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The only one there is."""
        return self.encoder.backbone

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2 (eq. 4), and the signs of the views [B, C, h, w]."""
        refuse_one_image(self, views)
        z, pooled = zip(*(self.encoder(view) for view in views))
        p = [self.predictor(embedding) for embedding in z]
        loss = (negative_cosine(p[0], z[1]) + negative_cosine(p[1], z[0])) / 2
        return loss, signs(torch.cat(z), torch.cat(pooled))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As of any objective, but the predictor apart: its learning rate stays constant (sec. 4.2)."""
        predictor = {id(parameter) for parameter in self.predictor.parameters()}
        groups: list[dict[str, Any]] = []
        for group in super().parameter_groups():
            constant = [parameter for parameter in group["params"] if id(parameter) in predictor]
            others = [parameter for parameter in group["params"] if id(parameter) not in predictor]
            groups += [{**group, "params": others}, {**group, "params": constant, "constant_lr": True}]
        return groups
