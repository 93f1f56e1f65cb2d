"""Recipes of iBOT.

Nobody published good numbers of it on small data: the only ones (k-NN 43.3 on Imagenette, rbalestr-lab/
stable-pretraining) came of no local crops, random masks on every view, two heads, and neither clipping, nor a
frozen last layer, nor a weight-decay ramp. The small recipes here are DINO's, which work there, with the published
masks.
"""

from typing import Any

from pipeline.recipes import dino
from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """iBOT's options as published for ViT-S/16, 800 epochs (Zhou et al. 2022, README of the authors' code)."""
    published = {
        "global_scale": (0.25, 1.0),
        "local_scale": (0.05, 0.25),
        "local_views": 10,
        "local_size": None,
        "blur": (1.0, 0.1, 0.5),
        "cell_weight": 1.0,
        "masked_share": 0.5,
        "mask_ratio": (0.1, 0.5),
        "out_dim": 8192,
        "hidden_dim": 2048,
        "bottleneck_dim": 256,
        "student_temp": 0.1,
        "teacher_temp": 0.07,
        "teacher_temp_start": 0.04,
        "teacher_temp_warmup": 0.0375,
        "centre_momentum": 0.9,
        "ema_start": 0.996,
        "ema_end": 1.0,
        "freeze_last_layer": 0.00125,
        "norm_last_layer": False,
        "head_norm": "none",
    }
    return published | changes


def of_dino(family: str, scale: str) -> dict[str, Any]:
    """The options of DINO's recipe with iBOT's masks."""
    return options(**dino.RECIPES[family, scale].options)


RECIPES = {
    ("vit", "large"): Recipe(
        "iBOT ViT-S/16 on ImageNet-1k, 800 epochs: k-NN 75.2, linear 77.9 (bytedance/ibot, README.md, with a clip "
        "for each parameter alone)",
        epochs=800,
        batch_size=1024,
        image_size=224,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.0125,
        lr_end=5e-4,
        clip=3.0,
        drop_path=0.1,
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "optimiser, crops and temperature of DINO ResNet-50 on ImageNet-1k (facebookresearch/dino, README.md, with "
        "a clip for each parameter alone), masks and 8192 shared prototypes of iBOT ViT-S/16; unpublished",
        epochs=100,
        batch_size=512,
        image_size=224,
        optimiser="sgd",
        base_lr=0.03,
        weight_decay=1e-4,
        clip=3.0,
        options=of_dino("cnn", "large") | {"out_dim": 8192},
    ),
    ("vit", "small"): Recipe(
        "the recipe of DINO ViT-S/16 on Imagenette (rbalestr-lab/stable-pretraining, benchmarks/imagenet10), its "
        "longer warm-up included, masks of iBOT ViT-S/16, drop path and clip (there for each parameter alone) of both "
        "papers; unpublished",
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
        drop_path=0.1,
        options=of_dino("vit", "small"),
    ),
    ("cnn", "small"): Recipe(
        "the recipe of DINO ResNet-18 on Imagenette (lightly-ai/lightly, imagenette_benchmark.py), masks of iBOT "
        "ViT-S/16, clip (there for each parameter alone) of facebookresearch/dino; unpublished",
        epochs=200,
        batch_size=256,
        image_size=128,
        optimiser="sgd",
        base_lr=0.06,
        weight_decay=5e-4,
        warmup=0.0,
        clip=3.0,
        options=of_dino("cnn", "small"),
    ),
    ("vit", "thumbnails"): Recipe(
        "the recipe of DINO with a small ViT on CIFAR-10 (hananshafi/vits-for-small-scale-datasets, train_ssl.py, with "
        "a clip for each parameter alone), masks of iBOT ViT-S/16; unpublished",
        epochs=200,
        batch_size=512,
        image_size=32,
        optimiser="adamw",
        base_lr=1e-4,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.15,
        lr_end=5e-3,
        clip=3.0,
        options=of_dino("vit", "thumbnails"),
    ),
    ("cnn", "thumbnails"): Recipe(
        "the recipe of DINO ResNet-18 on CIFAR-10 (lightly-ai/lightly, cifar10_benchmark.py), masks of iBOT ViT-S/16, "
        "clip (there for each parameter alone) of facebookresearch/dino; unpublished",
        epochs=200,
        batch_size=128,
        image_size=32,
        optimiser="sgd",
        base_lr=0.12,
        weight_decay=5e-4,
        warmup=0.0,
        clip=3.0,
        options=of_dino("cnn", "thumbnails"),
    ),
    **embedded(options(local_views=0, out_dim=256, ema_start=0.9, head_norm="batch"), "vit"),
    **embedded(
        options(local_views=0, out_dim=256, ema_start=0.99, head_norm="batch"),
        "cnn",
        but="for a teacher that follows slower: with an EMA from 0.9 it finds all prototypes alike (ResNet-20 "
        "collapsed after 6,048 images of 32 px; from 0.99 k-NN 32.7 after 16,384; untrained 25.8)",
    ),
}
