"""What every fault is done to: a small real run on a few images, through the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from pipeline import asked
from pipeline import config as configuration
from pipeline.data import preparation
from pipeline.training import measure, worker
from pipeline.training.display import Status
from pipeline.training.links import Links
from pipeline.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8
KIND = (
    *("--backbone", "lenet5", "--options.local-views", "1", "--options.local-size", "8", "--options.out-dim", "16"),
    *("--options.hidden-dim", "16", "--options.head-norm", "batch"),
)


@dataclass(frozen=True)
class Row:
    """What came of one fault.

    fault      what happened
    injected   how it was made to happen
    lost       images that had to be seen again, at most
    seconds    from the fault to the first step after it, or to the end of the command; None where nothing stopped
    said       what the user reads
    """

    fault: str
    injected: str
    lost: int
    seconds: float | None
    said: str


def job_of(words: Sequence[str], *, threads: int = 1, rank: int = 0) -> worker.Job:
    """The job of pretraining's command line: its images packed, and by rank 0 its run folder begun."""
    config = asked.parse(words)
    train, val, _ = preparation.prepare(config)
    config = configuration.resolve(config, images=train.images, side=preparation.median_side(train))
    folder = RunFolder(str(config.run))
    if rank == 0:
        folder.write("config.yaml", configuration.dump(config))
    return worker.Job(config, folder.address, train, val, "cpu", threads)


class Place:
    """A folder with images, and the runs on them.

    Args:
        folder: empty or absent.
        images: how many are drawn.
    """

    def __init__(self, folder: Path, images: int = 60) -> None:
        self.folder, self.photos = folder, folder / "photos"
        self._begun: list[subprocess.Popen[str]] = []
        generator = np.random.default_rng(0)
        for i in range(images):
            pixels = generator.integers(0, 120, (20, 24, 3), np.uint8)
            pixels[..., 2 * (i % 2)] += 120
            (self.photos / "rb"[i % 2]).mkdir(exist_ok=True, parents=True)
            Image.fromarray(pixels).save(self.photos / "rb"[i % 2] / f"{i}.png")

    def words(self, run: str, *more: str, kind: Sequence[str] = KIND) -> list[str]:
        """Command-line options of a run named `run`; an address is taken as it is."""
        address = run if "://" in run else str(self.folder / "runs" / run)
        return [
            *("--data", str(self.photos), "--cache", str(self.folder / "cache")),
            *("--storage", str(self.folder / "runs"), "--run", address, "--engine", "local", "--loader", "opencv"),
            *("--image-size", "16", "--batch-size", str(BATCH), "--knn-every", "0", "--precision", "fp32"),
            *(*kind, *more),
        ]

    def environment(self) -> dict[str, str]:
        """For a process of its own."""
        kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        return {**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}

    def start(self, run: str, *more: str) -> subprocess.Popen[str]:
        """Begin a run in a process of its own; its output is in `….log` beside the run."""
        (self.folder / "runs").mkdir(exist_ok=True)
        name = run.rsplit("/", 1)[-1]
        with open(self.folder / "runs" / f"{name}.log", "a") as log:
            self._begun.append(subprocess.Popen(
                [sys.executable, "-m", "pipeline.pretrain", *self.words(run, *more)],
                env=self.environment(), stdout=log, stderr=subprocess.STDOUT, text=True, cwd=self.folder,
            ))  # fmt: skip
        return self._begun[-1]

    def train(self, run: str, *more: str, exchange: Callable[[Status], bool] = lambda status: False) -> RunFolder:
        """The training alone of a run named `run`, in this process; `exchange` hears of every step and may stop it."""
        job = job_of(self.words(run, *more), threads=len(os.sched_getaffinity(0)))
        with mock.patch.object(measure, "finish", return_value={}):
            worker.work(job, Links(exchange, lambda metrics, seen: None))
        return RunFolder(job.run)

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *error: object) -> None:
        """End what still runs: a fault that was not survived must not leave a run behind."""
        for process in self._begun:
            if process.poll() is None:
                process.kill()
                process.wait()

    def log(self, run: str) -> str:
        """What a run has said."""
        return (self.folder / "runs" / f"{run.rsplit('/', 1)[-1]}.log").read_text()

    def whole(self, run: str, *more: str) -> Path:
        """A run to its end, undisturbed.

        Raises:
            AssertionError: it ended otherwise.
        """
        assert self.start(run, *more).wait(600) == 0, self.log(run)[-2000:]
        return self.folder / "runs" / run


def steps(run: Path | RunFolder) -> list[dict[str, Any]]:
    """Every step that a run's metrics file holds, in its order."""
    folder = run if isinstance(run, RunFolder) else RunFolder(str(run))
    rows = [json.loads(line) for line in folder.read("metrics.jsonl").decode().splitlines()]
    return [row for row in rows if "knn_online" not in row]


def losses(run: Path | RunFolder) -> list[tuple[int, float | None]]:
    """Images seen and loss of every step."""
    return [(row["images"], row.get("loss")) for row in steps(run)]


def final(run: Path | RunFolder) -> dict[str, Any]:
    """The newest checkpoint of a run."""
    folder = run if isinstance(run, RunFolder) else RunFolder(str(run))
    return folder.load_checkpoint(folder.checkpoints()[-1])


def assert_identical(one: Any, other: Any) -> None:
    """Two states are equal to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_identical(a, b)
    else:
        assert one == other


def assert_same_run(one: Path | RunFolder, other: Path | RunFolder) -> None:
    """Two runs took the same steps to the same weights, optimiser state and place in the data, to the last bit."""
    assert losses(one) == losses(other)
    a, b = final(one), final(other)
    for key in ("objective", "optimiser", "loader", "images_seen"):
        assert_identical(a[key], b[key])


def assert_tracked(run: Path, store: Path) -> None:
    """MLflow holds every step of a run once, with the loss that the run recorded."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{store}")
    history = client.get_metric_history((run / "mlflow_run_id").read_text(), "loss")
    assert [(m.step, m.value) for m in history] == [(n, loss) for n, loss in losses(run) if loss is not None]


def assert_tracked_since(run: Path, store: Path) -> None:
    """MLflow's newest loss at every step of a run that healed is the one that the run recorded, and so is its latest;
    where it went back to is a tag."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{store}")
    tracked = client.get_run((run / "mlflow_run_id").read_text())
    history = sorted(client.get_metric_history(tracked.info.run_id, "loss"), key=lambda m: m.timestamp)
    newest = {m.step: m.value for m in history}
    recorded = {n: loss for n, loss in losses(run) if loss is not None}
    assert {n: newest.get(n) for n in recorded} == recorded
    assert tracked.data.metrics["loss"] == recorded[max(recorded)]
    back = json.loads((run / "interventions.json").read_text())[-1]["back"]
    assert tracked.data.tags["rewound"].startswith(f"to {back} images at ")
