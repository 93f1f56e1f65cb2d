"""Recipes of BYOL."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """BYOL's options as published for ResNet-50, 1000 epochs (Grill et al. 2020, byol/configs/byol.py)."""
    published = {
        "scale": (0.08, 1.0),
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "blur": (1.0, 0.1),
        "solarize": (0.0, 0.2),
        "hidden_dim": 4096,
        "out_dim": 256,
        "ema_start": 0.996,
        "ema_end": 1.0,
    }
    return published | changes


RECIPES = {
    ("cnn", "large"): Recipe(
        "BYOL ResNet-50 on ImageNet-1k, 1000 epochs: linear 74.3 (deepmind/deepmind-research, byol/configs/byol.py)",
        epochs=1000,
        batch_size=4096,
        image_size=224,
        optimiser="lars",
        base_lr=0.2,
        weight_decay=1.5e-6,
        warmup=0.01,
        options=options(),
    ),
    ("vit", "large"): Recipe(
        "optimiser, schedule and EMA of MoCo v3's ViT-S/16, 300 epochs (facebookresearch/moco-v3), whose paper trains "
        "BYOL likewise; heads and crops of BYOL's ResNet-50; this combination is unpublished",
        epochs=300,
        batch_size=4096,
        image_size=224,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=40 / 300,
        options=options(ema_start=0.99),
    ),
    ("cnn", "small"): Recipe(
        "BYOL ResNet-18 on Imagenette at 128 px, 800 epochs: k-NN 88.7 (lightly-ai/lightly, imagenette_benchmark.py)",
        epochs=800,
        batch_size=256,
        image_size=128,
        optimiser="sgd",
        base_lr=0.06,
        weight_decay=5e-4,
        warmup=0.0,
        options=options(ema_start=0.99, ema_end=0.99),
    ),
    ("vit", "small"): Recipe(
        "MoCo v3's AdamW for ViT-S (facebookresearch/moco-v3) over the 200 Imagenette epochs of "
        "rbalestr-lab/stable-pretraining, whose LARS without momentum reached k-NN 56.0; unpublished",
        epochs=200,
        batch_size=256,
        image_size=160,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.15,
        options=options(ema_start=0.99),
    ),
    ("cnn", "thumbnails"): Recipe(
        "BYOL ResNet-18 on CIFAR-10, 1000 epochs: linear 92.6 (vturrisi/solo-learn, scripts/pretrain/cifar/byol.yaml)",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="larc",
        base_lr=1.0,
        weight_decay=1e-5,
        warmup=0.01,
        options=options(blur=(0.0, 0.0), ema_start=0.99),
    ),
    ("vit", "thumbnails"): Recipe(
        "views, heads and EMA of ResNet-18 on CIFAR (vturrisi/solo-learn) with MoCo v3's AdamW for ViT-S; unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.1,
        options=options(blur=(0.0, 0.0), ema_start=0.99),
    ),
    **embedded(options(jitter=(0.4, 0.4, 0.2, 0.0), hidden_dim=512, out_dim=128, ema_start=0.9)),
}
