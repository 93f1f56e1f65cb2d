"""Two Ray nodes on one machine that stand for two machines: each process stays on the cores of its node."""

import contextlib
import json
import os
from collections.abc import Iterator

from pipeline.cluster.machines import TAKES, keep_to_loopback

GIB = 1 << 30


@contextlib.contextmanager
def on(cores: set[int]) -> Iterator[None]:
    """Have every process that is started meanwhile, and what it starts, stay on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def two(training: set[int], spare: set[int]) -> Iterator[tuple[dict[str, str], int]]:
    """A cluster of two nodes, which ends with this.

    Args:
        training: cores of the first, which has room for a worker on all of them.
        spare: cores of the second, which has too little memory for one.

    Yields:
        The variables of a run that trains on the first, and the process id of the second's raylet, whose children
        compute there.
    """
    from ray.cluster_utils import Cluster

    keep_to_loopback()
    nodes = Cluster()
    try:
        for cores, memory in ((training, 8 * GIB), (spare, GIB)):
            with on(cores):
                node = nodes.add_node(
                    num_cpus=len(cores), memory=memory, node_ip_address="127.0.0.1", include_dashboard=False
                )
        takes = json.dumps({"CPU": len(training), "GPU": 0, "memory": 2 * GIB})
        yield {"RAY_ADDRESS": nodes.address, TAKES: takes}, node.all_processes["raylet"][0].process.pid
    finally:
        nodes.shutdown()
