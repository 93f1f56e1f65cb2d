"""Batches of views from a .beton, in an order that depends on the seed and the epoch alone, from any point
onwards.

    with make_loader("photos.beton", objective.views, batch_size=64, seed=0) as loader:
        for batch in loader:            # for ever, epoch after epoch; one pass with shuffle=False
            ...
            checkpoint["loader"] = loader.state()

The cursor counts images of the global order. Each global step takes the next `batch_size * world` images and
each rank its contiguous share of them, so a run may go on with another number of ranks or another batch,
showing every image that is due.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data import crops
from pipeline.data.beton import BetonReader
from pipeline.data.workers import cores

if TYPE_CHECKING:
    from objectives.views import View

BATCHES_AHEAD = 2
"""Finished batches that wait for the training step; more would hide no more than one long step and cost memory."""

BACKENDS = ("auto", "ffcv", "opencv")


@dataclass
class Batch:
    """One rank's share of a global step. All tensors are the receiver's own."""

    views: list[Tensor]
    """one uint8 [B, 3, h, w] for each view, channels last in memory, all slices of one buffer"""
    index: Tensor
    """int64 [B], the images' numbers in the .beton"""
    label: Tensor
    """int64 [B], -1 where there is none"""
    epoch: int


class Step(NamedTuple):
    """What a global step shows to this rank, and where the cursor stands after it."""

    epoch: int
    indices: np.ndarray
    position: int


class Cutter(Protocol):
    """What a backend does: decode some images and cut their views (`ffcv_loader`, `opencv_loader`)."""

    name: str

    def cut(self, indices: np.ndarray, epoch: int) -> tuple[Tensor, np.ndarray]: ...

    def close(self) -> None: ...


def make_loader(
    path: str | Path,
    views: Sequence["View"],
    *,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    shuffle: bool = True,
    drop_last: bool = True,
    threads: int | None = None,
    backend: Literal["auto", "ffcv", "opencv"] = "auto",
    pin_memory: bool = False,
) -> "Loader":
    """A loader over the .beton at `path`.

    Args:
        batch_size: images of a batch of one rank.
        shuffle: a new order for each epoch, without end; otherwise one pass in the file's order.
        drop_last: leave out the end of an epoch that fills no global step; False needs `world=1` when shuffling.
        threads: decoding threads of this rank; by default its share of the processors this process may use.
        backend: "auto" takes FFCV where it can be imported.
        pin_memory: page-locked batches, which a GPU copies while it computes.

    Raises:
        ValueError: a batch larger than the data, or arguments that fit no loader.
        BetonError: `path` is no readable .beton.
        ImportError: `backend="ffcv"` without FFCV.
    """
    reader = BetonReader(path)
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of world {world}: ranks count from 0 to world - 1")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: a batch holds at least one image")
    if not len(reader):
        raise ValueError(f"{path} holds no image: nothing to load")
    if shuffle and batch_size * world > len(reader) and drop_last:
        raise ValueError(
            f"{path} holds {len(reader)} images, fewer than a global batch of {batch_size * world} "
            f"({batch_size} on each of {world} ranks): lower the batch size to {len(reader) // world}"
        )
    if shuffle and world > 1 and not drop_last:
        raise ValueError(f"shuffle with drop_last=False on {world} ranks: some would miss the last step; drop it")
    threads = threads or default_threads()
    torch_threads = torch.get_num_threads()
    try:
        cutter = _cutter_class(backend)(reader, views, threads=threads, seed=seed, pin_memory=pin_memory)
    finally:
        torch.set_num_threads(torch_threads)  # FFCV sets it to 1, when imported and when built
    sizes = [view.size for view in views]
    return Loader(reader, cutter, sizes, batch_size, seed, rank, world, shuffle, drop_last)


def default_threads() -> int:
    """This process's share of the processors it may run on, by the number of ranks of this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _cutter_class(backend: str) -> Any:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend != "opencv":
        try:
            from pipeline.data.ffcv_loader import FFCVCutter

            return FFCVCutter
        except (ImportError, OSError) as error:
            if backend == "ffcv":
                raise ImportError(f"backend 'ffcv': FFCV cannot be imported ({error}); use 'opencv'") from error
    from pipeline.data.opencv_loader import OpenCVCutter

    return OpenCVCutter


class Loader:
    """Iterable over `Batch`es with a cursor. Made by `make_loader`.

    images             images in the .beton
    batch_size         images of this rank's batch
    batches_per_epoch  global steps in an epoch
    backend            "ffcv" or "opencv"
    decode_errors      {image index: how many times it could not be decoded}; its views were black
    waiting            called every second that a batch keeps its taker waiting, with the seconds so far
    """

    def __init__(
        self,
        reader: BetonReader,
        cutter: Cutter,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        shuffle: bool,
        drop_last: bool,
    ) -> None:
        self.images, self.batch_size, self.backend = len(reader), batch_size, cutter.name
        self.decode_errors: dict[int, int] = {}
        self.waiting: Callable[[float], object] = lambda seconds: None
        self._reader, self._cutter = reader, cutter
        self._sizes, self._labels = list(sizes), reader.metadata["label"]
        self._seed, self._rank, self._world = seed, rank, world
        self._shuffle, self._drop_last = shuffle, drop_last and shuffle
        self._epoch = self._position = 0
        self._prefetch: _Prefetch | None = None
        self._closed = False

    @property
    def batches_per_epoch(self) -> int:
        whole = self._world * self.batch_size
        return self.images // whole if self._drop_last else -(-self.images // whole)

    def state(self) -> dict[str, int]:
        """Where the next batch begins: the epoch, and the position in images of its global order."""
        return {"epoch": self._epoch, "position": self._position}

    def upcoming(self) -> np.ndarray:
        """Indices [batch_size * world] of the images of the next global step, in the order of the ranks."""
        step = next(_plan(self.images, self._seed, self._epoch, self._position, self.batch_size * self._world, 0, 1,
                          self._shuffle, self._drop_last))  # fmt: skip
        return step.indices

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from `state`, also one taken with another batch or world; it begins with the next `iter(loader)`."""
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= self.images:
            raise ValueError(f"loader state {state} does not fit {self.images} images: it is from another data set")
        self._stop()
        self._epoch, self._position = epoch, position

    def __iter__(self) -> Iterator[Batch]:
        if self._closed:
            raise RuntimeError("this loader was closed: make a new one")
        self._stop()
        steps = _plan(
            self.images, self._seed, self._epoch, self._position, self.batch_size, self._rank, self._world,
            self._shuffle, self._drop_last,
        )  # fmt: skip
        prefetch = self._prefetch = _Prefetch(self._reader, self._cutter, steps, self.waiting)
        self._finalizer = weakref.finalize(self, prefetch.stop)  # a loader merely dropped leaves no thread
        for step, flat, failed in prefetch:
            self._epoch, self._position = step.epoch, step.position
            for failure in step.indices[failed].tolist():
                self.decode_errors[failure] = self.decode_errors.get(failure, 0) + 1
            index = torch.from_numpy(step.indices)
            label = torch.from_numpy(self._labels[step.indices])
            yield Batch(self._split(flat, len(index)), index, label, step.epoch)
        if self._prefetch is prefetch:  # one pass is over, not stopped by another: the next begins at the front
            self._epoch = self._position = 0

    def _split(self, flat: Tensor, rows: int) -> list[Tensor]:
        views = []
        parts = flat.split([rows * 3 * height * width for height, width in self._sizes])
        for part, (height, width) in zip(parts, self._sizes):
            views.append(part.view(rows, height, width, 3).permute(0, 3, 1, 2))
        return views

    def _stop(self) -> None:
        if self._prefetch is not None:
            self._finalizer.detach()
            self._prefetch.stop()
            self._prefetch = None

    def close(self) -> None:
        """Stop the background work and release its threads. The loader is of no use afterwards."""
        self._stop()
        self._cutter.close()
        self._closed = True

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plan(
    images: int, seed: int, epoch: int, position: int, batch: int, rank: int, world: int, shuffle: bool, drop_last: bool
) -> Iterator[Step]:
    """Every step from the cursor onwards: global steps of `batch * world` images, of which `rank` has its share."""
    while True:
        order = crops.epoch_order(images, seed, epoch) if shuffle else np.arange(images)
        while position < images and not (drop_last and position + batch * world > images):
            step = order[position : position + batch * world]
            position += len(step)
            mine = step[len(step) * rank // world : len(step) * (rank + 1) // world]
            if len(mine):
                yield Step(epoch, mine, position)
        if not shuffle:
            return
        epoch, position = epoch + 1, 0


class _Prefetch:
    """Makes batches in a thread, at most `BATCHES_AHEAD` ahead; what fails there is raised where they are taken."""

    def __init__(
        self, reader: BetonReader, cutter: Cutter, steps: Iterator[Step], waiting: Callable[[float], object]
    ) -> None:
        self._queue: Queue[Any] = Queue(BATCHES_AHEAD)
        self._waiting = waiting
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(reader, cutter, steps, self._queue, self._stopped), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Step, Tensor, np.ndarray]]:
        since = time.monotonic()
        while not self._stopped.is_set():
            try:
                item = self._queue.get(timeout=1.0)
            except Empty:
                self._waiting(time.monotonic() - since)
                if not self._thread.is_alive() and self._queue.empty() and not self._stopped.is_set():
                    raise RuntimeError("the loader's thread ended without a batch or an error") from None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            since = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()
        while self._thread.is_alive() and self._thread is not threading.current_thread():
            try:
                self._queue.get_nowait()
            except Empty:
                self._thread.join(timeout=0.05)


def _produce(
    reader: BetonReader, cutter: Cutter, steps: Iterator[Step], queue: "Queue[Any]", stopped: threading.Event
) -> None:
    """The thread's work; a function, so that the thread keeps no loader alive."""

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                pass

    try:
        for step in steps:
            reader.check_whole()
            put((step, *cutter.cut(step.indices, step.epoch)))
            if stopped.is_set():
                return
        put(None)
    except BaseException as error:
        put(error)
