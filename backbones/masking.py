"""Run any convolutional network on its visible cells only, without touching the network.

    with visible_only(network, visible):      # visible [B, 1, h, w] bool, over the cells of the last feature map
        features = network(images)

Inside, whatever mixes positions sees visible positions only, at every resolution:
- convolutions and padding read zero at masked positions (the sparse-convolution identity: Tian et al. 2023, SparK,
  section 3.2; Graham & van der Maaten 2017);
- max pooling ignores masked positions, average pooling averages over visible ones;
- batch, group and instance norm take their statistics over visible positions; batch norm updates its running
  statistics with them, over all ranks where it is a SyncBatchNorm;
- spatial means, maxima and norms (squeeze-excite, global response normalisation, global pooling) run over visible
  positions.
What treats each position by itself (1 x 1 convolutions, activations, layer norm and LRN over channels) is left alone:
it may put anything at masked positions, since nothing ever reads them.

It is a mode over torch functions, not a set of hooks: the network holds no state, so deepcopy, pickling, SyncBatchNorm
conversion, DDP, autocast, channels_last and torch.compile work as they do without it. Attention is not masked: in a
hybrid network, positions that were masked still take part in it, though never with anything of the masked pixels.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from backbones.batch_norm import SyncBatchNorm, masked_batch_norm, over_ranks

NCHW, NHWC = (2, 3), (1, 2)


@contextlib.contextmanager
def visible_only(network: nn.Module, visible: Tensor) -> Iterator[None]:
    """Within, `network` computes from visible positions only. visible [B, 1, h, w] bool, over its coarsest map."""
    mode = VisibleOnly(visible)
    synchronised = [m for m in network.modules() if isinstance(m, (SyncBatchNorm, nn.SyncBatchNorm))]
    for module in synchronised:  # its forward calls no torch function a mode could see, so it is shadowed for a while
        module.forward = _SyncForward(module, mode)  # type: ignore[method-assign]
    try:
        with mode:
            yield
    finally:
        for module in synchronised:
            del module.forward


class VisibleOnly(TorchFunctionMode):
    """Torch functions that mix positions, replaced by ones that see visible positions only."""

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.visible = visible.to(torch.float32)
        self._resized: dict[tuple[int, int], Tensor] = {}
        self._padded: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seeing = _SEEING.get(func)
        if seeing is None:
            return func(*args, **kwargs)
        return seeing(self, func, *args, **kwargs)

    def at(self, x: Tensor, space: tuple[int, int] = NCHW) -> Tensor | None:
        """The mask (1 visible, 0 masked) that broadcasts over `x`, None where `x` is no map over the image."""
        if x.ndim != 4 or x.shape[0] != self.visible.shape[0]:
            return None
        if self._padded is not None and x is self._padded[0]:
            return self._padded[1].to(x.dtype)
        size = (x.shape[space[0]], x.shape[space[1]])
        if size[0] < self.visible.shape[2] or size[1] < self.visible.shape[3]:
            return None  # a squeezed vector [B, C, 1, 1], not a map
        if size not in self._resized:
            self._resized[size] = F.interpolate(self.visible, size=size, mode="nearest")
        mask = self._resized[size].to(x.dtype)
        return mask if space == NCHW else mask.permute(0, 2, 3, 1)

    def remember_padding(self, padded: Tensor, mask: Tensor) -> None:
        """A convolution or pool will read `padded`: `mask` is exact for it, where a resized one would be shifted."""
        self._padded = (padded, mask)


def _conv2d(masked: VisibleOnly, func: Callable, /, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    mask = None if tuple(weight.shape[-2:]) == (1, 1) else masked.at(x)
    return func(x if mask is None else x * mask, weight, *args, **kwargs)


def _pad(masked: VisibleOnly, func: Callable, /, x: Tensor, pad: Any, *args: Any, **kwargs: Any) -> Tensor:
    out, mask = func(x, pad, *args, **kwargs), masked.at(x)
    if mask is not None and len(pad) == 4:
        reflects = (args[0] if args else kwargs.get("mode", "constant")) != "constant"
        masked.remember_padding(out, func(mask, pad, *args, **kwargs) if reflects else func(mask, pad))
    return out


def _max_pool(masked: VisibleOnly, func: Callable, /, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    mask = masked.at(x)
    if mask is None:
        return func(x, *args, **kwargs)
    out = func(x.masked_fill(mask == 0, -math.inf), *args, **kwargs)
    return out.masked_fill(out == -math.inf, 0)  # windows that held nothing visible


def _avg_pool(masked: VisibleOnly, func: Callable, /, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    mask = masked.at(x)
    if mask is None:
        return func(x, *args, **kwargs)
    # Sum over visible / number of visible; the ratio keeps the operator's own rule for padding at the border.
    everything, seen = (func(m, *args, **kwargs) for m in (torch.ones_like(mask), mask))
    return func(x * mask, *args, **kwargs) * (everything / seen.clamp_min(1e-6))


def _adaptive_avg_pool(masked: VisibleOnly, func: Callable, /, x: Tensor, output_size: Any, **kwargs: Any) -> Tensor:
    mask = masked.at(x)
    if mask is None:
        return func(x, output_size, **kwargs)
    seen = func(mask.float(), output_size, **kwargs).clamp_min(1e-6)
    return (func((x * mask).float(), output_size, **kwargs) / seen).to(x.dtype)


def _spatial(x: Tensor, dim: Any) -> tuple[int, int] | None:
    """Which pair of spatial axes a reduction over `dim` runs over, None if it is no spatial reduction."""
    if x.ndim != 4 or not isinstance(dim, (tuple, list)) or len(dim) != 2:
        return None
    axes = tuple(sorted(d % 4 for d in dim))
    return axes if axes in (NCHW, NHWC) else None


def _mean(
    masked: VisibleOnly, func: Callable, /, x: Tensor, dim: Any = None, keepdim: bool = False, **kw: Any
) -> Tensor:
    axes = _spatial(x, dim)
    mask = masked.at(x, axes) if axes else None
    if mask is None:
        return func(x, **kw) if dim is None else func(x, dim, keepdim, **kw)
    return (x * mask).sum(dim, keepdim) / mask.sum(dim, keepdim).clamp_min(1)


def _amax(masked: VisibleOnly, func: Callable, /, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    axes = _spatial(x, dim)
    mask = masked.at(x, axes) if axes else None
    return func(x if mask is None else x.masked_fill(mask == 0, -math.inf), dim, keepdim)


def _norm(masked: VisibleOnly, func: Callable, /, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    axes = _spatial(x, kwargs.get("dim", args[1] if len(args) > 1 else None))
    mask = masked.at(x, axes) if axes else None
    return func(x if mask is None else x * mask, *args, **kwargs)


def _batch_norm(
    masked: VisibleOnly,
    func: Callable,
    /,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    mask = masked.at(x) if training else None
    if mask is None:
        return func(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return masked_batch_norm(x, mask, running_mean, running_var, weight, bias, momentum, eps)


def _group_norm(
    masked: VisibleOnly,
    func: Callable,
    /,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    mask = masked.at(x)
    if mask is None:
        return func(x, num_groups, weight, bias, eps)
    return masked_group_norm(x, mask, num_groups, weight, bias, eps)


def _instance_norm(
    masked: VisibleOnly,
    func: Callable,
    /,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    mask = masked.at(x)
    if mask is None or not use_input_stats or running_mean is not None:
        return func(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return masked_group_norm(x, mask, x.shape[1], weight, bias, eps)


_SEEING: dict[Any, Callable[..., Tensor]] = {
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    F.pad: _pad,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.adaptive_max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _adaptive_avg_pool,
    torch.mean: _mean,
    Tensor.mean: _mean,
    torch.amax: _amax,
    Tensor.amax: _amax,
    torch.norm: _norm,
    Tensor.norm: _norm,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
}


def masked_group_norm(
    x: Tensor, mask: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm (Wu & He 2018, equation 1) of x [B, C, H, W], statistics over the positions where `mask` [B, 1, H, W]
    is 1, in float32 at least."""
    exact = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(exact).reshape(x.shape[0], groups, -1, *x.shape[2:])
    m = mask.to(exact).unsqueeze(2)
    count = (m.sum((2, 3, 4), keepdim=True) * grouped.shape[2]).clamp_min(1)
    mean = (grouped * m).sum((2, 3, 4), keepdim=True) / count
    var = ((grouped - mean).square() * m).sum((2, 3, 4), keepdim=True) / count
    out = ((grouped - mean) * torch.rsqrt(var + eps)).reshape(x.shape)
    if weight is not None:
        out = out * weight.to(exact).view(1, -1, 1, 1)
    if bias is not None:
        out = out + bias.to(exact).view(1, -1, 1, 1)
    return out.to(x.dtype)


class _SyncForward:
    """What a SyncBatchNorm does while masked: statistics over visible positions of all ranks."""

    def __init__(self, module: Any, mode: VisibleOnly) -> None:
        self.module, self.mode = module, mode

    def __call__(self, x: Tensor) -> Tensor:
        bn, mask = self.module, self.mode.at(x)
        if mask is None or not (bn.training or bn.running_mean is None):
            return type(bn).forward(bn, x)
        return over_ranks(bn, x, mask)
