"""Sinkhorn-Knopp: soft assignments that use every prototype equally often (Cuturi 2013, arXiv 1306.0895)."""

import torch
from torch import Tensor

from objectives.distributed import gather
from objectives.precision import full_precision


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments Q = Diag(u) exp(scores / temperature) Diag(v) [B, K]: the codes of SwAV (Caron et al. 2020, eq. 5).

    Each iteration gives every prototype (column) the same total over the rows of all ranks, then every sample (row)
    the total 1. Rows therefore sum to 1 exactly, columns to B_total / K the better the more iterations there are.
    It all happens to logarithms in at least float32: no temperature over- or underflows, no prototype divides by 0.

    Args:
        scores: of samples [B, K]; ranks may hold different numbers of them.
        temperature: the weight epsilon of the entropy, above 0; the smaller, the harder the assignments.
        iterations: at least 1.

    Raises:
        ValueError: no iteration, or a temperature that is not above 0.
    """
    if iterations < 1 or temperature <= 0:
        raise ValueError(
            f"Sinkhorn-Knopp needs at least 1 iteration and a temperature above 0, not {iterations} and {temperature}"
        )
    log_q = full_precision(scores) / temperature
    for _ in range(iterations):
        columns = gather(log_q.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)
        log_q = (log_q - columns).log_softmax(dim=1)
    return log_q.exp()
