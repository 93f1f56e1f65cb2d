"""Every objective, made small: what tests over all of them start from."""

from typing import Any

import torch
from torch import Tensor, nn

import objectives
from objectives.contract import Objective

OPTIONS: dict[str, dict[str, Any]] = {
    "barlow_twins": {"hidden_dim": 32, "out_dim": 16},
    "byol": {"hidden_dim": 32, "out_dim": 16},
    "dino": {"out_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16, "local_views": 1, "freeze_last_layer": 0.1},
    "distillation": {"teacher": "random:lenet5"},
    "lejepa": {"hidden_dim": 32, "out_dim": 16, "slices": 16, "local_views": 1},
    "mae": {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
    "simsiam": {"hidden_dim": 32, "out_dim": 16, "predictor_dim": 8},
    "supervised": {"classes": 3},
    "vicreg": {"hidden_dim": 32, "out_dim": 16},
}


def make(name: str, backbone: nn.Module, size: int, **options: Any) -> Objective:
    """The objective `name` around a backbone for square images of `size` pixels."""
    return objectives.create(name, backbone, image_size=size, **{**OPTIONS[name], **options})  # type: ignore[arg-type]


def some_views(objective: Objective, batch: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Noise for each view [batch, C, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    channels = objective.backbone.in_channels
    return [torch.randn(batch, channels, *view.size, generator=generator, dtype=dtype) for view in objective.views]


def some_labels(objective: Objective, batch: int) -> tuple[Tensor, ...]:
    """Labels [batch], one in four unknown, for an objective that learns from them."""
    return ((torch.arange(batch) % 4 - 1),) if objective.labelled else ()
