"""VICReg: variance-invariance-covariance regularisation (Bardes, Ponce & LeCun 2022, arXiv 2105.04906).

Equation numbers are the paper's; what it leaves open follows the authors' code (main_vicreg.py), which also
averages the invariance over components and the variance over both views.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.distributed import gather
from objectives.heads import mlp
from objectives.joint_embedding import VITAL_SIGNS, Encoder, Jitter, refuse_one_image, signs, two_views
from objectives.precision import full_precision
from objectives.views import VitalSign

if TYPE_CHECKING:
    from backbones import Backbone


def invariance(z1: Tensor, z2: Tensor) -> Tensor:
    """s(Z, Z') (eq. 5): the mean squared difference of embeddings [n, d]."""
    return (full_precision(z1) - full_precision(z2)).square().mean()


def variance(z: Tensor, gamma: float = 1.0, epsilon: float = 1e-4) -> Tensor:
    """v(Z) (eq. 1 and 2): how far the standard deviation of each component of z [n, d] falls short of gamma."""
    deviation = (full_precision(z).var(0) + epsilon).sqrt()
    return (gamma - deviation).relu().mean()


def covariance(z: Tensor) -> Tensor:
    """c(Z) (eq. 3 and 4): the squared off-diagonal entries of the covariance of z [n, d], summed, over d."""
    with torch.autocast(z.device.type, enabled=False):
        centred = full_precision(z) - full_precision(z).mean(0)
        c = centred.T @ centred / (len(z) - 1)
    return (c.square().sum() - c.diagonal().square().sum()) / len(c)


class VICReg(Objective):
    """Embeddings of two views agree, each component varies over the batch, and no two vary together.

    The hinge on the variance is what forbids the collapse, the covariance what forbids components to be alike
    (sec. 4). Both are taken over the joined batch of all ranks. Defaults are those of the 1000-epoch ResNet-50 run.

    Args:
        backbone: the encoder's, shared by both views.
        image_size: of both views, in pixels: a side or (height, width).
        scale: area range of the crops. jitter: its strengths. blur, solarize: probabilities for either view.
        hidden_dim: of the expander's two hidden layers. out_dim: of the embeddings, d.
        invariance_weight, variance_weight, covariance_weight: lambda, mu and nu of eq. 6.
    """

    family = "redundancy reduction"
    paper = "Bardes et al. 2022, arXiv 2105.04906"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        jitter: Jitter = (0.4, 0.4, 0.2, 0.1),
        blur: tuple[float, float] = (1.0, 0.1),
        solarize: tuple[float, float] = (0.0, 0.2),
        hidden_dim: int = 8192,
        out_dim: int = 8192,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        backbone.grid(*size)
        self.views = two_views(size, scale, jitter, blur, solarize)
        self.weights = (invariance_weight, variance_weight, covariance_weight)
        widths = [backbone.width, hidden_dim, hidden_dim, out_dim]
        self.encoder = Encoder(backbone, mlp(widths, norm="batch", activation=nn.ReLU, last_bias=False))
        self.vital_signs = (
            *VITAL_SIGNS,
            VitalSign("deviation", 0.1, 100.0, "the components of the embedding do not vary: collapse"),
        )

    @property
    def backbone(self) -> "Backbone":
        """The only one there is."""
        return self.encoder.backbone

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda s(Z, Z') + mu [v(Z) + v(Z')] / 2 + nu [c(Z) + c(Z')] (eq. 6), and signs of the views [B, C, h, w]."""
        refuse_one_image(self, views)
        z, pooled = zip(*(self.encoder(view) for view in views))
        joined = [gather(full_precision(embedding)) for embedding in z]
        s = invariance(*z)
        v = (variance(joined[0]) + variance(joined[1])) / 2
        c = covariance(joined[0]) + covariance(joined[1])
        lam, mu, nu = self.weights
        terms = {"invariance": s.detach(), "variance": v.detach(), "covariance": c.detach()}
        deviation = joined[0].detach().std(0).mean()
        return lam * s + mu * v + nu * c, {**terms, "deviation": deviation, **signs(torch.cat(z), torch.cat(pooled))}
