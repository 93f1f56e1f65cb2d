"""What it costs a run that `jobs.watch` evaluates its checkpoints all the time, on a machine of their own.

Two Ray nodes on this machine, one of all its cores but one and one of that one, each of whose processes stay on the
cores of their node. A machine's own speed differs more from run to run than is looked for, so that there is one run,
and the evaluations are halted and continued by turns.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.bench.contender import Arguments, Bench
from pipeline.errors import UserError

TRAINING = (
    *("--backbone", "vit_ti16", "--objective", "lejepa", "--image-size", "64", "--limit", "1024"),
    *("--knn-every", "0", "--checkpoint-every", "0.5", "--keep", "8"),
)
"""A checkpoint every half minute: when an evaluation ends, another is due, and none is dropped before it is read,
though the watch stands still half of the time."""
EPOCHS = "100000"
"""More than any bench lasts: it ends the run."""
PATIENCE = 600  # seconds until a run trains and is watched


class Side(NamedTuple):
    """One of two that are measured by turns."""

    title: str

    def figure(self, path: Path, arguments: Arguments) -> float:
        """None of its own.

        Raises:
            UserError: always.
        """
        raise UserError("--only: both are measured in one run, by turns")


def by_turns(arguments: Arguments) -> dict[str, list[float]]:
    """Images per second of one run, `--rounds` times for `--seconds` alone and watched.

    Raises:
        UserError: this machine has one core.
        RuntimeError: the run failed, or nothing was evaluated beside it, or an evaluation failed.
    """
    from pipeline.cluster.nodes import two

    *many, one = sorted(os.sched_getaffinity(0))
    if not many:
        raise UserError("one core alone makes no two machines")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, two({*many}, {one}) as (variables, raylet):
        environment, said = {**os.environ, **variables}, Path(folder) / "said"
        run, kept = Path(folder) / "runs" / "run", ("--cache", folder)
        run.parent.mkdir()
        fixed = ("--run", str(run), "--storage", str(run.parent), "--batch-size", str(arguments.batch_size), *kept)
        train = [sys.executable, "-m", "pipeline.pretrain", *TRAINING, "--epochs", EPOCHS, *fixed]
        watch = [sys.executable, "-m", "jobs.watch", str(run.parent), "--every", "1", *kept]
        figures: dict[str, list[float]] = {"alone": [], "watched": []}
        with (
            said.open("w") as log,
            beside(train, environment, {*many}, log) as training,
            beside(watch, environment, {one}) as watching,
        ):
            wait(training, said, lambda: evaluations(run) and evaluating(raylet))
            for turn in range(2 * arguments.rounds):
                name = ("alone", "watched", "watched", "alone")[turn % 4]
                with contextlib.nullcontext() if name == "watched" else halted(watching.pid, raylet):
                    if name == "watched":
                        wait(training, said, lambda: evaluating(raylet))
                    figure = arguments.batch_size * steps(run / "metrics.jsonl", arguments.seconds)
                figures[name].append(figure)
                refuse_failed(run)
                print(f"turn {turn // 2 + 1}: {BENCH.contenders[name].title}: {figure:.1f} images/s", file=sys.stderr)
        print(f"{evaluations(run)} checkpoints evaluated", file=sys.stderr)
    return figures


def evaluating(raylet: int) -> list[Any]:
    """The processes that evaluate on a node."""
    import psutil

    found = []
    for process in psutil.Process(raylet).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith("ray::_Polite"):
                found.append(process)
    return found


@contextlib.contextmanager
def beside(
    command: list[str], environment: Mapping[str, str], cores: set[int], log: IO[str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Have a command run on these cores for as long as this lasts; its errors go to `log`."""
    from pipeline.cluster.nodes import on

    with on(cores):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=log or subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def halted(watching: int, raylet: int) -> Iterator[None]:
    """Have a watch, and then what evaluates for it on a node, stand still for as long as this lasts."""
    import psutil

    still = [psutil.Process(watching)]
    still[0].suspend()  # begins nothing from here on
    try:
        for process in evaluating(raylet):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                still.append(process)
        yield
    finally:
        for process in still:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def wait(training: subprocess.Popen[bytes], said: Path, ready: Callable[[], Any]) -> None:
    """Until something is so.

    Raises:
        RuntimeError: the run has ended before, or it took too long.
    """
    until = time.monotonic() + PATIENCE
    while not ready():
        if training.poll() is not None:
            raise RuntimeError(f"the run ended: {(said.read_text().strip().splitlines() or ['without a word'])[-1]}")
        if time.monotonic() > until:
            raise RuntimeError(f"nothing was evaluated within {PATIENCE} s: too little to call it watched")
        time.sleep(0.1)


def steps(metrics: Path, seconds: float) -> float:
    """Steps per second, between the first and the last whose line is added to a file within so many seconds.

    Raises:
        RuntimeError: there were fewer than two.
    """
    ends: list[float] = []
    with metrics.open("rb") as file:
        file.seek(0, os.SEEK_END)
        until = time.perf_counter() + seconds
        while (now := time.perf_counter()) < until:
            ends += [now] * file.read().count(b"\n")
            time.sleep(0.005)
    if len(ends) < 2:
        raise RuntimeError(f"{len(ends)} steps in {seconds:g} s: --seconds must be longer")
    return (len(ends) - 1) / (ends[-1] - ends[0])


def watched(run: Path) -> list[dict[str, Any]]:
    """What `jobs.watch` has found of each checkpoint of a run."""
    file = run / "watched.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def refuse_failed(run: Path) -> None:
    """Raise `RuntimeError` where an evaluation of a run's checkpoint failed."""
    if failed := [row["error"] for row in watched(run) if "error" in row]:
        raise RuntimeError(f"an evaluation failed ({failed[0]}), which costs less than one that does not")


def evaluations(run: Path) -> int:
    """Checkpoints of a run that `jobs.watch` has measured."""
    return sum("knn_top1" in row for row in watched(run))


BENCH = Bench(
    "training steps of LeJEPA with ViT-Ti/16 at 64 pixels, Ray Train, on all cores but one",
    {
        "alone": Side("nothing on the machine of that one"),
        "watched": Side("`jobs.watch` on it, one checkpoint after the other"),
    },
    by_turns=by_turns,
)
