"""Recipes of Gram anchoring: short, at a low and constant rate, from a checkpoint that was trained to its end."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """Its options as published for ViT-7B/16 (facebookresearch/dinov3, dinov3_vit7b16_gram_anchor.yaml)."""
    published = {
        "checkpoint": "",
        "gram_weight": 2.0,
        "gram_warmup": 0.025,
        "local_weight": 0.5,
        "gram_resolution": 2.0,
        "refresh_every": 0.25,
        "refreshes": 3,
        "ema": 0.999,
    }
    return published | changes


RECIPES = {
    ("vit", "large"): Recipe(
        "DINOv3 ViT-7B/16, Gram stage: constant rate 3e-5 * 4 sqrt(B / 1024), weight decay, betas "
        "(facebookresearch/dinov3, dinov3_vit7b16_gram_anchor.yaml); length, batch, clip and drop path for smaller "
        "ViTs, unpublished",
        epochs=10,
        batch_size=1024,
        image_size=224,
        optimiser="adamw",
        base_lr=3e-5,
        weight_decay=0.04,
        warmup=0.1,
        lr_end=1.0,
        betas=(0.9, 0.99),
        clip=3.0,
        drop_path=0.1,
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "weight, resolution and refreshes of DINOv3's Gram stage (facebookresearch/dinov3), SGD at a tenth of the rate "
        "of DINO ResNet-50 (facebookresearch/dino); unpublished",
        epochs=10,
        batch_size=512,
        image_size=224,
        optimiser="sgd",
        base_lr=3e-3,
        weight_decay=1e-4,
        warmup=0.1,
        lr_end=1.0,
        clip=3.0,
        options=options(),
    ),
    ("vit", "small"): Recipe(
        "DINOv3's Gram stage (facebookresearch/dinov3) after a run of the small DINO, iBOT or DINOv2 recipe, at about "
        "a tenth of its rate; unpublished",
        epochs=20,
        batch_size=128,
        image_size=160,
        optimiser="adamw",
        base_lr=1e-4,
        weight_decay=0.04,
        warmup=0.1,
        lr_end=1.0,
        betas=(0.9, 0.99),
        clip=3.0,
        drop_path=0.1,
        options=options(),
    ),
    ("cnn", "small"): Recipe(
        "DINOv3's Gram stage (facebookresearch/dinov3) after a run of the small DINO, iBOT or DINOv2 recipe, at a "
        "tenth of its rate; unpublished",
        epochs=20,
        batch_size=128,
        image_size=128,
        optimiser="sgd",
        base_lr=6e-3,
        weight_decay=5e-4,
        warmup=0.1,
        lr_end=1.0,
        clip=3.0,
        options=options(),
    ),
    ("vit", "thumbnails"): Recipe(
        "DINOv3's Gram stage (facebookresearch/dinov3) after a run of DINO's, iBOT's or DINOv2's recipe for "
        "thumbnails, at about a tenth of its rate, at one resolution, since there are no more pixels; unpublished",
        epochs=20,
        batch_size=512,
        image_size=32,
        optimiser="adamw",
        base_lr=1e-5,
        weight_decay=0.04,
        warmup=0.1,
        lr_end=1.0,
        betas=(0.9, 0.99),
        clip=3.0,
        options=options(gram_resolution=1.0),
    ),
    ("cnn", "thumbnails"): Recipe(
        "DINOv3's Gram stage (facebookresearch/dinov3) after a run of DINO's, iBOT's or DINOv2's recipe for "
        "thumbnails, at a tenth of its rate, at one resolution, since there are no more pixels; unpublished",
        epochs=20,
        batch_size=128,
        image_size=32,
        optimiser="sgd",
        base_lr=0.012,
        weight_decay=5e-4,
        warmup=0.1,
        lr_end=1.0,
        clip=3.0,
        options=options(gram_resolution=1.0),
    ),
    **embedded(options(gram_resolution=1.0, ema=0.99), base_lr=8e-4),
}
