"""Recipes of DINOv2.

Nobody published good numbers of it on small data: the only ones (k-NN 31.5 on Imagenette, rbalestr-lab/
stable-pretraining) came of Sinkhorn-Knopp over 8192 prototypes on 256 images, which leaves nearly uniform targets, a
teacher temperature of .07 from the first step, and no KoLeo, clipping or slower stem. The small recipes here centre
over few prototypes, warm the temperature up, and keep all of the published regularisers.
"""

from typing import Any

from pipeline.recipes import dino
from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """DINOv2's options as published for the short ViT-L/16 run (facebookresearch/dinov2, vitl16_short.yaml)."""
    published = {
        "global_scale": (0.32, 1.0),
        "local_scale": (0.05, 0.32),
        "local_views": 8,
        "local_size": None,
        "cell_weight": 1.0,
        "masked_share": 0.5,
        "mask_ratio": (0.1, 0.5),
        "centring": "centre",
        "koleo_weight": 0.1,
        "separate_heads": False,
        "layer_decay": 0.9,
        "stem_lr": 0.2,
        "out_dim": 65536,
        "hidden_dim": 2048,
        "bottleneck_dim": 256,
        "student_temp": 0.1,
        "teacher_temp": 0.07,
        "teacher_temp_start": 0.04,
        "teacher_temp_warmup": 0.3,
        "centre_momentum": 0.9,
        "ema_start": 0.992,
        "ema_end": 1.0,
        "freeze_last_layer": 0.01,
        "norm_last_layer": False,
        "head_norm": "none",
    }
    return published | changes


def on_cnn(scale: str) -> dict[str, Any]:
    """The options of DINO's recipe for CNNs with DINOv2's masks and KoLeo, and its blur, which is no option; rates as
    under its SGD, the same in all layers."""
    inherited = {name: value for name, value in dino.RECIPES["cnn", scale].options.items() if name != "blur"}
    return options(**inherited) | {"layer_decay": 1.0, "stem_lr": 1.0}


RECIPES = {
    ("vit", "large"): Recipe(
        "DINOv2 ViT-L/16 on ImageNet-1k, 100 epochs, learning rate .004 sqrt(B / 1024): k-NN 81.6, linear 82.9 "
        "(facebookresearch/dinov2, vitl16_short.yaml, README.md, with one drop path for all blocks)",
        epochs=100,
        batch_size=2048,
        image_size=224,
        optimiser="adamw",
        base_lr=7.07e-4,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.1,
        lr_end=1.8e-4,
        clip=3.0,
        drop_path=0.3,
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "optimiser, crops and temperature of DINO ResNet-50 on ImageNet-1k (facebookresearch/dino, README.md), masks "
        "and KoLeo of DINOv2; unpublished",
        epochs=100,
        batch_size=512,
        image_size=224,
        optimiser="sgd",
        base_lr=0.03,
        weight_decay=1e-4,
        clip=3.0,
        options=on_cnn("large"),
    ),
    ("vit", "small"): Recipe(
        "schedule and 2048 prototypes, of length 1, of DINO on Imagenette (rbalestr-lab/stable-pretraining, "
        "lightly-ai/lightly), all else of DINOv2's short run, its learning rate .004 sqrt(B / 1024) included; drop "
        "path of ViT-S; unpublished",
        epochs=200,
        batch_size=128,
        image_size=160,
        optimiser="adamw",
        base_lr=2.8e-3,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.1,
        lr_end=7e-4,
        clip=3.0,
        drop_path=0.1,
        options=options(local_views=6, out_dim=2048, norm_last_layer=True),
    ),
    ("cnn", "small"): Recipe(
        "the recipe of DINO ResNet-18 on Imagenette (lightly-ai/lightly, imagenette_benchmark.py), masks, KoLeo and "
        "clip of DINOv2; unpublished",
        epochs=200,
        batch_size=256,
        image_size=128,
        optimiser="sgd",
        base_lr=0.06,
        weight_decay=5e-4,
        warmup=0.0,
        clip=3.0,
        options=on_cnn("small"),
    ),
    ("vit", "thumbnails"): Recipe(
        "crops and 1024 prototypes of DINO with a small ViT on CIFAR-10 (hananshafi/vits-for-small-scale-datasets, "
        "train_ssl.py), all else of DINOv2's short run, its learning rate .004 sqrt(B / 1024) included; unpublished",
        epochs=200,
        batch_size=512,
        image_size=32,
        optimiser="adamw",
        base_lr=1.4e-3,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.15,
        lr_end=3.5e-4,
        clip=3.0,
        options=options(global_scale=(0.7, 1.0), local_scale=(0.2, 0.5), local_size=16, out_dim=1024),
    ),
    ("cnn", "thumbnails"): Recipe(
        "the recipe of DINO ResNet-18 on CIFAR-10 (lightly-ai/lightly, cifar10_benchmark.py), masks, KoLeo, blur and "
        "clip of DINOv2; unpublished",
        epochs=200,
        batch_size=128,
        image_size=32,
        optimiser="sgd",
        base_lr=0.12,
        weight_decay=5e-4,
        warmup=0.0,
        clip=3.0,
        options=on_cnn("thumbnails"),
    ),
    **embedded(options(local_views=0, layer_decay=1.0, stem_lr=1.0, out_dim=256, ema_start=0.9, head_norm="batch")),
}
