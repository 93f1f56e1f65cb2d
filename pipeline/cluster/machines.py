"""Which cluster a run joins or begins, and what its machines could hold."""

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.errors import UserError

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
TAKES = "SSL_WORKER_TAKES"
"""Variable that says what each worker reserves in place of its share of the cluster: whole cores, a GPU or none, and
bytes of memory, as in {"CPU": 8, "GPU": 1, "memory": 34359738368}."""


def in_job() -> bool:
    """Whether this process is the driver of a job submitted to a cluster, whose working folder is temporary."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def connect(workers: int) -> bool:
    """Join the cluster that is there, or begin one on this machine if several workers need it.

    Args:
        workers: the most that will train.

    Returns:
        Whether there is a cluster; without one, Ray Train runs its single worker in this process.

    Raises:
        UserError: as of `join`.
    """
    if join():
        return True
    os.environ.setdefault(WATCHER, "0")  # nobody takes this one machine away with notice
    if workers == 1:
        return False
    begin(num_cpus=max(workers, os.cpu_count() or 1))
    return True


def join() -> bool:
    """Join the cluster that RAY_ADDRESS names or that `ray start` has made here; whether there is one. That of another
    run which began its own is left alone: it ends with that run.

    Raises:
        UserError: a cluster that is named but does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray._private.worker
    from ray._private.services import find_bootstrap_address

    if ray.is_initialized():
        return True
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
    return False


def address() -> str:
    """Of the joined cluster, as RAY_ADDRESS names it to other processes."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def on_loopback() -> bool:
    """Whether the joined cluster is one of this machine alone, which no other can reach."""
    return address().rpartition(":")[0] == "127.0.0.1"


def begin(**options: Any) -> None:
    """Begin a cluster on this machine, which listens on loopback only; `options` are those of `ray.init`."""
    import ray

    keep_to_loopback()
    ray.init(address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False, **options)


def keep_to_loopback() -> None:
    """Have the cluster that this process begins, and the processes that join it, listen and look on loopback only."""
    from ray._private import ray_constants

    # Ray has a switch for it, named after the systems on which it is the default; children read the variable.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for library in ("GLOO", "NCCL"):  # else they listen where the machine's name leads to
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    ray_constants.ENABLE_RAY_CLUSTER = False


def placement(fewest: int, most: int) -> tuple[str, int]:
    """("cuda" or "cpu", CPU cores for each worker) on the connected cluster, as `TAKES` says or by equal shares.

    Args:
        fewest, most: workers that may train; where the most do not fit now, others may join later.

    Raises:
        UserError: the fewest are more than the GPUs, or the CPU cores, of the whole cluster, or than it could hold.
    """
    import ray

    if given := json.loads(os.environ.get(TAKES, "null")):
        threads, cuda = int(given["CPU"]), bool(given.get("GPU"))
        if (there := room(takes(threads, cuda=cuda))) < fewest:
            said = amounts(takes(threads, cuda=cuda))
            raise UserError(f"--workers {fewest}: of {said} each, the machines of the cluster could hold {there}")
        return "cuda" if cuda else "cpu", threads
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
    while each > 1 and room({"CPU": each}) < workers:
        each -= 1
    return "cpu", each


def takes(threads: int, *, cuda: bool) -> dict[str, float]:
    """What a worker of that many CPU cores, with a GPU or not, reserves of its machine, by Ray's names."""
    memory = (json.loads(os.environ.get(TAKES, "null")) or {}).get("memory")
    return {"CPU": threads, **({"GPU": 1} if cuda else {}), **({"memory": memory} if memory else {})}


def amounts(takes: Mapping[str, float]) -> str:
    """What a worker reserves, in words."""
    cores = f"{takes['CPU']:g} CPU core{'s' * (takes['CPU'] > 1)}"
    memory = f" and {takes['memory'] / (1 << 30):.3g} GiB" if "memory" in takes else ""
    return cores + " and a GPU" * ("GPU" in takes) + memory


def machines() -> int:
    """Workers that a cluster has where nobody says how many: one for each GPU, or for each machine with CPU cores."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    return gpus or sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes()) or 1


def side_by_side(fewest: int, most: int) -> int:
    """Runs of so many workers that the connected cluster could train at once; at least one.

    Raises:
        UserError: as of `placement`.
    """
    device, threads = placement(fewest, most)
    return max(1, room(takes(threads, cuda=device == "cuda")) // most)


def free(takes: Mapping[str, float]) -> bool:
    """Whether a machine of the cluster has free, at this moment, what a worker reserves."""
    from ray._private.state import available_resources_per_node

    there = available_resources_per_node().values()
    return any(all(idle.get(kind, 0) >= amount for kind, amount in takes.items()) for idle in there)


def room(takes: Mapping[str, float], without: Collection[str] = ()) -> int:
    """Workers, each of which reserves so much, that the machines of the cluster could hold between them; none on one
    that is about to be taken away, as Ray's cluster knows or `without` names by node id."""
    import ray
    from ray._private.state import state

    leaving = {*state.get_draining_nodes(), *without}
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return sum(min(int(there.get(kind, 0) // amount) for kind, amount in takes.items()) for there in alive)
