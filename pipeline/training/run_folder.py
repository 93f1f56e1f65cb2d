"""A run's folder, here or at any fsspec address: config, checkpoints, metrics, log, summary. Every write is atomic."""

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import torch

from pipeline.errors import UserError

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
        os.makedirs(os.path.dirname(target), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """Remove `name` if it is there."""
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
        try:
            found = self.filesystem.ls(f"{self.root}/checkpoints", detail=False)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for path in found if (match := CHECKPOINT.search(path)))

    def save_checkpoint(self, images_seen: int, state: dict[str, Any], keep: int) -> str:
        """Write a checkpoint, then drop all but the newest `keep`; returns its address."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        name = f"checkpoints/{images_seen:012d}.pt"
        self.write(name, buffer.getvalue())
        for old in self.checkpoints()[:-keep]:
            self.filesystem.rm_file(f"{self.root}/checkpoints/{old:012d}.pt")
        return self.path(name)

    def load_checkpoint(self, images_seen: int) -> dict[str, Any]:
        """The checkpoint at that many images, on the CPU; never executes what it holds."""
        return read_checkpoint(self.read(f"checkpoints/{images_seen:012d}.pt"), str(images_seen))


def read_checkpoint(content: bytes, name: str) -> dict[str, Any]:
    """A checkpoint from its bytes.

    Raises:
        UserError: a torn or foreign file.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"checkpoint {name}: cannot be read ({str(error).splitlines()[0][:120]})") from None
    if not isinstance(state, dict) or "objective" not in state or "config" not in state:
        raise UserError(f"checkpoint {name}: is none of ours (it has no objective and config)")
    return state


class MetricsFile:
    """`metrics.jsonl`: one line a step, flushed with every checkpoint, cut back to it on resume.

    Args:
        folder: the run's.
        until: keep the lines up to this many images seen.
    """

    def __init__(self, folder: RunFolder, until: int) -> None:
        self.folder = folder
        self.lines: list[str] = []
        if folder.exists("metrics.jsonl"):
            lines = folder.read("metrics.jsonl").decode().splitlines()
            self.lines = [line for line in lines if line.endswith("}") and json.loads(line)["images"] <= until]
        folder.write("metrics.jsonl", "".join(line + "\n" for line in self.lines))

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return [json.loads(line) for line in self.lines]

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; `row["images"]` orders them."""
        self.lines.append(json.dumps(row))
        if self.folder.local:
            with open(f"{self.folder.root}/metrics.jsonl", "a") as file:
                file.write(self.lines[-1] + "\n")

    def flush(self) -> None:
        """Make what was added visible at a remote address."""
        if not self.folder.local:
            self.folder.write("metrics.jsonl", "".join(line + "\n" for line in self.lines))
