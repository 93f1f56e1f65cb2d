"""Ray: the one place that imports it. Brings a job to the workers of a cluster and their news back to the driver."""

import dataclasses
import fcntl
import hashlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.packed import Packed
from pipeline.errors import UserError
from pipeline.training.display import Display, Status

CHUNK = 64 << 20  # bytes of a packed set that travel at once between nodes
BEAT = 0.5  # seconds between two words of rank 0 with the driver
RETRIES = 3  # times that a lost worker or node is replaced


def in_job() -> bool:
    """Whether this process is the driver of a job submitted to a cluster, whose working folder is temporary."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def connect(workers: int) -> bool:
    """Join the cluster that is there, or begin one on this machine if several workers need it.

    Returns:
        Whether there is a cluster; without one, Ray Train runs its single worker in this process.

    Raises:
        UserError: a cluster that is named but does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError as error:
        if address := os.environ.get("RAY_ADDRESS"):
            raise UserError(f"RAY_ADDRESS={address}: no cluster answers there ({error})") from None
        if workers == 1:
            return False
        begin(num_cpus=max(workers, os.cpu_count() or 1))
    return True


def begin(**options: Any) -> None:
    """Begin a cluster on this machine, which listens on loopback only; `options` are those of `ray.init`."""
    import ray
    from ray._private import ray_constants

    # Ray has a switch for it, named after the systems on which it is the default; children read the variable.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False, **options)


def placement(workers: int) -> tuple[str, int]:
    """("cuda" or "cpu", CPU cores for each worker) on the connected cluster.

    Raises:
        UserError: more workers than GPUs, or than CPU cores, on the whole cluster.
    """
    import ray

    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), int(total.get("CPU", 0))
    if gpus:
        if workers > gpus:
            raise UserError(f"--workers {workers}: the cluster has {gpus} GPUs")
        return "cuda", max(1, cpus // gpus)
    if workers > cpus:
        raise UserError(f"--workers {workers}: the cluster has {cpus} CPU cores and no GPU")
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    each = max(1, cpus // workers)
    while each > 1 and sum(node // each for node in nodes) < workers:
        each -= 1
    return "cpu", each


def fit(job: Any, tracking: tuple[str, str] | None, display: Display, stop: threading.Event) -> dict[str, Any]:
    """Run a job on the connected cluster's workers; returns what rank 0 returned.

    A worker or node that is lost is replaced, and training goes on from the newest checkpoint.

    Args:
        job: a `pipeline.training.worker.Job`.
        tracking: address and run id for rank 0 to log to.
        display: draws rank 0's statuses here, on the driver.
        stop: set to end the run with a checkpoint.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    hub = ray.remote(Hub).options(num_cpus=0, scheduling_strategy=here).remote()
    cuda = job.device == "cuda"
    trainer = TorchTrainer(
        _train,
        train_loop_config={
            "job": dataclasses.asdict(job),
            "tracking": tracking,
            "hub": hub,
            "driver": ray.get_runtime_context().get_node_id(),
        },
        scaling_config=ScalingConfig(
            num_workers=job.config.workers,
            use_gpu=cuda,
            resources_per_worker={"CPU": job.threads, **({"GPU": 1} if cuda else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo", timeout_s=3600),
        run_config=RunConfig(
            name=f"{Path(job.run).name}-{int(time.time())}",
            storage_path=tempfile.gettempdir() + "/ray-train",
            failure_config=FailureConfig(max_failures=RETRIES),
            worker_runtime_env={"worker_process_setup_hook": "pipeline.find_objectives"},
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
    while thread.is_alive():
        thread.join(BEAT)
        if stop.is_set():
            hub.stop.remote()
        if (status := ray.get(hub.news.remote())) is not None:
            display.show(Status(**status))
    if "error" in outcome:
        raise RuntimeError(_cause(outcome["error"])) from outcome["error"]
    value = outcome["value"]
    if "user_error" in value:
        raise UserError(value["user_error"])
    if "nonfinite" in value:
        raise FloatingPointError(value["nonfinite"])
    return dict(value)


def alone(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one worker in this process through Ray Train's local mode: no cluster is begun."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(lambda: function(), scaling_config=ScalingConfig(num_workers=0))
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return dict(trainer.fit().return_value)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Hub:
    """An actor beside the driver, through which rank 0 and the driver talk; no shared disk is needed."""

    def __init__(self) -> None:
        self.status: dict[str, Any] | None = None
        self.stopping = False

    def beat(self, status: dict[str, Any]) -> bool:
        """Rank 0's newest status in, whether to stop out."""
        messages = (self.status or {}).get("messages", [])
        self.status = {**status, "messages": [*messages, *status["messages"]]}
        return self.stopping

    def news(self) -> dict[str, Any] | None:
        """The status since the last call, if there is a new one."""
        status, self.status = self.status, None
        return status

    def stop(self) -> None:
        """Ask the run to stop."""
        self.stopping = True


def _train(settings: dict[str, Any]) -> dict[str, Any]:
    """The training loop of one Ray Train worker."""
    import ray.train

    from pipeline.config import Config
    from pipeline.training.links import Links
    from pipeline.training.worker import Job, work

    plain = settings["job"]
    job = Job(**{**plain, "config": Config(**plain["config"]), "train": Packed(**plain["train"]),
                 "val": Packed(**plain["val"]) if plain["val"] else None})  # fmt: skip
    beat = Heartbeat(settings["hub"])
    tracker, said = None, list[str]()
    if settings["tracking"] and ray.train.get_context().get_world_rank() == 0:
        from pipeline.tracking import Tracker

        required = job.config.tracking == "required"
        tracker = Tracker(*settings["tracking"], run=job.run, required=required, say=said.append)

    def exchange(status: Status) -> bool:
        while said:
            status.messages.append(said.pop(0))
        return beat.exchange(status) or (tracker is not None and tracker.lost)

    links = Links(
        exchange=exchange,
        log=tracker.log if tracker else lambda metrics, step: None,
        fetch=lambda packed: fetch(packed, settings["driver"]),
    )
    try:
        return work(job, links) | {"unrecorded": tracker is not None and tracker.lost}
    except UserError as error:  # trying again would not help
        return {"user_error": str(error)}
    except FloatingPointError as error:
        return {"nonfinite": str(error)}
    finally:
        beat.close()
        if tracker:
            tracker.close()


class Heartbeat:
    """Exchanges rank 0's status for the wish to stop in the background, so that no step waits for it."""

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self.stop = False
        self._status: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def exchange(self, status: Status) -> bool:
        """Leave a status to be sent; whether the run was asked to stop at the last beat."""
        messages = (self._status or {}).get("messages", [])
        self._status = {**dataclasses.asdict(status), "messages": [*messages, *status.messages]}
        status.messages = []
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self.stop

    def close(self) -> None:
        """Send the last status and end."""
        self._ended.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        import ray

        last = False
        while not last:
            last = self._ended.wait(BEAT)
            status, self._status = self._status, None
            if status is not None:
                self.stop = ray.get(self.hub.beat.remote(status))


def fetch(packed: Packed, driver: str) -> Packed:
    """The packed set on this node's own disk: where it is already, else brought from the driver's node, once.

    A copy counts once it is whole: it is written aside, checked against its size and moved into place.

    Args:
        packed: as it is on the driver's node.
        driver: that node's id.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    source = Path(packed.path)
    if ray.get_runtime_context().get_node_id() == driver:
        return packed
    there = NodeAffinitySchedulingStrategy(driver, soft=False)
    size, digest = ray.get(ray.remote(_facts).options(num_cpus=0, scheduling_strategy=there).remote(str(source)))
    if source.exists() and _facts(str(source)) == (size, digest):
        return packed
    root = Path(os.environ.get("SSL_NODE_CACHE", Path.home() / ".cache" / "ssl-pretraining" / "nodes"))
    target = root / f"{packed.fingerprint}-{digest[:12]}.beton"
    root.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of this node brings it, the others wait
        if not (target.exists() and _facts(str(target)) == (size, digest)):
            read = ray.remote(_read).options(num_cpus=0, scheduling_strategy=there)
            temporary = target.with_suffix(".part")
            with temporary.open("wb") as file:
                for start in range(0, size, CHUNK):
                    file.write(ray.get(read.remote(str(source), start, CHUNK)))
            if _facts(str(temporary)) != (size, digest):
                raise OSError(f"{target}: arrived damaged from the driver's node")
            temporary.replace(target)
    return dataclasses.replace(packed, path=target)


def _facts(path: str) -> tuple[int, str]:
    """Size of a file, and a digest of its first and last megabyte: a .beton's metadata and allocation table."""
    size = os.path.getsize(path)
    return size, hashlib.sha256(_read(path, 0, 1 << 20) + _read(path, max(0, size - (1 << 20)), 1 << 20)).hexdigest()


def _read(path: str, start: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(count)


def _cause(error: BaseException) -> str:
    """The sentence at the root of a failed run."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in failures.items():
        return f"worker {rank} failed: {type(failure).__name__}: {str(failure).strip().splitlines()[-1]}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
