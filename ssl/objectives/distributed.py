"""Sums and gathers over the ranks of a run; with one process, or none started, each is the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks that train together; 1 where `torch.distributed` was never started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's `x` (same shape on all), without gradient. `x` itself stays as it is."""
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of every rank's `x` (same shape on all), without gradient."""
    return sum_over_ranks(x) / world_size()


def gather(x: Tensor) -> Tensor:
    """Every rank's `x [B, ...]`, joined in rank order as `[world * B, ...]`, with gradient to all of them.

    The gradient that reaches a rank's `x` is the sum of what all ranks' losses send to it. Where each rank's
    loss is a mean over its own B rows, DDP's averaging therefore leaves the gradient of the joined batch.
    B must be the same on all ranks.
    """
    return _Gather.apply(x) if world_size() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]
