"""Examine several runs on the same images: what is known of each, what it cost, and what every protocol found."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from backbones import names
from backbones.cost import receptive_field
from pipeline import cluster
from pipeline.config import Config
from pipeline.data import preparation
from pipeline.device import device_name, here, precision_of
from pipeline.errors import UserError
from pipeline.evaluation import BY_TABLE, floors, judge
from pipeline.evaluation.duplicates import duplicates
from pipeline.evaluation.evaluate import Findings, examine
from pipeline.evaluation.table import Table
from pipeline.report.cost import Cost, cost
from pipeline.training import launch


@dataclass(frozen=True)
class Entry:
    """One backbone of a contest, and its own untrained self. `run` is None where nobody pretrained it; `field` is the
    side of its theoretical receptive field in pixels, None where that is the whole image."""

    name: str
    run: str | None
    config: Config
    family: str
    cost: Cost
    field: int | None
    trained: Findings
    untrained: Findings


@dataclass(frozen=True)
class Contest:
    """Backbones examined on the same images.

    classes    of the labels; none where only columns of a table were examined
    pixels     what raw pixels achieve
    copies     (training image, validation image) that are the same file
    table      of the labels, where those of the folders do not count
    seconds    spent, by stage
    """

    data: str
    note: str
    classes: tuple[str, ...]
    train_images: int
    val_images: int
    entries: tuple[Entry, ...]
    pixels: Findings
    copies: tuple[tuple[str, str], ...]
    protocols: tuple[str, ...]
    seed: int
    limit: int | None
    epochs: int | None = None
    table: Table | None = None
    fingerprints: tuple[str, str] = ("", "")
    device: str = "cpu"
    seconds: Mapping[str, float] = field(default_factory=dict)


def hold(
    runs: Sequence[str],
    *,
    fresh: Sequence[Config] = (),
    data: str | None = None,
    val_data: str | None = None,
    table: Table | None = None,
    protocols: Sequence[str],
    limit: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    cache: str | None = None,
    engine: str = "local",
    workers: int | None = None,
) -> Contest:
    """Examine runs or checkpoints on the data that all share, or on `data`, by its labels or by those of a table.

    Args:
        engine, workers: where features are extracted, as of `cluster.looking`.
        fresh: backbones beside the runs that nobody pretrained.
        epochs: over which protocols train the whole network; None: as their recipes say.

    Raises:
        UserError: fewer than two runs, runs on different data, no labels, or a torn or foreign checkpoint.
    """
    if len(runs) + len(fresh) < 2:
        raise UserError(f"a comparison needs at least two runs, not {len(runs) + len(fresh)}")
    begun = time.perf_counter()
    found = [judge.find(run) for run in runs]
    configs = [*(one.config for one in found), *fresh]
    shared = {one.data for one in configs}
    if data is None and len(shared) > 1:
        raise UserError(f"the runs have different data ({', '.join(sorted(shared))}); give --data to say whose counts")
    config = configs[0] if data is None else replace(configs[0], data=data, val_data=None)
    config = replace(config, val_data=val_data or config.val_data, cache=cache or config.cache)
    if data is not None or len({one.limit for one in configs}) > 1:
        config = replace(config, limit=None)
    train, val, note = preparation.prepare(config)
    if val is None and table:
        train, val, note = preparation.prepare(config, hold_out=True)
    if val is None or (table is None and not (train.classes and val.classes)):
        raise UserError(
            f"--data {config.data}: has no labels to judge by (class folders are labels; --labels takes a table)"
        )
    device = here()
    look = cluster.looking(engine, workers)
    found += [judge.fresh(one, train) for one in fresh]
    seconds = {"reading checkpoints and packing": time.perf_counter() - begun}

    entries = []
    for one, name in zip(found, titles(found)):
        begun = time.perf_counter()
        size, precision = int(one.config.image_size or 0), precision_of(one.config, device)
        one.backbone.to(device)
        spent = cost(one, size, device, precision)
        backbones = {
            "trained": one.backbone,
            "untrained": floors.untrained(one.backbone.config, one.config.seed).to(device),
            "pixels": floors.pixels(),
        }
        results = examine(
            backbones, train, val, image_size=size, protocols=protocols, device=device, seed=seed, limit=limit,
            precision=precision, floors=("untrained", "pixels"), epochs=epochs,
            cache=preparation.cache_folder(config.cache) / "features", table=table, look=look,
        )  # fmt: skip
        entries.append(
            Entry(
                name, one.folder.address if one.folder else None, one.config, names.family(one.config.backbone), spent,
                receptive_field(one.backbone), results["trained"], results["untrained"],
            )
        )  # fmt: skip
        one.backbone.to("cpu")
        seconds[name] = time.perf_counter() - begun
        print(f"{name}: examined in {seconds[name]:.0f} s", flush=True)
    numbers = entries[0].trained.numbers
    classes = train.classes
    if table:
        classes = () if set(protocols) <= set(BY_TABLE) else table.classes
    return Contest(
        data=launch.data_name(config) + (f" by {table.name}" if table else ""), note=note, classes=classes,
        train_images=int(numbers["train_images"] or 0), val_images=int(numbers["val_images"] or 0),
        entries=tuple(entries), pixels=results["pixels"], copies=tuple(duplicates(train, val)),
        protocols=tuple(protocols), seed=seed, limit=limit, epochs=epochs, table=table,
        fingerprints=(train.fingerprint, val.fingerprint), device=device_name(device.type), seconds=seconds,
    )  # fmt: skip


def titles(found: Sequence[judge.Judged]) -> list[str]:
    """What each run is called: its backbone and objective, and what tells it from others of the same; a backbone that
    nobody pretrained by its name."""
    plain = [f"{one.config.backbone} + {one.config.objective}" if one.folder else one.config.backbone for one in found]
    seen = [f"{name} at {one.seen:,} images" for name, one in zip(plain, found)]
    folders = [
        f"{name} ({Path(one.folder.address).name if one.folder else 'not pretrained'})"
        for name, one in zip(seen, found)
    ]
    return [
        names[0] if plain.count(names[0]) == 1 else names[1] if seen.count(names[1]) == 1 else names[2]
        for names in zip(plain, seen, folders)
    ]
