"""FFCV as the loader's decoder: one JPEG decode per image, every view cut from it, inside FFCV's own pipeline.

What FFCV gives: the .beton reader, its memory manager, its pipeline and its libjpeg-turbo binding. What is
replaced here, because it fails in long runs: its iterator's thread (an exception in it hangs the consumer for
ever; `loader.py` has one that does not), its samplers and crops (they ignore the seed or the resume point),
its decode buffers (one for each sample of each batch in flight, as large as the largest image; here one for
each thread), and its code generation (3-17 s for each loader; here ordinary functions, compiled once for all
lists of views and kept on disk).
"""

import ctypes
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm
import numpy as np
import torch
from ffcv import _libffcv
from ffcv.loader import Loader as FFCVLoader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from numba import types

from pipeline.data import crops
from pipeline.data.beton import JPEG, BetonReader
from pipeline.data.crops import compiled, cut

if TYPE_CHECKING:
    from objectives.views import View

# By name rather than through ctypes, whose addresses keep numba from storing what it compiled.
_library = ctypes.CDLL(_libffcv.__file__)
llvm.add_symbol("ffcv_imdecode", ctypes.cast(_library.imdecode, ctypes.c_void_p).value)
_imdecode = types.ExternalFunction(
    "ffcv_imdecode",
    types.int32(
        types.voidptr, types.uint64, *[types.uint32] * 2, types.voidptr, *[types.uint32] * 6, *[types.boolean] * 2
    ),
)

# FFCV's own sets `mutable` of numba's one type of bytes in a row: what had been compiled for it is not found again.
OSCacheManager.state_type = property(
    lambda _: types.Tuple([types.Array(types.uint8, 1, "C", readonly=True), *[types.uint64[::1]] * 2])
)


@compiled
def decode(data, height, width, out):
    """JPEG bytes `data` to RGB in `out`, flat, of 3 * height * width or more; 0, or -1 when libjpeg-turbo objects."""
    return _imdecode(
        data.ctypes.data, data.size, height, width, out.ctypes.data, height, width, 0, 0, 1, 1, False, False
    )


def _cutting(sources: int) -> Any:
    """The compiled loop over samples, stored on disk under `sources`.

    numba looks stored code up by the file that defines it, and does not notice that `cut`, of another file, has
    changed; values that a closure uses count as well.
    """

    @compiled
    def cut_rows(first, last, indices, file, pointer, size, mode, height, width, scratch, key, table, out, failed):
        """Decode and cut samples first..last of a batch; one that does not decode is black and marked in `failed`."""
        if sources < 0:
            return
        for row in range(first, last):
            index = indices[row]
            data = file[pointer[index] : pointer[index] + size[index]]
            h, w = height[index], width[index]
            pixels = data
            if mode[index] == JPEG:
                pixels = scratch
                if decode(data, h, w, scratch) != 0:
                    failed[row] = True
                    scratch[: 3 * h * w] = 0
            cut(pixels[: 3 * h * w].reshape(h, w, 3), key, index, table, row, indices.size, out)

    return cut_rows


_cut_rows = _cutting(zlib.crc32(Path(crops.__file__).read_bytes()))


class _MultiCrop(Operation):
    """FFCV's decoding step: indices [B] to (all views in one flat uint8 buffer, failed [B]), split over our threads.

    Threads rather than numba's: its default layer aborts the process when two loaders run at once.
    """

    def __init__(self, reader: BetonReader, table: np.ndarray, threads: int, pin_memory: bool) -> None:
        super().__init__()
        self.table, self.threads, self.pin_memory = table, threads, pin_memory
        self.key = np.uint64(0)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="ffcv-cut")
        records = reader.metadata
        self.columns = [records[name].astype(np.int64) for name in ("data_ptr", "size", "mode", "height", "width")]
        largest = int((3 * self.columns[3] * self.columns[4]).max())
        self.scratches: SimpleQueue[np.ndarray] = SimpleQueue()
        for _ in range(threads):
            self.scratches.put(np.empty(largest, np.uint8))

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=False, dtype=torch.uint8), None

    def generate_code(self) -> Callable[..., Any]:
        return self.cut_batch

    def cut_batch(self, indices: np.ndarray, _memory: None, _metadata: np.ndarray, storage: tuple) -> tuple:
        size = crops.batch_bytes(self.table, len(indices))
        out = torch.empty(size, dtype=torch.uint8, pin_memory=self.pin_memory)
        failed = np.zeros(len(indices), np.bool_)
        file = np.asarray(storage[0])
        parts = min(len(indices), 4 * self.threads)  # several for each thread: images differ in size

        def work(part: int) -> None:
            first, last = (len(indices) * p // parts for p in (part, part + 1))
            scratch = self.scratches.get()
            try:
                _cut_rows(first, last, indices, file, *self.columns, scratch, self.key, self.table, out.numpy(), failed)
            finally:
                self.scratches.put(scratch)

        list(self.pool.map(work, range(parts)))
        return out, failed


class _Pipeline(EpochIterator):
    """FFCV's iterator without its thread: `run_pipeline` is called from ours."""

    def start(self) -> None:
        pass


class FFCVCutter:
    """Cuts batches of views from a .beton through FFCV; the order and the prefetching are `loader.Loader`'s."""

    name = "ffcv"

    def __init__(
        self, reader: BetonReader, views: Sequence["View"], *, threads: int, seed: int, pin_memory: bool = False
    ) -> None:
        self.seed = seed
        self.step = _MultiCrop(reader, crops.view_table(views), threads, pin_memory)
        Compiler.set_enabled(False)  # our step is compiled already, and FFCV would compile it anew
        try:
            spec = PipelineSpec(reader.image_field, decoder=self.step)
            others = dict.fromkeys(Reader(str(reader.path)).field_names)  # None switches a field off
            loader = FFCVLoader(
                str(reader.path), batch_size=1, num_workers=1, batches_ahead=0, pipelines={**others, "views": spec}
            )
            self.pipeline = _Pipeline(loader, [])
        finally:
            Compiler.set_enabled(True)

    def cut(self, indices: np.ndarray, epoch: int) -> tuple[torch.Tensor, np.ndarray]:
        """(views of images `indices` [B] as one flat uint8 buffer laid out by `crops.cut`, failed [B] bool)."""
        self.step.key = crops.stream(crops.CROP, self.seed, epoch)
        ((out, failed),) = self.pipeline.run_pipeline(0, indices, 0, None)
        return out, failed

    def close(self) -> None:
        """Release the threads and FFCV's hold on the file."""
        self.step.pool.shutdown(wait=True, cancel_futures=True)
        self.pipeline.close()
