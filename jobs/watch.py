"""`python -m jobs.watch RUN`: every new checkpoint of a run is evaluated while training goes on, by spare workers.

Each evaluation is a Ray task: it starts where the cluster has CPUs (and GPUs) that nobody has reserved, at the lowest
priority of its machine, and otherwise waits. Results go to MLflow as children of the run, and into `watched.jsonl` of
the run folder, so that a watch that is started anew evaluates nothing twice; what failed is tried again, `TRIES` times
in all. RUN may also be a folder of runs.

Training on CPUs reserves every core of the cluster, and would have this wait until it has ended, unless its job leaves
some: see `jobs/checkpoints.yaml`.
"""

import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from jobs.cluster import NoneFree, on_a_spare_worker, step_aside
from pipeline.command import command
from pipeline.errors import UserError
from pipeline.evaluation import NAMES

if TYPE_CHECKING:
    from pipeline.training.run_folder import RunFolder

TRIES = 3
"""Times that the evaluation of a checkpoint is tried: what made it fail may pass."""


@dataclass(frozen=True)
class Arguments:
    """Evaluate every new checkpoint on spare workers, until the run has ended."""

    run: Positional[str]
    """A run folder, or a folder of runs, which is watched until stopped."""
    data: str | None = None
    """Labelled images to learn from; left open: the run's own."""
    val_data: str | None = None
    """Labelled images to be judged on; left open: a train/ + val/ pair, else a split by content."""
    protocols: tuple[str, ...] = ("knn",)
    """Of knn, linear."""
    limit: int | None = None
    """Learn from at most this many images."""
    cpus: float = 1
    """CPU cores that an evaluation reserves."""
    gpus: float = 0
    """GPUs that an evaluation reserves."""
    every: float = 20.0
    """Seconds between two looks."""
    hours: float | None = None
    """End after so long, whatever still runs."""
    cache: str | None = None
    """Where packed data sets are kept; left open: ~/.cache/ssl-pretraining."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 a user's mistake."""

    def run(arguments: Arguments) -> int:
        for name in arguments.protocols:
            if name not in NAMES:
                raise UserError(f"--protocols {name}: unknown; there are {', '.join(NAMES)}")
        if "://" not in arguments.run and not Path(arguments.run).expanduser().exists():
            raise UserError(f"{arguments.run}: no such run folder, or folder of runs")
        from pipeline.cluster import connect

        settings = {"data": arguments.data, "val_data": arguments.val_data, "protocols": arguments.protocols,
                    "limit": arguments.limit, "cache": arguments.cache}  # fmt: skip
        ends = time.monotonic() + 3600 * arguments.hours if arguments.hours is not None else math.inf
        if connect(1):

            def evaluate(checkpoint: str) -> dict[str, Any]:
                left = None if ends == math.inf else max(0.0, ends - time.monotonic())
                takes = {"cpus": arguments.cpus, "gpus": arguments.gpus}
                say = partial(print, flush=True)
                return dict(on_a_spare_worker(judge, checkpoint, settings, **takes, waits=say, patience=left))
        else:
            print("no cluster is there, so evaluations run in this process", flush=True)
            step_aside()

            def evaluate(checkpoint: str) -> dict[str, Any]:
                return judge(checkpoint, settings)

        with contextlib.suppress(NoneFree):
            watch(arguments, evaluate, ends)
        return 0

    return command(Arguments, "jobs.watch", run, argv)


def watch(arguments: Arguments, evaluate: Callable[[str], dict[str, Any]], ends: float) -> None:
    """Evaluate checkpoints as they appear, oldest first, until the run has ended or the clock is at `ends`."""
    from pipeline.training.run_folder import RunFolder

    root = RunFolder(str(Path(arguments.run).expanduser()) if "://" not in arguments.run else arguments.run)
    while True:
        one = root.exists("config.yaml")
        runs = [root] if one else runs_below(root)
        over = one and root.exists("summary.json")  # looked for first: no checkpoint comes after it
        for run in runs:
            for seen in unjudged(run):
                if time.monotonic() < ends:
                    look(run, seen, evaluate)
        if (over and not unjudged(root)) or time.monotonic() >= ends:
            return
        time.sleep(min(arguments.every, max(0.0, ends - time.monotonic())))


def look(run: "RunFolder", seen: int, evaluate: Callable[[str], dict[str, Any]]) -> None:
    """Evaluate one checkpoint and write down what came out."""
    try:
        scores = evaluate(run.path(f"checkpoints/{seen:012d}.pt"))
    except NoneFree:
        raise
    except Exception as error:
        if seen not in run.checkpoints():
            why = "was dropped before a worker was free; --keep keeps more of them"
        else:
            why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        scores = {"error": why}
    row = {"images": seen, **{key: value for key, value in scores.items() if not isinstance(value, dict)}}
    before = run.read("watched.jsonl").decode() if run.exists("watched.jsonl") else ""
    run.write("watched.jsonl", before + json.dumps(row) + "\n")
    told = ", ".join(f"{key} {value:.3f}" for key, value in row.items() if key.endswith("_top1") and value is not None)
    print(
        f"{Path(run.address).name} at {seen:,} images: {told or row.get('error', 'no labels to judge by')}", flush=True
    )


def unjudged(run: "RunFolder") -> list[int]:
    """The checkpoints that are still to be evaluated, by images seen."""
    rows = []
    if run.exists("watched.jsonl"):
        rows = [json.loads(line) for line in run.read("watched.jsonl").decode().splitlines()]
    failed = Counter(row["images"] for row in rows if "error" in row)
    judged = {row["images"] for row in rows if "error" not in row or failed[row["images"]] >= TRIES}
    return sorted(set(run.checkpoints()) - judged)


def runs_below(root: "RunFolder") -> list["RunFolder"]:
    """The runs in a folder."""
    from pipeline.training.run_folder import RunFolder

    found = root.filesystem.glob(f"{root.root}/*/config.yaml")
    return [RunFolder(f"{root.address}/{path.split('/')[-2]}") for path in sorted(found)]


def judge(checkpoint: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The scores of one checkpoint; what a worker runs."""
    from pipeline.evaluation.judge import judge as measure

    return dict(measure(checkpoint, **settings))


if __name__ == "__main__":
    sys.exit(main())
