"""Losses are computed in at least float32, whatever autocast made of their inputs."""

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 if it came in half precision; float32 and float64 pass as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
