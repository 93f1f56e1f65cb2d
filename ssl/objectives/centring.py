"""The running centre of a teacher's outputs (DINO, Caron et al. 2021, sec. 3.1)."""

import torch
from torch import Tensor, nn

from objectives.distributed import sum_over_ranks
from objectives.precision import full_precision


class Centre(nn.Module):
    """`c <- m c + (1 - m) * mean of the outputs of this step` over all ranks, views and accumulated batches (eq. 4).

    A step's outputs are gathered by `observe` and enter the centre in `update`, after the loss that they made was
    computed with the old centre, as published. One sum over ranks per optimiser step, and a batch that is
    accumulated in parts leaves the same centre as the whole.
    """

    value: Tensor
    seen_sum: Tensor
    seen_count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(width))
        # Zero between steps, hence no part of a checkpoint.
        self.register_buffer("seen_sum", torch.zeros(width), persistent=False)
        self.register_buffer("seen_count", torch.zeros(1), persistent=False)

    def forward(self, outputs: Tensor) -> Tensor:
        """`outputs [..., K]` less the centre, in full precision."""
        return full_precision(outputs) - self.value

    @torch.no_grad()
    def observe(self, outputs: Tensor) -> None:
        """Count `outputs [..., K]` towards this step's mean."""
        rows = full_precision(outputs).flatten(0, -2)
        self.seen_sum += rows.sum(0)
        self.seen_count += len(rows)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the centre to this step's mean over all ranks; nothing happens where nothing was observed."""
        total, count = sum_over_ranks(torch.cat([self.seen_sum, self.seen_count])).split([len(self.value), 1])
        self.value.lerp_(torch.where(count > 0, total / count.clamp(min=1), self.value), 1 - momentum)
        self.seen_sum.zero_()
        self.seen_count.zero_()
