"""Recipes of SwAV."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """SwAV's options as published for ResNet-50, 100 epochs, batch 4096 (facebookresearch/swav, scripts/)."""
    published = {
        "global_scale": (0.14, 1.0),
        "local_scale": (0.05, 0.14),
        "local_views": 6,
        "local_size": None,
        "jitter": 1.0,
        "blur_p": 0.5,
        "hidden_dim": 2048,
        "out_dim": 128,
        "prototypes": 3000,
        "temperature": 0.1,
        "epsilon": 0.05,
        "sinkhorn_iterations": 3,
        "freeze_prototypes": 0.01,
        "queue_size": 0,
        "queue_start": 0.15,
    }
    return published | changes


RECIPES = {
    ("vit", "large"): Recipe(
        "SwAV's views, head and loss with optimiser and schedule of DINO ViT-S/16 on ImageNet-1k, 100 epochs "
        "(facebookresearch/dino, README.md); the queue of SwAV's batches of 256 (facebookresearch/swav, scripts/); "
        "unpublished",
        epochs=100,
        batch_size=512,
        image_size=224,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.04,
        weight_decay_end=0.4,
        lr_end=1e-3,
        clip=3.0,
        drop_path=0.1,
        options=options(queue_size=3840),
    ),
    ("cnn", "large"): Recipe(
        "SwAV ResNet-50 on ImageNet-1k, 100 epochs, batch 4096: linear 72.1 (facebookresearch/swav, scripts/, with "
        "LARC on norms and biases too)",
        epochs=100,
        batch_size=4096,
        image_size=224,
        optimiser="lars",
        base_lr=0.3,
        weight_decay=1e-6,
        warmup=0.1,
        lr_end=1e-3,
        options=options(),
    ),
    ("vit", "small"): Recipe(
        "SwAV ViT-S/16 on Imagenette at 224 px, 200 epochs: k-NN 86.4, linear 89.7 (rbalestr-lab/stable-pretraining, "
        "benchmarks/imagenet10); weight decay of its DINO, prototypes frozen for the published one epoch",
        epochs=200,
        batch_size=128,
        image_size=160,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=0.05,
        warmup=0.01,
        options=options(local_views=4, freeze_prototypes=0.005),
    ),
    ("cnn", "small"): Recipe(
        "SwAV ResNet-18 on Imagenette at 128 px, 200 epochs: k-NN 86.1 (lightly-ai/lightly, imagenette_benchmark.py, "
        "with Adam); prototypes frozen for the published one epoch",
        epochs=200,
        batch_size=256,
        image_size=128,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=1e-6,
        warmup=0.0,
        options=options(local_size=64, freeze_prototypes=0.005),
    ),
    ("vit", "thumbnails"): Recipe(
        "views and queue of SwAV ResNet-18 on CIFAR (vturrisi/solo-learn), 512 prototypes as lightly-ai/lightly takes "
        "there, AdamW of SwAV ViT-S/16 on Imagenette (rbalestr-lab/stable-pretraining); unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=0.05,
        warmup=0.01,
        options=options(
            global_scale=(0.08, 1.0),
            local_views=0,
            prototypes=512,
            freeze_prototypes=0.002,
            queue_size=3840,
            queue_start=0.05,
        ),
    ),
    ("cnn", "thumbnails"): Recipe(
        "SwAV ResNet-18 on CIFAR-10, 1000 epochs: online linear 89.2 (vturrisi/solo-learn, "
        "scripts/pretrain/cifar/swav.yaml)",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="larc",
        base_lr=0.6,
        weight_decay=1e-6,
        warmup=0.01,
        options=options(
            global_scale=(0.08, 1.0), local_views=0, freeze_prototypes=0.002, queue_size=3840, queue_start=0.05
        ),
    ),
    **embedded(options(local_views=0, jitter=0.25, hidden_dim=512, prototypes=64, freeze_prototypes=0.0)),
}
