"""Barlow Twins: self-supervised learning via redundancy reduction (Zbontar et al. 2021, arXiv 2103.03230).

Equation numbers are the paper's; what it leaves open follows the authors' code (main.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.distributed import mean_with_gradient
from objectives.heads import mlp
from objectives.joint_embedding import VITAL_SIGNS, Encoder, Jitter, refuse_one_image, signs, two_views
from objectives.precision import full_precision
from objectives.views import VitalSign

if TYPE_CHECKING:
    from backbones import Backbone


def cross_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """C [D, D] (eq. 2) of two views' embeddings [B, D], standardised along the joined batch of all ranks already."""
    with torch.autocast(z1.device.type, enabled=False):
        return mean_with_gradient(full_precision(z1).T @ full_precision(z2) / len(z1))


def barlow_twins_loss(c: Tensor, redundancy_weight: float) -> Tensor:
    """sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2 (eq. 1) of a cross-correlation [D, D]."""
    on_diagonal = c.diagonal()
    redundancy = c.square().sum() - on_diagonal.square().sum()
    return (1 - on_diagonal).square().sum() + redundancy_weight * redundancy


class BarlowTwins(Objective):
    """The cross-correlation of two views' embeddings is driven to the identity.

    Ones on its diagonal make the embeddings invariant; zeros beside it leave no two components alike, which a
    collapse would (sec. 2). Defaults are those of the 1000-epoch ResNet-50 run.

    Args:
        backbone: the encoder's, shared by both views.
        image_size: of both views, in pixels: a side or (height, width).
        scale: area range of the crops. jitter: its strengths. blur, solarize: probabilities for either view.
        hidden_dim: of the projector's two hidden layers. out_dim: of the embeddings.
        redundancy_weight: lambda of eq. 1.
        loss_scale: on the whole loss (solo-learn: 0.1); it matters to what LARS leaves unscaled.
        bias_lr: learning rate of biases and norms, relative to that of weights (the authors': .0048 and .2).
    """

    family = "redundancy reduction"
    paper = "Zbontar et al. 2021, arXiv 2103.03230"

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
        redundancy_weight: float = 0.0051,
        loss_scale: float = 1.0,
        bias_lr: float = 0.024,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        backbone.grid(*size)
        self.views = two_views(size, scale, jitter, blur, solarize)
        self.redundancy_weight = redundancy_weight
        self.loss_scale = loss_scale
        self.bias_lr = bias_lr
        widths = [backbone.width, hidden_dim, hidden_dim, out_dim]
        self.encoder = Encoder(backbone, mlp(widths, norm="batch", activation=nn.ReLU, last_norm="standardise"))
        self.vital_signs = (
            *VITAL_SIGNS,
            VitalSign("redundancy", 0.0, 0.8, "the components of the embedding all say the same"),
            VitalSign("invariance", 0.1, 1.01, "two views of an image have nothing in common"),
        )

    @property
    def backbone(self) -> "Backbone":
        """The only one there is."""
        return self.encoder.backbone

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (eq. 1) and signs of the views [B, C, h, w].

        The last batch norm of the projector, without scale and shift, standardises the embeddings for eq. 2.
        """
        refuse_one_image(self, views)
        z, pooled = zip(*(self.encoder(view) for view in views))
        c = cross_correlation(*z)
        loss = self.loss_scale * barlow_twins_loss(c, self.redundancy_weight)
        return loss, {**signs(torch.cat(z), torch.cat(pooled)), **correlation_signs(c)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As of any objective, biases and norms at a rate of their own."""
        groups = super().parameter_groups()
        return [{**group, "lr_scale": 1.0 if group["wd_scale"] else self.bias_lr} for group in groups]


@torch.no_grad()
def correlation_signs(c: Tensor) -> dict[str, Tensor]:
    """Mean of the diagonal of C [D, D], and the root mean square of what lies beside it."""
    on_diagonal = c.diagonal()
    beside = c.square().sum() - on_diagonal.square().sum()
    return {"invariance": on_diagonal.mean(), "redundancy": (beside / max(c.numel() - len(c), 1)).sqrt()}
