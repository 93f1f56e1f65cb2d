"""All numbers of an evaluation: every protocol on the frozen features of a backbone, and of the floors beside it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from pipeline.data.packed import Packed
from pipeline.evaluation import floors
from pipeline.evaluation.feature_set import FeatureSet, in_classes_of
from pipeline.evaluation.features import extract_all
from pipeline.evaluation.protocols import PROTOCOLS

Results = dict[str, float | int | None]


def evaluate_backbone(
    backbone: nn.Module,
    train: Packed,
    val: Packed | None,
    *,
    image_size: int | tuple[int, int],
    protocols: Sequence[str] = tuple(PROTOCOLS),
    device: torch.device | str = "cpu",
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Results:
    """Numbers by name: `knn_top1` (k = 20), `knn_low`, `knn_high`, `knn_k10` ..., `linear_top1`, `linear_lr` ..., and
    how many labelled images they stand on, `train_images` and `val_images`.

    Accuracies are in [0, 1]; `<protocol>_top1` is None where either set has no labels.

    Args:
        backbone: on `device`; images [B, C, H, W] to an object with `pooled` [B, D]. It is put back into its mode.
        limit: the largest number of training images to learn from, always the same ones.

    Raises:
        ValueError: an unknown protocol, or a validation set that is the training set.
    """
    return evaluate_all(
        {"": backbone}, train, val, image_size=image_size, protocols=protocols, device=device, seed=seed, limit=limit,
        batch_size=batch_size, precision=precision,
    )[""]  # fmt: skip


def with_floors(
    backbone: nn.Module,
    untrained: nn.Module,
    train: Packed,
    val: Packed | None,
    *,
    image_size: int | tuple[int, int],
    protocols: Sequence[str] = tuple(PROTOCOLS),
    device: torch.device | str = "cpu",
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Any]:
    """As `evaluate_backbone`, with the same numbers of the untrained backbone under `untrained`, of raw pixels under
    `pixels`. All three see the same images, each decoded once."""
    results = evaluate_all(
        {"trained": backbone, "untrained": untrained, "pixels": floors.pixels()}, train, val, image_size=image_size,
        protocols=protocols, device=device, seed=seed, limit=limit, batch_size=batch_size, precision=precision,
    )  # fmt: skip
    return {**results["trained"], "untrained": results["untrained"], "pixels": results["pixels"]}


def evaluate_all(
    backbones: Mapping[str, nn.Module],
    train: Packed,
    val: Packed | None,
    *,
    image_size: int | tuple[int, int],
    protocols: Sequence[str],
    device: torch.device | str,
    seed: int,
    limit: int | None,
    batch_size: int,
    precision: Literal["fp32", "bf16"],
) -> dict[str, Results]:
    """The numbers of several backbones on the same images; arguments as of `evaluate_backbone`."""
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown:
        raise ValueError(f"unknown protocol {', '.join(unknown)}; there are {', '.join(PROTOCOLS)}")
    nothing: Results = {f"{name}_top1": None for name in protocols}
    if val is None or not train.classes or not val.classes:
        return {name: {**nothing, "train_images": 0, "val_images": 0} for name in backbones}
    if train.path == val.path or (train.fingerprint and train.fingerprint == val.fingerprint):
        raise ValueError(
            f"{val.path} holds the training images, so an accuracy on it says nothing: give other val data"
        )

    def features(packed: Packed, limit: int | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return extract_all(
            backbones, packed.path, image_size=image_size, batch_size=batch_size, device=device, limit=limit,
            precision=precision,
        )  # fmt: skip

    train_x, train_y = features(train, limit)
    val_x, val_y = features(val, None)
    val_y = in_classes_of(train.classes, val_y, val.classes)
    counts = {"train_images": int((train_y >= 0).sum()), "val_images": int((val_y >= 0).sum())}
    results = {}
    for name in backbones:
        bank = FeatureSet(train_x[name].to(device), train_y.to(device), train.classes)
        queries = FeatureSet(val_x[name].to(device), val_y.to(device), train.classes)
        numbers: Results = {}
        for protocol in protocols:
            found = PROTOCOLS[protocol](bank, queries, seed=seed)
            numbers |= {f"{protocol}_top1": None} if found is None else {f"{protocol}_{k}": v for k, v in found.items()}
        results[name] = {**numbers, **counts}
    return results
