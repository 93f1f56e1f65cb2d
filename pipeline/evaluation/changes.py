"""Changes of images that people see through: geometry, occlusion, and the common corruptions at five severities.

All work on float images [B, 3, H, W] in [0, 1], on their device, and give the same for the same generator.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluation.corruptions import CORRUPTIONS
from pipeline.evaluation.moving import random, warp

SEVERITIES = (1, 2, 3, 4, 5)
Change = Callable[[Tensor, int, torch.Generator], Tensor]
"""(images in [0, 1], severity 1 to 5, CPU generator) to images of the same shape, perhaps out of [0, 1]."""


# --- geometry ---------------------------------------------------------------------------------------------------------


def shift(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Moved by 5, 10, 15, 20, 25 % of the side in a random direction, the border mirrored."""
    angle = 2 * math.pi * random(x, generator)
    far = 2 * 0.05 * severity
    return warp(x, shift=torch.stack([angle.cos(), angle.sin()], dim=1) * far)


def crop(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A random square of 80, 60, 40, 25, 15 % of the area, brought to full size: the horse's head."""
    side = math.sqrt((0.8, 0.6, 0.4, 0.25, 0.15)[severity - 1])
    middle = (2 * random(x, generator, 2) - 1) * (1 - side)
    return warp(x, scale=side, shift=middle)


def scale(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Shrunk to 0.85, 0.7, 0.55, 0.4, 0.3 of the side, around it the mean colour."""
    small = max(1, round((0.85, 0.7, 0.55, 0.4, 0.3)[severity - 1] * x.shape[-1]))
    rows = max(1, round(small * x.shape[-2] / x.shape[-1]))
    inner = F.interpolate(x, size=(rows, small), mode="bilinear", antialias=True)
    out = x.mean((2, 3), keepdim=True).expand_as(x).clone()
    top, left = (x.shape[-2] - rows) // 2, (x.shape[-1] - small) // 2
    out[..., top : top + rows, left : left + small] = inner
    return out


def rotation(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Turned by 15, 30, 45, 60, 90 degrees to either side, the border mirrored."""
    sign = torch.where(random(x, generator) < 0.5, -1.0, 1.0)
    return warp(x, angle=sign * math.radians((15, 30, 45, 60, 90)[severity - 1]))


# --- what is missing, or out of place --------------------------------------------------------------------------------


def occlusion(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """15, 30, 45, 60, 75 % of an 8 x 8 grid of patches, at random, show the mean colour (Naseer et al. 2021)."""
    grid = _grid(x)
    order = torch.rand(len(x), grid[0] * grid[1], generator=generator).argsort(dim=1).argsort(dim=1).to(x.device)
    hidden = (order < round(0.15 * severity * grid[0] * grid[1])).view(-1, 1, *grid)
    mask = F.interpolate(hidden.to(x.dtype), size=x.shape[-2:], mode="nearest") > 0.5
    return torch.where(mask, x.mean((2, 3), keepdim=True), x)


def patch_shuffle(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The patches of a 2, 3, 4, 6, 8 a side grid, at random places: texture stays, shape goes (Naseer et al. 2021)."""
    g = (2, 3, 4, 6, 8)[severity - 1]
    h, w = x.shape[-2] // g * g, x.shape[-1] // g * g
    patches = rearrange(x[..., :h, :w], "b c (gh p) (gw q) -> b (gh gw) c p q", gh=g, gw=g)
    order = torch.rand(len(x), g * g, generator=generator).argsort(dim=1).to(x.device)
    patches = patches[torch.arange(len(x), device=x.device)[:, None], order]
    out = x.clone()
    out[..., :h, :w] = rearrange(patches, "b (gh gw) c p q -> b c (gh p) (gw q)", gh=g, gw=g)
    return out


GEOMETRY: Mapping[str, Change] = MappingProxyType(
    {"shift": shift, "crop": crop, "scale": scale, "rotation": rotation, "occlusion": occlusion,
     "patch_shuffle": patch_shuffle}
)  # fmt: skip
ALL: Mapping[str, Change] = MappingProxyType({**GEOMETRY, **CORRUPTIONS})


def change(images: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """uint8 images [B, 3, H, W] changed, as uint8; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    changed = ALL[name](images.float() / 255, severity, generator)
    return (changed.clamp(0, 1) * 255).round().to(torch.uint8)


def _grid(x: Tensor) -> tuple[int, int]:
    return min(8, x.shape[-2]), min(8, x.shape[-1])
