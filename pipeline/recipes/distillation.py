"""Recipes of distillation; `--options.teacher` names the teacher."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """Loss weights of AM-RADIO (Ranzinger et al. 2024, sec. 3.4), crops of Beyer et al. 2022 (arXiv 2106.05237)."""
    published = {
        "teacher": "",
        "scale": (0.08, 1.0),
        "jitter": (0.0, 0.0, 0.0, 0.0),
        "cells_weight": 1.0,
        "alpha": 0.9,
        "beta": 0.1,
    }
    return published | changes


RECIPES = {
    ("vit", "large"): Recipe(
        "loss of AM-RADIO (Ranzinger et al. 2024), crops and patience of Beyer et al. 2022, learning rate and clip of "
        "DINO's ViT-S/16 (facebookresearch/dino); this combination is unpublished",
        epochs=300,
        batch_size=1024,
        image_size=224,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.05,
        warmup=0.02,
        clip=3.0,
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "loss of AM-RADIO (Ranzinger et al. 2024), crops, patience and clip of Beyer et al. 2022 (there from a "
        "teacher's logits, with Adam); this combination is unpublished",
        epochs=300,
        batch_size=512,
        image_size=224,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.05,
        warmup=0.02,
        clip=1.0,
        options=options(),
    ),
    ("vit", "small"): Recipe(
        "the recipe of large sets with longer training, which Beyer et al. 2022 find to matter most on small ones "
        "(sec. 4); unpublished",
        epochs=600,
        batch_size=256,
        image_size=160,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.05,
        warmup=0.02,
        clip=3.0,
        options=options(),
    ),
    ("cnn", "small"): Recipe(
        "the recipe of large sets with longer training, which Beyer et al. 2022 find to matter most on small ones "
        "(sec. 4); unpublished",
        epochs=600,
        batch_size=256,
        image_size=128,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=0.05,
        warmup=0.02,
        clip=1.0,
        options=options(),
    ),
    ("vit", "thumbnails"): Recipe(
        "the recipe of small sets at 32 pixels, crops no smaller than a fifth; unpublished",
        epochs=600,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.05,
        warmup=0.02,
        clip=3.0,
        options=options(scale=(0.2, 1.0)),
    ),
    ("cnn", "thumbnails"): Recipe(
        "the recipe of small sets at 32 pixels, crops no smaller than a fifth; unpublished",
        epochs=600,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=0.05,
        warmup=0.02,
        clip=1.0,
        options=options(scale=(0.2, 1.0)),
    ),
    **embedded(options()),
}
