"""What a backbone costs and sees: parameters, multiply-adds, theoretical receptive field. All from shapes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from backbones.build import tensors_in
from backbones.cnn import FullyConnected
from backbones.contract import Backbone, Features


def parameters(model: nn.Module) -> int:
    """Number of parameters, without a backbone's mask token, which only masked objectives use."""
    token = model.mask_token.numel() if isinstance(model, Backbone) else 0
    return sum(p.numel() for p in model.parameters()) - token


def multiply_adds(model: nn.Module, size: int | tuple[int, int], in_channels: int | None = None) -> int:
    """Multiply-adds of convolutions, linear layers and attention for one image of `size` pixels (a side, or H and W).

    The unit papers call FLOPs (He et al. 2016, Tan & Le 2019). Biases, norms and activations are not counted.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _on_shapes(model, size, in_channels)
    return counter.get_total_flops() // 2


def receptive_field(model: nn.Module, in_channels: int | None = None) -> int | None:
    """Side in pixels of the square of the image that one cell can depend on, None where it is the whole image by design
    (attention, fully connected).

    The kernel-stride recursion (Araujo, Norris, Sim 2019, equation 2) along the longest path: r ← r + (k − 1) d j and
    j ← j s, for kernels k, dilations d, strides s. Borders are ignored, and so are the gates of squeeze-excite, which
    are global.
    """
    if isinstance(model, FullyConnected):
        return None
    side: int | tuple[int, int] = 256
    if isinstance(model, Backbone):
        side = getattr(model, "only_size", None) or 8 * model.stride
    mode = _ReceptiveField()
    with torch.no_grad(), mode:
        out = _on_shapes(model, side, in_channels)
    field = _field(out.cells if isinstance(out, Features) else out)
    return None if mode.attends or field is None else field[0]


def _on_shapes(model: nn.Module, size: int | tuple[int, int], in_channels: int | None) -> Any:
    """The output of `model` for one image, all on meta tensors, in evaluation mode."""
    height, width = (size, size) if isinstance(size, int) else size
    channels = in_channels or (model.in_channels if isinstance(model, Backbone) else 3)
    meta = {k: torch.empty_like(v, device="meta") for k, v in (*model.named_parameters(), *model.named_buffers())}
    image = torch.empty(1, channels, height, width, device="meta")
    _mark(image, (1, 1))
    training = model.training
    model.eval()
    try:
        return functional_call(model, meta, (image,), tie_weights=False)
    finally:
        model.train(training)


class _ReceptiveField(TorchFunctionMode):
    """Carries (receptive field, jump), both in pixels, along with every tensor that comes from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.attends = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return args[0]  # moves nothing, and slow to trace
        out = func(*args, **kwargs)
        fields = [f for t in tensors_in((args, tuple(kwargs.values()))) if (f := _field(t))]
        if not fields or (func in _REDUCTIONS and args[0].ndim == 4):
            return out  # a reduction gives a gate for the whole map, not a place in it
        self.attends = self.attends or func in _ATTENTION
        field, jump = max(f[0] for f in fields), max(f[1] for f in fields)
        if func in _WINDOWS:
            kernel, stride, dilation = _WINDOWS[func](args, kwargs)
            field, jump = field + (kernel - 1) * dilation * jump, jump * stride
        _mark(out, (field, jump))
        return out


def _field(tensor: Tensor) -> tuple[int, int] | None:
    return getattr(tensor, "_receptive_field", None)


def _mark(out: Any, field: tuple[int, int]) -> None:
    for tensor in tensors_in(out):
        tensor._receptive_field = field  # type: ignore[attr-defined]


def _one(value: Any) -> int:
    return int(max(value)) if isinstance(value, (tuple, list)) else int(value)


def _conv(args: Any, kwargs: Any) -> tuple[int, int, int]:
    given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation"), args)) | kwargs
    return max(given["weight"].shape[-2:]), _one(given.get("stride", 1)), _one(given.get("dilation", 1))


def _pool(args: Any, kwargs: Any) -> tuple[int, int, int]:
    given = dict(zip(("input", "kernel_size", "stride"), args)) | kwargs
    kernel = _one(given["kernel_size"])
    return kernel, _one(given.get("stride") or kernel), _one(given.get("dilation", 1))


_WINDOWS = {
    torch.conv2d: _conv,
    F.conv2d: _conv,
    F.max_pool2d: _pool,
    torch.max_pool2d: _pool,
    F.avg_pool2d: _pool,
}
_REDUCTIONS = {torch.mean, Tensor.mean, torch.amax, Tensor.amax, F.adaptive_avg_pool2d}
_ATTENTION = {F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax}
