"""The common corruptions at five severities (Hendrycks & Dietterich 2019, ImageNet-C), on the device.

As of `changes.Change`, with the parameters of the authors' code (hendrycks/robustness, make_imagenet_c.py), scaled by
side / 224 where they are pixels. Where that pastes photographs of ice (frost), ice is drawn here.
"""

import math
from types import MappingProxyType

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluation.jpeg import jpeg_at
from pipeline.evaluation.moving import blurred, displaced, filtered, normal, random, streaked, warp

SIDE = 224
"""Pixels of the images that the parameters were made for."""


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Normal noise of deviation 0.08 to 0.38, for each channel of each pixel."""
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] * normal(x, generator)


def shot_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """As if a white pixel had caught 60, 25, 12, 5, 3 photons."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return torch.poisson(x.cpu() * photons, generator=generator).to(x) / photons


def impulse_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Salt and pepper: 3, 6, 9, 17, 27 % of all values become 0 or 1."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    u = torch.rand(x.shape, generator=generator).to(x.device)
    return torch.where(u < share, (u < share / 2).to(x), x)


def defocus_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Out of focus: blurred by a disc of radius 3, 4, 6, 8, 10 px at 224."""
    radius = (3, 4, 6, 8, 10)[severity - 1] * x.shape[-1] / 224
    reach = math.ceil(radius)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    # A disc, its rim as dark as the pixel is covered: exact enough for radii below a pixel.
    cover = (radius + 0.5 - (at[:, None] ** 2 + at**2).sqrt()).clamp(0, 1)
    return filtered(x, (cover / cover.sum()).to(x))


def glass_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blurred, pixels exchanged with near ones, row by row from the last, and blurred again: all images of a batch
    alike. The exchange is that of the original, whose pixels are views: the second is copied over the first."""
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    ratio, rows = x.shape[-1] / SIDE, _rows(x)
    moved = torch.from_numpy(_exchanged(rows, reach, times, generator)).to(x)
    if moved.shape[:2] != x.shape[-2:]:
        moved = F.interpolate(rearrange(moved, "h w two -> 1 two h w"), size=x.shape[-2:], mode="nearest-exact")
        moved = ratio * rearrange(moved, "1 two h w -> h w two")
    return blurred(displaced(blurred(x, sigma * ratio), moved.expand(len(x), -1, -1, -1)), sigma * ratio)


def _exchanged(rows: int, reach: int, times: int, generator: torch.Generator) -> np.ndarray:
    """How far (right, down) from it each pixel [rows, SIDE, 2] comes from."""
    down, right = range(rows - reach, reach, -1), range(SIDE - reach, reach, -1)
    steps = torch.randint(-reach, reach, (times, len(down), len(right), 2), generator=generator)
    source = list(range(rows * SIDE))
    for once in (steps[..., 0] + SIDE * steps[..., 1]).tolist():
        for y, row in zip(down, once):
            for z, step in zip(right, row):
                source[y * SIDE + z] = source[y * SIDE + z + step]
    place = np.arange(rows * SIDE)
    moved = [np.array(source) % SIDE - place % SIDE, np.array(source) // SIDE - place // SIDE]
    return np.stack(moved, axis=1).reshape(rows, SIDE, 2).astype(np.float32)


def motion_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Along a line of a random direction, half a Gaussian long."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    angle = math.radians(float(torch.rand((), generator=generator)) * 90 - 45)
    return streaked(x, radius, sigma, angle, x.shape[-1] / 224)


def zoom_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The mean of the image and of it zoomed in by factors up to 1.1, 1.15, 1.2, 1.25, 1.3."""
    last, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    factors = torch.arange(1, last, step, dtype=torch.float64).tolist()
    return (x + sum(warp(x, scale=1 / factor) for factor in factors)) / (len(factors) + 1)


def snow(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Whitened, and through it flakes that fall in one direction: noise enlarged to their size, its peaks, streaked.
    They are drawn for 224 px, then brought to the image's size."""
    mean, deviation, size, peak, radius, sigma, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    rows = _rows(x)
    noise = torch.randn(len(x), 1, math.ceil(rows / size), math.ceil(224 / size), generator=generator)
    flakes = F.interpolate(mean + deviation * noise.to(x), size=(rows, 224), mode="bilinear", align_corners=True)
    flakes = torch.where(flakes < peak, 0, flakes.clamp(0, 1))
    angle = math.radians(float(torch.rand((), generator=generator)) * 90 - 135)
    flakes = streaked(flakes, radius, sigma, angle, 1.0)
    flakes = F.interpolate(flakes, size=x.shape[-2:], mode="bilinear", antialias=True)
    grey = torch.einsum("c,bchw->bhw", x.new_tensor([0.299, 0.587, 0.114]), x)[:, None]
    white = torch.maximum(x, 1.5 * grey + 0.5)
    return kept * x + (1 - kept) * white + flakes + flakes.flip(2, 3)


def frost(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Seen through ice: 100, 80, 70, 65, 60 % of the image and 40, 60, 70, 70, 75 % of the ice. The original takes the
    ice from six photographs; here it is drawn: bright veins, where rough heights are half, on a cloudy ground."""
    kept, thick = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    ground, *heights = (_sized(plasma(len(x), decay, generator), x) for decay in (1.5, 1.4, 1.25, 1.25))
    veins = sum((1 - 3 * (2 * height - 1).abs()).clamp(min=0) for height in heights)
    ice = x.new_tensor([0.85, 0.95, 1.0])[:, None, None] * (0.5 * ground + 0.35 * veins).clamp(0, 1)
    return kept * x + thick * ice


def fog(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A plasma, 1.5, 2, 2.5, 2.5, 3 thick and finer with the severity, laid over the image."""
    thickness, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + thickness * _sized(plasma(len(x), decay, generator), x)) * most / (most + thickness)


def plasma(count: int, decay: float, generator: torch.Generator) -> Tensor:
    """Heights [count, 1, 256, 256] from 0 to 1 by diamonds and squares on a torus (Fournier et al. 1982).

    Each point is the mean of four, moved by up to the square of a wobble either way, as in the original, and the wobble
    falls by `decay` from one scale to the next, which is half of it.
    """
    field = torch.zeros(count, 256, 256, dtype=torch.float64)
    step, wobble = 256, 1.0

    def between(four: Tensor) -> Tensor:
        return four / 4 + wobble**2 * (2 * torch.rand(four.shape, generator=generator, dtype=torch.float64) - 1)

    while step > 1:
        half = step // 2
        corners = field[:, ::step, ::step].clone()
        along = corners + corners.roll(-1, 2)
        middles = field[:, half::step, half::step] = between(along + along.roll(-1, 1))
        field[:, ::step, half::step] = between(along + middles + middles.roll(1, 1))
        field[:, half::step, ::step] = between(corners + corners.roll(-1, 1) + middles + middles.roll(1, 2))
        step, wobble = half, wobble / decay
    low, high = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
    return ((field - low) / (high - low))[:, None].float()


def _sized(field: Tensor, x: Tensor) -> Tensor:
    """The corner of a plasma that covers an image of width 224, at the size of `x`."""
    corner = field[..., : min(256, _rows(x)), :SIDE].to(x)
    if corner.shape[-2:] == x.shape[-2:]:
        return corner
    return F.interpolate(corner, size=x.shape[-2:], mode="bilinear", antialias=True)


def _rows(x: Tensor) -> int:
    """Rows of an image of this shape where it is 224 wide."""
    return round(SIDE * x.shape[-2] / x.shape[-1])


def brightness(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """HSV's value raised by 0.1 … 0.5, hue and saturation kept."""
    value = x.amax(1, keepdim=True)
    raised = (value + 0.1 * severity).clamp(max=1)
    return torch.where(value > 0, x / value.clamp(min=1e-12) * raised, raised)


def contrast(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Each channel drawn towards its mean, to 40, 30, 20, 10, 5 % of its contrast."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] * (x - mean)


def elastic(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Pixels moved by a smooth random field, 2 sides times uniform noise blurred by 0.7 of a side, and so on to 0.12 by
    0.01; before that, three points moved by up to 0.1, 0.2, 0.02 sides, and the image with them. The authors take 244
    pixels for a side here."""
    levels = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    amount, sigma, jitter = levels[severity - 1]
    side = x.shape[-1] * 244 / SIDE
    # In half sides from the middle; the points lie a third of a side from it.
    corners = x.new_tensor([[1, 1], [1, -1], [-1, -1]]) * 2 / 3
    moved_corners = corners + 2 * jitter * 244 / SIDE * (2 * random(x, generator, 3, 2) - 1)
    ones = x.new_ones(len(x), 3, 1)
    back = torch.linalg.lstsq(torch.cat([moved_corners, ones], 2), corners.expand(len(x), 3, 2)).solution.mT
    places = F.affine_grid(back, list(x.shape), align_corners=False)
    x = F.grid_sample(x, places, mode="bilinear", padding_mode="reflection", align_corners=False)
    noise = 2 * torch.rand(len(x), 2, *x.shape[-2:], generator=generator).to(x.device) - 1
    moved = amount * side * blurred(noise, sigma * side, 3.0)
    return displaced(x, rearrange(moved, "b two h w -> b h w two"))


def pixelate(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Shrunk to 60, 50, 40, 30, 25 % of the side, then enlarged in squares."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    size = [max(1, int(side * share)) for side in x.shape[-2:]]
    return F.interpolate(F.interpolate(x, size=size, mode="area"), size=x.shape[-2:], mode="nearest")


def jpeg(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """JPEG's loss at quality 25, 18, 15, 10, 7: colours halved in size, 8 x 8 cosine transforms rounded by tables of
    the standard's annex K."""
    return jpeg_at(x, (25, 18, 15, 10, 7)[severity - 1])


CORRUPTIONS = MappingProxyType(
    {
        "gaussian_noise": gaussian_noise, "shot_noise": shot_noise, "impulse_noise": impulse_noise,
        "defocus_blur": defocus_blur, "glass_blur": glass_blur, "motion_blur": motion_blur, "zoom_blur": zoom_blur,
        "snow": snow, "frost": frost, "fog": fog, "brightness": brightness, "contrast": contrast, "elastic": elastic,
        "pixelate": pixelate, "jpeg": jpeg,
    }
)  # fmt: skip
"""The fifteen of the benchmark, in its order."""
