"""Recipes of Barlow Twins."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """Barlow Twins' options as published for ResNet-50, 1000 epochs (Zbontar et al. 2021, main.py)."""
    published = {
        "scale": (0.08, 1.0),
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "blur": (1.0, 0.1),
        "solarize": (0.0, 0.2),
        "hidden_dim": 8192,
        "out_dim": 8192,
        "redundancy_weight": 0.0051,
        "loss_scale": 1.0,
        "bias_lr": 0.024,
    }
    return published | changes


RECIPES = {
    ("cnn", "large"): Recipe(
        "Barlow Twins ResNet-50 on ImageNet-1k, 1000 epochs: linear 73.5 (facebookresearch/barlowtwins, main.py)",
        epochs=1000,
        batch_size=2048,
        image_size=224,
        optimiser="lars",
        base_lr=0.2,
        weight_decay=1e-6,
        warmup=0.01,
        lr_end=1e-3,
        options=options(),
    ),
    ("vit", "large"): Recipe(
        "AdamW rate of ViT-S on Imagenette (rbalestr-lab/stable-pretraining), batch, schedule and weight decay of "
        "MoCo v3's ViT-S; unpublished",
        epochs=300,
        batch_size=1024,
        image_size=224,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.1,
        warmup=40 / 300,
        options=options(bias_lr=1.0),
    ),
    ("cnn", "small"): Recipe(
        "Barlow Twins ResNet-18 on Imagenette at 128 px, 800 epochs: k-NN 85.2 (lightly-ai/lightly, "
        "imagenette_benchmark.py), and a clip of our own: without it the first gradients, of norm 6,000 and no "
        "warm-up, undo the network (2 epochs of imagenette160 at 96 px, untrained 30.7: k-NN 22.3, with it 37.6)",
        epochs=800,
        batch_size=256,
        image_size=128,
        optimiser="sgd",
        base_lr=0.06,
        weight_decay=5e-4,
        warmup=0.0,
        clip=10.0,
        options=options(hidden_dim=2048, out_dim=2048, redundancy_weight=0.005, bias_lr=1.0),
    ),
    ("vit", "small"): Recipe(
        "Barlow Twins ViT-S/16 on Imagenette, 200 epochs, AdamW 5e-4: k-NN 81.2, linear 83.0 "
        "(rbalestr-lab/stable-pretraining, benchmarks/imagenet10); weight decay of its LeJEPA, width of "
        "vturrisi/solo-learn",
        epochs=200,
        batch_size=256,
        image_size=160,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.05,
        warmup=0.01,
        options=options(hidden_dim=2048, out_dim=2048, bias_lr=1.0),
    ),
    ("cnn", "thumbnails"): Recipe(
        "Barlow Twins ResNet-18 on CIFAR-10, 1000 epochs: linear 92.1 (vturrisi/solo-learn, "
        "scripts/pretrain/cifar/barlow.yaml)",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="larc",
        base_lr=0.3,
        weight_decay=1e-4,
        warmup=0.01,
        options=options(blur=(0.0, 0.0), hidden_dim=2048, out_dim=2048, loss_scale=0.1, bias_lr=1.0),
    ),
    ("vit", "thumbnails"): Recipe(
        "views and head of ResNet-18 on CIFAR (vturrisi/solo-learn) with the AdamW of ViT-S on Imagenette "
        "(rbalestr-lab/stable-pretraining); unpublished",
        epochs=1000,
        batch_size=256,
        image_size=32,
        optimiser="adamw",
        base_lr=5e-4,
        weight_decay=0.05,
        warmup=0.01,
        options=options(blur=(0.0, 0.0), hidden_dim=2048, out_dim=2048, loss_scale=0.1, bias_lr=1.0),
    ),
    **embedded(options(jitter=(0.4, 0.4, 0.2, 0.0), hidden_dim=512, out_dim=256, bias_lr=1.0)),
}
