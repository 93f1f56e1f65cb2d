"""BYOL: bootstrap your own latent (Grill et al. 2020, arXiv 2006.07733).

Equation numbers are the paper's; what it leaves open follows the authors' code (deepmind-research, byol/).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.heads import mlp
from objectives.joint_embedding import VITAL_SIGNS, Encoder, Jitter, refuse_one_image, signs, two_views
from objectives.precision import full_precision
from objectives.schedules import cosine
from objectives.teacher import Teacher

if TYPE_CHECKING:
    from backbones import Backbone


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """|q/|q| - z'/|z'||^2 = 2 - 2 cos(q, z') (eq. 2) of predictions q and targets z' [B, K], mean over the batch."""
    q, z = (F.normalize(full_precision(x), dim=-1) for x in (prediction, target))
    return (q - z).square().sum(-1).mean()


class BYOL(Objective):
    """From one view an online network predicts the projection that an EMA target network gives the other view.

    Nothing pushes images apart; the predictor and the slow target keep the embeddings from collapsing (sec. 3.2).
    Defaults are those of the 1000-epoch ResNet-50 run.

    Args:
        backbone: the online network's; it is the one to keep (sec. 3.1).
        image_size: of both views, in pixels: a side or (height, width).
        scale: area range of the crops. jitter: its strengths. blur, solarize: probabilities for either view.
        hidden_dim: of the projector g and the predictor q, which are alike. out_dim: of the projections.
        ema_start, ema_end: tau of the target, on a cosine.
    """

    family = "self-distillation"
    paper = "Grill et al. 2020, arXiv 2006.07733"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        jitter: Jitter = (0.4, 0.4, 0.2, 0.1),
        blur: tuple[float, float] = (1.0, 0.1),
        solarize: tuple[float, float] = (0.0, 0.2),
        hidden_dim: int = 4096,
        out_dim: int = 256,
        ema_start: float = 0.996,
        ema_end: float = 1.0,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        backbone.grid(*size)
        self.views = two_views(size, scale, jitter, blur, solarize)
        self.ema = (ema_start, ema_end)

        def head(width: int) -> nn.Module:
            return mlp([width, hidden_dim, out_dim], norm="batch", activation=nn.ReLU, last_bias=False)

        self.online = Encoder(backbone, head(backbone.width))
        self.predictor = head(out_dim)
        self.target = Teacher(self.online)
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The online network's, f_theta, all that the authors keep at the end (sec. 3.1)."""
        return self.online.backbone

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """L + L~ (eq. 2), each view predicted from the other, and the signs of the views [B, C, h, w]."""
        refuse_one_image(self, views)
        z, pooled = zip(*(self.online(view) for view in views))
        targets = [self.target(view)[0] for view in views]
        loss = byol_loss(self.predictor(z[0]), targets[1]) + byol_loss(self.predictor(z[1]), targets[0])
        return loss, signs(torch.cat(targets), torch.cat(pooled))

    def after_step(self, progress: float) -> None:
        """xi <- tau xi + (1 - tau) theta (eq. 1), tau on its way to 1 (sec. 3.2)."""
        self.target.update(self.online, cosine(*self.ema, progress))
