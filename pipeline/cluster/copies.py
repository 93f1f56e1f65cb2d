"""A packed set on the disk of every node that trains, wherever it was packed."""

import dataclasses
import fcntl
import hashlib
import os
from pathlib import Path

from pipeline.data.packed import Packed
from pipeline.errors import UserError

CHUNK = 64 << 20  # bytes that travel at once between nodes


def fetch(packed: Packed, driver: str, known: tuple[int, str]) -> Packed:
    """The packed set on this node's own disk: where it is already, else brought from the driver's node, once.

    A copy counts once it is whole: it is written aside, checked against its size and moved into place.

    Args:
        packed: as it is on the driver's node.
        driver: that node's id.
        known: `facts` of the set when the run began.

    Raises:
        UserError: it is no longer what it was, on the driver's node, where it cannot be had from elsewhere.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    source = Path(packed.path)
    if source.exists() and facts(str(source)) == known:
        return packed
    if ray.get_runtime_context().get_node_id() == driver:
        state = "has changed" if source.exists() else "is gone"
        raise UserError(f"{source}: the packed data set {state} since the run began; is its disk well?")
    size, digest = known
    there = NodeAffinitySchedulingStrategy(driver, soft=False)
    root = Path(os.environ.get("SSL_NODE_CACHE", Path.home() / ".cache" / "ssl-pretraining" / "nodes"))
    target = root / f"{packed.fingerprint}-{digest[:12]}.beton"
    root.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of this node brings it, the others wait
        if not (target.exists() and facts(str(target)) == known):
            read = ray.remote(_read).options(num_cpus=0, scheduling_strategy=there)
            temporary = target.with_suffix(".part")
            with temporary.open("wb") as file:
                for start in range(0, size, CHUNK):
                    file.write(ray.get(read.remote(str(source), start, CHUNK)))
            if facts(str(temporary)) != known:
                raise OSError(f"{target}: arrived damaged from the driver's node")
            temporary.replace(target)
    return dataclasses.replace(packed, path=target)


def facts(path: str) -> tuple[int, str]:
    """Size of a file, and a digest of its first and last megabyte: a .beton's metadata and allocation table."""
    size = os.path.getsize(path)
    return size, hashlib.sha256(_read(path, 0, 1 << 20) + _read(path, max(0, size - (1 << 20)), 1 << 20)).hexdigest()


def _read(path: str, start: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(count)
