"""A training run with and without `jobs.watch` beside it, which evaluates its checkpoints on a core left free; and with
a loop there that computes nothing, at the same lowest priority: what it costs that the core is not idle."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.bench.contender import Arguments, Bench
from pipeline.errors import UserError

TRAINING = (
    *("--backbone", "vit_ti16", "--objective", "lejepa", "--image-size", "64", "--limit", "1024", "--epochs", "6"),
    *("--knn-every", "0", "--checkpoint-every", "0.1"),
)
"""A checkpoint every 6 seconds: when an evaluation ends, another is due."""
FEWEST = 2
"""Evaluations beside a run, below which it was not watched."""
LOOP = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"


class Watched(NamedTuple):
    """A run on all cores of a cluster but one, and what runs on that one: "nothing", a "loop" or `jobs.watch`."""

    title: str
    there: str

    def figure(self, path: Path, arguments: Arguments) -> float:
        """Images per second of its steps, from the first to the last.

        Raises:
            UserError: this machine has one core.
            RuntimeError: the run failed, or was not watched.
        """
        from pipeline import cluster
        from pipeline.data.workers import cores

        if cores() < 2:
            raise UserError("one core alone leaves none free")
        cluster.begin(num_cpus=cores())
        takes = json.dumps({"CPU": cores() - 1, "GPU": 0})
        environment = {**os.environ, "RAY_ADDRESS": cluster.address(), cluster.TAKES: takes}
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            run, kept = Path(folder) / "runs" / "run", ("--cache", folder)
            run.parent.mkdir()
            fixed = ("--run", str(run), "--storage", str(run.parent), "--batch-size", str(arguments.batch_size), *kept)
            train = [sys.executable, "-m", "pipeline.pretrain", *TRAINING, *fixed]
            commands = {
                "loop": [sys.executable, "-c", LOOP],
                "jobs.watch": [sys.executable, "-m", "jobs.watch", str(run.parent), "--every", "1", *kept],
            }
            command = commands.get(self.there)
            with beside(command, environment) if command else contextlib.nullcontext():
                done = subprocess.run(train, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the run failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
            if self.there == "jobs.watch" and (count := evaluations(run)) < FEWEST:
                raise RuntimeError(f"{count} evaluations beside the run: too few to call it watched")
            return float(json.loads((run / "summary.json").read_text())["images_per_second"])


@contextlib.contextmanager
def beside(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """Have a command run for as long as this lasts."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def evaluations(run: Path) -> int:
    """Checkpoints of a run that `jobs.watch` has measured."""
    file = run / "watched.jsonl"
    return sum("knn_top1" in json.loads(line) for line in file.read_text().splitlines()) if file.exists() else 0


BENCH = Bench(
    "training steps of LeJEPA with ViT-Ti/16 at 64 pixels, Ray Train, one core left free",
    {
        "alone": Watched("nothing on that core", "nothing"),
        "loop": Watched("an empty loop on that core", "loop"),
        "watched": Watched("`jobs.watch` on that core, one checkpoint after the other", "jobs.watch"),
    },
    limit=1200,
    paired=True,
)
