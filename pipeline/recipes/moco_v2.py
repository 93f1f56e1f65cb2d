"""Recipes of MoCo v2."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """MoCo v2's options as published for ResNet-50 (facebookresearch/moco, README.md)."""
    published = {
        "scale": (0.2, 1.0),
        "jitter": 0.5,
        "blur_p": 0.5,
        "hidden_dim": 2048,
        "out_dim": 128,
        "temperature": 0.2,
        "queue_size": 65536,
        "momentum_start": 0.999,
        "momentum_end": 0.999,
        "symmetric": False,
    }
    return published | changes


RECIPES = {
    ("vit", "large"): Recipe(
        "MoCo v2's views, head and queue with optimiser and schedule of MoCo v3 ViT-S/16 on ImageNet-1k "
        "(facebookresearch/moco-v3, CONFIG.md); unpublished",
        epochs=300,
        batch_size=1024,
        image_size=224,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.133,
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "MoCo v2 ResNet-50 on ImageNet-1k, 200 epochs: linear 67.5 (facebookresearch/moco, README.md, with shuffled "
        "batch norm and weight decay on all parameters)",
        epochs=200,
        batch_size=256,
        image_size=224,
        optimiser="sgd",
        base_lr=0.03,
        weight_decay=1e-4,
        warmup=0.0,
        options=options(),
    ),
    ("vit", "small"): Recipe(
        "MoCo v2 ViT-S/16 on Imagenette at 224 px, 200 epochs, AdamW: k-NN 70.0, linear 70.8 (rbalestr-lab/"
        "stable-pretraining, benchmarks/imagenet10); weight decay of its MoCo v3; queue, momentum and symmetry of "
        "MoCo on Imagenette in lightly-ai/lightly, imagenette_benchmark.py; a warm-up ten times as long",
        epochs=200,
        batch_size=256,
        image_size=160,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.1,
        options=options(queue_size=4096, momentum_start=0.99, momentum_end=0.99, symmetric=True),
    ),
    ("cnn", "small"): Recipe(
        "MoCo ResNet-18 on Imagenette at 128 px, 200 epochs: k-NN 78.6 (lightly-ai/lightly, imagenette_benchmark.py); "
        "crops of MoCo v2",
        epochs=200,
        batch_size=256,
        image_size=128,
        optimiser="sgd",
        base_lr=0.06,
        weight_decay=5e-4,
        warmup=0.0,
        options=options(temperature=0.1, queue_size=4096, momentum_start=0.99, momentum_end=0.99, symmetric=True),
    ),
    ("vit", "thumbnails"): Recipe(
        "views, head, momentum and queue of MoCo v2+ ResNet-18 on CIFAR (vturrisi/solo-learn) with AdamW and warm-up "
        "of MoCo v3 ViT-S/16 (facebookresearch/moco-v3, CONFIG.md); unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.133,
        options=options(scale=(0.08, 1.0), out_dim=256, queue_size=32768, momentum_start=0.99, symmetric=True),
    ),
    ("cnn", "thumbnails"): Recipe(
        "MoCo v2+ ResNet-18 on CIFAR-10, 1000 epochs: online linear 92.9 (vturrisi/solo-learn, "
        "scripts/pretrain/cifar/mocov2plus.yaml)",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="sgd",
        base_lr=0.3,
        weight_decay=1e-4,
        warmup=0.01,
        options=options(scale=(0.08, 1.0), out_dim=256, queue_size=32768, momentum_start=0.99, symmetric=True),
    ),
    **embedded(options(jitter=0.25, hidden_dim=512, queue_size=512, momentum_start=0.9, momentum_end=0.99), "vit"),
    **embedded(
        options(jitter=0.25, hidden_dim=512, queue_size=512, momentum_start=0.99, momentum_end=0.999),
        "cnn",
        but="for keys that change slower, as published (ResNet-20 after 512 steps at 32 px, seed 0: k-NN 23.6, linear "
        "49.2 with a momentum from 0.9 to 0.99, 35.3 and 67.3 so; untrained 25.8 and 52.2)",
    ),
}
