"""What changes of images are made of: numbers drawn for each image, pixels moved, blurs. Borders are mirrors."""

import math
from collections import defaultdict
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.photometric import blur as gaussian_blur


def random(x: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), of `shape` for each of the images x [B, ...], drawn on the CPU."""
    return torch.rand(len(x), *shape, generator=generator).to(x.device)


def normal(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers, one for each number of x, drawn on the CPU."""
    return torch.randn(x.shape, generator=generator).to(x.device)


def warp(
    x: Tensor, *, scale: float = 1.0, angle: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Each output pixel from the place scale · R(angle) · place + shift of the image, in half sides, mirrored."""
    angle = x.new_zeros(len(x)) if angle is None else angle
    shift = x.new_zeros(len(x), 2) if shift is None else shift
    c, s = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([c, -s, shift[:, 0]], 1), torch.stack([s, c, shift[:, 1]], 1)], 1)
    places = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, places, mode="bilinear", padding_mode="reflection", align_corners=False)


def displaced(x: Tensor, moved: Tensor) -> Tensor:
    """Each pixel from `moved` [B, H, W, 2] (right, down; pixels) beside it, the border mirrored."""
    identity = F.affine_grid(torch.eye(2, 3).to(x).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    places = identity + 2 * moved / moved.new_tensor([x.shape[-1], x.shape[-2]])
    return F.grid_sample(x, places, mode="bilinear", padding_mode="reflection", align_corners=False)


def streaked(x: Tensor, radius: int, sigma: float, angle: float, ratio: float) -> Tensor:
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


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel convolved with a symmetric kernel [k, k], the border mirrored."""
    half = kernel.shape[0] // 2
    weight = kernel.expand(x.shape[1], 1, *kernel.shape)
    return F.conv2d(F.pad(x, [half] * 4, mode="reflect"), weight, groups=x.shape[1])


def blurred(x: Tensor, sigma: float, cut: float = 4.0) -> Tensor:
    """Blurred by a Gaussian of `sigma` pixels, cut at `cut` of them or at the border."""
    if sigma <= 0:
        return x
    taps = [min(2 * math.ceil(cut * sigma) + 1, 2 * (side - 1) + 1) for side in x.shape[-2:]]
    return gaussian_blur(x, x.new_full((len(x),), sigma), (taps[0], taps[1]))
