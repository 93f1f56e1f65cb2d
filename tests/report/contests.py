"""Contests of backbones whose features are drawn here, so that who is better is known beforehand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.evaluation import linear, low_shot
from pipeline.evaluation.changes import CORRUPTIONS, GEOMETRY
from pipeline.evaluation.evaluate import Findings
from pipeline.evaluation.feature_set import FeatureSet
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.report.contest import Contest, Entry
from pipeline.report.cost import Cost

CLASSES = 5
PLAIN = ("knn", "logistic", "low_shot", "retrieval")


def features(n: int, noise: float, seed: int, own: int = 0) -> FeatureSet:
    """Features whose classes lie apart by about 1, in `noise`; `own` tells backbones apart on the same images."""
    centres = np.random.default_rng(5).normal(size=(CLASSES, 12)) / 2
    y = np.random.default_rng(seed).integers(0, CLASSES, n)
    x = centres[y] + noise * np.random.default_rng([seed, own]).normal(size=(n, 12))
    x = torch.from_numpy(x).float()
    views = x[:40, None] + 0.1 * torch.randn(40, 4, 12, generator=torch.Generator().manual_seed(own))
    classes = tuple(f"class <{i}>" for i in range(CLASSES))
    return FeatureSet(x, torch.from_numpy(y), classes, (x[:, None, :4], x[:, None]), views)


def findings(noise: float, own: int = 0, protocols: Sequence[str] = PLAIN) -> Findings:
    """What protocols find in them."""
    train, val = features(300, noise, 0, own), features(400, noise, 1, own)
    numbers: dict[str, float | int | None] = {"train_images": 300, "val_images": 400}
    evidence: dict[str, Tensor] = {}
    choices: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:  # how good the numbers are is not what is tested with them
        patch.setattr(linear, "LEAST_STEPS", 50)
        patch.setattr(low_shot, "DRAWS", 2)
        for name in protocols:
            for key, value in (PROTOCOLS[name](train, val, seed=0) or {}).items():
                kept = evidence if isinstance(value, Tensor) else choices if isinstance(value, str) else numbers
                if key != "head":
                    kept[f"{name}_{key}"] = value  # type: ignore[index]
    return Findings(numbers, evidence, val.labels, choices=choices)


def entry(
    backbone: str, objective: str, trained: Findings, untrained: Findings, *, seen: int = 10_000, seed: int = 0
) -> Entry:
    config = Config(
        backbone=backbone, objective=objective, data="photos", image_size=64, batch_size=64, lr=1e-3, seed=seed,
        recipe="a recipe & its source",
    )  # fmt: skip
    family = "vit" if backbone.startswith("vit") else "cnn"
    cost = Cost(
        parameters=11_200_000, multiply_adds=1_800_000_000, inference=850.0, memory=None, images_seen=seen,
        compute=1e14, training=83.3, training_memory=5 << 28, seconds=120.0, device="a processor", workers=1,
    )  # fmt: skip
    field = None if family == "vit" else 435
    return Entry(
        f"{backbone} + {objective}", f"runs/{backbone}", config, family, cost, field, trained, untrained,
        pixels=Findings({}, {}, trained.labels), floors=(f"{backbone} untrained", "raw pixels"),
    )  # fmt: skip


def shaken(found: Findings, own: int, **right: float) -> Findings:
    """What was found, and how it holds under changes of the images: right about that share of them, 0.6 where none is
    given, and a tenth less with every severity."""
    drawn = np.random.default_rng([17, own])
    n = len(found.labels)
    evidence = {"robustness_clean_right": torch.from_numpy(drawn.random(n) < 0.9)}
    numbers = {"robustness_clean": evidence["robustness_clean_right"].double().mean().item()}
    for name in (*GEOMETRY, *CORRUPTIONS):
        shares = right.get(name, 0.6) - 0.1 * np.arange(5)[:, None]
        answers = torch.from_numpy(drawn.random((5, n)) < shares)
        evidence[f"robustness_{name}_right"] = answers
        numbers[f"robustness_{name}"] = answers.double().mean().item()
    for kind, names in (("geometry", GEOMETRY), ("corruptions", CORRUPTIONS)):
        numbers[f"robustness_{kind}"] = sum(numbers[f"robustness_{name}"] for name in names) / len(names)
    return found._replace(numbers={**found.numbers, **numbers}, evidence={**found.evidence, **evidence})


def factored(found: Findings, **held: float) -> Findings:
    """What was found, how far each factor is held linearly, and of which images it is told."""
    numbers = {f"factors_{name}": share for name, share in held.items()}
    numbers |= {f"factors_{name}_held": share for name, share in held.items()}
    bias = {"factors_shape_bias": held["shape"] / (held["shape"] + held["texture"])}
    at = torch.arange(len(found.labels)) / len(found.labels)
    evidence = {f"factors_{name}_right": at < share for name, share in held.items()}
    return found._replace(numbers={**found.numbers, **numbers, **bias}, evidence={**found.evidence, **evidence})


def scratch(backbone: str, right: float, on_train: float, epochs: float = 2.0) -> Entry:
    """A backbone that nobody pretrained, right about those shares of the validation and of the training images."""
    labels = torch.arange(400) % CLASSES
    drawn = np.random.default_rng([int(1000 * right), len(backbone)])
    predicted = torch.where(torch.from_numpy(drawn.random(400) < right), labels, (labels + 1) % CLASSES)
    learnt = torch.from_numpy(drawn.random(300) < on_train)
    numbers = dict(zip(("scratch_top1", "scratch_low", "scratch_high"), (right, right - 0.05, right + 0.05)))
    numbers |= {"scratch_train_error": 1 - learnt.double().mean().item(), "scratch_epochs": epochs}
    found = Findings({**numbers}, {"scratch_predicted": predicted, "scratch_train_right": learnt}, labels)
    nothing = Findings({}, {}, labels)
    one = entry(backbone, "supervised", found, nothing, seen=0)
    return replace(
        one, name=backbone, run=None, cost=replace(one.cost, training=None, training_memory=None, seconds=None)
    )


def contest(entries: Sequence[Entry], pixels: Findings, protocols: Sequence[str] = PLAIN) -> Contest:
    return Contest(
        data="photos", address="/somewhere/photos", note="its own validation part",
        classes=tuple(f"class <{i}>" for i in range(CLASSES)),
        train_images=300, val_images=400, entries=tuple(replace(one, pixels=pixels) for one in entries), copies=(),
        protocols=tuple(protocols), seed=0, limit=None, fingerprints=("a" * 32, "b" * 32),
        seconds={"resnet18 + dino": 3.0},
    )  # fmt: skip
