"""Recipes of DINO."""

from typing import Any

from pipeline.recipes.recipe import Recipe, embedded


def options(**changes: Any) -> dict[str, Any]:
    """DINO's options as published for ViT-S/16, 100 epochs (Caron et al. 2021, README of the authors' code)."""
    published = {
        "global_scale": (0.4, 1.0),
        "local_scale": (0.05, 0.4),
        "local_views": 8,
        "local_size": None,
        "blur": (1.0, 0.1, 0.5),
        "out_dim": 65536,
        "hidden_dim": 2048,
        "bottleneck_dim": 256,
        "student_temp": 0.1,
        "teacher_temp": 0.04,
        "teacher_temp_start": 0.04,
        "teacher_temp_warmup": 0.0,
        "centre_momentum": 0.9,
        "ema_start": 0.996,
        "ema_end": 1.0,
        "freeze_last_layer": 0.01,
        "norm_last_layer": True,
        "head_norm": "none",
    }
    return published | changes


RECIPES = {
    ("vit", "large"): Recipe(
        "DINO ViT-S/16 on ImageNet-1k, 100 epochs: k-NN 69.3, linear 74.0 (facebookresearch/dino, README.md, with "
        "a clip for each parameter alone)",
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
        options=options(),
    ),
    ("cnn", "large"): Recipe(
        "DINO ResNet-50 on ImageNet-1k, 100 epochs (facebookresearch/dino, README.md, with a clip for each parameter "
        "alone; accuracy not given)",
        epochs=100,
        batch_size=512,
        image_size=224,
        optimiser="sgd",
        base_lr=0.03,
        weight_decay=1e-4,
        clip=3.0,
        options=options(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14)),
    ),
    ("vit", "small"): Recipe(
        "DINO ViT-S/16 on Imagenette at 224 px, 200 epochs: k-NN 83.8, linear 86.1 (rbalestr-lab/stable-pretraining, "
        "benchmarks/imagenet10, where the warm-up is a hundredth); out_dim 2048 from lightly-ai/lightly "
        "imagenette_benchmark.py; weight-decay ramp, clip (there for each parameter alone) and frozen last layer from "
        "facebookresearch/dino",
        epochs=200,
        batch_size=128,
        image_size=160,
        optimiser="adamw",
        base_lr=1e-3,
        weight_decay=0.04,
        weight_decay_end=0.4,
        warmup=0.05,
        lr_end=2e-3,
        clip=3.0,
        options=options(
            out_dim=2048, local_views=6, teacher_temp=0.07, teacher_temp_warmup=0.05, freeze_last_layer=0.005
        ),
    ),
    ("cnn", "small"): Recipe(
        "DINO ResNet-18 on Imagenette at 128 px, 200 epochs: k-NN 87.3 (lightly-ai/lightly, imagenette_benchmark.py)",
        epochs=200,
        batch_size=256,
        image_size=128,
        optimiser="sgd",
        base_lr=0.06,
        weight_decay=5e-4,
        warmup=0.0,
        options=options(
            out_dim=2048,
            local_views=6,
            local_size=64,
            ema_start=0.99,
            ema_end=0.99,
            freeze_last_layer=0.0,
            head_norm="batch",
        ),
    ),
    ("vit", "thumbnails"): Recipe(
        "DINO with a small ViT on CIFAR-10, 200 epochs (hananshafi/vits-for-small-scale-datasets, train_ssl.py, "
        "with a clip for each parameter alone; only fine-tuned accuracy published)",
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
        options=options(
            global_scale=(0.7, 1.0),
            local_scale=(0.2, 0.5),
            local_size=16,
            out_dim=1024,
            teacher_temp=0.07,
            teacher_temp_warmup=0.05,
            freeze_last_layer=0.005,
            norm_last_layer=False,
        ),
    ),
    ("cnn", "thumbnails"): Recipe(
        "DINO ResNet-18 on CIFAR-10, 200 epochs, batch 128: k-NN 84.0 (lightly-ai/lightly, cifar10_benchmark.py)",
        epochs=200,
        batch_size=128,
        image_size=32,
        optimiser="sgd",
        base_lr=0.12,
        weight_decay=5e-4,
        warmup=0.0,
        options=options(
            local_views=0,
            blur=(0.0, 0.0, 0.0),
            out_dim=2048,
            ema_start=0.99,
            ema_end=0.99,
            freeze_last_layer=0.0,
            head_norm="batch",
        ),
    ),
    ("vit", "embedded"): Recipe(
        "chosen here for minutes on 2 CPU cores: a small head with batch norm and few prototypes, a teacher that "
        "follows fast (EMA from 0.95), since there are but 192 steps, and is less sharp than published (with 0.04 the "
        "features of all images fell together for a while, with 0.06 prototypes stayed uniform); colour of the "
        "generated images, last epoch, seed 0: ViT-S/16 k-NN 24.7, linear 63.9 (with an EMA from 0.9 25.5 and 57.4; "
        "untrained 14.6 and 40.1), ViT-Ti/8 after 512 steps at 32 px 36.4 and 76.8 (from 0.9 23.5 and 37.0, from 0.99 "
        "18.5 and 52.4; untrained 15.5 and 37.0)",
        epochs=3,
        batch_size=32,
        image_size=64,
        optimiser="adamw",
        base_lr=8e-3,
        weight_decay=0.04,
        lr_end=2e-3,
        clip=3.0,
        options=options(
            local_views=0,
            out_dim=256,
            ema_start=0.95,
            head_norm="batch",
            teacher_temp=0.05,
            teacher_temp_start=0.05,
        ),
    ),
    **embedded(
        options(local_views=0, out_dim=256, ema_start=0.99, head_norm="batch"),
        "cnn",
        but="for a teacher that follows slower: with an EMA from 0.9 it finds all prototypes alike (ResNet-20 after "
        "512 steps at 32 px, seed 0: k-NN 26.7, from 0.99 40.4; untrained 25.8)",
    ),
}
