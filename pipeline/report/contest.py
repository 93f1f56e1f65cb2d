"""Examine several runs on the same images: what is known of each, what it cost, and what every protocol found."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from backbones import names
from backbones.cost import receptive_field
from pipeline import cluster
from pipeline.config import Config, without_secrets
from pipeline.data import preparation
from pipeline.device import device_name, here, placed, precision_of
from pipeline.errors import UserError
from pipeline.evaluation import BY_TABLE, floors, judge
from pipeline.evaluation.duplicates import NEVER, Met, duplicates, met
from pipeline.evaluation.evaluate import Findings, examine
from pipeline.evaluation.table import Table
from pipeline.redaction import hide, redact
from pipeline.report.cost import Cost, cost
from pipeline.training import launch


@dataclass(frozen=True)
class Entry:
    """One backbone of a contest, and what it must beat: its own untrained self, and raw pixels at its image size.

    name    of no other entry
    run     None where nobody pretrained it
    field   side of its theoretical receptive field in pixels, None where that is the whole image
    floors  what the untrained self and the raw pixels are called: alike where they are the same for several entries
    met     how many validation images it was pretrained on
    lone    a checkpoint without its run: no `config.yaml` says how it was trained
    """

    name: str
    run: str | None
    config: Config
    family: str
    cost: Cost
    field: int | None
    trained: Findings
    untrained: Findings
    pixels: Findings
    floors: tuple[str, str]
    met: Met = NEVER
    lone: bool = False

    @property
    def slug(self) -> str:
        """The name as part of a file's: "vit_ti16-dino"."""
        return re.sub(r"[^a-zA-Z0-9_.]+", "-", self.name).strip("-")


@dataclass(frozen=True)
class Contest:
    """Backbones examined on the same images.

    address    of the images, without credentials
    classes    of the labels; none where only columns of a table were examined
    copies     (training image, validation image) that are the same file
    table      of the labels, where those of the folders do not count
    seconds    spent, by stage
    """

    data: str
    address: str
    note: str
    classes: tuple[str, ...]
    train_images: int
    val_images: int
    entries: tuple[Entry, ...]
    copies: tuple[tuple[str, str], ...]
    protocols: tuple[str, ...]
    seed: int
    limit: int | None
    epochs: int | None = None
    table: Table | None = None
    fingerprints: tuple[str, str] = ("", "")
    device: str = "cpu"
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def lacking(self) -> dict[str, str]:
        """By protocol that measured nothing, what it takes for that."""
        return {protocol: takes for one in self.entries for protocol, takes in one.trained.lacking.items()}


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
        UserError: fewer than two runs, one named twice, runs on different data, no labels where a protocol needs them,
            or a torn or foreign checkpoint.
    """
    if len(runs) + len(fresh) < 2:
        raise UserError(f"a comparison needs at least two runs, not {len(runs) + len(fresh)}")
    begun = time.perf_counter()
    found = [judge.find(run) for run in runs]
    known = [(one.folder.address if one.folder else run, one.seen) for run, one in zip(runs, found)]
    if twice := [run for run, one in zip(runs, known) if known.count(one) > 1]:
        raise UserError(f"{' and '.join(dict.fromkeys(twice))}: one run, named twice, which differs in nothing")
    config = examined([*(one.config for one in found), *fresh], data, val_data, cache)
    train, val, note = judge.sets(config, table, protocols)
    assert val is not None
    device, cached = here(), preparation.cache_folder(config.cache)
    look = cluster.looking(engine, workers)
    found += [judge.fresh(one, train) for one in fresh]
    seconds = {"reading checkpoints and packing": time.perf_counter() - begun}

    entries = []
    called = titles(found)
    for one, name, names_of_floors in zip(found, called, floors_of(found, called)):
        begun = time.perf_counter()
        size, precision = int(one.config.image_size or 0), precision_of(one.config, device)
        placed(one.backbone, device)
        spent = cost(one, size, device, precision)
        backbones = {
            "trained": one.backbone,
            "untrained": placed(floors.untrained(one.backbone.config, one.config.seed), device),
            "pixels": floors.pixels(),
        }
        results = examine(
            backbones, train, val, image_size=size, protocols=protocols, device=device, seed=seed, limit=limit,
            precision=precision, floors=("untrained", "pixels"), epochs=epochs,
            cache=cached / "features", table=table, look=look,
        )  # fmt: skip
        entries.append(
            Entry(
                name, one.folder.address if one.folder else None, one.config, names.family(one.config.backbone), spent,
                receptive_field(one.backbone), results["trained"], results["untrained"], results["pixels"],
                names_of_floors, met(one.config, one.trained_on, val, cache=cached) if one.folder else NEVER,
                one.folder is not None and not one.folder.exists("config.yaml"),
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
        data=launch.data_name(config) + (f" by {table.name}" if table else ""), address=hide(config.data), note=note,
        classes=classes,
        train_images=int(numbers["train_images"] or 0), val_images=int(numbers["val_images"] or 0),
        entries=tuple(entries), copies=tuple(duplicates(train, val)),
        protocols=tuple(protocols), seed=seed, limit=limit, epochs=epochs, table=table,
        fingerprints=(train.fingerprint, val.fingerprint), device=device_name(device.type), seconds=seconds,
    )  # fmt: skip


def examined(configs: Sequence[Config], data: str | None, val_data: str | None, cache: str | None) -> Config:
    """A configuration that names the images to examine backbones of these configurations on; arguments as of `hold`.

    Raises:
        UserError: they have different data, and none is named.
    """
    shared = {one.data for one in configs}
    if data is None and len(shared) > 1:
        raise UserError(f"the runs have different data ({', '.join(sorted(shared))}); give --data to say whose counts")
    config = configs[0] if data is None else replace(configs[0], data=data, val_data=None)
    config = replace(config, val_data=val_data or config.val_data, cache=cache or config.cache)
    if data is not None or len({one.limit for one in configs}) > 1:
        config = replace(config, limit=None)
    return config


def refuse(
    runs: Sequence[str],
    planned: Sequence[Config],
    *,
    data: str | None,
    val_data: str | None,
    table: Table | None,
    protocols: Sequence[str],
    cache: str | None,
) -> None:
    """Raise the `UserError` of `hold` before runs are trained by the `planned` configurations."""
    configs = [*(judge.find(run).config for run in runs), *(without_secrets(one) for one in planned)]
    judge.sets(examined(configs, data, val_data, cache), table, protocols)


def titles(found: Sequence[judge.Judged]) -> list[str]:
    """What each run is called, no two of them alike: its backbone and objective, and as much of its images seen, its
    folder's name, its address or a number as tells it from others of the same; a backbone that nobody pretrained by its
    name. Names of which a file's name keeps no difference are alike."""
    plain = [f"{one.config.backbone} + {one.config.objective}" if one.folder else one.config.backbone for one in found]
    seen = [f"{name} at {one.seen:,} images" for name, one in zip(plain, found)]
    addresses = [redact(one.folder.address) if one.folder else "not pretrained" for one in found]
    by_folder = [f"{name} ({Path(address).name})" for name, address in zip(seen, addresses)]
    by_address = [f"{name} ({address})" for name, address in zip(seen, addresses)]
    numbered = [f"{name}, number {i}" for i, name in enumerate(by_address, 1)]
    levels = [plain, seen, by_folder, by_address, numbered]
    files = [[re.sub(r"[^a-z0-9_]+", "-", name.lower()) for name in level] for level in levels]
    first_alone = [next(k for k, level in enumerate(files) if level.count(level[i]) == 1) for i in range(len(found))]
    return [levels[k][i] for i, k in enumerate(first_alone)]


def floors_of(found: Sequence[judge.Judged], called: Sequence[str]) -> list[tuple[str, str]]:
    """What the untrained self of each run and the raw pixels it is set against are called: by the backbone where all of
    that name are the same untrained, of the same options, size and seed, else by the run; and by the image size where
    not all have one."""
    made = [(one.config.backbone, one.config.seed, {**one.backbone.config, "drop_path": 0.0}) for one in found]
    sizes = [one.config.image_size for one in found]
    names_of = []
    for (backbone, *_), name, size in zip(made, called, sizes):
        alike = all(one == other for one in made for other in made if one[0] == other[0] == backbone)
        untrained = f"{backbone if alike else name} untrained"
        names_of.append((untrained, "raw pixels" if len(set(sizes)) == 1 else f"raw pixels at {size} px"))
    return names_of
