"""Recipes of LeJEPA."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """LeJEPA's options as the authors run it on ImageNet-1k (rbalestr-lab/lejepa, README.md and scripts)."""
    published = {
        "global_scale": (0.3, 1.0),
        "local_scale": (0.05, 0.3),
        "global_views": 2,
        "local_views": 6,
        "local_size": None,
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "blur": 0.5,
        "solarize": 0.2,
        "hidden_dim": 2048,
        "out_dim": 512,
        "sigreg_weight": 0.05,
        "slices": 1024,
        "knots": 17,
        "t_max": 3.0,
    }
    return published | changes


RECIPES = {
    ("vit", "large"): Recipe(
        "LeJEPA ViT-L/14 on ImageNet-1k, 100 epochs (rbalestr-lab/lejepa, scripts; accuracy not given there), without "
        "the patch masking and EMA teacher of that script, which the README leaves out; warm-up of ViT-S on Imagenette",
        epochs=100,
        batch_size=512,
        image_size=224,
        optimiser="adamw",
        base_lr=2.5e-4,
        weight_decay=0.05,
        warmup=0.01,
        lr_end=1e-3,
        drop_path=0.1,
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "LeJEPA on ImageNet-1k with the weight decay that the authors advise for ResNets (rbalestr-lab/lejepa, "
        "README.md; accuracy not given)",
        epochs=100,
        batch_size=512,
        image_size=224,
        optimiser="adamw",
        base_lr=2.5e-4,
        weight_decay=5e-4,
        warmup=0.01,
        lr_end=1e-3,
        options=options(),
    ),
    ("vit", "small"): Recipe(
        "LeJEPA ViT-S/16 on Imagenette, 200 epochs: k-NN 85.4, linear 87.1 (rbalestr-lab/stable-pretraining, "
        "benchmarks/imagenet10)",
        epochs=200,
        batch_size=128,
        image_size=160,
        optimiser="adamw",
        base_lr=8e-4,
        weight_decay=0.05,
        warmup=0.01,
        lr_end=1e-3,
        options=options(sigreg_weight=0.02),
    ),
    ("cnn", "small"): Recipe(
        "the recipe of ViT-S/16 on Imagenette (rbalestr-lab/stable-pretraining) with the weight decay that the authors "
        "advise for ResNets; unpublished",
        epochs=200,
        batch_size=128,
        image_size=128,
        optimiser="adamw",
        base_lr=8e-4,
        weight_decay=5e-4,
        warmup=0.01,
        lr_end=1e-3,
        options=options(sigreg_weight=0.02),
    ),
    ("vit", "thumbnails"): Recipe(
        "LeJEPA ViT-S/8 on Imagenette at 128 px, 800 epochs: linear 90.7 (rbalestr-lab/lejepa, MINIMAL.md), taken to "
        "32 px; unpublished there",
        epochs=800,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=2e-3,
        weight_decay=0.05,
        warmup=1 / 800,
        lr_end=0.5,
        drop_path=0.1,
        options=options(
            global_scale=(0.08, 1.0),
            global_views=4,
            local_views=0,
            jitter=(0.8, 0.8, 0.8, 0.2),
            out_dim=16,
            sigreg_weight=0.02,
            slices=256,
        ),
    ),
    ("cnn", "thumbnails"): Recipe(
        "optimiser, views and head of SIGReg with ResNet-18 on CIFAR-10, 300 epochs: linear 91.0 "
        "(facebookresearch/eb_jepa, examples/image_jepa), lambda and slices of the authors' MINIMAL.md",
        epochs=300,
        batch_size=256,
        image_size=32,
        optimiser="larc",
        base_lr=0.3,
        weight_decay=1e-4,
        warmup=1 / 30,
        options=options(
            global_scale=(0.2, 1.0),
            local_views=0,
            blur=0.0,
            solarize=0.1,
            out_dim=128,
            sigreg_weight=0.02,
            slices=256,
        ),
    ),
    **embedded(options(local_views=0, jitter=(0.4, 0.4, 0.2, 0.0), hidden_dim=512, out_dim=64, slices=256)),
}
