"""Views of several sizes through one backbone, as few forward passes as there are runs of equal sizes."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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


def crop_size(backbone: "Backbone", height: float, width: float) -> tuple[int, int]:
    """The size (height, width) next to the wished one, in pixels, that the backbone's stride divides.

    Where the backbone is too deep for so small a crop, the next larger multiples of the stride are tried.

    Raises:
        ValueError: the backbone's own, where it accepts none of them.
    """
    sides = [max(round(side / backbone.stride), 1) for side in (height, width)]
    for extra in range(8):
        h, w = (round((side + extra) * backbone.stride) for side in sides)
        try:
            backbone.grid(h, w)
        except ValueError as error:
            reason = error
        else:
            return h, w
    raise reason
