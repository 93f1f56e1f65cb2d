"""What the tests of sources make and read."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.listing import Source
from pipeline.data.workers import Extent


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((24, 20)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(root: Path, names: list[str]) -> dict[str, bytes]:
    contents = {name: jpeg(number) for number, name in enumerate(names)}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return contents


def read(source: Source) -> dict[str, tuple[str | None, bytes]]:
    """{key: (label, bytes)} of everything wanted."""
    wanted = source.wanted()
    labels = dict(zip(wanted, source.labels(wanted)))
    found = {}
    for index, payload in source.payloads(wanted):
        if isinstance(payload, Extent):
            with open(payload.path, "rb") as file:
                file.seek(payload.start)
                payload = file.read(payload.size)
        found[source.items[index].key] = labels[index], payload
    return found


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
