"""Any network with a feature map as a backbone: its cells are the positions of its last map.

Also `fc`, the yardstick: one fully connected layer, whose single cell is the whole image.
"""

import re
from math import inf
from typing import Any

import torch
from einops import rearrange
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.contract import Backbone, Features, as_mask, gather_cells, number_depths, replace_pixels, show_only
from backbones.masking import visible_only


class FeatureMap(Backbone):
    """A network with `forward_features(images) → map` as a backbone.

    visible: every operation that mixes positions sees visible positions only (see `masking`). `layers` then still hold
    all positions of each stage; those over masked cells mean nothing, nor do `summaries`.
    replaced: each pixel of a replaced cell shows one learned colour, `mask_token` [C]; zero at first, the mean of
    normalised images.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        width: int,
        stride: int,
        in_channels: int,
        config: dict[str, Any],
        norm: nn.Module | None = None,
        only_size: tuple[int, int] | None = None,
        border: int = 0,
    ) -> None:
        """norm: applied to each cell of the last map. only_size: (H, W) where the network takes no other size.
        border: pixels of zero padding per side that make the map H / stride x W / stride where unpadded convolutions
        would lose its edge (Inception)."""
        super().__init__()
        self.name, self.width, self.stride, self.in_channels = name, width, stride, in_channels
        self.pool, self.config, self.only_size, self.border = "mean", config, only_size, border
        self.network = network
        self.norm = norm or nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(in_channels), requires_grad=False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        grid = super().grid(height, width)
        if self.only_size is not None and self.only_size != (height, width):
            raise ValueError(
                f"{self.name} works at {self.only_size[0]} x {self.only_size[1]} pixels only, "
                f"not at {height} x {width}; create it with image_size=({height}, {width})."
            )
        return grid

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        replaced: Tensor | None = None,
        layers: bool = False,
        summaries: bool = False,
    ) -> Features:
        grid = self._check(images, visible, replaced)
        if replaced is not None:
            images = replace_pixels(images, replaced, grid, self.mask_token)
        if visible is None:
            last, stages = self._maps(images, grid, layers or summaries)
            cells = rearrange(last, "b d h w -> b (h w) d")
        else:
            images, seen = show_only(images, as_mask(visible, grid[0] * grid[1]), grid)
            with visible_only(self.network, seen):
                last, stages = self._maps(images, grid, layers or summaries)
            cells = gather_cells(rearrange(last, "b d h w -> b (h w) d"), visible)
        pooled = cells.mean(1)
        return Features(
            pooled, cells,
            tuple(rearrange(m, "b d h w -> b (h w) d") for m in stages) if layers else (),
            (*(m.mean((2, 3))[:, None] for m in stages[:-1]), pooled[:, None]) if summaries else (),
        )  # fmt: skip

    def depths(self) -> dict[str, int]:
        matcher: Any = getattr(self.network, "group_matcher", None)
        if matcher is None:
            inside = depths_in_order(self.network)
        else:
            inside = group_parameters(self.network, matcher(coarse=False), reverse=True)
        found = {f"network.{name}": depth for name, depth in inside.items()}
        return number_depths({name: found.get(name, inf if name.startswith("norm.") else -1) for name in _names(self)})

    def blocks(self) -> list[nn.Module]:
        depths, found = self.depths(), dict[int, nn.Module]()

        def visit(module: nn.Module, prefix: str) -> None:
            for name, child in module.named_children():
                names = (f"{prefix}{name}.{key}" for key, _ in child.named_parameters())
                inside = {depths[key] for key in names if key in depths}  # what is shared stands under one name only
                if len(inside) == 1:
                    found[inside.pop()] = child
                elif inside:
                    visit(child, f"{prefix}{name}.")

        visit(self, "")
        return [found[depth] for depth in sorted(found)]

    def _maps(self, images: Tensor, grid: tuple[int, int], layers: bool) -> tuple[Tensor, list[Tensor]]:
        """The last map [B, D, h, w], and that of every stage when asked for."""
        if self.border:
            images = F.pad(images, [self.border] * 4)
        if layers:
            last, stages = self.network.forward_intermediates(images, output_fmt="NCHW")  # type: ignore[operator]
        else:
            last, stages = self.network.forward_features(images), []  # type: ignore[operator]
        return self.norm(as_map(last, self.width, grid)), stages


def as_map(out: Tensor, width: int, grid: tuple[int, int]) -> Tensor:
    """A network's output, as map [B, D, h, w] whether it was that, [B, h, w, D], or tokens [B, P + h w, D], P >= 0 of
    which are in front of the cells."""
    if out.ndim == 3:
        return rearrange(out[:, -grid[0] * grid[1] :], "b (h w) d -> b d h w", h=grid[0], w=grid[1])
    if out.shape[1] != width and out.shape[-1] == width:
        return rearrange(out, "b h w d -> b d h w")
    return out


def depths_in_order(network: nn.Module) -> dict[str, int]:
    """Depths of the parameters of a network for which timm has no groups: a number for each of its parts and each block
    in them, in the order in which it holds them, which is that in which they run."""
    part = {name: re.match(r"\w+(\.\d+)*(\.blocks\.\d+)?", name).group() for name, _ in network.named_parameters()}  # type: ignore[union-attr]
    number = {found: depth for depth, found in enumerate(dict.fromkeys(part.values()))}
    return {name: number[found] for name, found in part.items()}


def _names(backbone: Backbone) -> list[str]:
    return [name for name, _ in backbone.named_parameters()]


def take_cell_norm(network: nn.Module) -> nn.Module:
    """The norm timm keeps in the head of a ConvNeXt and its like, there applied to the pooled feature, here to each
    cell: the residual stream itself has no scale."""
    head = getattr(network, "head", None)
    norm = getattr(head, "norm", None)
    if isinstance(head, nn.Module) and isinstance(norm, LayerNorm2d):
        head.norm = nn.Identity()
        return norm
    return nn.Identity()


class FullyConnected(Backbone):
    """One fully connected layer and a ReLU over all pixels: one cell, whose stride is the image.

    Images of another size (the local crops of a multi-crop objective) are resized to its own first, by area averaging
    downwards and bilinear interpolation upwards. Weights start as in He et al. 2015.
    """

    def __init__(
        self, name: str, image_size: tuple[int, int], *, width: int, in_channels: int, config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.name, self.width, self.stride, self.in_channels = name, width, max(image_size), in_channels
        self.pool, self.config, self.image_size = "mean", config, image_size
        self.layer = nn.Linear(in_channels * image_size[0] * image_size[1], width)
        nn.init.kaiming_normal_(self.layer.weight, nonlinearity="relu")
        nn.init.zeros_(self.layer.bias)
        self.mask_token = nn.Parameter(torch.zeros(in_channels), requires_grad=False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return 1, 1

    def blocks(self) -> list[nn.Module]:
        return [self.layer]

    def depths(self) -> dict[str, int]:
        return dict.fromkeys(_names(self), 0)

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        replaced: Tensor | None = None,
        layers: bool = False,
        summaries: bool = False,
    ) -> Features:
        self._check(images, visible, replaced)
        if replaced is not None:
            images = replace_pixels(images, replaced, (1, 1), self.mask_token)
        if tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bilinear", antialias=True)
        feature = torch.relu(self.layer(images.flatten(1)))
        cells = feature.unsqueeze(1)
        if visible is not None:
            cells = gather_cells(cells, visible)
        one = (feature.unsqueeze(1),)
        return Features(feature, cells, one if layers else (), one if summaries else ())
