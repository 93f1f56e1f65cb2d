"""How far apart a batch's embeddings lie: what tells a collapsed network from a living one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.precision import full_precision


@torch.no_grad()
def feature_spread(x: Tensor) -> Tensor:
    """Root of the total variance of the L2-normalised rows of `x [N, D]`: 0 when all point one way, at most 1.

    Equal to sqrt(1 - mean cosine similarity over all pairs, each with itself included), the bounded form of the
    standard deviation that SimSiam watches (Chen & He 2021, sec. 4.1). Rows of zeros are all alike: 0. A single
    row has no spread to judge: 1.
    """
    if len(x) < 2:
        return x.new_ones((), dtype=torch.float32)
    x = F.normalize(full_precision(x), dim=-1)
    return (x.square().sum(-1).mean() - x.mean(0).square().sum()).clamp(min=0).sqrt()


@torch.no_grad()
def effective_rank(x: Tensor) -> Tensor:
    """Number of directions in which the rows of `x [N, D]` vary, between 1 and min(N - 1, D).

    The participation ratio (tr C)^2 / tr(C^2) of their covariance C, from the smaller of the two Gram matrices:
    no eigenvalues needed. A batch that does not vary at all has rank 0; a single row cannot be judged, and gets 1.
    """
    if len(x) < 2:
        return x.new_ones((), dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        centred = full_precision(x)
        centred = centred - centred.mean(0)
        gram = centred @ centred.T if len(x) < x.shape[1] else centred.T @ centred
        return gram.trace().square() / gram.square().sum().clamp(min=torch.finfo(gram.dtype).tiny)
