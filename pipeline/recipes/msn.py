"""Recipes of MSN.

On small data the best published number is a k-NN of 82.8 on Imagenette after 800 epochs, with prototypes that were
never trained (lightly-ai/lightly); without focal crops and with one heavily masked view it is 50.6 (rbalestr-lab/
stable-pretraining). The small recipes here keep the published views and take about as many prototypes as images in
the batch, the paper's proportion: targets balanced over many more are flat by force.
"""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """MSN's options as published for ViT-S/16, 800 epochs (facebookresearch/msn, msn_vits16.yaml)."""
    published = {
        "scale": (0.3, 1.0),
        "focal_scale": (0.05, 0.3),
        "focal_views": 10,
        "focal_size": None,
        "mask_ratio": 0.15,
        "n_prototypes": 1024,
        "hidden_dim": 2048,
        "embedding_dim": 256,
        "temp": 0.1,
        "sharpening": 0.25,
        "sinkhorn": 3,
        "me_max": 1.0,
        "ema_start": 0.996,
        "ema_end": 0.9992,
        "head_norm": "batch",
    }
    return published | changes


RECIPES = {
    ("vit", "large"): Recipe(
        "MSN ViT-S/16 on ImageNet-1k, 800 epochs: linear 76.9 (facebookresearch/msn, msn_vits16.yaml; its schedules, "
        "stretched over 1.25 times the run, end here where they stop there)",
        epochs=800,
        batch_size=1024,
        image_size=224,
        optimiser="adamw",
        base_lr=2.5e-4,
        weight_decay=0.04,
        weight_decay_end=0.37,
        warmup=0.019,
        lr_end=0.1,
        clip=3.0,
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "optimiser and batch of DINO ResNet-50 on ImageNet-1k (facebookresearch/dino, README.md), views and loss of "
        "MSN ViT-S/16; unpublished",
        epochs=100,
        batch_size=512,
        image_size=224,
        optimiser="sgd",
        base_lr=0.03,
        weight_decay=1e-4,
        clip=3.0,
        options=options(n_prototypes=512),
    ),
    ("vit", "small"): Recipe(
        "MSN ViT-S/16 of facebookresearch/msn with the length and size of lightly-ai/lightly's on Imagenette (k-NN "
        "71.3 after 200 epochs), the learning rate of DINO (facebookresearch/dino) and 256 prototypes; unpublished",
        epochs=200,
        batch_size=256,
        image_size=128,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.075,
        lr_end=2e-3,
        clip=3.0,
        options=options(n_prototypes=256),
    ),
    ("cnn", "small"): Recipe(
        "optimiser of DINO ResNet-18 on Imagenette (lightly-ai/lightly, imagenette_benchmark.py) and its fast teacher, "
        "views and loss of MSN ViT-S/16 with 128 prototypes; unpublished",
        epochs=200,
        batch_size=128,
        image_size=128,
        optimiser="sgd",
        base_lr=0.06,
        weight_decay=5e-4,
        warmup=0.0,
        clip=3.0,
        options=options(n_prototypes=128, focal_views=6, focal_size=64, ema_start=0.99, ema_end=0.99),
    ),
    ("vit", "thumbnails"): Recipe(
        "crops and optimiser of DINO with a small ViT on CIFAR-10 (hananshafi/vits-for-small-scale-datasets, "
        "train_ssl.py), loss and masks of MSN ViT-S/16 with 512 prototypes; unpublished",
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
        options=options(scale=(0.7, 1.0), focal_scale=(0.2, 0.5), focal_views=8, focal_size=16, n_prototypes=512),
    ),
    ("cnn", "thumbnails"): Recipe(
        "optimiser of DINO ResNet-18 on CIFAR-10 (lightly-ai/lightly, cifar10_benchmark.py) and its fast teacher, "
        "loss and masks of MSN ViT-S/16 with 128 prototypes, no focal crops; unpublished",
        epochs=200,
        batch_size=128,
        image_size=32,
        optimiser="sgd",
        base_lr=0.12,
        weight_decay=5e-4,
        warmup=0.0,
        clip=3.0,
        options=options(scale=(0.2, 1.0), focal_views=0, n_prototypes=128, ema_start=0.99, ema_end=0.99),
    ),
    **embedded(options(focal_views=2, n_prototypes=64, hidden_dim=512, embedding_dim=64, ema_start=0.9, ema_end=0.99)),
}
