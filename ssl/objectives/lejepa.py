"""LeJEPA: provable and scalable self-supervised learning without heuristics (Balestriero & LeCun 2025, 2511.08544).

Follows the paper's algorithms 1 (SIGReg) and 2 (LeJEPA); the integration range is that of the authors' code.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.distributed import from_first_rank, mean_with_gradient, world_size
from objectives.heads import mlp
from objectives.joint_embedding import Jitter, refuse_one_image, signs
from objectives.multicrop import local_crop_size, pooled_features
from objectives.precision import full_precision
from objectives.views import Photometric, View, VitalSign

if TYPE_CHECKING:
    from backbones import Backbone


def random_slices(width: int, count: int, device: torch.device) -> Tensor:
    """Directions A [width, count] of length 1, uniform on the sphere, the same on every rank (algorithm 1)."""
    return F.normalize(from_first_rank(torch.randn(width, count, device=device)), dim=0)


def epps_pulley(x: Tensor, knots: int, t_max: float) -> Tensor:
    """The Epps-Pulley statistic T [..., M] of samples x [..., N, M] against N(0, 1), over all ranks' samples.

    N times the integral over |t| <= t_max of |phi_X(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), phi_X the empirical
    characteristic function. The integrand is even: a trapezoid rule of `knots` points on t >= 0, taken twice.
    """
    t = torch.linspace(0, t_max, knots, device=x.device, dtype=x.dtype)
    phi = (-t.square() / 2).exp()
    xt = x[..., None] * t  # [..., N, M, knots]
    moments = mean_with_gradient(torch.stack([xt.cos().mean(-3), xt.sin().mean(-3)]))
    distance = (moments[0] - phi).square() + moments[1].square()
    return 2 * torch.trapezoid(distance * phi, t, dim=-1) * x.shape[-2] * world_size()


def sigreg(z: Tensor, slices: Tensor, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """SIGReg (algorithm 1) of embeddings z [..., N, K]: the statistic, averaged over slices [K, M] and views."""
    with torch.autocast(z.device.type, enabled=False):
        z = full_precision(z)
        return epps_pulley(z @ slices.to(z.dtype), knots, t_max).mean()


def prediction_loss(z: Tensor, global_views: int) -> Tensor:
    """Mean squared distance of every view's embedding z [V, N, K] from the centre of the global ones, the first."""
    z = full_precision(z)
    return (z[:global_views].mean(0) - z).square().mean()


class LeJEPA(Objective):
    """All views of an image are embedded at one point, and the points of all images are an isotropic Gaussian.

    The second, tested on random slices that every step draws anew, forbids every collapse: no teacher, no stopped
    gradient, no predictor. One weight lambda trades the two off. Defaults are those of the ImageNet-1k runs.

    Args:
        backbone: the encoder's; its pooled features go into the projector.
        image_size: of the global views, in pixels: a side or (height, width).
        global_scale, local_scale: area ranges of the crops. global_views, local_views: how many.
        local_size: side in pixels; by default 98/224 of the image size, rounded to the backbone's stride;
            that of the global views where the backbone takes one size only.
        jitter, blur, solarize: of every view.
        hidden_dim, out_dim: of the three-layer projector.
        sigreg_weight: lambda. slices: random directions a step. knots, t_max: of the integral.
    """

    family = "distribution matching"
    paper = "Balestriero & LeCun 2025, arXiv 2511.08544"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        global_scale: tuple[float, float] = (0.3, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.3),
        global_views: int = 2,
        local_views: int = 6,
        local_size: int | None = None,
        jitter: Jitter = (0.4, 0.4, 0.2, 0.1),
        blur: float = 0.5,
        solarize: float = 0.2,
        hidden_dim: int = 2048,
        out_dim: int = 512,
        sigreg_weight: float = 0.05,
        slices: int = 1024,
        knots: int = 17,
        t_max: float = 3.0,
    ) -> None:
        super().__init__()
        if global_views < 1 or global_views + local_views < 2:
            raise ValueError(
                f"LeJEPA cannot compare {global_views} global and {local_views} local view(s): "
                "it needs at least one global view, and two in all"
            )
        size = pair(image_size)
        backbone.grid(*size)
        colours = Photometric(*jitter, gray_p=0.2, blur_p=blur, solarize_p=solarize)
        local = local_crop_size(backbone, size, local_size, 98)
        self.views = (
            *(View(f"global {i + 1}", size, global_scale, photometric=colours) for i in range(global_views)),
            *(View(f"local {i + 1}", local, local_scale, photometric=colours) for i in range(local_views)),
        )
        self.global_views = global_views
        self.sigreg_weight = sigreg_weight
        self.slices, self.knots, self.t_max = slices, knots, t_max
        self.encoder = backbone
        self.projector = mlp([backbone.width, hidden_dim, hidden_dim, out_dim], norm="batch", activation=nn.ReLU)
        self.vital_signs = (
            VitalSign("deviation", 0.3, 3.0, "the embeddings are far from unit variance: collapse"),
            VitalSign("feature_spread", 0.02, 1.0, "the backbone gives every image the same features"),
        )

    @property
    def backbone(self) -> "Backbone":
        """The only one there is."""
        return self.encoder

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(1 - lambda) prediction + lambda SIGReg (algorithm 2) of the views [B, C, h, w], the global ones first."""
        refuse_one_image(self, views)
        pooled = pooled_features(self.encoder, views)
        z = self.projector(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])
        prediction = prediction_loss(z, self.global_views)
        gaussian = sigreg(z, random_slices(z.shape[-1], self.slices, z.device), self.knots, self.t_max)
        loss = (1 - self.sigreg_weight) * prediction + self.sigreg_weight * gaussian
        terms = {"prediction": prediction.detach(), "sigreg": gaussian.detach(), "deviation": deviation(z)}
        k = self.global_views
        return loss, {**terms, **signs(z[:k].flatten(0, 1), pooled[:k].flatten(0, 1))}


@torch.no_grad()
def deviation(z: Tensor) -> Tensor:
    """Root of the variance over images of embeddings z [V, N, K], averaged over views and components: 1 is Gaussian."""
    return full_precision(z).var(1, correction=0).mean().sqrt()
