"""Features of an EMA teacher as targets, and the signs that they stay worth predicting."""

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.precision import full_precision
from objectives.spread import feature_spread
from objectives.views import VitalSign


def normalised(features: Tensor) -> Tensor:
    """Features [..., D] of mean 0 and variance 1 each, in full precision: a layer norm without parameters."""
    return F.layer_norm(full_precision(features), features.shape[-1:])


VITAL_SIGNS = (
    VitalSign("explained", 0.0, 1.0, "predictions are no better than one constant target"),
    VitalSign("prediction_spread", 0.05, 2.0, "the same is predicted for every cell"),
    VitalSign("target_spread", 0.05, 2.0, "targets hardly differ between images: the teacher has collapsed"),
    VitalSign("feature_spread", 0.02, 1.0, "the backbone gives every image the same features"),
)


@torch.no_grad()
def signs(
    predictions: Tensor, targets: Tensor, chosen: Tensor, everywhere: Tensor, pooled: Tensor
) -> dict[str, Tensor]:
    """Share of the targets' variance that is explained, and the spread of predictions, targets and features.

    The targets' spread is that over the images of a batch at one and the same cell: targets that tell nothing but
    the cell's position would be easy to predict, too. A single image has no such spread to judge: 1.

    Args:
        predictions, targets: normalised features [..., D]; `chosen` [...] tells which rows count, as 0 or 1.
        everywhere: the targets of all cells [B, N, D].
        pooled: features [B, D].
    """
    weight = chosen.reshape(-1, 1).to(targets.dtype)
    weight = weight / weight.sum().clamp(min=1)
    predictions, targets = (x.detach().flatten(0, -2) for x in (predictions, targets))

    def variance(x: Tensor) -> Tensor:
        return (weight * (x - (weight * x).sum(0)).square()).sum(0).mean()

    error = (weight * (predictions - targets).square()).sum(0).mean()
    single = everywhere.new_ones(())
    return {
        "explained": 1 - error / variance(targets).clamp(min=1e-8),
        "prediction_spread": variance(predictions).sqrt(),
        "target_spread": everywhere.var(0, correction=0).mean().sqrt() if len(everywhere) > 1 else single,
        "feature_spread": feature_spread(pooled),
    }
