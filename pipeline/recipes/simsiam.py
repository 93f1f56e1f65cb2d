"""Recipes of SimSiam."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """SimSiam's options as published for ResNet-50, 100 epochs (Chen & He 2021, main_simsiam.py)."""
    published = {
        "scale": (0.2, 1.0),
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "blur": (0.5, 0.5),
        "solarize": (0.0, 0.0),
        "hidden_dim": 2048,
        "out_dim": 2048,
        "predictor_dim": 512,
    }
    return published | changes


RECIPES = {
    ("cnn", "large"): Recipe(
        "SimSiam ResNet-50 on ImageNet-1k, 100 epochs: linear 68.1 (facebookresearch/simsiam, README.md; there biases "
        "and norms decay too)",
        epochs=100,
        batch_size=512,
        image_size=224,
        optimiser="sgd",
        base_lr=0.05,
        weight_decay=1e-4,
        warmup=0.0,
        options=options(),
    ),
    ("vit", "large"): Recipe(
        "optimiser and schedule of MoCo v3's ViT-S/16, 300 epochs (facebookresearch/moco-v3), heads and views of "
        "SimSiam's ResNet-50; unpublished",
        epochs=300,
        batch_size=1024,
        image_size=224,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=40 / 300,
        options=options(),
    ),
    ("cnn", "small"): Recipe(
        "SimSiam ResNet-18 on Imagenette at 128 px, 800 epochs: k-NN 87.2 (lightly-ai/lightly, "
        "imagenette_benchmark.py)",
        epochs=800,
        batch_size=256,
        image_size=128,
        optimiser="sgd",
        base_lr=0.06,
        weight_decay=5e-4,
        warmup=0.0,
        options=options(),
    ),
    ("vit", "small"): Recipe(
        "MoCo v3's AdamW for ViT-S (facebookresearch/moco-v3) over the 200 Imagenette epochs of "
        "rbalestr-lab/stable-pretraining, whose SGD reached k-NN 54.9; unpublished",
        epochs=200,
        batch_size=256,
        image_size=160,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.15,
        options=options(),
    ),
    ("cnn", "thumbnails"): Recipe(
        "SimSiam ResNet-18 on CIFAR-10, 1000 epochs: linear 90.5 (vturrisi/solo-learn, "
        "scripts/pretrain/cifar/simsiam.yaml)",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="sgd",
        base_lr=0.5,
        weight_decay=1e-5,
        warmup=0.01,
        options=options(scale=(0.08, 1.0)),
    ),
    ("vit", "thumbnails"): Recipe(
        "views and heads of ResNet-18 on CIFAR (vturrisi/solo-learn) with MoCo v3's AdamW for ViT-S; unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.1,
        options=options(scale=(0.08, 1.0)),
    ),
    **embedded(options(jitter=(0.4, 0.4, 0.4, 0.0), hidden_dim=512, out_dim=512, predictor_dim=128)),
}
