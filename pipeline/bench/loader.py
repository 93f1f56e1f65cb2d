"""From JPEG files to views: this project's loader, torchvision's way, and decoding alone."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.bench.contender import Arguments, Bench, Contender, threads, views
from pipeline.errors import UserError


def ours(backend: str) -> Callable[[Path, Arguments], Iterator[int]]:
    """This project's loader."""

    def batches(path: Path, arguments: Arguments) -> Iterator[int]:
        from pipeline.data.loader import make_loader

        with make_loader(
            path,
            views(),
            batch_size=arguments.batch_size,
            threads=threads(arguments),
            backend=backend,  # type: ignore[arg-type]
        ) as loader:
            for batch in loader:
                yield len(batch.index)

    return batches


class _Photographs:
    """The data set of torchvision's contender: PIL decodes, every view is cropped, resized and flipped on its own."""

    def __init__(self, path: Path) -> None:
        from torchvision.transforms import Compose, InterpolationMode, PILToTensor, RandomHorizontalFlip
        from torchvision.transforms import RandomResizedCrop as Crop

        from pipeline.data.beton import BetonReader

        self.reader = BetonReader(path)
        bicubic = InterpolationMode.BICUBIC
        self.transforms = [
            Compose([Crop(view.size, view.scale, interpolation=bicubic), RandomHorizontalFlip(), PILToTensor()])
            for view in views()
        ]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> list[Any]:
        from PIL import Image

        image = self.reader.read(index)[0]
        picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
        picture = picture.convert("RGB")
        return [transform(picture) for transform in self.transforms]


def torchvision_loader(path: Path, arguments: Arguments) -> Iterator[int]:
    """The plain way: a `DataLoader` of processes, torchvision's transforms on Pillow images."""
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Photographs(path),  # type: ignore[arg-type]
        arguments.batch_size,
        shuffle=True,
        num_workers=threads(arguments),
        drop_last=True,
        persistent_workers=True,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    while True:
        for batch in loader:
            yield len(batch[0])


def decoding(path: Path, arguments: Arguments) -> Iterator[int]:
    """libjpeg-turbo alone: what no loader that decodes each image can exceed."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from pipeline.data.beton import JPEG, BetonReader

    records, data = (reader := BetonReader(path)).metadata, np.asarray(reader.data)
    jpegs = [record for record in records if record["mode"] == JPEG]
    if not jpegs:
        raise UserError(f"{path} holds no JPEG: there is nothing to decode")
    rooms, largest = threading.local(), max(3 * int(r["height"]) * int(r["width"]) for r in jpegs)
    decode = _decoder()

    def work(record: Any) -> None:
        if not hasattr(rooms, "room"):
            rooms.room = np.empty(largest, np.uint8)
        start = int(record["data_ptr"])
        decode(data[start : start + int(record["size"])], int(record["height"]), int(record["width"]), rooms.room)

    with ThreadPoolExecutor(threads(arguments)) as pool:
        while True:
            for first in range(0, len(jpegs), arguments.batch_size):
                batch = jpegs[first : first + arguments.batch_size]
                list(pool.map(work, batch))
                yield len(batch)


def _decoder() -> Callable[..., Any]:
    try:
        from pipeline.data.ffcv_loader import decode

        return decode
    except (ImportError, OSError):
        from pipeline.data.opencv_loader import decode as with_opencv

        return lambda data, height, width, room: with_opencv(data)


BENCH = Bench(
    "JPEG files to 2 views of 224 and 8 of 96 pixels",
    {
        "torchvision": Contender("torchvision on Pillow in a `DataLoader`", torchvision_loader),
        "opencv": Contender("this loader with OpenCV", ours("opencv")),
        "ffcv": Contender("this loader with FFCV", ours("ffcv")),
        "decode": Contender("JPEG decoding alone (the floor)", decoding),
    },
)
