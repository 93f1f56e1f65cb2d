"""The driver's side of a run: prepare the data, begin or continue the run folder, train on an engine, conclude."""

import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from backbones import names
from pipeline import cluster, tracking
from pipeline import config as configuration
from pipeline.command import STOPPED, TAKEN, Stop, stop_signals
from pipeline.config import Config
from pipeline.data import preparation
from pipeline.data.packed import Packed
from pipeline.data.workers import cores
from pipeline.device import kind
from pipeline.errors import UserError
from pipeline.redaction import bare, redact
from pipeline.training import conclusion
from pipeline.training.display import Display, Status
from pipeline.training.links import Links
from pipeline.training.mending import mend
from pipeline.training.run_folder import RunFolder
from pipeline.training.worker import Job, work


@dataclass(frozen=True)
class Engine:
    """Where a run trains.

    Args:
        name: for people to read.
        device: "cuda" or "cpu".
        threads: cores for each worker.
        run: takes the job, MLflow's (address, run id), the display and the stop event; returns rank 0's result.
    """

    name: str
    device: str
    threads: int
    run: Callable[[Job, tuple[str, str], Display, Stop], dict[str, Any]]


def launch(config: Config, argv: Sequence[str]) -> int:
    """Run a configuration from its data to its summary; returns the exit status.

    Raises:
        UserError: data, run folder or cluster do not fit the configuration.
    """
    started = time.monotonic()
    if config.init:  # workers of a cluster run in folders of their own
        config = replace(config, init=RunFolder(config.init).address)
    address = config.resume or config.run
    earlier = load_earlier(address) if address else None
    if config.resume and earlier is None:
        raise UserError(f"--resume {address}: no run is there (it has no config.yaml)")
    storage = storage_of(config)
    folder = RunFolder(address or f"{storage}/{fresh_name(config)}")
    uri = tracking.store_of(folder.address)
    if config.tracking == "required":
        tracking.require(uri)
    train, val, note = preparation.prepare(config)
    config = configuration.without_secrets(config)
    side, asked = preparation.median_side(train), config.batch_size
    config = configuration.resolve(config, images=train.images, side=side, classes=len(train.classes))
    if asked and asked != config.batch_size:
        print(
            f"--batch-size {asked} does not fit {train.images:,} training images: {config.batch_size} is used",
            flush=True,
        )
    if earlier and (changes := configuration.differences(earlier, config)):
        if folder.checkpoints():
            raise UserError(
                f"{address}: is a run with another configuration ({'; '.join(changes)}); "
                "repeat its options, or give another --run"
            )
        folder.remove("mlflow_run_id")  # its start failed: it begins anew, in MLflow too
    with folder.held():
        return carry_out(config, folder, uri, (train, val, note), argv, started)


def carry_out(
    config: Config,
    folder: RunFolder,
    uri: str,
    data: tuple[Packed, Packed | None, str],
    argv: Sequence[str],
    started: float,
) -> int:
    """As `launch`, once configuration, data and run folder are settled and nobody else trains there."""
    train, val, note = data
    state, said = mend(folder)
    for sentence in said:
        print(sentence, flush=True)
    refuse_other_images(state, train, folder.address)
    engine = choose_engine(config)
    config = replace(config, run=folder.address, resume=None, config=None)
    job = Job(config, folder.address, train, val, engine.device, engine.threads)
    run_id = begin(job, folder, uri, argv)
    conclusion.introduce(job, folder, engine.name, note, uri)

    with stop_signals() as stop:
        display = Display()
        try:
            result = engine.run(job, (uri, run_id), display, stop)
        except BaseException as error:
            status: tracking.Status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            tracking.end_run(uri, run_id, status, folder.address)
            raise
        finally:
            display.close()
    if result["stopped"]:
        tracking.end_run(uri, run_id, "KILLED", folder.address)
        if result["unrecorded"]:
            away = f"{tracking.Tracker.PATIENCE / 60:g} minutes"
            print(f"--tracking required: MLflow at {redact(uri)} has been away for {away}", file=sys.stderr)
        if result["away"]:
            print(redact(result["away"]), file=sys.stderr)
        kept = RunFolder(result["run"])
        if kept.address != folder.address and kept.exists("config.yaml"):  # on this machine
            kept.write("mlflow_run_id", run_id)
        saved = result["checkpoint_images"]
        without = "" if saved == result["images_seen"] else "out one here: the last is"
        print(
            f"stopped with{without or ' a checkpoint'} at {saved:,} images; this continues it:\n"
            f"  python -m pipeline.pretrain --resume {shlex.quote(kept.address)}",
            flush=True,
        )
        if stop.cause:
            return STOPPED[stop.cause]
        return TAKEN if result["taken"] else int(result["unrecorded"] or bool(result["away"]))
    conclusion.conclude(job, folder, result, uri, run_id, time.monotonic() - started)
    return 0


def load_earlier(address: str) -> Config | None:
    """The configuration of the run at an address, None where there is no run."""
    folder = RunFolder(address)
    return configuration.of_run(address) if folder.exists("config.yaml") or folder.checkpoints() else None


def refuse_other_images(state: Mapping[str, Any] | None, train: Packed, address: str) -> None:
    """Refuse to go on from a checkpoint with other training images, whose order and number its place counts on.

    Raises:
        UserError: they differ.
    """
    trained = (state or {}).get("train")  # checkpoints of before this was kept have none
    if trained is None or trained["fingerprint"] == train.fingerprint:
        return
    counts = {name: (trained[name], now) for name, now in (("images", train.images), ("classes", len(train.classes)))}
    changes = [f"{before:,} {name} → {now:,}" for name, (before, now) in counts.items() if before != now]
    raise UserError(
        f"{address}: its training images are no longer those it was trained on ({', '.join(changes) or 'as many'}; "
        f"fingerprint {trained['fingerprint'][:12]} → {train.fingerprint[:12]}); bring those back, or begin a new run "
        f"on these from its weights with --init {shlex.quote(address)} in place of --resume and --run"
    )


def storage_of(config: Config) -> str:
    """Where runs and tracking go: as asked, else runs/ here, or the home folder where this folder is temporary."""
    if config.storage:
        return config.storage.rstrip("/")
    return str(Path.home() / "ssl-runs" if cluster.in_job() else Path("runs").absolute())


def fresh_name(config: Config) -> str:
    """A readable name for a new run: backbone-objective-data-monthday-hourminutesecond."""
    backbone = config.backbone.replace("/", "_")
    return f"{backbone}-{config.objective}-{data_name(config)[:24]}-{datetime.now():%m%d-%H%M%S}"


def begin(job: Job, folder: RunFolder, uri: str, argv: Sequence[str]) -> str:
    """Write what the run folder starts with and open the MLflow run, or the earlier one again; returns its id."""
    config, train = job.config, job.train
    folder.write("config.yaml", configuration.sealed(config))
    if train.rejected:
        folder.write("rejected.csv", train.rejected.read_bytes())
    if folder.exists("mlflow_run_id"):
        kept = folder.checkpoints()
        if earlier := tracking.resume_run(uri, folder.read("mlflow_run_id").decode(), kept[-1] if kept else 0):
            folder.write("mlflow_run_id", earlier)
            return earlier
    data = data_name(config)
    with folder.local_copy("config.yaml") as config_path:
        run_id = tracking.start_run(
            uri,
            experiment=data,
            name=Path(folder.address).name,
            tags={
                "backbone": config.backbone,
                "objective": config.objective,
                "data": data,
                "family": names.family(config.backbone),
                "run_folder": folder.address,
            },
            params=asdict(config),
            dataset={
                "name": data,
                "digest": train.fingerprint,
                "path": str(train.path),
                "images": train.images,
                "classes": len(train.classes),
            },
            config_path=config_path,
            run=folder.address,
            command=[sys.executable, "-m", "pipeline.pretrain", *argv],
        )
    folder.write("mlflow_run_id", run_id)
    if train.rejected:
        tracker = tracking.Tracker(uri, run_id, run=folder.address, system_metrics=0)
        tracker.log({"rejected": train.rejected_count}, 0)
        tracker.log_artifact(folder.path("rejected.csv"))
        tracker.close()
    return run_id


def data_name(config: Config) -> str:
    """A readable name for the data: the last part of its address."""
    return re.sub(r"\W+", "_", Path(bare(config.data).rstrip("/")).stem).strip("_") or "data"


def choose_engine(config: Config) -> Engine:
    """The engine that the configuration and the machine call for; begins or joins a Ray cluster where needed."""

    def counted(threads: int) -> str:
        return f"{threads} core{'s' * (threads != 1)}"

    if config.engine == "ray" and cluster.connect(config.group[1]):
        device, threads = cluster.placement(*config.group)
        place = f"Ray Train, {config.workers} worker{'s' * (config.group[1] > 1)}"
        return Engine(f"{place} on {device}, {counted(threads)} each", device, threads, cluster.fit)
    device, threads = kind(), cores()
    if config.engine == "ray":
        return Engine(f"Ray Train in this process on {device}, {counted(threads)}", device, threads, ray_alone)
    return Engine(f"this process on {device}, {counted(threads)}", device, threads, alone)


def alone(job: Job, tracking_run: tuple[str, str], display: Display, stop: Stop) -> dict[str, Any]:
    """Train in this process."""
    required = job.config.tracking == "required"
    tracker = tracking.Tracker(*tracking_run, run=job.run, required=required, say=display.say)

    def exchange(status: Status) -> bool:
        display.show(status)
        return stop.is_set() or tracker.lost

    try:
        return work(job, Links(exchange, tracker.log, tracker.rewind)) | {"unrecorded": tracker.lost, "taken": False}
    finally:
        tracker.close()


def ray_alone(job: Job, tracking_run: tuple[str, str], display: Display, stop: Stop) -> dict[str, Any]:
    """Train in this process, through Ray Train's local mode."""
    return cluster.alone(lambda: alone(job, tracking_run, display, stop))
