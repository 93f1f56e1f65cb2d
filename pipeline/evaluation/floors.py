"""What a backbone must beat to have learned anything: the raw pixels, and itself before training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backbones
from backbones.contract import Backbone, Features

SIDE = 12


class Pixels(nn.Module):
    """The image as its own feature: shrunk to 12 x 12 and flattened, 432 numbers for RGB."""

    def forward(self, images: Tensor, summaries: bool = False) -> Features:
        """It has no layers to sum up."""
        cells = F.adaptive_avg_pool2d(images, SIDE).flatten(2).transpose(1, 2)  # [B, 144, C]
        return Features(cells.flatten(1), cells)


def pixels() -> nn.Module:
    """The raw-pixel floor, to be evaluated like a backbone."""
    return Pixels()


def untrained(config: Mapping[str, Any], seed: int = 0) -> Backbone:
    """A fresh backbone of this configuration (`Backbone.config`), its weights drawn from the seed; the global random
    state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return backbones.create(**{**config, "pretrained": False})
