"""Hyper-parameters as data: one recipe per (objective, backbone family, data scale), each with its source.

A recipe fills whatever the user left open. `base_lr` is the peak learning rate at a global batch of 256 and scales
linearly with the batch (Goyal et al. 2017); `warmup`, `teacher_temp_warmup` and `freeze_last_layer` are shares of the
run, so that a shorter run keeps the published shape. This module imports no torch: `--help` reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

SCALES = MappingProxyType(
    {
        "embedded": "the generated data set, on 2 CPU cores",
        "thumbnails": "images of at most 48 pixels, such as CIFAR",
        "small": "fewer than 200,000 images",
        "large": "200,000 images or more",
    }
)


@dataclass(frozen=True)
class Recipe:
    """What a bare command trains with.

    Args:
        source: the publication, or the measurement, the numbers come from.
        epochs, batch_size, image_size: length, global batch and pixels per side.
        optimiser: "adamw", "sgd" or "lars".
        base_lr: peak learning rate per 256 images of global batch.
        weight_decay, weight_decay_end: cosine from the first to the second (None: constant).
        warmup: share of the run over which the learning rate rises linearly.
        lr_end: learning rate at the end as a share of the peak.
        clip: largest norm of the gradient of all parameters together; None clips nothing.
        drop_path: stochastic depth of the student (Huang et al. 2016), for backbones that have it.
        options: keyword options of the objective, all of them.
    """

    source: str
    epochs: int
    batch_size: int
    image_size: int
    optimiser: str
    base_lr: float
    weight_decay: float
    weight_decay_end: float | None = None
    warmup: float = 0.1
    lr_end: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    drop_path: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def _dino(**changes: Any) -> dict[str, Any]:
    """DINO's options as published for ViT-S/16, 100 epochs (Caron et al. 2021, README of the authors' code)."""
    published = {
        "global_scale": (0.4, 1.0),
        "local_scale": (0.05, 0.4),
        "local_views": 8,
        "local_size": None,
        "out_dim": 65536,
        "hidden_dim": 2048,
        "bottleneck_dim": 256,
        "student_temp": 0.1,
        "teacher_temp": 0.04,
        "teacher_temp_start": 0.04,
        "teacher_temp_warmup": 0.0,
        "centre_momentum": 0.9,
        "ema_start": 0.996,
        "ema_end": 1.0,
        "freeze_last_layer": 0.01,
        "norm_last_layer": True,
        "head_norm": "none",
    }
    return published | changes


def _mae(**changes: Any) -> dict[str, Any]:
    """MAE's options as published (He et al. 2022, the authors' PRETRAIN.md)."""
    published = {
        "scale": (0.2, 1.0),
        "mask_ratio": 0.75,
        "decoder_width": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
        "normalise_targets": True,
    }
    return published | changes


RECIPES: Mapping[tuple[str, str, str], Recipe] = MappingProxyType(
    {
        ("dino", "vit", "large"): Recipe(
            "DINO ViT-S/16 on ImageNet-1k, 100 epochs: k-NN 69.3, linear 74.0 (facebookresearch/dino, README.md)",
            epochs=100,
            batch_size=512,
            image_size=224,
            optimiser="adamw",
            base_lr=5e-4,
            weight_decay=0.04,
            weight_decay_end=0.4,
            lr_end=2e-3,
            clip=3.0,
            drop_path=0.1,
            options=_dino(),
        ),
        ("dino", "cnn", "large"): Recipe(
            "DINO ResNet-50 on ImageNet-1k, 100 epochs (facebookresearch/dino, README.md; accuracy not given)",
            epochs=100,
            batch_size=512,
            image_size=224,
            optimiser="sgd",
            base_lr=0.03,
            weight_decay=1e-4,
            clip=3.0,
            options=_dino(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14)),
        ),
        ("dino", "vit", "small"): Recipe(
            "DINO ViT-S/16 on Imagenette, 200 epochs: k-NN 83.8, linear 86.1 (rbalestr-lab/stable-pretraining, "
            "benchmarks/imagenet10); out_dim 2048 from lightly-ai/lightly imagenette_benchmark.py; weight-decay ramp, "
            "clip and frozen last layer from facebookresearch/dino",
            epochs=200,
            batch_size=128,
            image_size=160,
            optimiser="adamw",
            base_lr=1e-3,
            weight_decay=0.04,
            weight_decay_end=0.4,
            warmup=0.05,
            lr_end=2e-3,
            clip=3.0,
            options=_dino(
                out_dim=2048, local_views=6, teacher_temp=0.07, teacher_temp_warmup=0.05, freeze_last_layer=0.005
            ),
        ),
        ("dino", "cnn", "small"): Recipe(
            "DINO ResNet-18 on Imagenette at 128 px, 200 epochs: k-NN 87.3 (lightly-ai/lightly, "
            "imagenette_benchmark.py)",
            epochs=200,
            batch_size=128,
            image_size=128,
            optimiser="sgd",
            base_lr=0.06,
            weight_decay=5e-4,
            warmup=0.0,
            options=_dino(
                out_dim=2048,
                local_views=6,
                local_size=64,
                ema_start=0.99,
                ema_end=0.99,
                freeze_last_layer=0.0,
                head_norm="batch",
            ),
        ),
        ("dino", "vit", "thumbnails"): Recipe(
            "DINO with a small ViT on CIFAR-10, 200 epochs (hananshafi/vits-for-small-scale-datasets, train_ssl.py; "
            "only fine-tuned accuracy published)",
            epochs=200,
            batch_size=512,
            image_size=32,
            optimiser="adamw",
            base_lr=1e-4,
            weight_decay=0.04,
            weight_decay_end=0.4,
            warmup=0.15,
            lr_end=2e-3,
            clip=3.0,
            options=_dino(
                global_scale=(0.7, 1.0),
                local_scale=(0.2, 0.5),
                local_size=16,
                out_dim=1024,
                teacher_temp=0.07,
                teacher_temp_warmup=0.05,
                freeze_last_layer=0.005,
                norm_last_layer=False,
            ),
        ),
        ("dino", "cnn", "thumbnails"): Recipe(
            "DINO ResNet-18 on CIFAR-10, 200 epochs, batch 128: k-NN 84.0 (lightly-ai/lightly, cifar10_benchmark.py)",
            epochs=200,
            batch_size=128,
            image_size=32,
            optimiser="sgd",
            base_lr=0.12,
            weight_decay=5e-4,
            warmup=0.0,
            options=_dino(
                global_scale=(0.08, 1.0),
                local_views=0,
                out_dim=2048,
                ema_start=0.99,
                ema_end=0.99,
                freeze_last_layer=0.0,
                head_norm="batch",
            ),
        ),
        ("dino", "vit", "embedded"): Recipe(
            "chosen here for 2 CPU cores, its last epoch not yet measured: a teacher that is sharp (0.02, as "
            "the authors advise where the loss stalls: facebookresearch/dino issue 43) and follows fast (EMA 0.9)",
            epochs=3,
            batch_size=32,
            image_size=64,
            optimiser="adamw",
            base_lr=4e-3,
            weight_decay=0.04,
            lr_end=2e-3,
            clip=3.0,
            options=_dino(local_views=0, out_dim=2048, teacher_temp=0.02, teacher_temp_start=0.02, ema_start=0.9),
        ),
        ("mae", "vit", "large"): Recipe(
            "MAE ViT-B/L/H on ImageNet-1k, 800 epochs: fine-tuning 83.3 / 85.5 / – (facebookresearch/mae, PRETRAIN.md)",
            epochs=800,
            batch_size=4096,
            image_size=224,
            optimiser="adamw",
            base_lr=1.5e-4,
            weight_decay=0.05,
            warmup=0.05,
            betas=(0.9, 0.95),
            options=_mae(),
        ),
        ("mae", "cnn", "large"): Recipe(
            "SparK ResNet-50 on ImageNet-1k: mask ratio, crop, schedule and clip (keyu-tian/SparK, arg_util.py); "
            "MAE's decoder and AdamW in place of SparK's UNet and LAMB, unpublished",
            epochs=800,
            batch_size=4096,
            image_size=224,
            optimiser="adamw",
            base_lr=2e-4,
            weight_decay=0.04,
            weight_decay_end=0.2,
            warmup=0.025,
            lr_end=1e-3,
            betas=(0.9, 0.95),
            clip=5.0,
            options=_mae(scale=(0.67, 1.0), mask_ratio=0.6),
        ),
        ("mae", "vit", "small"): Recipe(
            "MAE ViT-S/16 on Imagenette, 200 epochs: k-NN 72.1, linear 84.1 (rbalestr-lab/stable-pretraining, "
            "benchmarks/imagenet10)",
            epochs=200,
            batch_size=128,
            image_size=160,
            optimiser="adamw",
            base_lr=1e-3,
            weight_decay=0.05,
            warmup=0.05,
            betas=(0.9, 0.95),
            options=_mae(decoder_width=384, decoder_depth=4, decoder_heads=6),
        ),
        ("mae", "cnn", "small"): Recipe(
            "the ImageNet-scale recipe with the decoder and schedule of ViT-S on Imagenette; unpublished",
            epochs=200,
            batch_size=128,
            image_size=160,
            optimiser="adamw",
            base_lr=1e-3,
            weight_decay=0.05,
            warmup=0.05,
            betas=(0.9, 0.95),
            clip=5.0,
            options=_mae(scale=(0.67, 1.0), mask_ratio=0.6, decoder_width=384, decoder_depth=4, decoder_heads=6),
        ),
        ("mae", "vit", "thumbnails"): Recipe(
            "MAE ViT-S/4 on CIFAR, 1000 epochs (vturrisi/solo-learn, scripts/pretrain/cifar/mae.yaml; "
            "no accuracy published)",
            epochs=1000,
            batch_size=256,
            image_size=32,
            optimiser="adamw",
            base_lr=2e-4,
            weight_decay=0.05,
            warmup=0.01,
            betas=(0.9, 0.95),
            options=_mae(decoder_heads=16),
        ),
        ("mae", "cnn", "thumbnails"): Recipe(
            "the recipe of ViT-S/4 on CIFAR (vturrisi/solo-learn) with SparK's mask ratio and clip; unpublished",
            epochs=1000,
            batch_size=256,
            image_size=32,
            optimiser="adamw",
            base_lr=2e-4,
            weight_decay=0.05,
            warmup=0.01,
            betas=(0.9, 0.95),
            clip=5.0,
            options=_mae(mask_ratio=0.6, decoder_width=256, decoder_depth=4, decoder_heads=8),
        ),
    }
)

OBJECTIVES = tuple(sorted({objective for objective, _, _ in RECIPES}))


def scale_of(address: str, images: int, side: int) -> str:
    """The data scale of a set: a key of `SCALES`.

    Args:
        address: what `--data` said.
        images: how many training images there are.
        side: their median shorter side, in pixels.
    """
    if address.split(":")[0] == "embedded":
        return "embedded"
    if side <= 48:
        return "thumbnails"
    return "small" if images < 200_000 else "large"


def find(objective: str, family: str, scale: str) -> Recipe:
    """The recipe for an objective ("dino"), a backbone family ("cnn" or "vit") and a data scale.

    Raises:
        KeyError: where none of the four scales has a recipe for the pair.
    """
    order = {"embedded": ("embedded", "small"), "thumbnails": ("thumbnails", "small")}.get(scale, (scale,))
    for candidate in order:
        if (objective, family, candidate) in RECIPES:
            return RECIPES[objective, family, candidate]
    raise KeyError(f"no recipe for {objective} on a {family} at scale {scale}")


def options_of(objective: str) -> dict[str, Any]:
    """Every option of an objective with its published value: what `--options.*` accepts."""
    return dict(RECIPES[objective, "vit", "large"].options)
