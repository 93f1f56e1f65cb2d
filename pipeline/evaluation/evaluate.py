"""All numbers of an evaluation: every protocol on the frozen features of a backbone, and of the floors beside it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from backbones.contract import Backbone
from pipeline.data import embedded
from pipeline.data.beton import BetonReader
from pipeline.data.packed import Packed, read_facts
from pipeline.evaluation import DEFAULT, floors
from pipeline.evaluation.accuracy import confusion
from pipeline.evaluation.attentive import Attentive
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.duplicates import duplicates
from pipeline.evaluation.feature_set import FeatureSet, in_classes_of
from pipeline.evaluation.features import VIEWED, Look, Pass, look, look_once, random_views
from pipeline.evaluation.images import Images, evaluating, evaluation_view
from pipeline.evaluation.pooling import LAST
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.evaluation.table import Table

Results = dict[str, float | int | None]
ALL = 1 << 20
"""Layers that are looked at where a protocol needs every one."""
OF_FLOORS = {"poolings", "factors", "targets"}
"""What a protocol that floors go through may need."""


class Findings(NamedTuple):
    """What was found out about one backbone.

    numbers      scores by name, `<protocol>_<name>`, None where there is none, and `train_images`, `val_images`
    evidence     tensors by name, likewise, on the CPU; those with one entry an image are in the order of `labels`
    labels       int64 [N], of the validation images that have one
    classifiers  by protocol, of those that train one
    choices      what was chosen on the training set and is no number, `<protocol>_<name>`
    lacking      by protocol that measured nothing, what it takes for that
    """

    numbers: Results
    evidence: dict[str, Tensor]
    labels: Tensor
    classifiers: Mapping[str, Classifier] = {}
    choices: Mapping[str, str] = {}
    lacking: Mapping[str, str] = {}


def evaluate_backbone(
    backbone: nn.Module,
    train: Packed,
    val: Packed | None,
    *,
    image_size: int | tuple[int, int],
    protocols: Sequence[str] = DEFAULT,
    device: torch.device | str = "cpu",
    seed: int = 0,
    limit: int | None = None,
    val_limit: int | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    cache: Path | None = None,
) -> Results:
    """Numbers by name: `knn_top1` (k = 20), `knn_low`, `knn_high`, `knn_k10` ..., `linear_top1`, `linear_lr` ..., and
    how many labelled images they stand on, `train_images` and `val_images`; of images without labels, how many in all.

    Accuracies are in [0, 1]; a protocol's headline (`knn_top1`, `retrieval_map`) is None where either set has no
    labels.

    Args:
        backbone: on `device`; images [B, C, H, W] and `summaries` to `Features`. It is put back into its mode.
        limit, val_limit: the largest number of training images to learn from, and of validation images to measure on,
            always the same ones.
        cache: the folder in which features are kept; None keeps none.

    Raises:
        ValueError: an unknown protocol, or a validation set that is the training set.
    """
    return examine(
        {"": backbone}, train, val, image_size=image_size, protocols=protocols, device=device, seed=seed, limit=limit,
        val_limit=val_limit, batch_size=batch_size, precision=precision, cache=cache,
    )[""].numbers  # fmt: skip


def with_floors(
    backbone: nn.Module,
    untrained: nn.Module,
    train: Packed,
    val: Packed | None,
    *,
    image_size: int | tuple[int, int],
    protocols: Sequence[str] = DEFAULT,
    device: torch.device | str = "cpu",
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    cache: Path | None = None,
    table: Table | None = None,
    look: Look = look,
) -> tuple[dict[str, Any], Findings]:
    """As `evaluate_backbone`, with the same numbers of the untrained backbone under `untrained`, of raw pixels under
    `pixels`, as far as protocols need nothing but features, as `duplicates` how many validation images are also
    training images, and as `lacking` what each protocol takes that measured nothing; and all that was found in the
    backbone. All three see the same images, each decoded once."""
    found = examine(
        {"trained": backbone, "untrained": untrained, "pixels": floors.pixels()}, train, val, image_size=image_size,
        protocols=protocols, device=device, seed=seed, limit=limit, batch_size=batch_size, precision=precision,
        cache=cache, floors=("untrained", "pixels"), table=table, look=look,
    )  # fmt: skip
    numbers = {name: one.numbers for name, one in found.items()}
    scores = {
        **numbers["trained"],
        "choices": dict(found["trained"].choices),
        "lacking": dict(found["trained"].lacking),
        "duplicates": len(duplicates(train, val)) if val else 0,
        "untrained": numbers["untrained"],
        "pixels": numbers["pixels"],
    }
    return scores, found["trained"]


def examine(
    backbones: Mapping[str, nn.Module],
    train: Packed,
    val: Packed | None,
    *,
    image_size: int | tuple[int, int],
    protocols: Sequence[str] = DEFAULT,
    device: torch.device | str = "cpu",
    seed: int = 0,
    limit: int | None = None,
    val_limit: int | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    cache: Path | None = None,
    floors: Sequence[str] = (),
    table: Table | None = None,
    look: Look = look,
    epochs: int | None = None,
) -> dict[str, Findings]:
    """What every protocol finds in several backbones on the same images; arguments as of `evaluate_backbone`.

    Args:
        floors: backbones that go through no protocol that needs more than features.
        table: labels that take the place of those that were packed.
        look: makes the passes that no cache holds.
        epochs: over which protocols train the whole network; None: as their recipes say.
    """
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown:
        raise ValueError(f"unknown protocol {', '.join(unknown)}; there are {', '.join(PROTOCOLS)}")
    classes = table.classes if table else train.classes
    labelled = val is not None and bool(classes) and bool(table or val.classes)
    nothing: Results = {f"{name}_{PROTOCOLS[name].headline}": None for name in protocols}
    if val is None or (not labelled and all(PROTOCOLS[name].labels for name in protocols)):
        numbers = {**nothing, "train_images": 0, "val_images": 0}
        return {name: Findings(dict(numbers), {}, torch.empty(0, dtype=torch.int64)) for name in backbones}
    if train.path == val.path or (train.fingerprint and train.fingerprint == val.fingerprint):
        raise ValueError(
            f"{val.path} holds the training images, so an accuracy on it says nothing: give other val data"
        )

    device = torch.device(device)
    needs = {need for name in protocols for need in PROTOCOLS[name].needs}
    layers = ALL if "layers" in needs else max(LAST) if "poolings" in needs else 0

    def passes(packed: Packed, names: Sequence[str], limit: int | None, *, random: bool = False) -> dict[str, Pass]:
        return look_once(
            cache, {name: backbones[name] for name in names}, packed,
            random_views(image_size) if random else [evaluation_view(image_size)],
            summaries=0 if random else layers, batch_size=batch_size, device=device,
            limit=limit, precision=precision, look=look,
        )  # fmt: skip

    examined = [name for name in backbones if name not in floors]
    on_train, on_val = (passes(packed, list(backbones), n) for packed, n in ((train, limit), (val, val_limit)))
    random = passes(train, examined, VIEWED, random=True) if "views" in needs else {}

    def labels_of(packed: Packed) -> tuple[Tensor, Tensor | None]:
        if table:
            return table.of(packed)
        packed_labels = torch.from_numpy(BetonReader(packed.path).metadata["label"].astype("int64"))
        return in_classes_of(classes, packed_labels, packed.classes), None

    def seen_by(name: str, packed: Packed, one: Pass) -> FeatureSet:
        labels, targets = labels_of(packed)
        images = None
        if "images" in needs and name not in floors:
            images = Images(backbones[name], packed.path, labels, image_size, device, precision, batch_size, epochs)
        return FeatureSet(
            one.features[:, 0].to(device), labels[one.which].to(device), classes,
            tuple(layer.to(device) for layer in one.summaries),
            random[name].features.to(device) if packed is train and name in random else None,
            truth(packed, one.which, device) if "factors" in needs else {}, images, one.which,
            None if targets is None else targets[one.which].to(device),
        )  # fmt: skip

    results = {}
    for name in backbones:
        bank, queries = seen_by(name, train, on_train[name]), seen_by(name, val, on_val[name])
        numbers = {}
        evidence: dict[str, Tensor] = {}
        classifiers: dict[str, Classifier] = {}
        choices: dict[str, str] = {}
        lacking: dict[str, str] = {}
        for protocol in protocols:
            measure = PROTOCOLS[protocol]
            if name in floors and set(measure.needs) - OF_FLOORS:
                continue
            with evaluating({name: backbones[name]}):
                found = measure(bank, queries, seed=seed)
            if found is None:
                lacking[protocol] = measure.takes
            for key, value in ({measure.headline: None} if found is None else found).items():
                if isinstance(value, Tensor):
                    evidence[f"{protocol}_{key}"] = value.cpu()
                elif isinstance(value, nn.Module):
                    pooling = str((found or {}).get("pooling", "pooled"))
                    classifiers |= named(protocol, value, backbones[name], classes, image_size, pooling)
                elif isinstance(value, str):
                    choices[f"{protocol}_{key}"] = value
                else:  # NaN, which is no JSON
                    numbers[f"{protocol}_{key}"] = None if value is None or math.isnan(value) else value
        counted = {"train_images": bank, "val_images": queries}
        counts = {key: of.known() if labelled or table else len(of.labels) for key, of in counted.items()}
        truths = queries.labels[queries.labels >= 0].cpu()
        results[name] = Findings({**numbers, **counts}, evidence, truths, classifiers, choices, lacking)
    return results


def confusions(found: Findings, classes: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """By protocol, of every true class how many of its images were taken for which: those cells that are not zero. A
    class that the training set lacks is called by its number."""
    by_protocol: dict[str, dict[str, dict[str, int]]] = {}
    for protocol in PROTOCOLS:
        predicted = found.evidence.get(f"{protocol}_predicted")
        if predicted is None:
            continue
        table = confusion(predicted, found.labels)
        names = [*classes, *map(str, range(len(classes), len(table)))]
        rows: dict[str, dict[str, int]] = {}
        for of, taken in table.nonzero().tolist():
            rows.setdefault(names[of], {})[names[taken]] = int(table[of, taken])
        by_protocol[protocol] = rows
    return by_protocol


def named(
    protocol: str,
    head: nn.Module,
    backbone: nn.Module,
    classes: tuple[str, ...],
    image_size: int | tuple[int, int],
    pooling: str,
) -> dict[str, Classifier]:
    """The classifier that a protocol trained, under its name; none of what is no backbone of ours."""
    if isinstance(head, Classifier):
        return {protocol: head}
    if not isinstance(backbone, Backbone) or not isinstance(head, nn.Linear | Attentive):
        return {}
    return {protocol: Classifier(backbone, head, classes[: head.out_features], image_size, pooling)}


def truth(packed: Packed, index: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The factors of images `index` [N] of a generated set, int64 [N] by name; empty for any other set."""
    drawn = read_facts(packed.path).get("embedded")
    if not drawn:
        return {}
    values = embedded.factors(drawn["n"], drawn["seed"], drawn["part"])
    return {name: torch.from_numpy(value)[index].to(device) for name, value in values.items()}
