"""Recipes of VICReg."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """VICReg's options as published for ResNet-50, 1000 epochs (Bardes et al. 2022, main_vicreg.py)."""
    published = {
        "scale": (0.08, 1.0),
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "blur": (1.0, 0.1),
        "solarize": (0.0, 0.2),
        "hidden_dim": 8192,
        "out_dim": 8192,
        "invariance_weight": 25.0,
        "variance_weight": 25.0,
        "covariance_weight": 1.0,
    }
    return published | changes


RECIPES = {
    ("cnn", "large"): Recipe(
        "VICReg ResNet-50 on ImageNet-1k, 1000 epochs: linear 73.2 (facebookresearch/vicreg, main_vicreg.py)",
        epochs=1000,
        batch_size=2048,
        image_size=224,
        optimiser="lars",
        base_lr=0.2,
        weight_decay=1e-6,
        warmup=0.01,
        lr_end=1e-3,
        options=options(),
    ),
    ("vit", "large"): Recipe(
        "AdamW rate of Barlow Twins' ViT-S on Imagenette (rbalestr-lab/stable-pretraining), batch, schedule and "
        "weight decay of MoCo v3's ViT-S; unpublished",
        epochs=300,
        batch_size=1024,
        image_size=224,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.1,
        warmup=40 / 300,
        options=options(),
    ),
    ("cnn", "small"): Recipe(
        "VICReg ResNet-18 on Imagenette at 128 px, 800 epochs: k-NN 84.5, diverging without warm-up "
        "(lightly-ai/lightly, imagenette_benchmark.py)",
        epochs=800,
        batch_size=256,
        image_size=128,
        optimiser="lars",
        base_lr=0.3,
        weight_decay=1e-4,
        warmup=0.05,
        options=options(hidden_dim=2048, out_dim=2048),
    ),
    ("vit", "small"): Recipe(
        "the recipe of Barlow Twins' ViT-S/16 on Imagenette (rbalestr-lab/stable-pretraining) with a longer warm-up, "
        "whose VICReg with LARS without momentum reached k-NN 75.0; unpublished",
        epochs=200,
        batch_size=256,
        image_size=160,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.05,
        warmup=0.05,
        options=options(hidden_dim=2048, out_dim=2048),
    ),
    ("cnn", "thumbnails"): Recipe(
        "VICReg ResNet-18 on CIFAR-10, 1000 epochs: linear 92.1 (vturrisi/solo-learn, "
        "scripts/pretrain/cifar/vicreg.yaml)",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="larc",
        base_lr=0.3,
        weight_decay=1e-4,
        warmup=0.01,
        options=options(scale=(0.2, 1.0), blur=(0.0, 0.0), solarize=(0.1, 0.1), hidden_dim=2048, out_dim=2048),
    ),
    ("vit", "thumbnails"): Recipe(
        "views and head of ResNet-18 on CIFAR (vturrisi/solo-learn) with the AdamW of Barlow Twins' ViT-S on "
        "Imagenette (rbalestr-lab/stable-pretraining); unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.05,
        warmup=0.05,
        options=options(scale=(0.2, 1.0), blur=(0.0, 0.0), solarize=(0.1, 0.1), hidden_dim=2048, out_dim=2048),
    ),
    **embedded(options(jitter=(0.4, 0.4, 0.2, 0.0), hidden_dim=512, out_dim=256)),
}
