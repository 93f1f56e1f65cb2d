"""Entries that wait: in memory, and in a file of JSON lines, from which another process delivers them.

Whoever may write to the file of a run holds it shared for as long as it lives; whoever delivers from outside holds it
exclusively, from before it reads until all is sent: a run that begins meanwhile tells nothing until then. Evaluations
wait in a file of their own, since they come while the run trains.
"""

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def spool_of(run: str) -> Path:
    """The file in which what a run has to say waits: in its folder, or below `~/.cache` where that is remote."""
    return Path(run, "mlflow.spool") if "://" not in run else spool_below_home(run)


def evaluations_of(run: str) -> Path:
    """The file in which evaluations of a run wait."""
    return spool_of(run).with_suffix(".evaluations")


def spool_below_home(name: str) -> Path:
    """The file in which what has no folder here waits, by any name that tells it from others."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "ssl-pretraining" / "tracking" / f"{digest}.jsonl"


class Spool:
    """The entries of one run, in order; all in memory, and after `write` in the file too, once that is claimed.

    Its user sees to it that one thread at a time is in here.

    Args:
        path: the file; what an earlier process left in it waits here again, first.
        ended: the run is over; else it goes on, and the end that an earlier process left behind is not this one's.
    """

    def __init__(self, path: Path, *, ended: bool) -> None:
        self.path = path
        self._ended = ended
        self._entries: deque[dict[str, Any]] = deque()
        self._written = 0  # so many entries at the head stand in the file too
        self._file: IO[bytes] | None = None
        self._claimed = False
        self.claim()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._entries)

    @property
    def ending(self) -> bool:
        """Whether the last entry is the run's end."""
        return bool(self._entries) and "status" in self._entries[-1]

    def claim(self, *, wait: bool = False) -> bool:
        """Take the file, and what waits in it; False while another process delivers it, or writes to an ended run's."""
        if not self._claimed:
            try:
                self._open(wait)
            except BlockingIOError:
                return False
            waiting = [entry for entry in read(self.path) if self._ended or "status" not in entry]
            self._entries.extendleft(reversed(waiting))
            self._written = len(waiting)
            self._claimed = True
        return True

    def add(self, *entries: dict[str, Any]) -> None:
        """Put entries at the end."""
        self._entries.extend(entries)

    def drop(self, count: int) -> None:
        """Forget the first entries, which were sent; the file once none is left."""
        for _ in range(count):
            self._entries.popleft()
        self._written = max(0, self._written - count)
        if not self._entries and self._file is not None:
            self._file.truncate(0)

    def write(self) -> None:
        """Have all entries in the file. Where the disk is full or read-only, they are still in memory."""
        if not self._claimed or len(self._entries) == self._written:
            return
        with suppress(OSError):
            if self._file is None:
                self._open()
            if self._file is not None:
                _append(self._file, list(self._entries)[self._written :])
                self._written = len(self._entries)

    def close(self, *, delivered: bool) -> None:
        """Let go of the file, which stays unless all in it is delivered; waits for another process to have done so."""
        if self._entries and not self._claimed:
            self.claim(wait=True)
            self.write()
        if delivered and self._claimed:
            self.path.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, wait: bool = False) -> None:
        """Open the file, where the disk lets it, as one that a living process writes to, or that it delivers."""
        try:
            self._file = _held(self.path, fcntl.LOCK_EX if self._ended else fcntl.LOCK_SH, wait)
        except BlockingIOError:
            raise
        except OSError:
            pass


def keep(path: Path, entry: Mapping[str, Any]) -> bool:
    """Append one entry to a file that no `Spool` holds, after whoever delivers from it now; whether that worked."""
    try:
        with _held(path, fcntl.LOCK_EX, wait=True) as file:
            _append(file, [entry])
    except OSError:
        return False
    return True


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The entries in a file, which need not exist."""
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):  # a process killed while writing leaves half a line at the end
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry


@contextmanager
def taken(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The entries in a file that `keep` appends to, which are removed from it unless there is an error."""
    if not path.exists():
        yield []
        return
    with _held(path, fcntl.LOCK_EX, wait=True) as file:
        yield list(read(path))
        file.truncate(0)


def _held(path: Path, lock: int, wait: bool) -> IO[bytes]:
    """A file to append to, locked; a line that a killed process left unfinished is ended.

    Raises:
        BlockingIOError: another process holds it, and it is not waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 - the caller closes it
        try:
            fcntl.flock(file, lock if wait else lock | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # a file system without locks
            pass
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # whoever held it has removed it meanwhile
    if size := file.seek(0, os.SEEK_END):
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _append(file: IO[bytes], entries: Sequence[Mapping[str, Any]]) -> None:
    """Have entries on the disk, all or none."""
    size = os.fstat(file.fileno()).st_size
    rest = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise
