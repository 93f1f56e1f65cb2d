"""Recipes of supervised classification, the yardstick."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """The options of the usual ResNet-50 on ImageNet-1k (Goyal et al. 2017; smoothing of He et al. 2019, table 6)."""
    published = {
        "classes": None,
        "label_smoothing": 0.1,
        "scale": (0.08, 1.0),
        "jitter": (0.4, 0.4, 0.4, 0.0),
    }
    return published | changes


RECIPES = {
    ("cnn", "large"): Recipe(
        "ResNet-50 on ImageNet-1k, 120 epochs with cosine decay and label smoothing, without Mixup (He et al. 2019, "
        "arXiv 1812.01187, table 6)",
        epochs=120,
        batch_size=1024,
        image_size=224,
        optimiser="sgd",
        base_lr=0.1,
        weight_decay=1e-4,
        warmup=5 / 120,
        options=options(),
    ),
    ("vit", "large"): Recipe(
        "plain ViT-S/16 on ImageNet-1k, 90 epochs (Beyer et al. 2022, arXiv 2205.01580), without its RandAugment and "
        "Mixup, hence unpublished",
        epochs=90,
        batch_size=1024,
        image_size=224,
        optimiser="adamw",
        base_lr=2.5e-4,
        weight_decay=0.1,
        warmup=0.09,
        clip=1.0,
        options=options(label_smoothing=0.0, jitter=(0.0, 0.0, 0.0, 0.0)),
    ),
    ("cnn", "small"): Recipe(
        "the recipe of ResNet-50 on ImageNet-1k (He et al. 2019) over the 200 epochs at 128 px of Imagenette's "
        "leaderboard (fastai/imagenette, where other networks reach 94.2); unpublished",
        epochs=200,
        batch_size=128,
        image_size=128,
        optimiser="sgd",
        base_lr=0.1,
        weight_decay=5e-4,
        warmup=0.025,
        options=options(scale=(0.35, 1.0)),
    ),
    ("vit", "small"): Recipe(
        "the recipe of ViT-S/16 on ImageNet-1k (Beyer et al. 2022) over 200 epochs, with label smoothing; unpublished",
        epochs=200,
        batch_size=128,
        image_size=160,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.1,
        warmup=0.1,
        clip=1.0,
        drop_path=0.1,
        options=options(scale=(0.35, 1.0)),
    ),
    ("cnn", "thumbnails"): Recipe(
        "ResNet on CIFAR-10, batch 128, 200 epochs (He et al. 2016, sec. 4.2; cosine decay and weight decay of later "
        "practice), resized crops in place of padded ones; unpublished",
        epochs=200,
        batch_size=128,
        image_size=32,
        optimiser="sgd",
        base_lr=0.2,
        weight_decay=5e-4,
        warmup=0.025,
        options=options(label_smoothing=0.0, scale=(0.4, 1.0), jitter=(0.0, 0.0, 0.0, 0.0)),
    ),
    ("vit", "thumbnails"): Recipe(
        "the recipe of ViT-S/16 on ImageNet-1k (Beyer et al. 2022) on small images, with label smoothing; unpublished",
        epochs=200,
        batch_size=128,
        image_size=32,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=0.05,
        warmup=0.1,
        clip=1.0,
        options=options(scale=(0.4, 1.0)),
    ),
    **embedded(options(label_smoothing=0.0, scale=(0.35, 1.0), jitter=(0.4, 0.4, 0.4, 0.0))),
}
