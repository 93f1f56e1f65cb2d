"""`python -m pipeline.learns`: does every objective learn? Short runs of all of them, and README's table of it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import objectives
from pipeline import pretrain
from pipeline.blocks import inside, write
from pipeline.command import command

BACKBONES = ("resnet20", "vit_ti8")
SIZE, EPOCHS = 32, 8
SCORES = {"k-NN": "knn_top1", "linear": "linear_top1"}
BASE = "dino"
"""Whose run of the same backbone and seed teaches in distillation, and is what Gram anchoring goes on from."""


@dataclass(frozen=True)
class Arguments:
    """Train every objective for eight epochs of the generated images, from its own recipe, on a small CNN and a small
    ViT.

    Runs that are there already are not trained again, so that what was interrupted goes on where it stopped.
    """

    objectives: tuple[str, ...] = objectives.NAMES
    """Which."""
    backbones: tuple[str, ...] = BACKBONES
    """On which."""
    seeds: int = 1
    """How many of each: 0, 1, ..."""
    storage: str = "runs/learns"
    """Where the runs go."""
    cache: str | None = None
    """Where the generated images are kept; left open: ~/.cache/ssl-pretraining."""
    write: str | None = None
    """A file whose block `<!-- learns -->` … `<!-- /learns -->` takes the table, after every run anew; its lines of
    objectives that are not asked for stay where they are of the same backbones."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Cell:
    """One short run: an objective on a backbone, from one seed."""

    objective: str
    backbone: str
    seed: int

    def folder(self, storage: Path) -> Path:
        """Where below `storage` it is."""
        return storage / f"{self.objective}-{self.backbone}-{self.seed}"

    def needs(self) -> "Cell | None":
        """The run that must be there first."""
        continues = objectives.objective(self.objective).continues
        return Cell(BASE, self.backbone, self.seed) if continues or self.objective == "distillation" else None

    def words(self, storage: Path) -> list[str]:
        """The command line of it, after `python -m pipeline.pretrain`."""
        given = {
            "objective": self.objective, "backbone": self.backbone, "seed": self.seed, "data": "embedded",
            "image-size": SIZE, "epochs": EPOCHS, "engine": "local", "loader": "opencv", "precision": "fp32",
            "knn-every": 0, "storage": storage, "run": self.folder(storage),
        }  # fmt: skip
        if base := self.needs():
            option = "teacher" if self.objective == "distillation" else "checkpoint"
            given[f"options.{option}"] = base.folder(storage)
        return [word for key, value in given.items() for word in (f"--{key}", str(value))]

    def summary(self, storage: Path) -> dict[str, Any] | None:
        """What it measured; None before it has finished."""
        path = self.folder(storage) / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def train(self, storage: Path, *more: str) -> int:
        """Run it, and before it what it needs, where they have not finished yet; the exit status of the last."""
        if self.summary(storage):
            return 0
        base = self.needs()
        return (base.train(storage, *more) if base else 0) or pretrain.main([*self.words(storage), *more])


def errors_above(summary: dict[str, Any], score: str = "knn_top1") -> float:
    """How many standard errors a score lies above that of the untrained backbone, as if either had seen other images.

    Both saw the same, which makes the difference surer than this says.
    """
    trained, floor = summary[score], summary["untrained"][score]
    variance = sum(p * (1 - p) / summary["val_images"] for p in (trained, floor))
    return float((trained - floor) / variance**0.5)


def table(cells: Sequence[Cell], storage: Path, before: str = "") -> str:
    """k-NN and linear accuracy of all that has finished: one line an objective, two columns a backbone; seeds are
    averaged. Of an earlier table of the same columns, the lines of other objectives stay.

    Raises:
        ValueError: nothing has finished.
    """
    found = {cell: summary for cell in cells if (summary := cell.summary(storage))}
    if not found:
        raise ValueError(f"{storage}: none of {len(cells)} runs has finished")
    backbones = list(dict.fromkeys(cell.backbone for cell in cells))
    heads = ["objective", *(f"{backbone}, {name}" for backbone in backbones for name in SCORES)]
    old = [line.strip("| ").split(" | ") for line in before.splitlines() if line.startswith("| ")]
    lines = {line[0]: line for line in old[2:] if old[0] == heads}
    for objective in dict.fromkeys(cell.objective for cell in cells):
        columns = (
            [s for cell, s in found.items() if (cell.objective, cell.backbone) == (objective, backbone)]
            for backbone in backbones
        )
        lines[objective] = [objective, *(entry(column, score) for column in columns for score in SCORES.values())]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    images = max(s["images_seen"] for s in found.values())
    pixels = ", ".join(
        f"{name} {100 * mean(s['pixels'][score] for s in found.values()):.1f}" for name, score in SCORES.items()
    )
    last = next(reversed(found.values()))
    seeds = len({cell.seed for cell in found})
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in (heads, rule, *(lines[name] for name in sorted(lines)))),
            "",
            f"Top-1 in per cent after {images:,} images of {SIZE} px: **trained** / the same untrained (raw pixels: "
            f"{pixels}), {f'mean of up to {seeds} seeds, ± their standard deviation' if seeds > 1 else 'one seed'}; ° "
            f"is less than two standard errors above untrained{' in some seed' * (seeds > 1)}; – has not been run. "
            f"{last['device']}, torch {last['versions']['torch']}.",
        ]
    )


def entry(summaries: Sequence[dict[str, Any]], score: str) -> str:
    """ "**43.1** ± 0.8 / 25.8" of the seeds of one objective on one backbone."""
    if not summaries:
        return "–"
    trained = [100 * s[score] for s in summaries]
    spread = f" ± {stdev(trained):.1f}" if len(trained) > 1 else ""
    floor = 100 * mean(s["untrained"][score] for s in summaries)
    low = "°" if min(errors_above(s, score) for s in summaries) < 2 else ""
    return f"**{mean(trained):.1f}**{low}{spread} / {floor:.1f}"


def run(arguments: Arguments) -> int:
    """Train what is missing, seed by seed, writing the table after each."""
    storage = Path(arguments.storage).absolute()
    before = inside(Path(arguments.write), "learns") if arguments.write else ""
    cells = [
        Cell(objective, backbone, seed)
        for seed in range(arguments.seeds)
        for objective in arguments.objectives
        for backbone in arguments.backbones
    ]
    more = ["--cache", arguments.cache] if arguments.cache else []
    failed = 0
    for cell in cells:
        status = cell.train(storage, *more)
        if status > 2:  # stopped
            return status
        failed = failed or status
        if arguments.write and status == 0:
            write(Path(arguments.write), "learns", table(cells, storage, before))
    print(table(cells, storage, before))
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 Ctrl-C, 143 SIGTERM."""
    return command(Arguments, "pipeline.learns", run, argv)


if __name__ == "__main__":
    sys.exit(main())
