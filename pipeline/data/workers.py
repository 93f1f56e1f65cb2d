"""Decode many files on several cores, surviving decoders that crash, hang, or eat all memory.

Decoding happens in child processes that share nothing with this one but a pipe. A child answers once per chunk of
files. When one dies, its replacement answers that chunk file by file, so that the file it dies of is known and
rejected by name. A child limits its own time per file with an alarm that the kernel delivers even into a stuck C
library, and its own memory; it ends when this process ends.
"""

import contextlib
import hashlib
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import NamedTuple

from pipeline.data.decode import MAX_PIXELS, DecodedImage, decode
from pipeline.data.magic import HEAD, NotAnImage, Rejected, check_is_image

SECONDS_PER_FILE = 60
MEMORY = 6 << 30  # bytes of address space of one child
LARGEST_FILE = MAX_PIXELS * 4 + (64 << 20)  # bytes: 32 bits a pixel, and metadata; no image that is read is larger
IN_FLIGHT = 256 << 20  # bytes that wait for a decoder, beyond one file
READY = "ready"


class Extent(NamedTuple):
    """Bytes in a local file: all of it where `size` is -1."""

    path: str
    start: int = 0
    size: int = -1


class Unreadable(NamedTuple):
    """A file whose bytes could not be had."""

    reason: str


class Task(NamedTuple):
    """One file to decode. `item`: the caller's own number for it; `payload`: its bytes, or where a child finds them."""

    item: int
    payload: bytes | Extent | Unreadable


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    image         what to store, or None where the file was rejected
    reason        why it was rejected
    not_an_image  it was rejected because it never was an image
    digest        blake2b of its bytes, 16 bytes
    """

    image: DecodedImage | None
    reason: str = ""
    not_an_image: bool = False
    digest: bytes = b""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Decoders:
    """A pool of decoding child processes.

    with Decoders(workers=2) as decoders:
        for chunk, outcomes in decoders.decode(chunks):    # chunks in their order, one outcome per task
            ...

    `resize`: see `pipeline.data.decode.decode`. `seconds`: the longest that one file may take.
    """

    def __init__(self, workers: int, *, resize: int | None = None, seconds: float = SECONDS_PER_FILE) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decoder")  # each feeds a child of its own
        self._mine = threading.local()
        self._ahead = 2 * workers
        self._children: list[_Child] = []
        self._arguments = (resize, seconds)
        self._closed = False

    def decode(self, chunks: Iterable[Sequence[Task]]) -> Iterator[tuple[Sequence[Task], list[Outcome]]]:
        """Each chunk with its outcomes, in order; a few chunks are worked on ahead, of `IN_FLIGHT` bytes at most."""
        waiting: deque[tuple[Sequence[Task], Future[list[Outcome]]]] = deque()
        held = 0
        for chunk in chunks:
            waiting.append((chunk, self._threads.submit(self._run, chunk)))
            held += _held(chunk)
            while len(waiting) > self._ahead or (held > IN_FLIGHT and waiting):
                tasks, future = waiting.popleft()
                held -= _held(tasks)
                yield tasks, future.result()
        for tasks, future in waiting:
            yield tasks, future.result()

    def close(self) -> None:
        """End every child, also in the middle of a file."""
        self._closed = True
        for child in list(self._children):
            child.end()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for child in self._children:  # one may have started in between
            child.end()

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Have this thread's child decode these tasks."""
        outcomes: list[Outcome] = []
        careful = False
        while len(outcomes) < len(tasks) and not self._closed:
            child = getattr(self._mine, "child", None)
            if child is None:
                child = self._mine.child = _Child(*self._arguments)
                self._children.append(child)
            died_of = child.answer(tasks[len(outcomes) :], outcomes, careful)
            if died_of:
                if careful:
                    outcomes.append(Outcome(None, died_of))
                careful = True
                self._children.remove(child)
                self._mine.child = None
        return outcomes


def _held(chunk: Sequence[Task]) -> int:
    """Bytes of files that a chunk holds in memory."""
    return sum(len(task.payload) for task in chunk if isinstance(task.payload, bytes))


class _Child:
    """The parent's end of one child process."""

    def __init__(self, resize: int | None, seconds: float) -> None:
        self.seconds = seconds
        self.pipe, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        start = f"from {__name__} import main; main()"
        command = [sys.executable, "-P", "-c", start, str(theirs.fileno()), str(resize or 0), str(seconds)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.ready = False

    def answer(self, tasks: Sequence[Task], outcomes: list[Outcome], careful: bool) -> str:
        """Append the outcomes of `tasks`, if `careful` one by one; returns what the child died of, or ""."""
        self._await_ready()
        patience = (self.seconds + 5) * (1 if careful else len(tasks))
        try:
            for part in [[task] for task in tasks] if careful else [list(tasks)]:
                self.pipe.send(part)
                if not self.pipe.poll(patience):  # even its alarm did not end it: it waits for a device
                    self.end()
                    return f"timed out: it cannot be read within {self.seconds:g} seconds"
                outcomes += self.pipe.recv()
        except (EOFError, OSError):
            return self._obituary()
        return ""

    def _await_ready(self) -> None:
        if self.ready:
            return
        try:
            self.ready = self.pipe.poll(120) and self.pipe.recv() == READY
        except (EOFError, OSError):
            self.ready = False
        assert self.process.stderr is not None
        if not self.ready:
            self.end()
            message = self.process.stderr.read().decode("utf-8", "replace").strip()
            raise RuntimeError(f"a decoding process did not start: {message or self._obituary()}")
        self.process.stderr.close()

    def _obituary(self) -> str:
        status = self.process.wait()
        self.pipe.close()
        if status == -signal.SIGALRM:
            return f"timed out: it cannot be decoded within {self.seconds:g} seconds"
        if status == -signal.SIGKILL:
            return "crashed: the decoder was killed, perhaps for want of memory"
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"crashed: the decoder died of {name}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


# ------------------------------------------------------------------------------------------------- in the child


def _serve(pipe: Connection, resize: int | None, seconds: float) -> None:
    while True:
        outcomes = []
        for task in pipe.recv():
            signal.setitimer(signal.ITIMER_REAL, seconds)
            outcomes.append(_decode_one(task, resize))
            signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(outcomes)


def _decode_one(task: Task, resize: int | None) -> Outcome:
    digest = b""
    if isinstance(task.payload, Unreadable):
        return Outcome(None, task.payload.reason)
    try:
        data = _read(task.payload) if isinstance(task.payload, Extent) else task.payload
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return Outcome(decode(data, resize=resize), digest=digest)
    except Rejected as error:
        return Outcome(None, str(error), isinstance(error, NotAnImage), digest)
    except OSError as error:
        return Outcome(None, f"unreadable: {error.strerror or error}")
    except MemoryError:
        return Outcome(None, "too large: not enough memory to read it")


def _read(extent: Extent) -> bytes:
    """The bytes of an extent; only its beginning is read where that is no image, nothing of what is no regular file."""
    descriptor = os.open(extent.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise Rejected("unreadable: Is a directory")
        raise NotAnImage("not an image: not a regular file")
    with open(descriptor, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size if extent.size < 0 else extent.size
        if extent.start:
            file.seek(extent.start)
        head = file.read(min(size, 1 << 16))
        check_is_image(head[:HEAD])
        if size > LARGEST_FILE:
            raise Rejected(f"too large: {size / 1e9:.1f} GB")
        parts = [head]
        done = len(head)
        while done < size:
            part = file.read(size - done)
            if not part:
                break
            parts.append(part)
            done += len(part)
    return b"".join(parts)


def main() -> None:
    """Serve one parent: the arguments are a socket's descriptor, the size to resize to (0: none), seconds per file."""
    descriptor, resize, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(descriptor)
    pipe.send(READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(pipe, resize or None, seconds)
