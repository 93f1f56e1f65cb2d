"""Batch norm over visible positions, and over the batches of all ranks, on any device."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose statistics run over the batches of all ranks: torch's own on a GPU, and the same on a CPU,
    where torch has none (so it is no `nn.SyncBatchNorm`, which DDP refuses there). `drop` and `act` are what timm's
    networks carry in a batch norm."""

    process_group = None

    def __init__(self, like: _BatchNorm) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(like, name))
        self.drop, self.act = (getattr(like, name, None) or nn.Identity() for name in ("drop", "act"))
        self.train(like.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not (self.training or self.running_mean is None) or not dist.is_initialized():
            return self.act(self.drop(nn.SyncBatchNorm.forward(self, x)))  # type: ignore[arg-type]
        flat = x if x.ndim == 4 else x.reshape(*x.shape[:2], -1, 1)
        return over_ranks(self, flat, flat.new_ones(len(flat), 1, *flat.shape[2:])).view_as(x)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def _check_non_zero_input_channels(self, input: Tensor) -> None:
        """Asked for by torch's forward."""


def synchronise(module: nn.Module) -> None:
    """Let every batch norm in `module` take its statistics over all ranks; its parameters stay the same objects."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, (SyncBatchNorm, nn.SyncBatchNorm)):
            setattr(module, name, SyncBatchNorm(child))
        else:
            synchronise(child)


def over_ranks(bn: nn.SyncBatchNorm | SyncBatchNorm, x: Tensor, mask: Tensor) -> Tensor:
    """`bn` of x [B, C, H, W], its statistics over the positions of all ranks where `mask` [B, 1, H, W] is 1."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    tracks = bn.training and bn.track_running_stats
    if tracks and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        momentum = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    group = (bn.process_group or dist.group.WORLD) if dist.is_available() and dist.is_initialized() else None
    running = (bn.running_mean, bn.running_var) if tracks else (None, None)
    out = masked_batch_norm(x, mask, *running, bn.weight, bn.bias, momentum, bn.eps, group)
    for after in ("drop", "act"):  # timm's networks carry these in a batch norm
        out = getattr(bn, after)(out) if hasattr(bn, after) else out
    return out


def masked_batch_norm(
    x: Tensor,
    mask: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Training-mode batch norm of x [B, C, H, W] with statistics over the positions where `mask` [B, 1, H, W] is 1.

    Statistics are in float32, or float64 where `x` is; with a process `group` they run over all its ranks. Running
    statistics move by `momentum`, the variance unbiased (n − 1), as torch's own do. Every position is normalised, so
    with everything visible this is torch's batch norm.
    """
    weight = torch.ones_like(x[0, :, 0, 0]) if weight is None else weight
    bias = torch.zeros_like(x[0, :, 0, 0]) if bias is None else bias
    out, mean, var, count = _MaskedBatchNorm.apply(x, mask, weight, bias, eps, group)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1).clamp_min(1))).to(running_var.dtype), momentum)
    return out


class _MaskedBatchNorm(torch.autograd.Function):
    """Normalise by statistics over visible positions, keeping only what torch's batch norm keeps for the backward.

    With g the gradient at the normalised value x̂, v the mask and n the number of visible positions,
    ∂x = (g − v (Σ g + x̂ Σ g x̂) / n) / σ: Ioffe & Szegedy 2015, section 3, the statistics' terms confined to the
    positions they were taken over.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, torch.float32)
        values, m = x.to(exact), mask.to(exact)
        total = torch.cat([(values * m).sum((0, 2, 3)), m.sum().view(1)])
        _sum_over_ranks(total, group)
        count = total[-1].clamp_min(1)
        mean = total[:-1] / count
        var = ((values - mean.view(1, -1, 1, 1)).square() * m).sum((0, 2, 3))
        _sum_over_ranks(var, group)
        var = var / count
        ctx.save_for_backward(x, mask, weight, mean, torch.rsqrt(var + eps), count)
        ctx.group = group
        out = torch.batch_norm(x, weight.to(exact), bias.to(exact), mean, var, False, 0.0, eps, False)
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, mask, weight, mean, inverse_std, count = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        normalised = (x.to(mean.dtype) - mean.view(shape)) * inverse_std.view(shape)
        g = grad.to(mean.dtype)
        bias_grad = g.sum((0, 2, 3))
        weight_grad = (g * normalised).sum((0, 2, 3))
        over_ranks = torch.stack([bias_grad, weight_grad])  # DDP averages these gradients itself: sum only for ∂x
        _sum_over_ranks(over_ranks, ctx.group)
        shift, slope = (over_ranks / count).unbind()
        through_statistics = mask.to(mean.dtype) * (shift.view(shape) + normalised * slope.view(shape))
        scale = (weight.to(mean.dtype) * inverse_std).view(shape)
        x_grad = ((g - through_statistics) * scale).to(x.dtype)
        return x_grad, None, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), None, None


def _sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
