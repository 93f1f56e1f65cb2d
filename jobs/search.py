"""`python -m jobs.search lr=1e-4..1e-2 --settings …`: hyper-parameters without labels, by Ray Tune.

Every trial is a pretraining run, stopped at each rung to be measured and continued exactly where it stood. ASHA (Li et
al. 2020) ends those that rank low at their rung. They are ranked by RankMe, which needs no labels, or by k-NN accuracy.
A search that was cut off, and is run again, begins with new trials.
In MLflow a search is one run, and every trial a child of it, with the tags `job` and `firing` where a job searches.
Stopped, or at its time limit, a search concludes from what has come out.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from pipeline import tracking
from pipeline.command import STOPPED, command, stop_signals
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.training.display import Status


@dataclass(frozen=True)
class Arguments:
    """Search hyper-parameters of pretraining, ranking runs by RankMe (no labels needed) or by k-NN accuracy."""

    space: Positional[tuple[str, ...]]
    """name=low..high (drawn evenly, on a logarithmic scale from a tenfold range on) or name=a,b,c, for any option of
    pretraining."""
    settings: tuple[str, ...] = ()
    """name=value: options of pretraining that all trials share, as in backbone=resnet18 data=photos epochs=20."""
    metric: Literal["rankme", "knn"] = "rankme"
    """rankme: the effective rank of the features (Garrido et al. 2023); knn: accuracy, where there are labels."""
    trials: int = 16
    """Runs that are begun."""
    rungs: int = 4
    """Times that a run is measured; at each but the last, ASHA ends all but the best third."""
    cpus: float = 1
    """CPU cores of a trial."""
    gpus: float = 0
    """GPUs of a trial."""
    seed: int = 0
    """Of all that is drawn at random."""
    storage: str | None = None
    """Where trials and the result go; left open: runs/, or in a cluster job ~/ssl-runs."""
    run: str | None = None
    """The folder of this search; left open: search/ below the storage."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 or 143 stopped."""

    def run(arguments: Arguments) -> int:
        space = dict(axis(text) for text in arguments.space)
        shared = [word for setting in arguments.settings for word in words(whole(setting))]
        check(space, shared)
        from jobs import cluster
        from jobs.run import default_storage
        from pipeline import asked
        from pipeline.training.launch import data_name

        folder = arguments.run or f"{(arguments.storage or default_storage()).rstrip('/')}/search"
        folder = folder if "://" in folder else str(Path(folder).absolute())
        uri, data = tracking.store_of(folder), data_name(asked.parse([*shared, "--engine", "local"]))
        search = tracking.start_run(
            uri, experiment=data, name=Path(folder).name, tags={"kind": "search", "data": data, "run_folder": folder},
            params=dataclasses.asdict(arguments), dataset=None, config_path=None, run=folder,
        )  # fmt: skip
        tags = {**json.loads(os.environ.get(tracking.TAGS_VARIABLE) or "{}"), "kind": "trial", PARENT: search}
        fixed = {"shared": shared, "rungs": arguments.rungs, "metric": arguments.metric, "folder": folder,
                 "uri": uri, "tags": json.dumps(tags)}  # fmt: skip
        with stop_signals() as stop:
            found = cluster.tune(
                trial, space, fixed, trials=arguments.trials, rungs=arguments.rungs, cpus=arguments.cpus,
                gpus=arguments.gpus, seed=arguments.seed, stop=stop.is_set,
            )  # fmt: skip
            conclude(found, arguments, folder)
            record(found, arguments, folder, uri, search, stopped=stop.is_set())
        if stop.cause:
            return STOPPED[stop.cause]
        return 0 if any("value" in row for row in found) else 1

    return command(Arguments, "jobs.search", run, argv)


METRICS = {"rankme": "label_free_rankme", "knn": "knn_top1"}
"""What MLflow calls them, as it does those of an evaluation."""
PARENT = "mlflow.parentRunId"
Axis = tuple[Literal["log", "even"], float, float] | tuple[Literal["of"], list[str]]


def axis(text: str) -> tuple[str, Axis]:
    """One axis of the space: its option, and how values are drawn.

    Raises:
        UserError: no such form.
    """
    name, equals, values = text.partition("=")
    name = name.replace("-", "_")
    if match := re.fullmatch(r"([-+.\de]+)\.\.([-+.\de]+)", values):
        try:
            low, high = float(match[1]), float(match[2])
        except ValueError:
            low = high = math.nan
        if not low < high:
            raise UserError(f"{text}: must run from a number to a larger one, as in lr=1e-4..1e-2")
        return name, ("log" if low > 0 and high >= 10 * low else "even", low, high)
    if not equals or not values:
        raise UserError(f"{text}: must be name=low..high or name=a,b,c")
    return name, ("of", values.split(","))


def words(setting: str) -> list[str]:
    """A name=value as words of pretraining's command line."""
    name, equals, value = setting.partition("=")
    if not equals:
        raise UserError(f"--settings {setting}: must be name=value")
    option = f"--{name.replace('_', '-')}"
    return [f"{option}={value}"] if value.startswith("-") else [option, value]


def whole(setting: str) -> str:
    """A setting whose local path holds wherever a trial runs: trials have folders of their own."""
    name, _, value = setting.partition("=")
    return (
        f"{name}={Path(value).absolute()}"
        if name in ("data", "val_data", "cache") and Path(value).exists()
        else setting
    )


def check(space: dict[str, Axis], shared: list[str]) -> None:
    """Have pretraining's own parser read the ends of every axis, so that no trial fails over a word."""
    from pipeline import asked

    for name, drawn in space.items():
        for value in drawn[1] if drawn[0] == "of" else drawn[1:]:
            asked.parse([*shared, *words(f"{name}={value}"), "--engine", "local"])


def trial(drawn: dict[str, Any], fixed: dict[str, Any], report: Callable[[dict[str, float]], None], name: str) -> None:
    """One run: trained rung by rung, measured at each."""
    from pipeline import asked

    os.environ[tracking.TAGS_VARIABLE] = fixed["tags"]
    options = [word for key, value in drawn.items() for word in words(f"{key}={value}")]
    argv = [*fixed["shared"], *options, "--engine", "local", "--run", f"{fixed['folder']}/{name}", "--knn-every", "0"]
    values = rungs(asked.parse(argv), fixed["rungs"], fixed["metric"], fixed["uri"], argv)
    for rung, value in enumerate(values, start=1):
        report({"value": value, "rung": rung})


def rungs(configuration: "Config", count: int, metric: str, uri: str, argv: Sequence[str]) -> Iterator[float]:
    """The metric after each of `count` equal parts of a run. Each part continues the last one's checkpoint exactly.

    Args:
        uri: the store in which the run is recorded; whoever ends it early marks its end there.
        argv: the options of pretraining that repeat the run.
    """
    import torch

    from pipeline import config as configurations
    from pipeline.data import preparation
    from pipeline.device import kind
    from pipeline.training import launch, worker
    from pipeline.training.links import Links
    from pipeline.training.run_folder import RunFolder

    train, val, _ = preparation.prepare(configuration)
    side = preparation.median_side(train)
    configuration = configurations.resolve(configuration, images=train.images, side=side, classes=len(train.classes))
    folder = RunFolder(str(configuration.run))
    job = worker.Job(configuration, folder.address, train, val, kind(), torch.get_num_threads())
    tracker = tracking.Tracker(uri, launch.begin(job, folder, uri, argv), run=folder.address)
    try:
        for rung in range(1, count + 1):
            links = Links(partial(_reached, share=rung / count), tracker.log, tracker.rewind)
            result = worker.work(job, links)
            value = measure(folder, configuration, train, val, metric)
            tracker.log({METRICS[metric]: value}, result["images_seen"])
            tracker.flush()
            yield value
            if not result["stopped"]:
                return
    except Exception:
        tracker.finish("FAILED")
        raise
    finally:
        tracker.close()


def _reached(status: "Status", share: float) -> bool:
    """Whether a part of a run is over; the last part ends by itself."""
    return share < 1 and status.seen >= share * status.planned


def measure(folder: Any, configuration: "Config", train: Any, val: Any, metric: str) -> float:
    """RankMe or k-NN accuracy of a run's newest checkpoint."""
    from pipeline import evaluation
    from pipeline.device import here, placed
    from pipeline.evaluation.features import extract_all
    from pipeline.evaluation.judge import find
    from pipeline.evaluation.label_free import rankme

    backbone = placed(find(folder.address)[2], here())
    size, device = int(configuration.image_size or 0), next(backbone.parameters()).device
    if metric == "knn":
        scores = evaluation.evaluate_backbone(backbone, train, val, image_size=size, protocols=("knn",), device=device)
        if scores["knn_top1"] is None:
            raise UserError("--metric knn: the data has no labels; --metric rankme needs none")
        return float(scores["knn_top1"])
    features, _ = extract_all(
        {"": backbone}, train.path, image_size=size, batch_size=256, device=device, limit=RANKED, precision="fp32"
    )
    return rankme(features[""])


RANKED = 25_600
"""Images that RankMe is computed on: what its authors use."""


def conclude(found: list[dict[str, Any]], arguments: Arguments, folder: str) -> None:
    """Print the trials, the best first, write `search.json`, and say how to train with the best."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.training.run_folder import RunFolder

    ranked = sorted(found, key=lambda row: (row.get("rung", 0), row.get("value", -math.inf)), reverse=True)
    rows = Table(arguments.metric, "rungs", *(text.partition("=")[0] for text in arguments.space), box=None)
    for row in ranked:
        value = f"{row['value']:.4g}" if "value" in row else row.get("error", "–")
        drawn = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row["drawn"].values())
        rows.add_row(value, f"{row.get('rung', 0)}/{arguments.rungs}", *drawn)
    Console(width=None if sys.stdout.isatty() else 160).print(rows)
    RunFolder(folder).write_json("search.json", {"arguments": dataclasses.asdict(arguments), "trials": ranked})
    if ranked and "value" in ranked[0]:
        best = [word for key, value in ranked[0]["drawn"].items() for word in words(f"{key}={value}")]
        shared = [word for setting in arguments.settings for word in words(setting)]
        print("best: " + shlex.join(["python", "-m", "pipeline.pretrain", *shared, *best]))


def record(
    found: list[dict[str, Any]], arguments: Arguments, folder: str, uri: str, search: str, *, stopped: bool
) -> None:
    """End the trials and the search in MLflow, the latter with the best value, at the rung that it was measured at."""
    from pipeline.training.run_folder import RunFolder

    well = [row for row in found if "value" in row and "error" not in row]
    for row in found:
        run = RunFolder(f"{folder}/{row['run']}")
        if run.exists("mlflow_run_id"):
            status: tracking.Status = "FINISHED" if row.get("rung") == arguments.rungs else "KILLED"
            status = "FAILED" if "error" in row else status
            tracking.end_run(uri, run.read("mlflow_run_id").decode(), status, run.address)
    tracker = tracking.Tracker(uri, search, run=folder, system_metrics=0)
    if well:
        best = max(well, key=lambda row: (row["rung"], row["value"]))
        tracker.log({METRICS[arguments.metric]: best["value"]}, best["rung"])
    tracker.log_artifact(f"{folder}/search.json")
    tracker.finish("KILLED" if stopped else "FINISHED" if well else "FAILED")


if __name__ == "__main__":
    sys.exit(main())
