"""KoLeo: spread the features of a batch evenly (Sablayrolles et al. 2019, arXiv 1806.03198; DINOv2, sec. 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.contract import TooFewImages
from objectives.distributed import gather, rank
from objectives.precision import full_precision


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """The Kozachenko-Leonenko estimate of minus the entropy: -mean_i log(min_{j != i} |x_i - x_j| + eps).

    Rows are L2-normalised first. Neighbours are looked for in the batch of all ranks, so that the loss does not depend
    on how many there are (DINOv2's code looks on each GPU alone). Which row is the nearest has no gradient; both rows
    of a pair do.

    Args:
        features: [B, D], at least two rows over all ranks.

    Raises:
        TooFewImages: a single row, which has no neighbour.
    """
    x = F.normalize(full_precision(features), dim=-1, eps=eps)
    everyone = gather(x)
    if len(everyone) < 2:
        raise TooFewImages("KoLeo needs a batch of at least 2 images: a single one has no neighbour")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        similarity = x @ everyone.T
        own = torch.arange(len(x), device=x.device)
        similarity[own, own + rank() * len(x)] = -2
        nearest = similarity.argmax(dim=1)
    return -(F.pairwise_distance(x, everyone[nearest], eps=eps) + eps).log().mean()
