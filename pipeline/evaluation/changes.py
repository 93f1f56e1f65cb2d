"""Changes of images that people see through: geometry, occlusion, and the common corruptions at five severities.

All work on float images [B, 3, H, W] in [0, 1], on their device, and give the same for the same generator. The
corruptions follow ImageNet-C (Hendrycks & Dietterich 2019) with the parameters of the authors' code
(hendrycks/robustness, imagenet_c/corruptions.py), scaled by side / 224 where they are pixels. Frost is left out: it
pastes photographs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import product
from types import MappingProxyType

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.photometric import blur as gaussian_blur

SEVERITIES = (1, 2, 3, 4, 5)
Change = Callable[[Tensor, int, torch.Generator], Tensor]
"""(images in [0, 1], severity 1 to 5, CPU generator) to images of the same shape, perhaps out of [0, 1]."""


# --- geometry ---------------------------------------------------------------------------------------------------------


def shift(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Moved by 5, 10, 15, 20, 25 % of the side in a random direction, the border mirrored."""
    angle = 2 * math.pi * _random(x, generator)
    far = 2 * 0.05 * severity
    return _warp(x, shift=torch.stack([angle.cos(), angle.sin()], dim=1) * far)


def crop(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A random square of 80, 60, 40, 25, 15 % of the area, brought to full size: the horse's head."""
    side = math.sqrt((0.8, 0.6, 0.4, 0.25, 0.15)[severity - 1])
    middle = (2 * _random(x, generator, 2) - 1) * (1 - side)
    return _warp(x, scale=side, shift=middle)


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
    sign = torch.where(_random(x, generator) < 0.5, -1.0, 1.0)
    return _warp(x, angle=sign * math.radians((15, 30, 45, 60, 90)[severity - 1]))


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


# --- the common corruptions -----------------------------------------------------------------------------------------


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Normal noise of deviation 0.08 to 0.38, for each channel of each pixel."""
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] * _normal(x, generator)


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
    return _filtered(x, (cover / cover.sum()).to(x))


def glass_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blurred, every pixel taken from a random near one, blurred again. The original swaps neighbours one after the
    other, several times over; here each moves once, by the sum of as many steps."""
    sigma, step, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    ratio = x.shape[-1] / 224
    spread = step * math.sqrt(times / 3) * ratio
    x = _blurred(x, sigma * ratio)
    moved = torch.randn(len(x), *x.shape[-2:], 2, generator=generator).to(x.device) * spread
    return _blurred(_displaced(x, moved), sigma * ratio)


def motion_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Along a line of a random direction, half a Gaussian long."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    angle = math.radians(float(torch.rand((), generator=generator)) * 90 - 45)
    return _streaked(x, radius, sigma, angle, x.shape[-1] / 224)


def zoom_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The mean of the image and of it zoomed in by factors up to 1.1, 1.15, 1.2, 1.25, 1.3."""
    last, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    factors = torch.arange(1, last, step, dtype=torch.float64).tolist()
    return (x + sum(_warp(x, scale=1 / factor) for factor in factors)) / (len(factors) + 1)


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
    rows = round(224 * x.shape[-2] / x.shape[-1])
    noise = torch.randn(len(x), 1, math.ceil(rows / size), math.ceil(224 / size), generator=generator)
    flakes = F.interpolate(mean + deviation * noise.to(x), size=(rows, 224), mode="bilinear", align_corners=True)
    flakes = torch.where(flakes < peak, 0, flakes.clamp(0, 1))
    angle = math.radians(float(torch.rand((), generator=generator)) * 90 - 135)
    flakes = _streaked(flakes, radius, sigma, angle, 1.0)
    flakes = F.interpolate(flakes, size=x.shape[-2:], mode="bilinear", antialias=True)
    grey = torch.einsum("c,bchw->bhw", x.new_tensor([0.299, 0.587, 0.114]), x)[:, None]
    white = torch.maximum(x, 1.5 * grey + 0.5)
    return kept * x + (1 - kept) * white + flakes + flakes.flip(2, 3)


def fog(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """White noise of spectrum 1 / f^decay laid over the image. The original draws it by midpoint displacement."""
    thickness, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    h, w = x.shape[-2:]
    frequency = (torch.fft.fftfreq(h)[:, None] ** 2 + torch.fft.rfftfreq(w) ** 2).sqrt()
    frequency[0, 0] = math.inf
    noise = torch.fft.rfft2(torch.randn(len(x), h, w, generator=generator)) / frequency ** (decay / 2 + 0.5)
    field = torch.fft.irfft2(noise, s=(h, w))
    low, high = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
    field = ((field - low) / (high - low).clamp(min=1e-12))[:, None].to(x)
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + thickness * field) * most / (most + thickness)


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
    0.01; before that, three points moved by up to 0.1, 0.2, 0.02 sides, and the image with them."""
    levels = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    amount, sigma, jitter = levels[severity - 1]
    side = x.shape[-1]
    # In half sides from the middle; the points lie a third of a side from it.
    corners = x.new_tensor([[1, 1], [1, -1], [-1, -1]]) * 2 / 3
    moved_corners = corners + 2 * jitter * (2 * _random(x, generator, 3, 2) - 1)
    ones = x.new_ones(len(x), 3, 1)
    back = torch.linalg.lstsq(torch.cat([moved_corners, ones], 2), corners.expand(len(x), 3, 2)).solution.mT
    places = F.affine_grid(back, list(x.shape), align_corners=False)
    x = F.grid_sample(x, places, mode="bilinear", padding_mode="reflection", align_corners=False)
    noise = 2 * torch.rand(len(x), 2, *x.shape[-2:], generator=generator).to(x.device) - 1
    moved = amount * side * _blurred(noise, sigma * side)
    return _displaced(x, rearrange(moved, "b two h w -> b h w two"))


def pixelate(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Shrunk to 60, 50, 40, 30, 25 % of the side, then enlarged in squares."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    size = [max(1, int(side * share)) for side in x.shape[-2:]]
    return F.interpolate(F.interpolate(x, size=size, mode="area"), size=x.shape[-2:], mode="nearest")


def jpeg(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """JPEG's loss at quality 25, 18, 15, 10, 7: colours halved in size, 8 x 8 cosine transforms rounded by tables of
    the standard's annex K."""
    return jpeg_at(x, (25, 18, 15, 10, 7)[severity - 1])


GEOMETRY: Mapping[str, Change] = MappingProxyType(
    {"shift": shift, "crop": crop, "scale": scale, "rotation": rotation, "occlusion": occlusion,
     "patch_shuffle": patch_shuffle}
)  # fmt: skip
CORRUPTIONS: Mapping[str, Change] = MappingProxyType(
    {
        "gaussian_noise": gaussian_noise, "shot_noise": shot_noise, "impulse_noise": impulse_noise,
        "defocus_blur": defocus_blur, "glass_blur": glass_blur, "motion_blur": motion_blur, "zoom_blur": zoom_blur,
        "snow": snow, "fog": fog, "brightness": brightness, "contrast": contrast, "elastic": elastic,
        "pixelate": pixelate, "jpeg": jpeg,
    }
)  # fmt: skip


def change(images: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """uint8 images [B, 3, H, W] changed, as uint8; the same for the same seed."""
    kind = (GEOMETRY | CORRUPTIONS)[name]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    changed = kind(images.float() / 255, severity, generator)
    return (changed.clamp(0, 1) * 255).round().to(torch.uint8)


# --- what they are made of ------------------------------------------------------------------------------------------


def _random(x: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(len(x), *shape, generator=generator).to(x.device)


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(x.device)


def _grid(x: Tensor) -> tuple[int, int]:
    return min(8, x.shape[-2]), min(8, x.shape[-1])


def _warp(
    x: Tensor, *, scale: float = 1.0, angle: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Each output pixel from the place scale · R(angle) · place + shift of the image, in half sides, mirrored."""
    angle = x.new_zeros(len(x)) if angle is None else angle
    shift = x.new_zeros(len(x), 2) if shift is None else shift
    c, s = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([c, -s, shift[:, 0]], 1), torch.stack([s, c, shift[:, 1]], 1)], 1)
    places = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, places, mode="bilinear", padding_mode="reflection", align_corners=False)


def _displaced(x: Tensor, moved: Tensor) -> Tensor:
    """Each pixel from `moved` [B, H, W, 2] (right, down; pixels) beside it, the border mirrored."""
    identity = F.affine_grid(torch.eye(2, 3).to(x).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    places = identity + 2 * moved / moved.new_tensor([x.shape[-1], x.shape[-2]])
    return F.grid_sample(x, places, mode="bilinear", padding_mode="reflection", align_corners=False)


def _streaked(x: Tensor, radius: int, sigma: float, angle: float, ratio: float) -> Tensor:
    """Blurred along a line in one direction, by half a Gaussian of `sigma` up to 2 radius; all times `ratio` pixels."""
    at = torch.arange(0, 2 * radius + 1, dtype=torch.float64)
    weights = (-(at**2) / (2 * sigma**2)).exp()
    # Read between pixels, a point of the line gives shares of its weight to four of them; near points, to the same.
    taps: dict[tuple[int, int], float] = defaultdict(float)
    for distance, weight in zip((at * ratio).tolist(), (weights / weights.sum()).tolist()):
        (down, row), (right, column) = (divmod(distance * part(angle), 1) for part in (math.sin, math.cos))
        for below, beside in product((0, 1), repeat=2):
            share = abs(1 - below - row) * abs(1 - beside - column)
            taps[int(down) + below, int(right) + beside] += share * weight
    reach = max(abs(move) for tap in taps for move in tap)
    rows, columns = (_mirrored(side, reach).to(x.device) for side in x.shape[-2:])
    padded = x[..., rows, :][..., columns]
    out = torch.zeros_like(x)
    for (down, right), weight in taps.items():
        y, z = reach + down, reach + right
        out.add_(padded[..., y : y + x.shape[-2], z : z + x.shape[-1]], alpha=weight)
    return out


def _mirrored(side: int, reach: int) -> Tensor:
    """The index of each pixel of a side, `reach` of them beyond either end, where the border is a mirror."""
    at = torch.arange(-reach, side + reach) % (2 * side)
    return torch.minimum(at, 2 * side - 1 - at)


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel convolved with a symmetric kernel [k, k], the border mirrored."""
    half = kernel.shape[0] // 2
    weight = kernel.expand(x.shape[1], 1, *kernel.shape)
    return F.conv2d(F.pad(x, [half] * 4, mode="reflect"), weight, groups=x.shape[1])


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Blurred by a Gaussian of `sigma` pixels, cut at four of them or at the border."""
    if sigma <= 0:
        return x
    taps = [min(2 * math.ceil(4 * sigma) + 1, 2 * (side - 1) + 1) for side in x.shape[-2:]]
    return gaussian_blur(x, x.new_full((len(x),), sigma), (taps[0], taps[1]))


_LUMINANCE = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
    ], dtype=torch.float32,
)  # fmt: skip
_CHROMINANCE = torch.full((8, 8), 99.0)
_CHROMINANCE[:4, :4] = torch.tensor(
    [[17.0, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
)  # fmt: skip
_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_FREQUENCY, _PLACE = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
_COSINES = torch.where(_FREQUENCY == 0, 0.5**0.5, 1.0) * 0.5 * ((2 * _PLACE + 1) * _FREQUENCY * math.pi / 16).cos()


def jpeg_at(x: Tensor, quality: int) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as JPEG of this quality (below 50, as the Independent JPEG Group scales its tables)
    and 4:2:0 colour keeps them."""
    h, w = x.shape[-2:]
    padded = F.pad(x * 255, [0, -w % 16, 0, -h % 16], mode="replicate")
    ycc = torch.einsum("ij,bjhw->bihw", _TO_YCC.to(x), padded)
    factor = 5000 / quality if quality < 50 else 200 - 2 * quality
    luma = _quantised(ycc[:, :1] - 128, _table(_LUMINANCE, factor).to(x))
    chroma = _quantised(F.avg_pool2d(ycc[:, 1:], 2), _table(_CHROMINANCE, factor).to(x))
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    rgb = torch.einsum("ij,bjhw->bihw", _TO_YCC.inverse().to(x), torch.cat([luma + 128, chroma], dim=1))
    return rgb[..., :h, :w] / 255


def _table(table: Tensor, factor: float) -> Tensor:
    return ((table * factor + 50) / 100).floor().clamp(1, 255)


def _quantised(x: Tensor, table: Tensor) -> Tensor:
    cosines = _COSINES.to(x)
    blocks = rearrange(x, "b c (h p) (w q) -> b c h w p q", p=8, q=8)
    spectrum = ((cosines @ blocks @ cosines.T) / table).round() * table
    return rearrange(cosines.T @ spectrum @ cosines, "b c h w p q -> b c (h p) (w q)")
