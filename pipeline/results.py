"""`python -m pipeline.results RUN RUN …`: what finished runs measured, as a Markdown table."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tyro.conf import Positional

from pipeline.blocks import inside, write
from pipeline.command import command
from pipeline.config import Config
from pipeline.errors import UserError

COLUMNS = ("data", "backbone", "objective", "px", "epochs", "k-NN", "linear")
SCORES = ("knn_top1", "linear_top1")
CAPTION = "Top-1 in per cent at the last epoch: trained / the same untrained / raw pixels. "


@dataclass(frozen=True)
class Arguments:
    """Put finished runs into one Markdown table: accuracy of the trained backbone, of the untrained one, of pixels."""

    runs: Positional[tuple[str, ...]]
    """Run folders."""
    write: str | None = None
    """A file whose block `<!-- results -->` … `<!-- /results -->` takes the table."""
    add: bool = False
    """Keep what the block holds of other runs: rows of other data, backbone, objective, pixels or epochs."""
    debug: bool = False
    """Show the traceback of an error."""


def row(run: str) -> tuple[list[str], str]:
    """A run's cells, and the device it trained on.

    Raises:
        UserError: the run has not finished.
    """
    try:
        summary = json.loads(Path(run, "summary.json").read_text())
        config = yaml.safe_load(Path(run, "config.yaml").read_text())
    except OSError:
        raise UserError(f"{run}: is no finished run (it has no summary.json beside a config.yaml)") from None
    scores = measured(summary, config["data"])
    floors = (scores["untrained"], scores["pixels"])
    images = f"{summary['train_images']:,}" if summary.get("train_images") else "unlabelled"
    cells = [
        f"{Path(config['data']).stem or config['data']} ({images})",
        summary["backbone"],
        summary["objective"],
        str(config["image_size"]),
        str(config["epochs"]),
        *(accuracy(name, scores, floors) for name in SCORES),
    ]
    workers = f", {config['workers']} workers" if config["workers"] != 1 else ""
    return cells, f"{summary['device']}{workers}, torch {summary['versions']['torch']}"


def measured(summary: Mapping[str, Any], data: str) -> Mapping[str, Any]:
    """The scores of the run's end; where its last checkpoint was evaluated again on the same images, the latest.

    Args:
        data: the address that the run learnt from: what was measured on other data, or by other labels, is another
            number.
    """
    if "evaluations" not in summary:
        return summary
    from pipeline.training.launch import data_name  # torch comes with it

    known = ("train_images", "val_images", "checkpoint_images", "fingerprints")
    same = {key: summary[key] for key in known if key in summary}
    same |= {"data": data_name(Config(data=data)), "limit": None}
    for again in reversed(summary["evaluations"].values()):
        if all(again.get(key) == value for key, value in same.items()) and all(score in again for score in SCORES):
            return dict(again)
    return summary


def accuracy(name: str, trained: Mapping[str, Any], floors: Sequence[Mapping[str, Any]]) -> str:
    """ "**43.1** / 21.0 / 35.5" in per cent: trained, untrained, pixels."""
    shown = ["–" if scores[name] is None else f"{100 * scores[name]:.1f}" for scores in (trained, *floors)]
    return " / ".join([f"**{shown[0]}**", *shown[1:]])


def table(runs: Sequence[str], before: str = "") -> str:
    """The table of some runs, and under it where they ran; rows of an earlier table that none of them measures stay."""
    new, devices = zip(*map(row, runs))
    old = [line.strip("| ").split(" | ") for line in before.splitlines() if line.startswith("| ")][2:]
    rows = [*(cells for cells in old if cells[:5] not in [one[:5] for one in new]), *new]
    for column in (1, 0):  # stable: by data, then by backbone, each where it came first
        order = list(dict.fromkeys(cells[column] for cells in (*old, *new)))
        rows.sort(key=lambda cells: order.index(cells[column]))
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * 5 + ("---:",) * 2, *rows)]
    there = before.strip().removesuffix(".").rpartition(CAPTION)[2].split("; ") if old else ()
    return "\n".join([*lines, "", f"{CAPTION}{'; '.join(dict.fromkeys((*there, *devices)))}."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 Ctrl-C."""

    def run(arguments: Arguments) -> None:
        if not arguments.runs:
            raise UserError("name at least one run folder")
        if arguments.add and not arguments.write:
            raise UserError("--add: to what? --write names the file")
        before = inside(Path(arguments.write), "results") if arguments.write else ""
        text = table(arguments.runs, before if arguments.add else "")
        print(text)
        if arguments.write:
            write(Path(arguments.write), "results", text)

    return command(Arguments, "pipeline.results", run, argv)


if __name__ == "__main__":
    sys.exit(main())
