"""A run's folder, here or at any fsspec address: config, checkpoints, metrics, log, summary. Every write is atomic."""

import contextlib
import fcntl
import io
import json
import os
import posixpath
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import torch

from objectives import checkpoint
from pipeline.errors import UserError

WRITING = ".writing-"  # how names of files begin that are not whole yet
HELD = ".held"  # locked by whoever trains
CHECKPOINT = re.compile(r"(\d{12})\.pt$")


class RunFolder:
    """Files of one run below `address`.

    Args:
        address: a folder or any fsspec address. It is created by the first write.
    """

    def __init__(self, address: str) -> None:
        self.filesystem, self.root = fsspec.core.url_to_fs(address)
        self.local = "file" in (
            self.filesystem.protocol if isinstance(self.filesystem.protocol, tuple) else (self.filesystem.protocol,)
        )
        self.address = self.root if self.local else address.rstrip("/")

    def path(self, name: str) -> str:
        """Where `name` is, to print and to pass on."""
        return f"{self.address}/{name}"

    def exists(self, name: str) -> bool:
        """Whether `name` has been written."""
        return bool(self.filesystem.exists(f"{self.root}/{name}"))

    def read(self, name: str) -> bytes:
        """The bytes of `name`."""
        return bytes(self.filesystem.cat_file(f"{self.root}/{name}"))

    def write(self, name: str, content: bytes | str) -> None:
        """Write `name` whole or not at all."""
        content = content.encode() if isinstance(content, str) else content
        target = f"{self.root}/{name}"
        if not self.local:
            self.filesystem.pipe_file(target, content)
            return
        with self._replacing(target) as file:
            file.write(content)

    @staticmethod
    @contextlib.contextmanager
    def _replacing(target: str) -> Iterator[IO[bytes]]:
        """A file that takes the place of `target`, on the disk, once all is in it."""
        os.makedirs(os.path.dirname(target), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=WRITING)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else trains here meanwhile; the system lets go of it where this process ends, however it does.

        Addresses that are no file system's cannot be held.

        Raises:
            UserError: another process holds it.
        """
        if not self.local:
            yield
            return
        os.makedirs(self.root, exist_ok=True)
        with open(f"{self.root}/{HELD}", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"{self.address}: {file.read() or 'another process'} is training there; wait for its end, or stop "
                    "it, which saves a checkpoint to go on from"
                ) from None
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def tidy(self) -> None:
        """Remove what processes that were killed while writing left half written; only a run that begins may ask."""
        if self.local:
            for left in Path(self.root).glob(f"**/{WRITING}*"):
                left.unlink(missing_ok=True)
        self.remove_strays()

    def rename(self, old: str, new: str) -> None:
        """Rename a file within the folder."""
        self.filesystem.mv(f"{self.root}/{old}", f"{self.root}/{new}")

    def remove(self, name: str) -> None:
        """Remove `name` if it is there."""
        with contextlib.suppress(FileNotFoundError):  # another worker may be as quick
            if self.exists(name):
                self.filesystem.rm_file(f"{self.root}/{name}")

    def write_json(self, name: str, content: Any) -> None:
        """Write `name` as indented JSON."""
        self.write(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """`name` as a file on this machine's disk: itself, or a copy for the while of a remote one."""
        if self.local:
            yield Path(self.root, name)
            return
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary, Path(name).name)
            copy.write_bytes(self.read(name))
            yield copy

    def checkpoints(self) -> list[int]:
        """Images seen at each whole checkpoint, oldest first."""
        return sorted(int(match[1]) for name in self._names() if (match := CHECKPOINT.search(name)))

    def parts(self) -> dict[str, int]:
        """The parts of checkpoints that several workers write, and the images seen at each; whole ones or not."""
        return {name: int(match[1]) for name in self._names() if (match := checkpoint.PART.search(name))}

    def _names(self) -> list[str]:
        self.filesystem.invalidate_cache()  # others write there, too
        try:
            return [posixpath.basename(path) for path in self.filesystem.ls(f"{self.root}/checkpoints", detail=False)]
        except FileNotFoundError:
            return []

    def files_of(self, images_seen: int) -> list[str]:
        """The files of the checkpoint at that many images; without the first it does not count."""
        parts = [name for name, seen in self.parts().items() if seen == images_seen]
        return [f"checkpoints/{name}" for name in (f"{images_seen:012d}.pt", *sorted(parts))]

    def remove_checkpoint(self, images_seen: int) -> None:
        """Remove the checkpoint at that many images with all its parts."""
        for name in self.files_of(images_seen):
            self.remove(name)

    def remove_strays(self, before: float = float("inf")) -> int:
        """Remove parts of checkpoints that never became whole, of those `before` so many images; returns how many."""
        whole = set(self.checkpoints())
        strays = [name for name, seen in self.parts().items() if seen < before and seen not in whole]
        for name in strays:
            self.remove(f"checkpoints/{name}")
        return len(strays)

    def save_checkpoint(self, images_seen: int, state: dict[str, Any]) -> str:
        """Write a checkpoint, whole or not at all; returns its address."""
        return self.save_state(f"checkpoints/{images_seen:012d}.pt", state)

    def save_state(self, name: str, state: dict[str, Any]) -> str:
        """Write what `torch.save` makes of `state`, whole or not at all; returns its address."""
        if self.local:
            with self._replacing(f"{self.root}/{name}") as file:
                torch.save(state, file)
        else:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            self.filesystem.pipe_file(f"{self.root}/{name}", buffer.getvalue())
        return self.path(name)

    def load_checkpoint(self, images_seen: int) -> dict[str, Any]:
        """The checkpoint at that many images, on the CPU; never executes what it holds.

        Raises:
            UserError: it, or a part of it, is torn, damaged, missing or foreign.
        """
        return self._load(f"checkpoints/{images_seen:012d}.pt", str(images_seen))[0]

    def facts_of(self, images_seen: int) -> dict[str, Any]:
        """What the checkpoint at that many images knows of itself; nothing if it is damaged."""
        try:
            return self._load(f"checkpoints/{images_seen:012d}.pt", str(images_seen))[1]
        except UserError:
            return {}

    def load_state(self, name: str) -> dict[str, Any]:
        """What `save_state` wrote, or a checkpoint by its file, likewise."""
        return self._load(name, self.path(name))[0]

    def _load(self, name: str, called: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A state, and the index's facts beside it."""
        folder, file = posixpath.split(name)
        try:
            state = checkpoint.read(file, lambda beside: self.read(posixpath.join(folder, beside)))
        except ValueError as error:
            raise UserError(f"checkpoint {called}: cannot be read ({error})") from None
        if not isinstance(state, dict) or "objective" not in state or "config" not in state:
            raise UserError(f"checkpoint {called}: is none of ours (it has no objective and config)")
        return state, state.pop("facts", {})


class MetricsFile:
    """`metrics.jsonl`: one line a step, flushed with every checkpoint, cut back to it on resume.

    Args:
        folder: the run's.
        until: keep the lines up to this many images seen.
    """

    def __init__(self, folder: RunFolder, until: int) -> None:
        self.folder = folder
        self._behind = False  # whether the disk took less than was added
        self.lines = [json.dumps(row) for row in self.read(folder, until)]
        self.cut(until)

    @property
    def content(self) -> str:
        """All lines."""
        return "".join(line + "\n" for line in self.lines)

    def cut(self, until: int) -> None:
        """Forget the rows after so many images."""
        self.lines = [line for line in self.lines if json.loads(line)["images"] <= until]
        try:
            self.folder.write("metrics.jsonl", self.content)
            self._behind = False
        except Exception:  # a full disk, storage that is away: the next flush tries again
            self._behind = True

    @staticmethod
    def read(folder: RunFolder, until: int) -> list[dict[str, Any]]:
        """The rows that a run folder holds, up to `until` images seen."""
        return [row for row in MetricsFile.rows_of(folder)[0] if row["images"] <= until]

    @staticmethod
    def rows_of(folder: RunFolder) -> tuple[list[dict[str, Any]], int]:
        """The rows that a run folder holds, and how many lines are none; the last does not count if it was cut off."""
        if not folder.exists("metrics.jsonl"):
            return [], 0
        *lines, last = folder.read("metrics.jsonl").decode(errors="replace").split("\n")
        rows = [_row(line) for line in lines]
        return [row for row in [*rows, _row(last)] if row], sum(row is None for row in rows)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return [json.loads(line) for line in self.lines]

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; `row["images"]` orders them."""
        self.lines.append(json.dumps(row))
        if self.folder.local and not self._behind:
            try:
                with open(f"{self.folder.root}/metrics.jsonl", "a") as file:
                    file.write(self.lines[-1] + "\n")
            except OSError:  # a full disk: the next flush tries again
                self._behind = True

    def flush(self) -> None:
        """Make what was added last: on the disk itself, or at a remote address.

        Raises:
            Exception: it cannot be written; what was added stays in memory for the next flush.
        """
        if self.folder.local and not self._behind:
            with open(f"{self.folder.root}/metrics.jsonl", "a") as file:
                os.fsync(file.fileno())
        else:
            self.folder.write("metrics.jsonl", self.content)
            self._behind = False


def _row(line: str) -> dict[str, Any] | None:
    """A line of metrics; None where it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    numbers = isinstance(row, dict) and all(isinstance(value, int | float) for value in row.values())
    return row if numbers and "images" in row else None
