"""Recipes of MoCo v3."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """MoCo v3's options as published for ViT-S/16 and ViT-B/16 (facebookresearch/moco-v3, CONFIG.md)."""
    published = {
        "scale": (0.08, 1.0),
        "blur": (1.0, 0.1),
        "solarize": (0.0, 0.2),
        "hidden_dim": 4096,
        "out_dim": 256,
        "projector_layers": 3,
        "predictor_norm": True,
        "temperature": 0.2,
        "momentum_start": 0.99,
        "momentum_end": 1.0,
        "freeze_stem": True,
    }
    return published | changes


def resnet(**changes: Any) -> dict[str, Any]:
    """Those published for ResNet-50, or `changes` of them."""
    return options(projector_layers=2, predictor_norm=False, freeze_stem=False, **changes)


RECIPES = {
    ("vit", "large"): Recipe(
        "MoCo v3 ViT-S/16 / ViT-B/16 on ImageNet-1k, 300 epochs: linear 73.2 / 76.7 (facebookresearch/moco-v3, "
        "CONFIG.md, with fixed sine positions and weight decay on all parameters)",
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
        "MoCo v3 ResNet-50 on ImageNet-1k, 100 epochs: linear 68.9 (facebookresearch/moco-v3, CONFIG.md)",
        epochs=100,
        batch_size=4096,
        image_size=224,
        optimiser="lars",
        base_lr=0.6,
        weight_decay=1e-6,
        warmup=0.1,
        options=resnet(scale=(0.2, 1.0), temperature=1.0),
    ),
    ("vit", "small"): Recipe(
        "MoCo v3 ViT-S/16 on Imagenette at 224 px, 200 epochs: k-NN 82.6, linear 84.7 (rbalestr-lab/"
        "stable-pretraining, benchmarks/imagenet10); warm-up and frozen stem of facebookresearch/moco-v3",
        epochs=200,
        batch_size=256,
        image_size=160,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.133,
        options=options(),
    ),
    ("cnn", "small"): Recipe(
        "MoCo v3 ResNet-18 on ImageNet-100 at 224 px, 400 epochs: linear 80.4 (vturrisi/solo-learn, "
        "scripts/pretrain/imagenet-100/mocov3.yaml)",
        epochs=400,
        batch_size=256,
        image_size=160,
        optimiser="larc",
        base_lr=0.3,
        weight_decay=1e-6,
        warmup=0.025,
        options=resnet(),
    ),
    ("vit", "thumbnails"): Recipe(
        "views, epochs, temperature and momentum of MoCo v3 ResNet-18 on CIFAR (vturrisi/solo-learn), heads, AdamW, "
        "warm-up and frozen stem of MoCo v3 ViT-S/16 (facebookresearch/moco-v3, CONFIG.md); unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=1.5e-4,
        weight_decay=0.1,
        warmup=0.133,
        options=options(blur=(0.0, 0.0)),
    ),
    ("cnn", "thumbnails"): Recipe(
        "MoCo v3 ResNet-18 on CIFAR-10, 1000 epochs: online linear 93.1 (vturrisi/solo-learn, "
        "scripts/pretrain/cifar/mocov3.yaml)",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="larc",
        base_lr=0.3,
        weight_decay=1e-6,
        warmup=0.01,
        options=resnet(blur=(0.0, 0.0)),
    ),
    **embedded(options(hidden_dim=512, out_dim=128, momentum_start=0.9)),
}
