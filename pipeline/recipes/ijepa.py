"""Recipes of I-JEPA.

The low numbers that circulate for small data (k-NN 33, linear 34 on Imagenette) come of the published learning rate of
batches of 2048 at batches of 64, no warm-up to speak of, a predictor as wide as the encoder, a constant weight decay,
and the student measured. Here the rate scales with the batch, the warm-up is 40 of 300 epochs as published, the
predictor is narrower than the encoder, and the teacher is measured.

Of CNNs the masks are those of CNN-JEPA (Kalapos and Gyires-Tóth 2024, kaland313/CNN-JEPA, ijepacnn_imagenet100.yaml),
whose context may be the whole grid, for as long as a cell is 32 pixels of 224. On grids of finer cells a target block
of the published size is wider than what a convolution's cell tells of: it hides whole objects, and what can be
predicted of it is the background. There the targets are a cell or two, and twice as many.
"""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """I-JEPA's options as published (Assran et al. 2023, the authors' configs/in1k_vith14_ep300.yaml)."""
    published = {
        "scale": (0.3, 1.0),
        "targets": 4,
        "target_scale": (0.15, 0.2),
        "target_aspect": (0.75, 1.5),
        "context_scale": (0.85, 1.0),
        "min_keep": 10,
        "predictor_width": 384,
        "predictor_depth": 12,
        "predictor_heads": 16,
        "ema_start": 0.996,
        "ema_end": 1.0,
    }
    return published | changes


WHOLE: dict[str, Any] = {"context_scale": (1.0, 1.0), "min_keep": 5}
"""CNN-JEPA's context."""
WITHIN_REACH: dict[str, Any] = {**WHOLE, "min_keep": 4, "targets": 8, "target_scale": (0.03, 0.06)}
"""Targets that a cell of a CNN can be told from."""

SHORT: dict[str, Any] = {"predictor_width": 96, "predictor_depth": 2, "predictor_heads": 3, "ema_start": 0.9}

RECIPES = {
    ("vit", "large"): Recipe(
        "I-JEPA ViT-H/14 on ImageNet-1k, 300 epochs: linear 79.3 (facebookresearch/ijepa, "
        "configs/in1k_vith14_ep300.yaml, with fixed sine positions, and initial weights that shrink with depth)",
        epochs=300,
        batch_size=2048,
        image_size=224,
        optimiser="adamw",
        base_lr=1.25e-4,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.133,
        lr_end=1e-3,
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "I-JEPA ViT-H/14 on ImageNet-1k: teacher, predictor, length and warm-up (facebookresearch/ijepa); masks of "
        "CNN-JEPA ResNet-50 on ImageNet-100 (kaland313/CNN-JEPA), without those that are random for a quarter of its "
        "steps; rate, weight decay and clip of SparK ResNet-50 (keyu-tian/SparK, arg_util.py); unpublished",
        epochs=300,
        batch_size=2048,
        image_size=224,
        optimiser="adamw",
        base_lr=2e-4,
        weight_decay=0.04,
        weight_decay_end=0.2,
        warmup=0.133,
        lr_end=1e-3,
        clip=5.0,
        options=options(**WHOLE),
    ),
    ("vit", "small"): Recipe(
        "I-JEPA ViT-H/14 on ImageNet-1k: rate per image, warm-up, weight decay, crop (facebookresearch/ijepa); a "
        "predictor half as wide as ViT-S and half as deep (shallower ones helped on 32,000 and 64,000 images: a TU "
        "Delft thesis); unpublished",
        epochs=300,
        batch_size=256,
        image_size=160,
        optimiser="adamw",
        base_lr=1.25e-4,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.133,
        lr_end=1e-3,
        options=options(predictor_width=192, predictor_depth=6, predictor_heads=6),
    ),
    ("cnn", "small"): Recipe(
        "the recipe of ViT on small data with SparK's rate, weight decay and clip, and CNN-JEPA's masks; 224 pixels, "
        "so that stride 32 leaves 49 cells; unpublished",
        epochs=300,
        batch_size=256,
        image_size=224,
        optimiser="adamw",
        base_lr=2e-4,
        weight_decay=0.04,
        weight_decay_end=0.2,
        warmup=0.133,
        lr_end=1e-3,
        clip=5.0,
        options=options(**WHOLE, predictor_width=192, predictor_depth=6, predictor_heads=6),
    ),
    ("vit", "thumbnails"): Recipe(
        "the recipe of ViT on small data (after facebookresearch/ijepa) with a shallower predictor still; unpublished",
        epochs=600,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=1.25e-4,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.133,
        lr_end=1e-3,
        options=options(predictor_width=96, predictor_depth=4, predictor_heads=6),
    ),
    ("cnn", "thumbnails"): Recipe(
        "the recipe of CNNs on small data with a shallower predictor still, and targets of a cell or two (below); "
        "unpublished",
        epochs=600,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=2e-4,
        weight_decay=0.04,
        weight_decay_end=0.2,
        warmup=0.133,
        lr_end=1e-3,
        clip=5.0,
        options=options(**WITHIN_REACH, predictor_width=96, predictor_depth=4, predictor_heads=6),
    ),
    **embedded(options(min_keep=4, **SHORT), "vit"),
    **embedded(
        options(**WITHIN_REACH, **SHORT),
        "cnn",
        but="targets of a cell or two: ResNet-20 after 512 steps at 32 px, k-NN 31.2, linear 55.8; with the published "
        "blocks 18.8 and 44.2 (untrained 25.8 and 52.8)",
    ),
}
