"""The pass of an encoder that sees a part of each image while it trains, and will be used on whole ones."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from objectives.distributed import world_size

if TYPE_CHECKING:
    from backbones import Backbone
    from backbones.contract import Features

WHOLE = 16  # images of each batch, over all ranks, that batch norms see whole


def encode(backbone: "Backbone", images: Tensor, **hidden: Any) -> "Features":
    """`backbone(images, **hidden)`, with `visible` or `replaced` given; running statistics are those of whole images.

    A convolution beside hidden cells sums over fewer inputs, so that the running statistics of a masked network are
    far too small for a whole image, and the more so the deeper it is: they would drown its features. While it trains,
    a masked pass therefore normalises by its own batch, as ever, and leaves running statistics as they are; they follow
    a pass without gradient over `WHOLE` images, the first of each rank. Without batch norm there is but the one pass.
    """
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        features: Features = backbone(images, **hidden)
    finally:
        for norm in norms:
            norm.track_running_stats = True
    if norms:
        with torch.no_grad():
            backbone(images[: -(-WHOLE // world_size())])
    return features
