"""Recipes of MAE."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
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


RECIPES = {
    ("vit", "large"): Recipe(
        "MAE ViT-L/16 on ImageNet-1k, 800 epochs: fine-tuning 85.5 (facebookresearch/mae, PRETRAIN.md, with fixed sine "
        "positions and Xavier's initial weights); ViT-B/16 after 1600: 83.6 (FINETUNE.md)",
        epochs=800,
        batch_size=4096,
        image_size=224,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.05,
        warmup=0.05,
        betas=(0.9, 0.95),
        options=options(),
    ),
    ("cnn", "large"): Recipe(
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
        options=options(scale=(0.67, 1.0), mask_ratio=0.6),
    ),
    ("vit", "small"): Recipe(
        "MAE ViT-S/16 on Imagenette at 224 px, 200 epochs: k-NN 72.1, linear 84.1 (rbalestr-lab/stable-pretraining, "
        "benchmarks/imagenet10, where the warm-up is a hundredth)",
        epochs=200,
        batch_size=128,
        image_size=160,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=0.05,
        warmup=0.05,
        betas=(0.9, 0.95),
        options=options(decoder_width=384, decoder_depth=4, decoder_heads=6),
    ),
    ("cnn", "small"): Recipe(
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
        options=options(scale=(0.67, 1.0), mask_ratio=0.6, decoder_width=384, decoder_depth=4, decoder_heads=6),
    ),
    ("vit", "thumbnails"): Recipe(
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
        options=options(decoder_heads=16),
    ),
    ("cnn", "thumbnails"): Recipe(
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
        options=options(mask_ratio=0.6, decoder_width=256, decoder_depth=4, decoder_heads=8),
    ),
    **embedded(options(decoder_width=128, decoder_depth=2, decoder_heads=4, normalise_targets=False), "vit"),
    **embedded(
        options(mask_ratio=0.25, decoder_width=128, decoder_depth=2, decoder_heads=4),
        "cnn",
        but="for a mask of a quarter, which leaves more visible cells beside each other for a convolution to see, and "
        "normalised targets (ResNet-20 after 512 steps at 32 px, seed 0: k-NN 31.1, linear 64.9; with 40 % 28.6 and "
        "64.5, with 60 % 25.7 and 58.6, with 75 % of raw pixels 19.6 and 52.9; untrained 25.8 and 52.2)",
    ),
}
