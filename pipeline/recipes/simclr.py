"""Recipes of SimCLR."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """SimCLR's options as published for ResNet-50, 100 epochs (README of google-research/simclr)."""
    published = {
        "scale": (0.08, 1.0),
        "jitter": 1.0,
        "blur_p": 0.5,
        "hidden_dim": 2048,
        "out_dim": 128,
        "head_layers": 3,
        "head_norm": "batch",
        "temperature": 0.1,
        "decoupled": False,
    }
    return published | changes


RECIPES = {
    ("vit", "large"): Recipe(
        "SimCLR's views, head and loss with optimiser and schedule of MoCo v3 ViT-S/16 on ImageNet-1k "
        "(facebookresearch/moco-v3, CONFIG.md); unpublished",
        epochs=300,
        batch_size=4096,
        image_size=224,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.133,
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "SimCLR ResNet-50 on ImageNet-1k, 100 epochs, batch 4096: linear 64.5 (google-research/simclr, README.md)",
        epochs=100,
        batch_size=4096,
        image_size=224,
        optimiser="lars",
        base_lr=0.3,
        weight_decay=1e-4,
        warmup=0.1,
        options=options(),
    ),
    ("vit", "small"): Recipe(
        "views, head and temperature of SimCLR on Imagenette (lightly-ai/lightly, imagenette_benchmark.py); AdamW of "
        "MoCo v3 ViT-S/16 on Imagenette (rbalestr-lab/stable-pretraining, benchmarks/imagenet10), whose SimCLR with "
        "LARS without momentum reached k-NN 73.3, linear 74.9; unpublished",
        epochs=200,
        batch_size=256,
        image_size=160,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.1,
        options=options(jitter=0.5, hidden_dim=512, head_layers=2, temperature=0.5),
    ),
    ("cnn", "small"): Recipe(
        "SimCLR ResNet-18 on Imagenette at 128 px, 200 epochs: k-NN 83.5 (lightly-ai/lightly, imagenette_benchmark.py)",
        epochs=200,
        batch_size=256,
        image_size=128,
        optimiser="sgd",
        base_lr=0.06,
        weight_decay=5e-4,
        warmup=0.0,
        options=options(jitter=0.5, hidden_dim=512, head_layers=2, temperature=0.5),
    ),
    ("vit", "thumbnails"): Recipe(
        "views and temperature of SimCLR ResNet-18 on CIFAR (vturrisi/solo-learn), a head with batch norm, AdamW and "
        "warm-up of MoCo v3 ViT-S (facebookresearch/moco-v3, CONFIG.md); unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.1,
        options=options(out_dim=256, head_layers=2, temperature=0.2),
    ),
    ("cnn", "thumbnails"): Recipe(
        "SimCLR ResNet-18 on CIFAR-10, 1000 epochs: online linear 90.7 (vturrisi/solo-learn, "
        "scripts/pretrain/cifar/simclr.yaml)",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="larc",
        base_lr=0.4,
        weight_decay=1e-4,
        warmup=0.01,
        options=options(out_dim=256, head_layers=2, head_norm="none", temperature=0.2),
    ),
    **embedded(options(jitter=0.25, hidden_dim=512, head_layers=2, temperature=0.2)),
}
