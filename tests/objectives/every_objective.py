"""Every objective, made small: what tests over all of them start from."""

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import backbones
import objectives
from objectives.contract import Objective

HEAD = {"out_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16, "local_views": 1}

OPTIONS: dict[str, dict[str, Any]] = {
    "barlow_twins": {"hidden_dim": 32, "out_dim": 16},
    "byol": {"hidden_dim": 32, "out_dim": 16},
    "data2vec": {},
    "dino": {**HEAD, "freeze_last_layer": 0.1},
    "dinov2": {**HEAD, "freeze_last_layer": 0.1},
    "distillation": {"teacher": "random:lenet5"},
    "gram": {},
    "ibot": {**HEAD, "freeze_last_layer": 0.1},
    "ijepa": {"min_keep": 1, "predictor_width": 16, "predictor_depth": 1, "predictor_heads": 2},
    "lejepa": {"hidden_dim": 32, "out_dim": 16, "slices": 16, "local_views": 1},
    "mae": {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
    "moco_v2": {"hidden_dim": 32, "out_dim": 16, "queue_size": 16},
    "moco_v3": {"hidden_dim": 32, "out_dim": 16},
    "msn": {"n_prototypes": 16, "hidden_dim": 32, "embedding_dim": 16, "focal_views": 1},
    "simclr": {"hidden_dim": 32, "out_dim": 16},
    "simmim": {"mask_unit": 8},
    "simsiam": {"hidden_dim": 32, "out_dim": 16, "predictor_dim": 8},
    "spark": {"decoder_width": 32},
    "supervised": {"classes": 3},
    "swav": {"hidden_dim": 32, "out_dim": 16, "prototypes": 24, "local_views": 1, "freeze_prototypes": 0.0},
    "vicreg": {"hidden_dim": 32, "out_dim": 16},
}


def save_run(folder: Path, objective: Objective, name: str, size: int) -> str:
    """A run folder with one checkpoint of an objective made by `make`; its path."""
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in OPTIONS[name].items()}
    config = {"objective": name, "backbone": objective.backbone.name, "image_size": size, "options": options}
    (folder / "checkpoints").mkdir(parents=True)
    state = {"objective": objective.state_dict(), "config": yaml.safe_dump(config), "images_seen": 64}
    torch.save(state, folder / "checkpoints" / f"{64:012d}.pt")
    return str(folder)


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


def step_in_bf16(name: str, backbone: str, size: int, device: str, folder: Path) -> tuple[Objective, dict[str, Tensor]]:
    """The objective and its scalars after a step on `device` under autocast, from noise."""
    torch.manual_seed(0)
    kind, options = objectives.objective(name), {}
    pool = kind.pool if kind.pool != "cls" or backbone.startswith("vit") else None
    network = backbones.create(backbone, image_size=size, pool=pool)
    if kind.continues:
        options = {"checkpoint": save_run(folder, make("dino", copy.deepcopy(network), size), "dino", size)}
    objective = make(name, network, size, **options).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(objective.parameters(), 1e-3)
    views = [view.to(device) for view in some_views(objective, 8)]
    labels = [label.to(device) for label in some_labels(objective, 8)]
    with torch.autocast(device, torch.bfloat16):
        loss, scalars = objective(views, 0.5, *labels)
    loss.backward()
    objective.after_backward(0.5)
    optimiser.step()
    objective.after_step(0.5)
    return objective, {"loss": loss.detach(), **scalars}
