"""A packed set on the disk of every node that trains, wherever it was packed."""

import dataclasses
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.packed import Packed, write_atomically
from pipeline.errors import UserError

CHUNK = 64 << 20  # bytes that travel at once between nodes


def fetch(packed: Packed, driver: str, known: tuple[int, str], say: Callable[[str], Any] = print) -> Packed:
    """The packed set on this node's own disk: where it is already, else brought from the driver's node, once.

    Args:
        packed: as it is on the driver's node.
        driver: that node's id.
        known: `facts` of the set when the run began.
        say: is given what the user should know.

    Raises:
        UserError: it is no longer what it was, on the driver's node, where it cannot be had from elsewhere.
        OSError: it arrived damaged, or cannot be written here.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    source = Path(packed.path)
    if source.exists() and facts(str(source)) == known:
        return packed
    if ray.get_runtime_context().get_node_id() == driver:
        state = "has changed" if source.exists() else "is gone"
        raise UserError(f"{source}: the packed data set {state} since the run began; is its disk well?")
    there = NodeAffinitySchedulingStrategy(driver, soft=False)
    part = ray.remote(read_part).options(num_cpus=0, scheduling_strategy=there)
    root = Path(os.environ.get("SSL_NODE_CACHE", Path.home() / ".cache" / "ssl-pretraining" / "nodes"))
    target = root / f"{packed.fingerprint}-{known[1][:12]}.beton"
    bring(target, known, lambda start: ray.get(part.remote(str(source), start)), say)
    return dataclasses.replace(packed, path=target)


def bring(
    target: Path, known: tuple[int, str], part: Callable[[int], tuple[bytes, str]], say: Callable[[str], Any] = print
) -> None:
    """Have a whole copy of a file at `target`: the one that is there, if nobody has touched it since, else a new one.

    A new copy is written aside, every part checked against the digest taken where it was read, and moved into place
    once it is on the disk. One process of a node brings it, the others wait.

    Args:
        known: `facts` of the file.
        part: the bytes from a place on, CHUNK of them, and their digest: `read_part` where the file is.
        say: is told where a copy is there that is not trusted.

    Raises:
        OSError: a part arrived damaged, the file changed meanwhile, or `target` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    note = target.with_suffix(".whole")  # how the copy was left
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            if note.exists() and note.read_text() == _state(target):
                return
            say(f"{target}: is not as it was brought; it is brought anew")
        temporary = target.with_suffix(".part")
        with temporary.open("wb") as file:
            for start in range(0, known[0], CHUNK):
                content, digest = part(start)
                if _digest(content) != digest:
                    raise OSError(f"{target}: arrived damaged from the driver's node, at byte {start:,}")
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if facts(str(temporary)) != known:
            raise OSError(f"{target}: changed on the driver's node while it was brought")
        temporary.replace(target)
        write_atomically(note, _state(target))


def facts(path: str) -> tuple[int, str]:
    """Size of a file, and a digest of its first and last megabyte: a .beton's metadata and allocation table."""
    size = os.path.getsize(path)
    return size, _digest(_read(path, 0, 1 << 20) + _read(path, max(0, size - (1 << 20)), 1 << 20))


def read_part(path: str, start: int) -> tuple[bytes, str]:
    """CHUNK bytes of a file from `start` on, fewer at its end, and their digest."""
    content = _read(path, start, CHUNK)
    return content, _digest(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: str, start: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(count)


def _state(path: Path) -> str:
    """What changes with every write to a file: its size and when it was last changed."""
    state = path.stat()
    return f"{state.st_size} {state.st_mtime_ns}"
