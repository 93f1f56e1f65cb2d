"""The loader's decoder where FFCV is not installed: OpenCV reads the JPEG, everything else is the same code.

Threads rather than a `DataLoader`'s processes: decoding and cutting release the GIL, so processes would only
add start-up time, a copy of every batch through shared memory, and forks inside a process that may hold Ray
or CUDA.

Windows are identical to FFCV's. Pixels are equal where images are stored raw; from a JPEG they differ by a
few levels, since FFCV asks libjpeg-turbo for its fast transform and fast chroma upsampling and OpenCV for the
exact ones.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from pipeline.data import crops
from pipeline.data.beton import JPEG, BetonReader

if TYPE_CHECKING:
    from objectives.views import View


def decode(data: np.ndarray) -> np.ndarray | None:
    """JPEG bytes [n] uint8 to RGB [h, w, 3], unrotated, as FFCV decodes them; None where OpenCV cannot."""
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    except cv2.error:
        return None


class OpenCVCutter:
    """Cuts batches of views from a .beton with OpenCV; the order and the prefetching are `loader.Loader`'s."""

    name = "opencv"

    def __init__(
        self, reader: BetonReader, views: Sequence["View"], *, threads: int, seed: int, pin_memory: bool = False
    ) -> None:
        self.reader, self.seed, self.pin_memory = reader, seed, pin_memory
        self.table = crops.view_table(views)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="opencv-cut")

    def cut(self, indices: np.ndarray, epoch: int) -> tuple[torch.Tensor, np.ndarray]:
        """(views of images `indices` [B] as one flat uint8 buffer laid out by `crops.cut`, failed [B] bool)."""
        key = crops.stream(crops.CROP, self.seed, epoch)
        size = crops.batch_bytes(self.table, len(indices))
        out = torch.empty(size, dtype=torch.uint8, pin_memory=self.pin_memory)
        flat, failed = out.numpy(), np.zeros(len(indices), np.bool_)

        def work(row: int) -> None:
            record = self.reader.metadata[indices[row]]
            height, width = int(record["height"]), int(record["width"])
            data = np.frombuffer(self.reader.payload(indices[row]), np.uint8)
            image = decode(data) if record["mode"] == JPEG else data.reshape(height, width, 3)
            if image is None or image.shape[:2] != (height, width):
                failed[row] = True
                image = np.zeros((height, width, 3), np.uint8)
            crops.cut(image, key, indices[row], self.table, row, len(indices), flat)

        list(self.pool.map(work, range(len(indices))))
        return out, failed

    def close(self) -> None:
        """Release the threads."""
        self.pool.shutdown(wait=True, cancel_futures=True)
