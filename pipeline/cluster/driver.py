"""On the driver: a job goes to the workers of the cluster, and what they say comes back until it has ended."""

import dataclasses
import math
import os
import shlex
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster.copies import facts
from pipeline.cluster.machines import amounts, on_loopback, room, takes
from pipeline.cluster.rendezvous import on_one_machine
from pipeline.cluster.witness import first_line, witness
from pipeline.cluster.worker import BEAT, train
from pipeline.errors import UserError
from pipeline.training.display import Display, Status
from pipeline.training.group import Hub

if TYPE_CHECKING:
    from pipeline.training.run_folder import RunFolder
    from pipeline.training.worker import Job

LOST = 30  # seconds without an answer after which the cluster counts as gone; after 60, Ray ends the process
PATIENCE = 20.0  # seconds without a worker after which the run says what it waits for


def fit(job: "Job", tracking: tuple[str, str], display: Display, stop: threading.Event) -> dict[str, Any]:
    """Run a job on the connected cluster's workers; returns what rank 0 returned.

    Where a worker or a machine is lost, hangs, or is about to be taken away, another group of workers goes on from the
    newest checkpoint; where one joins and `--workers` leaves room for it, after a checkpoint for the purpose.

    Args:
        job: what to train, on a device of which the cluster has enough.
        tracking: address and run id for rank 0 to log to.
        display: draws rank 0's statuses here, on the driver.
        stop: set to end the run with a checkpoint.

    Raises:
        UserError: the workers cannot train this, however often it were tried.
        RuntimeError: no group got any further, or the cluster is gone; it says how to continue.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipeline.training.run_folder import RunFolder

    folder, timeout = RunFolder(job.run), 60 * job.config.timeout
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(timeout))
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")  # then it looks anew what machines there are
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    hub = ray.remote(Hub).options(num_cpus=0, scheduling_strategy=here).remote(timeout)
    cuda = job.device == "cuda"
    each = takes(job.threads, cuda=cuda)
    fewest, most = job.config.group
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "job": dataclasses.asdict(job),
            "tracking": tracking,
            "hub": hub,
            "takes": each,
            "driver": ray.get_runtime_context().get_node_id(),
            "facts": [facts(str(packed.path)) if packed else None for packed in (job.train, job.val)],
        },
        scaling_config=ScalingConfig(
            num_workers=(fewest, most) if fewest < most else most,
            elastic_resize_monitor_interval_s=60 * job.config.checkpoint_every,
            use_gpu=cuda,
            resources_per_worker=each,
        ),
        torch_config=(on_one_machine if on_loopback() else TorchConfig)(
            backend="nccl" if cuda else "gloo", timeout_s=math.ceil(timeout)
        ),
        run_config=RunConfig(
            name=f"{Path(job.run).name}-{int(time.time())}",
            storage_path=tempfile.gettempdir() + "/ray-train",
            failure_config=FailureConfig(max_failures=-1),  # the hub counts, and forgives what was got over
            worker_runtime_env={"worker_process_setup_hook": "pipeline.find_objectives"},
            callbacks=[witness(hub)],
        ),
    )
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = trainer.fit().return_value
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    head, told, running = _Head(ray.get_runtime_context().gcs_address), False, True
    while running:  # and once more when it has ended, for the last news
        thread.join(BEAT)
        running = thread.is_alive()
        try:
            if stop.is_set():
                hub.stop.remote()
            news = ray.get(hub.news.remote(), timeout=LOST)
            head.check()
        except (ray.exceptions.RayError, ConnectionError) as error:
            why = str(error) if isinstance(error, ConnectionError) else "Ray no longer answers on the driver's machine"
            raise RuntimeError(f"the Ray cluster is gone: {why}; {_continues(folder)}") from error
        for message in news.messages:
            display.say(message)
        if news.status is not None:
            display.show(Status(**news.status))
        if news.refused:
            raise UserError(_refusal(news.refused, folder))
        if news.gave_up:
            raise RuntimeError(f"{news.gave_up}; {_continues(folder)}")
        if news.alone < PATIENCE:
            told = False
        elif stop.is_set():
            try:
                kept = (folder.checkpoints() or [0])[-1]
            except Exception as error:
                raise RuntimeError(f"stopped without a worker; {_continues(folder)}") from error
            facts_known = {"images_seen": kept, "checkpoint_images": kept, "run": folder.address}
            return {"stopped": True, "unrecorded": False, "away": "", "taken": False, **facts_known}
        elif not told and (news.starts > 1 or room(each) < fewest):
            told = True
            display.say(_waits(fewest, each))
    if "error" in outcome:
        raise RuntimeError(f"{_cause(outcome['error'])}; {_continues(folder)}") from outcome["error"]
    value = outcome["value"]
    if "nonfinite" in value:
        raise FloatingPointError(value["nonfinite"])
    return dict(value)


def alone(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one worker in this process through Ray Train's local mode: no cluster is begun."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(function, scaling_config=ScalingConfig(num_workers=0))
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return dict(trainer.fit().return_value)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Head:
    """Asks whether a cluster's head still listens; Ray itself ends the process, without a word, after a minute."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.address = (host.strip("[]"), int(port))
        self._answered = time.monotonic()

    def check(self) -> None:
        """Raise ConnectionError where it has not answered for `LOST` seconds."""
        try:
            socket.create_connection(self.address, 2).close()
            self._answered = time.monotonic()
        except OSError as error:
            if time.monotonic() - self._answered > LOST:
                raise ConnectionError(f"its head at {self.address[0]} has not answered for {LOST} s") from error


def _waits(workers: int, each: Mapping[str, float]) -> str:
    """What a run that cannot start its workers is waiting for."""
    import ray

    free = {kind: int(ray.available_resources().get(kind, 0)) for kind in ("CPU", "GPU")}
    idle = " and ".join([f"{free['CPU']} cores", *([f"{free['GPU']} GPUs"] if "GPU" in each else [])])
    return (
        f"waiting for room for {workers} worker{'s' * (workers > 1)} of {amounts(each)}: the machines of the cluster "
        f"could hold {room(each)}, and have {idle} free"
    )


def _refusal(mistake: str, folder: "RunFolder") -> str:
    """What a worker refuses, and how the run goes on once that is mended, where it has begun."""
    try:
        begun = bool(folder.checkpoints())
    except Exception:  # of which `_continues` tells
        begun = True
    return f"{mistake}; {_continues(folder)}" if begun else mistake


def _continues(folder: "RunFolder") -> str:
    """What is kept of a run that ended, and how it goes on."""
    try:
        kept = folder.checkpoints()
    except Exception as error:
        return f"the run folder does not answer either ({first_line(error)})"
    what = f"the checkpoint at {kept[-1]:,} images is kept" if kept else "there is no checkpoint yet"
    return f"{what}; this continues it: python -m pipeline.pretrain --resume {shlex.quote(folder.address)}"


def _cause(error: BaseException) -> str:
    """The sentence at the root of a failed run."""
    if failures := getattr(error, "worker_failures", None):
        rank, failure = next(iter(failures.items()))
        said = str(failure).strip().splitlines() or ["without a word"]
        return f"worker {rank} failed: {type(failure).__name__}: {said[-1]}"
    error = getattr(error, "controller_failure", None) or error
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
