"""Two views of an image and their embeddings: what BYOL, SimSiam, Barlow Twins, VICReg and LeJEPA share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from objectives.contract import TooFewImages
from objectives.distributed import world_size
from objectives.spread import effective_rank, feature_spread
from objectives.views import Photometric, View, VitalSign

if TYPE_CHECKING:
    from backbones import Backbone

Jitter = tuple[float, float, float, float]
"""Strengths of brightness, contrast, saturation and hue, as in `Photometric`."""


def two_views(
    size: tuple[int, int],
    scale: tuple[float, float],
    jitter: Jitter,
    blur: tuple[float, float],
    solarize: tuple[float, float],
) -> tuple[View, View]:
    """Two crops of one area range; `blur` and `solarize` are the probabilities for the first and for the second.

    Defaults of BYOL (Grill et al. 2020, table 6), which most successors took over: one view always blurred, the
    other seldom, and at times solarised.
    """
    first, second = (
        View(f"view {i + 1}", size, scale, photometric=Photometric(*jitter, gray_p=0.2, blur_p=b, solarize_p=s))
        for i, (b, s) in enumerate(zip(blur, solarize, strict=True))
    )
    return first, second


class Encoder(nn.Module):
    """A backbone f and a projector g on its pooled features."""

    def __init__(self, backbone: "Backbone", projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, K] and pooled features [B, D] of images [B, C, h, w].

        Views are encoded one by one, as published: each has its own batch statistics.
        """
        pooled = self.backbone(images).pooled
        return self.projector(pooled), pooled


def refuse_one_image(objective: nn.Module, views: Sequence[Tensor]) -> None:
    """Raise where all ranks together train on a single image, which no batch statistic can tell from others."""
    if objective.training and len(views[0]) * world_size() < 2:
        raise TooFewImages(
            f"{type(objective).__name__} compares the images of a batch and got a single one; "
            "use a batch of at least 2, or fewer accumulated parts"
        )


VITAL_SIGNS = (
    VitalSign("embedding_spread", 0.1, 1.0, "all images have the same embedding: complete collapse"),
    VitalSign("embedding_rank", 1.2, 1e6, "all embeddings lie on one line: dimensional collapse"),
    VitalSign("feature_spread", 0.02, 1.0, "the backbone gives every image the same features"),
)


@torch.no_grad()
def signs(embeddings: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    """Spread of embeddings [N, K] and pooled features [N, D], and the effective rank of both."""
    return {
        "embedding_spread": feature_spread(embeddings),
        "embedding_rank": effective_rank(embeddings),
        "feature_spread": feature_spread(pooled),
        "effective_rank": effective_rank(pooled),
    }
