"""Recipes of SparK."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """SparK's options as published (Tian et al. 2023, the authors' utils/arg_util.py)."""
    published = {
        "scale": (0.67, 1.0),
        "mask_ratio": 0.6,
        "decoder_width": 768,
        "scales": 4,
    }
    return published | changes


RECIPES = {
    ("cnn", "large"): Recipe(
        "SparK ResNet-50 on ImageNet-1k, 1600 epochs: fine-tuning 80.6 (keyu-tian/SparK, pretrain/utils/arg_util.py); "
        "AdamW in place of LAMB, no stochastic depth, which not every CNN has",
        epochs=1600,
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
        options=options(),
    ),
    ("vit", "large"): Recipe(
        "MAE ViT-B/16 on ImageNet-1k, 800 epochs: optimiser, schedule, crop and mask ratio (facebookresearch/mae, "
        "PRETRAIN.md) around SparK's decoder; unpublished",
        epochs=800,
        batch_size=4096,
        image_size=224,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.05,
        warmup=0.05,
        betas=(0.9, 0.95),
        options=options(scale=(0.2, 1.0), mask_ratio=0.75),
    ),
    ("cnn", "small"): Recipe(
        "SparK's weight decay, clip and masks (keyu-tian/SparK, arg_util.py) with the rate and length of MAE ViT-S on "
        "Imagenette (rbalestr-lab/stable-pretraining, benchmarks/imagenet10) and a decoder a third as wide; 224 "
        "pixels, so that stride 32 leaves 49 cells; unpublished",
        epochs=200,
        batch_size=128,
        image_size=224,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=0.04,
        weight_decay_end=0.2,
        warmup=0.05,
        lr_end=1e-3,
        betas=(0.9, 0.95),
        clip=5.0,
        options=options(decoder_width=256),
    ),
    ("vit", "small"): Recipe(
        "MAE ViT-S/16 on Imagenette, 200 epochs: optimiser, schedule, crop and mask ratio "
        "(rbalestr-lab/stable-pretraining, benchmarks/imagenet10) around SparK's decoder; unpublished",
        epochs=200,
        batch_size=128,
        image_size=160,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=0.05,
        warmup=0.05,
        betas=(0.9, 0.95),
        options=options(scale=(0.2, 1.0), mask_ratio=0.75, decoder_width=256),
    ),
    ("cnn", "thumbnails"): Recipe(
        "SparK's masks and clip with the schedule of MAE ViT-S/4 on CIFAR (vturrisi/solo-learn, "
        "scripts/pretrain/cifar/mae.yaml) and a decoder a third as wide; unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=2e-4,
        weight_decay=0.05,
        warmup=0.01,
        betas=(0.9, 0.95),
        clip=5.0,
        options=options(decoder_width=256),
    ),
    ("vit", "thumbnails"): Recipe(
        "MAE ViT-S/4 on CIFAR, 1000 epochs: optimiser, schedule, crop and mask ratio (vturrisi/solo-learn, "
        "scripts/pretrain/cifar/mae.yaml) around SparK's decoder; unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=2e-4,
        weight_decay=0.05,
        warmup=0.01,
        betas=(0.9, 0.95),
        options=options(scale=(0.2, 1.0), mask_ratio=0.75, decoder_width=256),
    ),
    **embedded(options(decoder_width=128), "vit"),
    **embedded(
        options(mask_ratio=0.5, decoder_width=128),
        "cnn",
        but="for a mask of half (ResNet-20 after 512 steps at 32 px, seed 0: linear 60.9; with 25 % 59.4, with 60 % "
        "56.5; untrained 52.2)",
    ),
}
