"""Optimisers and the two schedules that drive them, as functions of progress = images seen / images planned."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You et al. 2017, algorithm 1).

    Parameter groups with `trust=False` (norms, biases) take plain momentum steps, as in SimCLR and BYOL.

    Args:
        trust_coefficient: η, the local rate is lr · η · ‖w‖ / ‖g + wd·w‖.
        clipped: the local rate is min(η · ‖w‖ / (‖g‖ + wd ‖w‖), lr) instead, the clipping mode of NVIDIA's LARC that
            solo-learn trains its CNNs with.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        clipped: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": True,
                    "trust_coefficient": trust_coefficient, "clipped": clipped}  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad.add(p, alpha=group["weight_decay"])
                if group["trust"]:
                    weight_norm = p.norm()
                    if group["clipped"]:
                        update_norm = p.grad.norm() + group["weight_decay"] * weight_norm
                    else:
                        update_norm = update.norm()
                    usable = (weight_norm > 0) & (update_norm > 0)
                    ratio = group["trust_coefficient"] * weight_norm / update_norm
                    if group["clipped"]:
                        ratio = (ratio / group["lr"]).clamp(max=1) if group["lr"] else torch.zeros_like(ratio)
                    update = update * torch.where(usable, ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update)
                p.add_(state["momentum"], alpha=-group["lr"])


def build(groups: list[dict[str, Any]], config: Config, device: torch.device) -> torch.optim.Optimizer:
    """The configured optimiser over an objective's parameter groups."""
    lr = float(config.lr or 0.0)
    groups = [{**group, "trust": group["wd_scale"] > 0} for group in groups]
    if config.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=config.betas or (0.9, 0.999), fused=True)
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, foreach=True)
    if config.optimiser == "larc":
        return LARS(groups, lr=lr, trust_coefficient=0.02, clipped=True)
    return LARS(groups, lr=lr)


def set_rates(optimiser: torch.optim.Optimizer, config: Config, progress: float, scale: float = 1.0) -> float:
    """Write this step's learning rate, times `scale`, and weight decay into every group; returns the learning rate."""
    lr, peak = scale * learning_rate(config, progress), scale * float(config.lr or 0.0)
    start, end = float(config.weight_decay or 0.0), float(config.weight_decay_end or 0.0)
    decay = end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    for group in optimiser.param_groups:
        group["lr"] = (peak if group.get("constant_lr") else lr) * group["lr_scale"]
        group["weight_decay"] = decay * group["wd_scale"]
    return lr


def learning_rate(config: Config, progress: float) -> float:
    """Linear warm-up, then half a cosine from the peak to `lr_end` times the peak (Loshchilov & Hutter 2017)."""
    peak, warmup, end = float(config.lr or 0.0), float(config.warmup or 0.0), float(config.lr_end or 0.0)
    if progress < warmup:
        return peak * progress / warmup
    along = (progress - warmup) / (1 - warmup)
    return peak * (end + (1 - end) * (1 + math.cos(math.pi * along)) / 2)


def clip(module: nn.Module, largest: float) -> Tensor:
    """The norm of all gradients together, which are scaled down to `largest` where they exceed it (0: never)."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, largest or math.inf, foreach=True)
