"""What contrastive objectives share: cosines of embeddings, and the signs that tell whether anything is told apart."""

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.precision import full_precision
from objectives.spread import effective_rank, feature_spread
from objectives.views import VitalSign

VITAL_SIGNS = (
    VitalSign("loss_over_chance", 0.0, 0.98, "an image's other view is no nearer than any other image"),
    VitalSign("feature_spread", 0.05, 1.0, "the backbone gives every image the same features"),
)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine similarities [..., N] of x [..., D] with the rows of y [N, D], at least in float32 under any autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(full_precision(x), dim=-1) @ F.normalize(full_precision(y), dim=-1).T


@torch.no_grad()
def contrast_signs(logits: Tensor, positive: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    """The cross-entropy of finding the positive over that of guessing among the candidates (1: no better), and the
    spread of the features.

    Args:
        logits: of every candidate [M, N], minus infinity for what is none; at least two are some.
        positive: its index [M].
        pooled: features [B, D].
    """
    guess = logits[0].isfinite().sum().to(logits.dtype).log()
    return {
        "loss_over_chance": F.cross_entropy(logits, positive) / guess,
        "feature_spread": feature_spread(pooled),
        "effective_rank": effective_rank(pooled),
    }
