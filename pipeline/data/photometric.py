"""Photometric changes of views, on the training device: each sample has its own, drawn from the hash that draws
its crops.

Operations follow `torchvision.transforms.v2.functional` on floats in [0, 1]; what is drawn, and how often,
follows `RandomApply([ColorJitter])`, `RandomGrayscale`, `GaussianBlur` and `RandomSolarize` as the recipes of
SimCLR, BYOL and DINO combine them: jitter (its four operations in random order), grayscale, blur, solarise,
normalise.

Views of one size go through together, so DINO's ten views are two batches. Brightness, contrast and
saturation are one and the same blend, x <- clamp(t + f (x - t)), with black, the image's mean grey, or the
pixel's grey as t.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data import crops

if TYPE_CHECKING:
    from objectives.views import Photometric, View

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, torchvision's digits
SOLARIZE_FROM = 0.5  # between levels 127 and 128 of 255, so that no rounding moves the published threshold of 128


class Draws(NamedTuple):
    """What happens to each of B samples; numpy, on the host, so that no decision waits for a device."""

    order: np.ndarray  # [B, 4] int64: which jitter operation comes first, second ...
    factors: np.ndarray  # [B, 4] float32: brightness, contrast, saturation (1 = none), hue in turns (0 = none)
    gray: np.ndarray  # [B] bool
    sigma: np.ndarray  # [B] float32, pixels; 0 = no blur
    solarize: np.ndarray  # [B] bool


def draw(photometric: "Photometric | None", keys: np.ndarray) -> Draws:
    """Parameters for samples with stream keys [B]. None draws nothing."""
    b, p = len(keys), photometric
    factors = np.tile(np.array([1, 1, 1, 0], np.float32), (b, 1))
    none = np.zeros(b, np.bool_)
    if p is None:
        return Draws(np.tile(np.arange(4), (b, 1)), factors, none, none.astype(np.float32), none.copy())
    u = np.stack([crops.uniforms(keys, k) for k in range(13)], axis=1)
    jittered = u[:, 0] < p.jitter_p
    for op, strength in enumerate((p.brightness, p.contrast, p.saturation)):
        low, high = max(0.0, 1 - strength), 1 + strength
        factors[jittered, op] = (low + (high - low) * u[:, 1 + op])[jittered]
    factors[jittered, HUE] = (p.hue * (2 * u[:, 4] - 1))[jittered]
    low, high = p.blur_sigma
    return Draws(
        order=np.argsort(u[:, 5:9], axis=1),
        factors=factors,
        gray=u[:, 9] < p.gray_p,
        sigma=np.where(u[:, 10] < p.blur_p, low + (high - low) * u[:, 11], 0).astype(np.float32),
        solarize=u[:, 12] < p.solarize_p,
    )


def kernel_size(side: int) -> int:
    """Width of the Gaussian's window: a tenth of the image and odd, 23 at 224 pixels as SimCLR's 10 % is written."""
    return max(1, int(side * 0.1) // 2 * 2 + 1)


def grey(x: Tensor) -> Tensor:
    """[B, 3, h, w] to [B, 1, h, w]; with other channel counts, the mean of the channels."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return GREY[0] * x[:, 0:1] + GREY[1] * x[:, 1:2] + GREY[2] * x[:, 2:3]


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """RGB [B, 3, h, w] in [0, 1] with hue moved by `turns` [B], value and saturation kept.

    HSV's inverse as one formula, c_n = V - C clamp(min(k, 4 - k), 0, 1) with k = (n + 6 H) mod 6 and n = 5, 3, 1.
    """
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    inverse = torch.where(chroma > 0, chroma, 1).reciprocal_()
    sixths = torch.where(
        value == r, (g - b) * inverse, torch.where(value == g, (b - r) * inverse + 2, (r - g) * inverse + 4)
    )
    sixths = sixths + 6 * turns.view(-1, 1, 1, 1)
    n = torch.arange(5.0, 0.0, -2.0, device=x.device).view(1, 3, 1, 1)
    k = (sixths + n).remainder_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur(x: Tensor, sigma: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] blurred by each sample's Gaussian: `sigma` [B] > 0 pixels, `size` odd taps, edges mirrored."""
    b, c, h, w = x.shape
    flat = x.reshape(1, b * c, h, w)
    for axis, taps in ((2, size[0]), (3, size[1])):
        half = taps // 2
        if half == 0:
            continue
        at = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
        weights = torch.exp(-0.5 * (at / sigma.view(-1, 1)) ** 2)
        weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(c, 0)
        shape = [b * c, 1, 1, 1]
        shape[axis] = taps
        pad = (0, 0, half, half) if axis == 2 else (half, half, 0, 0)
        flat = F.conv2d(F.pad(flat, pad, mode="reflect"), weights.view(shape), groups=b * c)
    return flat.view(b, c, h, w)


class Photometrics:
    """Turns uint8 views into what a network reads: changed photometrically, normalised, float32.

    Args:
        views: one entry for each view, in the loader's order.
        seed: the run's seed; with epoch and image index it fixes every draw.
        mean, std: for each channel, of images in [0, 1].
    """

    def __init__(
        self, views: Sequence["View"], seed: int, mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:  # fmt: skip
        self.views, self.seed, self.mean, self.std = tuple(views), seed, tuple(mean), tuple(std)

    def draws(self, view: int, index: np.ndarray, epoch: int) -> Draws:
        """What view number `view` of images `index` [B] goes through in `epoch`."""
        keys = crops.sample_keys(crops.stream(crops.PHOTOMETRIC, self.seed, epoch), index, view)
        return draw(self.views[view].photometric, keys)

    def __call__(self, views: Sequence[Tensor], index: Tensor, epoch: int) -> list[Tensor]:
        """Each view uint8 [B, C, h, w] on any device, `index` [B] (best on the host) to float32 [B, C, h, w]."""
        if len(views) != len(self.views):
            raise ValueError(f"got {len(views)} views, but {len(self.views)} were declared")
        for view in views:
            if view.dtype != torch.uint8:
                raise ValueError(f"a view is {view.dtype}: photometric changes start from uint8")
            if view.shape[1] != len(self.mean):
                raise ValueError(f"a view has {view.shape[1]} channels, but there are means for {len(self.mean)}")
        host = index.cpu().numpy()
        changed: list[Tensor] = [torch.empty(0)] * len(views)
        for shape in dict.fromkeys((v.shape, v.device) for v in views):
            group = [n for n, v in enumerate(views) if (v.shape, v.device) == shape]
            drawn = [self.draws(n, host, epoch) for n in group]
            if views[group[0]].device.type == "cpu":
                for n, draws in zip(group, drawn):
                    changed[n] = self._on_cpu(views[n], draws)
            else:
                together = Draws(*(np.concatenate(column) for column in zip(*drawn)))
                parts = self._on_device(torch.cat([views[n] for n in group]), together).split(len(host))
                for n, part in zip(group, parts):
                    changed[n] = part
        return changed

    def _on_cpu(self, images: Tensor, draws: Draws) -> Tensor:
        from pipeline.data.photometric_cpu import change

        scale = (1 / np.array(self.std)).astype(np.float32)
        offset = (-np.array(self.mean) / np.array(self.std)).astype(np.float32)
        window = kernel_size(images.shape[2]), kernel_size(images.shape[3])
        return change(images, draws, window, scale, offset)

    def _on_device(self, images: Tensor, draws: Draws) -> Tensor:
        x = apply(images.float().div_(255), draws)
        mean, std = (
            upload(np.asarray(values, np.float32), x.device).view(1, -1, 1, 1) for values in (self.mean, self.std)
        )
        return x.sub_(mean).div_(std)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device; a GPU fetches it when it gets there, and nothing waits."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def apply(x: Tensor, draws: Draws) -> Tensor:
    """`x` [B, C, h, w] float in [0, 1], changed as `draws` says; without colour operations unless C = 3."""
    device, colour = x.device, x.shape[1] == 3
    factors = np.take_along_axis(draws.factors, draws.order, axis=1)  # [B, 4], by place
    blends = (draws.order != HUE) & (factors != 1) & (colour | (draws.order != SATURATION))
    kinds = np.stack([np.where(blends, factors, 1), draws.order == CONTRAST, draws.order == SATURATION])
    on_device = upload(kinds.astype(np.float32), device)[..., None, None, None]
    for place in range(4):
        if blends[:, place].any():
            factor, contrast, saturation = on_device[:, :, place]
            g = grey(x)
            target = contrast * g.mean((2, 3), keepdim=True) + saturation * g
            x = torch.lerp(target, x, factor).clamp_(0, 1)
        shifted = np.flatnonzero((draws.order[:, place] == HUE) & (factors[:, place] != 0))
        if colour and len(shifted):
            at = upload(shifted, device)
            x[at] = shift_hue(x[at], upload(factors[shifted, place], device))
    if colour and draws.gray.any():
        at = upload(np.flatnonzero(draws.gray), device)
        x[at] = grey(x[at]).expand(-1, 3, -1, -1)
    if draws.sigma.any():
        blurred = np.flatnonzero(draws.sigma)
        at = upload(blurred, device)
        window = kernel_size(x.shape[2]), kernel_size(x.shape[3])
        x[at] = blur(x[at], upload(draws.sigma[blurred], device), window)
    if draws.solarize.any():
        at = upload(np.flatnonzero(draws.solarize), device)
        part = x[at]
        x[at] = torch.where(part >= SOLARIZE_FROM, 1 - part, part)
    return x
