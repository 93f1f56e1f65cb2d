"""Do training and validation images really differ? Exact copies across the split make every accuracy too good."""

import hashlib
from pathlib import Path

from pipeline.data.beton import BetonReader
from pipeline.data.packed import Packed, read_names


def duplicates(train: Packed, val: Packed) -> list[tuple[str, str]]:
    """Names of (training image, validation image) that are the same file, byte for byte (or pixel for pixel, where they
    are stored as such). An image that was encoded again, or cropped, is another to this test."""
    known = {content: i for i, content in enumerate(_contents(train.path))}
    pairs = [(known[content], i) for i, content in enumerate(_contents(val.path)) if content in known]
    if not pairs:
        return []
    train_names, val_names = (read_names(packed.path) for packed in (train, val))
    return [
        (train_names[a] if train_names else f"image {a}", val_names[b] if val_names else f"image {b}") for a, b in pairs
    ]


def _contents(path: Path) -> list[bytes]:
    """A digest of each image as it is stored, its size in pixels included."""
    reader = BetonReader(path)
    return [
        hashlib.blake2b(
            reader.payload(index), digest_size=16, key=f"{row['width']} {row['height']}".encode()
        ).digest()
        for index, row in enumerate(reader.metadata)
    ]  # fmt: skip
