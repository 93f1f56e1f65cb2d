"""What JPEG loses, computed on the device: no file is written or read."""

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

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
