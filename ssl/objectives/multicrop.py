"""Views of several sizes through one backbone, as few forward passes as there are runs of equal sizes."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from objectives.contract import pair

if TYPE_CHECKING:
    from backbones import Backbone


def pooled_features(backbone: "Backbone", views: Sequence[Tensor]) -> Tensor:
    """Pooled features [V, B, D] of V views `[B, C, h, w]` (SwAV's multi-crop, Caron et al. 2020, sec. 3.2).

    Neighbouring views of one size share a forward pass and therefore, in a CNN, their batch statistics.
    """
    groups = [torch.cat(list(same)) for _, same in groupby(views, key=lambda view: view.shape[-2:])]
    pooled = torch.cat([backbone(images).pooled for images in groups])
    return pooled.unflatten(0, (len(views), -1))


def multicrop_features(backbone: "Backbone", views: Sequence[Tensor], **masking: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features [V, B, D] of V views, and the cells [G, B, N, D] of the G = 2 global ones, which come first.

    The global views share one forward pass, to which `masking` applies (`visible` or `replaced`, over [G B] images);
    the others follow as in `pooled_features`.
    """
    globals_, locals_ = views[:2], views[2:]
    seen = backbone(torch.cat(list(globals_)), **masking)
    pooled, cells = (x.unflatten(0, (len(globals_), -1)) for x in (seen.pooled, seen.cells))
    return (torch.cat([pooled, pooled_features(backbone, locals_)]) if locals_ else pooled), cells


def crop_size(backbone: "Backbone", wished: tuple[float, float], known: tuple[int, int]) -> tuple[int, int]:
    """The size (height, width) next to the wished one, in pixels, that the backbone's stride divides.

    Where the backbone takes no such size, the next ones on the way to the known size are tried, by steps of the stride
    up to it, and at last that: it is all there is for networks that take one size only.

    Args:
        known: a size that the backbone takes, larger or smaller than the wished one.

    Raises:
        ValueError: the backbone's own, where it does not take the known size either.
    """
    stride = backbone.stride
    h, w = (max(round(side / stride), 1) * stride for side in wished)
    while (h, w) != known:
        try:
            backbone.grid(h, w)
        except ValueError:
            h, w = (min(side + stride, most) for side, most in zip((h, w), known))
        else:
            return h, w
    backbone.grid(*known)
    return known


def local_crop_size(backbone: "Backbone", size: tuple[int, int], wished: int | None, published: int) -> tuple[int, int]:
    """The size (height, width) of local crops in pixels beside global ones of `size`: a side of `wished`, or where that
    is None in proportion to the `published` side beside global ones of 224."""
    proportional = (size[0] * published / 224, size[1] * published / 224)
    return crop_size(backbone, pair(wished) if wished else proportional, size)
