"""What happens to a run when machines and workers of its cluster come, go, hang or break: each fault injected for real.

Every function starts a small run on several Ray nodes of this machine, breaks something from outside, waits until
training goes on or has ended, and returns a row: what the fault was, how it was injected, how many images had to be
trained again, seconds from the fault to the first step after it, and what the user reads.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
IMAGES, BATCH, EPOCHS = 240, 24, 400
SMALL = [
    *("--backbone", "vit_ti8", "--image-size", "32", "--loader", "opencv", "--precision", "fp32", "--knn-every", "0"),
    *("--options.local-views", "2", "--options.local-size", "16", "--options.out-dim", "64"),
    *("--options.hidden-dim", "64", "--batch-size", str(BATCH), "--epochs", str(EPOCHS)),
]
INTERVAL = 3.0  # seconds between checkpoints, and between looks for more machines


def photos(folder: Path, images: int = IMAGES) -> Path:
    """Unlabelled images, so that nothing is measured when the run ends."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(images):
        Image.fromarray(generator.integers(0, 255, (36, 36, 3), np.uint8)).save(folder / f"{i:03}.png")
    return folder


class Machines:
    """Ray nodes on this machine, apart from any other cluster: a head and more, each with `cpus` cores."""

    def __init__(self, count: int, cpus: int = 1, **variables: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets in it have short paths only
        self.before = dict(os.environ)
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update({"RAY_TMPDIR": self.folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"})
        os.environ.update({"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", **variables})
        from ray.cluster_utils import Cluster

        self.cpus = cpus
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": cpus, "object_store_memory": 100 << 20, "include_dashboard": False},
        )
        self.nodes = [self.cluster.head_node]
        for _ in range(count - 1):
            self.add()

    def add(self) -> Any:
        """One more node."""
        node = self.cluster.add_node(num_cpus=self.cpus, object_store_memory=100 << 20)
        self.nodes.append(node)
        return node

    def remove(self, node: Any) -> None:
        """A node is gone, with all that ran on it, without notice."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End every process of the cluster."""
        for node in reversed(self.nodes):
            with contextlib.suppress(Exception):
                node.kill_all_processes(check_alive=False, allow_graceful=False)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if self.folder in " ".join(process.cmdline()):
                    process.kill()
        os.environ.clear()
        os.environ.update(self.before)
        shutil.rmtree(self.folder, ignore_errors=True)


class Run:
    """A pretraining in a process of its own."""

    def __init__(self, machines: Machines, folder: Path, data: Path, *words: str) -> None:
        self.folder, self.log = folder, folder.parent / f"{folder.name}.log"
        folder.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}", "RAY_ADDRESS": machines.cluster.address}
        environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment["SSL_NODE_CACHE"] = str(folder.parent / "nodes")
        common = ["--data", str(data), "--cache", str(folder.parent / "cache"), "--storage", str(folder.parent)]
        common += ["--checkpoint-every", str(INTERVAL / 60), "--run", str(folder), *SMALL, *words]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.pretrain", *common],
                env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder.parent,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text()

    def images(self) -> list[int]:
        """Images after each step that the metrics file holds."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["images"] for line in lines if line.endswith("}")]

    def checkpoints(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("checkpoints/*.pt"))

    def until(self, what: str, ready: Callable[[], Any], seconds: float = 900) -> None:
        """Wait until something has happened to a run that is alive."""
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.output}"
            assert self.process.poll() is None, f"it ended before {what}:\n{self.output}"
            time.sleep(0.1)

    def until_trained(self, steps: int = 5) -> None:
        """Wait for so many steps beyond the newest checkpoint, which is a new one."""
        before = self.checkpoints()[-1:]
        self.until("a checkpoint", lambda: self.checkpoints() and self.checkpoints()[-1:] != before)
        goal = self.checkpoints()[-1] + steps * BATCH
        self.until(f"{steps} steps beyond it", lambda: (self.images() or [0])[-1] >= goal)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def workers(machines: Machines) -> list[psutil.Process]:
    """The processes that train, those of the machine added last first."""
    found = []
    for node in reversed(machines.nodes):
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found


@contextlib.contextmanager
def running(folder: Path, nodes: int, *words: str, **variables: str) -> Iterator[tuple[Machines, Run]]:
    """A run on so many machines, which has got beyond a checkpoint."""
    machines = Machines(nodes, **variables)
    try:
        run = Run(machines, folder / "run", photos(folder / "photos"), *words)
        try:
            run.until_trained()
            yield machines, run
        finally:
            run.close()
    finally:
        machines.close()


def injected(run: Run, fault: str, how: str, action: Callable[[], Any], seconds: float = 900) -> dict[str, Any]:
    """Break something once the run is well beyond a checkpoint, wait for the next group's first step: a row.

    `kept_images` is the newest checkpoint at the fault.
    """
    run.until_trained()
    place, started, kept = len(run.output), time.monotonic(), run.checkpoints()[-1]
    action()
    run.until("a group that goes on", lambda: re.search("go(es)? on from", run.output[place:]), seconds)
    took = time.monotonic() - started
    said = [line for line in run.output[place:].splitlines() if not line.startswith("[")]
    lost = re.search(r"([\d,]+) images are trained again", run.output[place:])
    return {
        "fault": fault,
        "injected": how,
        "kept_images": kept,
        "lost_images": int(lost[1].replace(",", "")) if lost else 0,
        "recovered_s": round(took, 1),
        "said": "\n".join(said),
    }


def worker_killed(machines: Machines, run: Run) -> dict[str, Any]:
    return injected(run, "a worker is killed", "kill -9 of one worker", workers(machines)[0].kill)


def worker_hangs(machines: Machines, run: Run) -> dict[str, Any]:
    return injected(run, "a worker hangs in a collective", "SIGSTOP of one worker", workers(machines)[0].suspend)


def machine_lost(machines: Machines, run: Run) -> dict[str, Any]:
    node = machines.nodes[-1]
    return injected(run, "a machine is lost", "its Ray node killed with all on it", lambda: machines.remove(node))


def machine_joins(machines: Machines, run: Run) -> dict[str, Any]:
    return injected(run, "a machine joins", "one more Ray node", machines.add)


NOTICE = 90  # seconds between a spot notice and the loss of the machine


def announce(machines: Machines) -> None:
    """What a cloud's watcher tells Ray: the machine that was added last will be taken away."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = GcsClient(address=machines.cluster.address)
    node = machines.nodes[-1].node_id
    accepted, why = client.drain_node(node, reason, "spot", int(1000 * (time.time() + NOTICE)))
    assert accepted, why


def machine_taken_away(machines: Machines, run: Run) -> dict[str, Any]:
    node, how = machines.nodes[-1], f"Ray's drain-node for preemption, {NOTICE} s ahead"
    found = injected(run, "a spot notice", how, lambda: announce(machines))
    machines.remove(node)
    return found


def out_of_memory(machines: Machines, run: Run) -> dict[str, Any]:
    victim = workers(machines)[0]

    def limit() -> None:
        victim.rlimit(psutil.RLIMIT_AS, (victim.memory_info().vms,) * 2)

    return injected(run, "a worker runs out of memory", "RLIMIT_AS of a worker set to what it has", limit)


ONE_AFTER_THE_OTHER = (worker_killed, out_of_memory, machine_lost, machine_joins, worker_hangs, machine_taken_away)
"""Faults that one run gets over, in an order that leaves two machines for each that needs them."""


def ended(run: Run, fault: str, how: str, action: Callable[[], Any], seconds: float = 900) -> dict[str, Any]:
    """Break something that no group of workers gets over, wait for the run's end: a row, in which `recovered_s` is
    the seconds until it has ended and `lost_images` what lies behind the newest checkpoint."""
    run.until_trained()
    place, started = len(run.output), time.monotonic()
    action()
    status = run.process.wait(seconds)
    said = [line for line in run.output[place:].splitlines() if not line.startswith("[")]
    return {
        "fault": fault,
        "injected": how,
        "lost_images": run.images()[-1] - run.checkpoints()[-1],
        "recovered_s": round(time.monotonic() - started, 1),
        "said": "\n".join(said),
        "status": status,
    }


def stopped(machines: Machines, run: Run) -> dict[str, Any]:
    """What `ray job stop` does, too; `recovered_s` is the seconds until the checkpoint lies there."""
    asked = []

    def ask() -> None:
        asked.append(time.time())
        run.process.terminate()

    found = ended(run, "the run is told to stop", "SIGTERM to the driver", ask)
    newest = run.folder / "checkpoints" / f"{run.checkpoints()[-1]:012d}.pt"
    return found | {"recovered_s": round(newest.stat().st_mtime - asked[0], 1)}


def head_lost(machines: Machines, run: Run) -> dict[str, Any]:
    head = machines.nodes[0]
    kill = lambda: head.kill_all_processes(check_alive=False, allow_graceful=False)  # noqa: E731
    return ended(run, "the cluster's head is restarted", "all of the head node's Ray processes killed", kill)


def head_silent(machines: Machines, run: Run) -> dict[str, Any]:
    kill = machines.nodes[0].kill_gcs_server
    return ended(run, "the cluster's head dies, the machines live on", "Ray's gcs_server killed", kill)


def data_lost(machines: Machines, run: Run) -> dict[str, Any]:
    (beton,) = (run.folder.parent / "cache").rglob("train.beton")
    return ended(run, "the data disk vanishes", "the .beton truncated while it is read", lambda: os.truncate(beton, 0))


def too_few_left(machines: Machines, run: Run) -> dict[str, Any]:
    """`recovered_s` is the seconds from the notice until the run has ended, which is before the machine is gone."""
    how = f"Ray's drain-node for preemption, {NOTICE} s ahead; --workers 2 on two machines"
    return ended(run, "a spot notice, and too few machines without that one", how, lambda: announce(machines))


ENDS = (too_few_left, head_lost, head_silent, data_lost)
"""Faults that end a run."""


def every(folder: Path) -> Iterator[dict[str, Any]]:
    """The row of every fault here: one run gets over the first, is stopped, and a run of its own ends of each other."""
    with running(folder / "survivor", 2, "--workers", "1..2", "--timeout", "0.5") as (machines, run):
        for fault in (*ONE_AFTER_THE_OTHER, stopped):
            yield fault(machines, run)
    for fault in ENDS:
        with running(folder / fault.__name__, 2, "--workers", "2") as (machines, run):
            yield fault(machines, run)
