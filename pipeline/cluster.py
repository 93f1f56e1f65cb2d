"""Ray: the one place that imports it. Brings a job to the workers of a cluster and their news back to the driver."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shlex
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.packed import Packed
from pipeline.errors import UserError
from pipeline.training.display import Display, Status
from pipeline.training.group import Hub, doing

CHUNK = 64 << 20  # bytes of a packed set that travel at once between nodes
BEAT = 0.5  # seconds between two words of a worker with the driver
LEAVING = 120.0  # seconds that a group is given to leave a checkpoint before one of another size takes its place
LOST = 30  # seconds without an answer after which the cluster counts as gone; after 60, Ray ends the process
PATIENCE = 20.0  # seconds without a worker after which the run says what it waits for
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


def in_job() -> bool:
    """Whether this process is the driver of a job submitted to a cluster, whose working folder is temporary."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def connect(workers: int) -> bool:
    """Join the cluster that RAY_ADDRESS names or that `ray start` has made here, or begin one on this machine if
    several workers need it. That of another run which began its own is left alone: it ends with that run.

    Args:
        workers: the most that will train.

    Returns:
        Whether there is a cluster; without one, Ray Train runs its single worker in this process.

    Raises:
        UserError: a cluster that is named but does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray._private.worker
    from ray._private.services import find_bootstrap_address

    # Of a raylet that dies Ray prints its last 20 lines, whatever `log_to_driver` says; the hub says what is lost.
    ray._private.worker.print_to_stdstream = lambda *words, **options: None
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    named = os.environ.get("RAY_ADDRESS")
    if address := named or find_bootstrap_address(None):
        try:
            ray.init(address=address, **quiet)
            return True
        except ConnectionError as error:
            if named:
                raise UserError(f"RAY_ADDRESS={named}: no cluster answers there ({error})") from None
    os.environ.setdefault(WATCHER, "0")  # nobody takes this one machine away with notice
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
    ray.init(address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False, **options)


def placement(fewest: int, most: int) -> tuple[str, int]:
    """("cuda" or "cpu", CPU cores for each worker) on the connected cluster.

    Args:
        fewest, most: workers that may train; where the most do not fit now, others may join later.

    Raises:
        UserError: the fewest are more than the GPUs, or the CPU cores, of the whole cluster.
    """
    import ray

    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), int(total.get("CPU", 0))
    asked = f"{fewest}..{most}" if fewest < most else f"{fewest}"
    if gpus:
        if fewest > gpus:
            raise UserError(f"--workers {asked}: the cluster has {gpus} GPUs")
        return "cuda", max(1, cpus // gpus)
    if fewest > cpus:
        raise UserError(f"--workers {asked}: the cluster has {cpus} CPU cores and no GPU")
    workers = min(most, cpus)
    each = max(1, cpus // workers)
    while each > 1 and room(each, cuda=False) < workers:
        each -= 1
    return "cpu", each


def room(threads: int, *, cuda: bool) -> int:
    """Workers of that many CPU cores, with a GPU or not, that the machines of the cluster could hold between them."""
    import ray

    count = 0
    for node in ray.nodes():
        if node["Alive"]:
            cores, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
            count += min(cores // threads, gpus) if cuda else cores // threads
    return count


def fit(job: Any, tracking: tuple[str, str] | None, display: Display, stop: threading.Event) -> dict[str, Any]:
    """Run a job on the connected cluster's workers; returns what rank 0 returned.

    Where a worker or a machine is lost, hangs, or is about to be taken away, another group of workers goes on from the
    newest checkpoint; where one joins and `--workers` leaves room for it, after a checkpoint for the purpose.

    Args:
        job: a `pipeline.training.worker.Job`.
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

    timeout = 60 * job.config.timeout
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(timeout))
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")  # then it looks anew what machines there are
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    hub = ray.remote(Hub).options(num_cpus=0, scheduling_strategy=here).remote(timeout)
    cuda = job.device == "cuda"
    fewest, most = job.config.group
    trainer = TorchTrainer(
        _train,
        train_loop_config={
            "job": dataclasses.asdict(job),
            "tracking": tracking,
            "hub": hub,
            "driver": ray.get_runtime_context().get_node_id(),
            "facts": [_facts(str(packed.path)) if packed else None for packed in (job.train, job.val)],
        },
        scaling_config=ScalingConfig(
            num_workers=(fewest, most) if fewest < most else most,
            elastic_resize_monitor_interval_s=60 * job.config.checkpoint_every,
            use_gpu=cuda,
            resources_per_worker={"CPU": job.threads, **({"GPU": 1} if cuda else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo", timeout_s=math.ceil(timeout)),
        run_config=RunConfig(
            name=f"{Path(job.run).name}-{int(time.time())}",
            storage_path=tempfile.gettempdir() + "/ray-train",
            failure_config=FailureConfig(max_failures=-1),  # the hub counts, and forgives what was got over
            worker_runtime_env={"worker_process_setup_hook": "pipeline.find_objectives"},
            callbacks=[_witness(hub)],
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
            raise RuntimeError(f"the Ray cluster is gone: {why}; {_continues(job)}") from error
        for message in news.messages:
            display.say(message)
        if news.status is not None:
            display.show(Status(**news.status))
        if news.refused:
            raise UserError(f"{news.refused}; {_continues(job)}" if RunFolder(job.run).checkpoints() else news.refused)
        if news.gave_up:
            raise RuntimeError(f"{news.gave_up}; {_continues(job)}")
        if news.alone < PATIENCE:
            told = False
        elif stop.is_set():
            kept = (RunFolder(job.run).checkpoints() or [0])[-1]
            return {"stopped": True, "unrecorded": False, "images_seen": kept, "checkpoint_images": kept}
        elif not told and (news.starts > 1 or room(job.threads, cuda=cuda) < fewest):
            told = True
            display.say(_waits(fewest, job.threads, cuda=cuda))
    if "error" in outcome:
        raise RuntimeError(f"{_cause(outcome['error'])}; {_continues(job)}") from outcome["error"]
    value = outcome["value"]
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


class Left(Exception):
    """Raised by rank 0 once its group has left a checkpoint, so that Ray forms another."""


def _witness(hub: Any) -> Any:
    """What Ray's controller calls as groups of workers come and go; it tells the hub."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    class Witness(ControllerCallback, WorkerGroupCallback):
        """Tells the hub; a hub that is gone went with the driver, which ends the run itself."""

        def before_worker_group_start(self, worker_group_context: Any) -> None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(hub.starting.remote())

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            if errors := {rank: _text(error) for rank, error in worker_group_status.errors.items()}:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(hub.fault.remote(errors))

        def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
            sentence = f"there is room for {resize_decision.num_workers} workers: a checkpoint, and they go on"
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(hub.leave.remote("resize", sentence)):
                    until = time.monotonic() + LEAVING
                    while not ray.get(hub.has_left.remote()) and time.monotonic() < until:
                        time.sleep(BEAT / 5)

    return Witness()


def _train(settings: dict[str, Any]) -> dict[str, Any]:
    """The training loop of one Ray Train worker."""
    import ray.train
    import ray.train.collective

    from pipeline.config import Config
    from pipeline.training.links import Links
    from pipeline.training.run_folder import RunFolder
    from pipeline.training.worker import Job, work

    plain, hub = settings["job"], settings["hub"]
    job = Job(**{**plain, "config": Config(**plain["config"]), "train": Packed(**plain["train"]),
                 "val": Packed(**plain["val"]) if plain["val"] else None})  # fmt: skip
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    heart = Heart(hub, rank, world, RunFolder(job.run))
    driver, facts = settings["driver"], settings["facts"]
    try:
        val = fetch(job.val, driver, facts[1]) if job.val and rank == 0 else None
        job = dataclasses.replace(job, train=fetch(job.train, driver, facts[0]), val=val)
    except UserError as error:
        ray.get(hub.give_up.remote(str(error)))  # the driver ends the run: the other workers wait below
        raise
    ray.train.collective.barrier()  # however long a node's copy takes, no collective of torch's waits for it
    heart.watch()
    tracker = None
    if settings["tracking"] and rank == 0:
        from pipeline.tracking import Tracker

        required = job.config.tracking == "required"
        tracker = Tracker(*settings["tracking"], run=job.run, required=required, say=hub.say.remote)

    def exchange(status: Status) -> bool:
        return heart.exchange(status) or (tracker is not None and tracker.lost)

    links = Links(exchange=exchange, log=tracker.log if tracker else lambda metrics, step: None)
    if rank == 0 and (step := job.config.batch_of(world)) < int(job.config.batch_size or 0):
        hub.say.remote(
            f"{world} workers share {step} of the {job.config.batch_size} images of a batch: as many to each"
        )
    try:
        result = work(job, links) | {"unrecorded": tracker is not None and tracker.lost}
    except UserError as error:  # the others may wait for this one: the driver ends the run
        ray.get(hub.refuse.remote(str(error)))
        raise
    except FloatingPointError as error:
        return {"nonfinite": str(error)}
    finally:
        heart.close()
        if tracker:
            tracker.close()
    if rank == 0 and result["stopped"] and heart.leaving != "stop" and not result["unrecorded"]:
        ray.get(hub.left.remote())
        raise Left(heart.leaving)
    return result


class Heart:
    """Speaks to the hub in the background, so that no step waits for it: of every worker that it lives and what it
    does, of rank 0 the status in exchange for the wish to leave.

    Made in the thread that trains.
    """

    def __init__(self, hub: Any, rank: int, world: int, folder: Any) -> None:
        self.hub, self.rank, self.world = hub, rank, world
        self.leaving = ""
        self._reached = _reached(folder) if rank == 0 else 0
        self._name = f"worker {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._trains = threading.get_ident()
        self._status: dict[str, Any] | None = None
        self._began = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def exchange(self, status: Status) -> bool:
        """Leave a status to be sent; whether the group was asked to leave at the last beat."""
        messages = (self._status or {}).get("messages", [])
        self._status = {**dataclasses.asdict(status), "messages": [*messages, *status.messages]}
        status.messages = []
        return bool(self.leaving)

    def watch(self) -> None:
        """From now on, look out for a notice that a machine of this group is about to be taken away."""
        if os.environ.get(WATCHER) != "0":
            threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Send the last status and end."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        import ray

        last = False
        while not last:
            last = self._ended.wait(BEAT)
            status, self._status = self._status, None
            self.hub.hear.remote(self.rank, self._name, doing(self._trains))
            if status is None:
                continue
            if not self._began:
                self._began = True
                self.hub.began.remote(self.world, status["seen"], self._reached)
            self.leaving = ray.get(self.hub.beat.remote(status))

    def _watch(self) -> None:
        import ray.train

        while not self._ended.wait(4 * BEAT):
            notice = ray.train.get_preemption_info()  # all ranks ask as often, and get rank 0's answer
            if notice and self.rank == 0:
                ranks = ", ".join(map(str, notice.preempted_ranks))
                left = f" in {notice.deadline_ms / 1000 - time.time():.0f} s" if notice.deadline_ms else ""
                self.hub.leave.remote(
                    "preemption",
                    f"the machine of worker {ranks} will be taken away{left}: a checkpoint, and others go on",
                )


def _reached(folder: Any) -> int:
    """Images to which the metrics file has come, beyond the newest checkpoint too."""
    if not folder.exists("metrics.jsonl"):
        return 0
    rows = [line for line in folder.read("metrics.jsonl").decode().splitlines() if line.endswith("}")]
    return int(json.loads(rows[-1])["images"]) if rows else 0


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


def fetch(packed: Packed, driver: str, facts: tuple[int, str]) -> Packed:
    """The packed set on this node's own disk: where it is already, else brought from the driver's node, once.

    A copy counts once it is whole: it is written aside, checked against its size and moved into place.

    Args:
        packed: as it is on the driver's node.
        driver: that node's id.
        facts: `_facts` of the set when the run began.

    Raises:
        UserError: it is no longer what it was, on the driver's node, where it cannot be had from elsewhere.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    source = Path(packed.path)
    if source.exists() and _facts(str(source)) == facts:
        return packed
    if ray.get_runtime_context().get_node_id() == driver:
        state = "has changed" if source.exists() else "is gone"
        raise UserError(f"{source}: the packed data set {state} since the run began; is its disk well?")
    size, digest = facts
    there = NodeAffinitySchedulingStrategy(driver, soft=False)
    root = Path(os.environ.get("SSL_NODE_CACHE", Path.home() / ".cache" / "ssl-pretraining" / "nodes"))
    target = root / f"{packed.fingerprint}-{digest[:12]}.beton"
    root.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of this node brings it, the others wait
        if not (target.exists() and _facts(str(target)) == facts):
            read = ray.remote(_read).options(num_cpus=0, scheduling_strategy=there)
            temporary = target.with_suffix(".part")
            with temporary.open("wb") as file:
                for start in range(0, size, CHUNK):
                    file.write(ray.get(read.remote(str(source), start, CHUNK)))
            if _facts(str(temporary)) != facts:
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


def _waits(workers: int, threads: int, *, cuda: bool) -> str:
    """What a run that cannot start its workers is waiting for."""
    import ray

    free = {kind: int(ray.available_resources().get(kind, 0)) for kind in ("CPU", "GPU")}
    each = f"{threads} CPU core{'s' * (threads > 1)}{' and a GPU' * cuda}"
    idle = " and ".join([f"{free['CPU']} cores", *([f"{free['GPU']} GPUs"] if cuda else [])])
    return (
        f"waiting for room for {workers} worker{'s' * (workers > 1)} of {each}: the machines of the cluster could hold "
        f"{room(threads, cuda=cuda)}, and have {idle} free"
    )


def _continues(job: Any) -> str:
    """What is kept of a run that ended, and how it goes on."""
    from pipeline.training.run_folder import RunFolder

    try:
        kept = RunFolder(job.run).checkpoints()
    except Exception as error:
        return f"the run folder does not answer either ({_first_line(error)})"
    what = f"the checkpoint at {kept[-1]:,} images is kept" if kept else "there is no checkpoint yet"
    return f"{what}; this continues it: python -m pipeline.pretrain --resume {shlex.quote(job.run)}"


def _text(error: BaseException) -> str:
    """What an error says, and its kind; of a failed health check, the reason."""
    inner = getattr(error, "health_check_failure", None) or error
    return (
        f"{type(inner).__name__}: {inner}"
        if inner is error
        else f"{inner}\n{type(inner).__name__}: {_first_line(inner)}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _cause(error: BaseException) -> str:
    """The sentence at the root of a failed run."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in failures.items():
        return f"worker {rank} failed: {type(failure).__name__}: {str(failure).strip().splitlines()[-1]}"
    error = getattr(error, "controller_failure", None) or error
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
