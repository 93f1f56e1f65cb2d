"""Make a backbone from its name."""

import bisect
import contextlib
import re
from typing import Any, cast

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from backbones import classics, names, stems
from backbones.cnn import FeatureMap, FullyConnected, as_map, take_cell_norm
from backbones.contract import Backbone
from backbones.vit import Transformer


def create(
    name: str,
    *,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    stem: str = "auto",
    pool: str | None = None,
    drop_path: float = 0.0,
    pretrained: bool = False,
) -> Backbone:
    """The backbone `name` (short or timm's), with fresh weights unless `pretrained`.

    image_size  pixels, or (H, W): fixes position tables, the one layer of `fc`, and what stem="auto" means; any other
                multiple of the stride works later
    stem        "imagenet", "small" (see `stems`), or "auto": small where the shorter side has at most 64 pixels and the
                network has such a stem
    pool        "cls" or "mean" for `pooled`; None is the backbone's own: the class token where there is one
    drop_path   stochastic depth at the last block, rising linearly from 0 at the first (Huang et al. 2016)
    pretrained  timm's published weights, where it has some
    Weights start as timm starts them, those of `classics` as each says there. Raises UnknownBackbone, or ValueError for
    an option the network cannot have and for a network of timm's whose features are no single map of cells.
    """
    entry = names.entry(name)
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    if stem not in ("auto", "imagenet", "small"):
        raise ValueError(f"stem={stem!r} is none of 'auto', 'imagenet', 'small'.")
    if pool not in (None, "cls", "mean"):
        raise ValueError(f"pool={pool!r} is none of 'cls', 'mean', None.")
    if min(size) < 1 or in_channels < 1:
        raise ValueError(f"image_size={image_size}, in_channels={in_channels}: both must be at least 1.")
    if pretrained and entry.timm is None:
        raise ValueError(f"pretrained: timm has no weights for {name}; use pretrained=False.")
    if drop_path and (entry.timm is None and entry.family == "cnn"):
        raise ValueError(f"drop_path={drop_path}: {name} has no residual blocks that can be dropped; use 0.")

    want_small = stem == "small" or (stem == "auto" and min(size) <= stems.SMALL_UP_TO and not pretrained)
    config: dict[str, Any] = {"name": name, "image_size": size, "in_channels": in_channels}
    config |= {"stem": stem, "pool": pool, "drop_path": drop_path}
    if name == "fc":
        _only_one_stem(name, stem, pool)
        width = classics.fc_width(*size, in_channels)
        return FullyConnected(name, size, width=width, in_channels=in_channels, config=config)

    network, has_small = _network(name, entry, size, in_channels, want_small, drop_path, pretrained)
    config["stem"] = ("small" if want_small else "imagenet") if has_small else "auto"
    if not has_small:
        _only_one_stem(name, stem, None)
    if isinstance(network, (VisionTransformer, Eva)):
        return Transformer(name, network, in_channels=in_channels, pool=pool, config=config)
    if pool == "cls":
        raise ValueError(f"pool='cls': {name} has no class token; use pool='mean'.")
    return _feature_map(name, network, size, in_channels, config)


def published(name: str) -> nn.Module:
    """The network as its paper counts it: the paper's borders and classifier (1000 classes, 10 for the CIFAR nets) and
    channels (one for LeNet-5, else three)."""
    entry = names.entry(name)
    if entry.timm is None and entry.family == "vit":
        raise ValueError(f"{name} was published nowhere; vit_ti16, vit_s16, vit_b16, vit_l16 and vit_h14 were.")
    if entry.timm is not None:
        return timm.create_model(entry.timm, num_classes=1000)
    if name == "lenet5":
        return classics.lenet5(1, as_published=True)
    return _classic(name, 3, small=False, as_published=True)


def _classic(name: str, in_channels: int, small: bool, as_published: bool = False) -> classics.Staged:
    if name == "lenet5":
        return classics.lenet5(in_channels, as_published)
    if name == "alexnet":
        return classics.alexnet(in_channels, small, as_published)
    if name.startswith("googlenet"):
        return classics.googlenet(in_channels, small, as_published, batch_norm=name.endswith("_bn"))
    kind, depth = re.fullmatch(r"(resnet|plain)(\d+)", name).groups()  # type: ignore[union-attr]
    return classics.cifar_resnet(int(depth), in_channels, kind == "resnet", as_published)


def _network(
    name: str,
    entry: names.Entry,
    size: tuple[int, int],
    in_channels: int,
    small: bool,
    drop_path: float,
    pretrained: bool,
) -> tuple[nn.Module, bool]:
    """The bare network, small-stemmed if wanted and possible; whether it is possible."""
    vit = names.vit_size(name)
    if vit is not None and not pretrained:
        kind, patch = vit
        if size[0] % patch or size[1] % patch:
            raise ValueError(
                f"image size {size[0]} x {size[1]} does not fit {name}: "
                f"both sides must be multiples of its patch {patch}."
            )
        network = VisionTransformer(
            img_size=size, patch_size=patch, in_chans=in_channels, num_classes=0, embed_dim=kind.width,
            depth=kind.depth, num_heads=kind.heads, drop_path_rate=drop_path, dynamic_img_size=True,
        )  # fmt: skip
        return network, False
    if entry.timm is None:
        has_small = name == "alexnet" or name.startswith("googlenet")
        return _classic(name, in_channels, small and has_small), has_small
    network = _timm(name, entry.timm, size, in_channels, drop_path, pretrained)
    if name.startswith("vgg") and hasattr(network, "features"):
        cast(nn.Sequential, network.features)[-1] = nn.Identity()  # pool5 belongs to the classifier
    if not stems.has_small_stem(network):
        return network, False
    if small:
        stems.make_stem_small(network)
    return network, True


def _timm(
    name: str, known: str, size: tuple[int, int], in_channels: int, drop_path: float, pretrained: bool
) -> nn.Module:
    """timm's model, without classifier, for any image size where it can be."""
    options: dict[str, Any] = {"num_classes": 0, "in_chans": in_channels, "pretrained": pretrained}
    if drop_path:
        options["drop_path_rate"] = drop_path
    # Not every model takes each of these, and which do stands only in its constructor.
    sized: dict[str, Any] = {"img_size": size}
    for flexible in (sized | {"dynamic_img_size": True}, sized | {"strict_img_size": False}, sized):
        with contextlib.suppress(TypeError):
            return timm.create_model(known, **options, **flexible)
    try:
        return timm.create_model(known, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ValueError(f"drop_path={drop_path}: {name} has no blocks that can be dropped; use 0.") from None


def _only_one_stem(name: str, stem: str, pool: str | None) -> None:
    if stem != "auto":
        raise ValueError(f"stem={stem!r}: {name} has one stem only; use stem='auto'.")
    if pool == "cls":
        raise ValueError(f"pool='cls': {name} has no class token; use pool='mean'.")


def _feature_map(
    name: str, network: nn.Module, size: tuple[int, int], in_channels: int, config: dict[str, Any]
) -> FeatureMap:
    """Find out what the network gives by running it on shapes alone, then wrap it. Raises ValueError where that is no
    map, or where it takes no images of this `size`."""
    width = int(network.num_features)  # type: ignore[arg-type]
    norm = take_cell_norm(network)
    probe = _Shapes(name, network, in_channels, width)
    only_size, border = None, 0
    try:
        rows = probe.rows(256)
        stride = 256 // rows
        if stride * rows != 256 or stride & (stride - 1):  # unpadded layers lost some cells at the edge
            stride = round(256 / (probe.rows(512) - rows))
            border = bisect.bisect_left(range(4 * stride), 256 // stride, key=lambda b: probe.rows(256 + 2 * b))
        if probe.rows(3 * stride + 2 * border) != 3:  # windows may fit powers of two alone, others are resized to fit
            raise ValueError("its map is no multiple of the stride")
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError):  # its modules allow one size only
        only_size, border = size, 0
        try:
            stride = round(size[0] / probe.rows(*size))
        except (RuntimeError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise ValueError(f"{name} takes no images of {size[0]} x {size[1]} pixels ({reason}).") from error
    _remove(network, {k for k, _ in network.named_parameters()} - probe.used)
    return FeatureMap(
        name, network, norm=norm, width=width, stride=stride, in_channels=in_channels, config=config,
        only_size=only_size, border=border,
    )  # fmt: skip


class _Shapes(nn.Module):
    """Runs `forward_features` of a network on meta tensors: only shapes, and which parameters it uses, come of it."""

    def __init__(self, name: str, network: nn.Module, in_channels: int, width: int) -> None:
        super().__init__()
        self.name, self.network, self.in_channels, self.width = name, network, in_channels, width
        token = getattr(network, "cls_token", None)
        self.prefix_tokens = int(getattr(network, "num_prefix_tokens", 0 if token is None else token.shape[1]))
        self.used: set[str] = set()

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_features(images)  # type: ignore[operator]

    def rows(self, height: int, width: int | None = None) -> int:
        """Rows of the feature map of an image of this size. Parameters that took part in it are added to `used`.
        Raises ValueError where its features are no map."""
        width = width or height
        meta = {k: torch.empty_like(v, device="meta") for k, v in (*self.named_parameters(), *self.named_buffers())}
        training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad(), _Uses(meta) as uses:
                images = torch.empty(1, self.in_channels, height, width, device="meta")
                out = functional_call(self, meta, (images,), tie_weights=False)  # tied, CoaT's shared ones stay on meta
        finally:
            self.network.train(training)
        self.used |= {name.removeprefix("network.") for name in uses.names}
        if not isinstance(out, Tensor) or (out.ndim == 3 and out.shape[1] <= self.prefix_tokens):
            given = "class tokens alone" if isinstance(out, Tensor) else f"{len(out)} tensors"
            raise ValueError(f"{self.name} cannot be a backbone: timm gives {given} as its features, not one map.")
        if out.ndim == 3:
            return round(((out.shape[1] - self.prefix_tokens) * height / width) ** 0.5)
        return as_map(out, self.width, (0, 0)).shape[2]


class _Uses(TorchFunctionMode):
    """Notes which of some named tensors torch functions were given."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._of = {id(tensor): name for name, tensor in named.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":  # asking for its shape or dtype is no use
            for tensor in tensors_in((args, tuple(kwargs.values()))):
                if id(tensor) in self._of:
                    self.names.add(self._of[id(tensor)])
        if func is F.batch_norm:
            return args[0]  # same shape, and slow to trace
        return func(*args, **kwargs)


def tensors_in(nested: Any) -> list[Tensor]:
    """All tensors in tuples and lists of any depth."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, (tuple, list)):
        return [t for item in nested for t in tensors_in(item)]
    return []


def _remove(module: nn.Module, unused: set[str], prefix: str = "") -> None:
    """Put an identity in place of every module all of whose parameters are `unused`."""
    for name, child in module.named_children():
        inside = {f"{prefix}{name}.{k}" for k, _ in child.named_parameters()}
        if inside and inside <= unused:
            setattr(module, name, nn.Identity())
        elif inside & unused:
            _remove(child, unused, f"{prefix}{name}.")
