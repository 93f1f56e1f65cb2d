"""A second device for machines that have none: what a GPU refuses is refused.

Tensors "elsewhere" are computed by the CPU's own operators, but an operation between them and tensors of the CPU, a
generator of the CPU that is to fill them, or their memory read as the host's is an error, as it is with CUDA. Autocast
casts as it does there. What a GPU's kernels, memory and streams do is not tried: that takes tests/gpu.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "elsewhere"
BETWEEN = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
"""Operators that carry from one device to another."""
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Those whose indices may lie on the CPU."""
ASKED = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
"""Those for whose outcome the CPU waits, as it does for what is carried to it and where a mask is an index."""
IN_HALF = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv_transpose2d.input",
    "scaled_dot_product_attention",
)  # fmt: skip
IN_FULL = (
    "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "exp", "log", "rsqrt", "pow.Tensor_Scalar", "sum",
    "cumsum", "norm.Scalar", "cdist", "cosine_similarity", "mse_loss", "smooth_l1_loss", "nll_loss",
    "cross_entropy_loss", "binary_cross_entropy_with_logits",
)  # fmt: skip
"""What autocast of CUDA computes in half precision, and what in full: of its lists, the operators that networks use."""


class Elsewhere(Tensor):
    """A tensor on the other device, which holds one of the CPU."""

    held: Tensor
    waits: ClassVar[list[str]] = []
    """Operators for whose outcome the CPU waited."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Elsewhere({self.held})"

    def tolist(self) -> Any:
        self.waits.append("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> NoReturn:
        raise TypeError(f"can't convert a tensor on {NAME} to numpy; take .cpu() first")

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        refuse_mixed(function, args, tensors)
        if has_to_wait(function, args, kwargs):
            cls.waits.append(str(function))
        target = torch.device(kwargs["device"] if kwargs.get("device") is not None else NAME)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        generator = kwargs.get("generator")
        if generator is not None:
            raise RuntimeError(f"{function}: a generator of {generator.device} for a tensor on {NAME}")
        known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}
        args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))

        def back(tensor: Tensor) -> Tensor:
            if target.type != NAME:
                return tensor
            return known[id(tensor)] if id(tensor) in known else Elsewhere(tensor)

        return tree_map_only(Tensor, back, function(*args, **kwargs))


def refuse_mixed(function: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raise where tensors of both devices meet in an operator that takes those of one; numbers may come from the CPU.

    Raises:
        RuntimeError: they do.
    """
    name = function._schema.name
    if name in BETWEEN:
        return
    if name in INDEXED:
        tensors = [leaf for leaf in tree_leaves((args[0], args[2:])) if isinstance(leaf, Tensor)]
    here = [tuple(tensor.shape) for tensor in tensors if tensor.device.type != NAME and tensor.dim()]
    if here and (len(here) < len(tensors) or name in INDEXED):
        raise RuntimeError(f"{function}: some tensors are on {NAME}, and on the CPU those of shape {here}")


def has_to_wait(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the CPU waits for the device here."""
    name = function._schema.name
    if name in INDEXED:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return name in ASKED or (name == "aten::_to_copy" and torch.device(kwargs.get("device") or NAME).type == "cpu")


class Module(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Of autocast."""
        return [torch.bfloat16, torch.float16]


def empty(size: Any, **options: Any) -> Tensor:
    """aten::empty.memory_format"""
    return Elsewhere(torch.empty(size, **without_place(options)))


def empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
    """aten::empty_strided"""
    return Elsewhere(torch.empty_strided(size, stride, **without_place(options)))


def without_place(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a tensor but its device, and what is no option of every factory."""
    return {key: value for key, value in options.items() if key in {"dtype", "layout", "memory_format"} and value}


def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """aten::_copy_from"""
    held = [tensor.held if isinstance(tensor, Elsewhere) else tensor for tensor in (source, target)]
    held[1].copy_(held[0])
    return target


def casting(operator: Any, dtype: torch.dtype | None) -> Callable[..., Any]:
    """The operator under autocast: floating-point tensors of the device in `dtype`, or in that of the autocast."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(tensor: Tensor) -> Tensor:
        takes_part = tensor.device.type == NAME and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype or torch.get_autocast_dtype(NAME)) if takes_part else tensor

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return operator(*args, **kwargs)

    return kernel


def register() -> list[torch.library.Library]:
    """Make the device known to torch, once for a process; what it is made of must be kept."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    factories = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name, kernel in {"empty.memory_format": empty, "empty_strided": empty_strided, "_copy_from": copy}.items():
        factories.impl(name, kernel)
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    casts = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for names, dtype in ((IN_HALF, None), (IN_FULL, torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            casts.impl(name, casting(operator, dtype))
    return [factories, rest, casts]
