"""Entries that wait: in memory, and in a file of JSON lines, from which another process delivers them.

Whoever may write to the file of a run holds it shared for as long as it lives; whoever delivers from outside holds it
exclusively. Evaluations wait in a file of their own, since they come while the run trains.
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

from pipeline.errors import UserError


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
    """The entries of one run, in order; all in memory, and after `write` in the file too.

    Its user sees to it that one thread at a time is in here.

    Args:
        path: the file; what an earlier process left in it waits here again, first.
        ended: the run is over; else it goes on, and the end that an earlier process left behind is not this one's.
    """

    def __init__(self, path: Path, *, ended: bool) -> None:
        self.path = path
        self._entries = deque(entry for entry in read(path) if ended or "status" not in entry)
        self._written = len(self._entries)  # so many entries at the head stand in the file too
        self._file: IO[str] | None = None
        self._open()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._entries)

    @property
    def ending(self) -> bool:
        """Whether the last entry is the run's end."""
        return bool(self._entries) and "status" in self._entries[-1]

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
        if len(self._entries) == self._written:
            return
        if self._file is None:
            self._open()
        if self._file is None:
            return
        try:
            _append(self._file, list(self._entries)[self._written :])
            self._written = len(self._entries)
        except OSError:  # it may end in half a line, which opening it anew ends
            self._let_go()

    def close(self, *, delivered: bool) -> None:
        """Let go of the file, which stays unless all in it is delivered."""
        if delivered:
            self.path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> None:
        """Open the file and mark it as written to by a living process."""
        with suppress(OSError):
            self._file = _appending(self.path)
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def keep(path: Path, entry: Mapping[str, Any]) -> bool:
    """Append one entry to a file that no `Spool` holds, after whoever delivers from it now; whether that worked."""
    try:
        with _appending(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _append(file, [entry])
    except OSError:
        return False
    return True


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The entries in a file, which need not exist."""
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # a process killed while writing leaves half a line at the end
            yield json.loads(line)


@contextmanager
def sole(path: Path, run: str) -> Iterator[None]:
    """Hold a file that no living process writes to.

    Raises:
        UserError: one does.
    """
    if not path.exists():
        yield
        return
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run}: is at work now, and delivers by itself") from None
        yield


def _appending(path: Path) -> IO[str]:
    """A file to append to; a line that a killed process left unfinished is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 - the caller closes it
    file.seek(max(0, file.tell() - 1))
    if file.read(1) not in ("", "\n"):
        file.write("\n")
    return file


def _append(file: IO[str], entries: Sequence[Mapping[str, Any]]) -> None:
    file.writelines(json.dumps(entry) + "\n" for entry in entries)
    file.flush()
    os.fsync(file.fileno())
