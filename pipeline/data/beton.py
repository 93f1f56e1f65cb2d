"""FFCV's `.beton` files, read and written with numpy alone: packing and the fallback loader need no FFCV.

Format, version 2, all numbers little-endian:

    header       version, number of fields, page size, samples, address of the allocations (24 bytes)
    fields       type, name (16 bytes, zero-filled), arguments (1024 bytes), one descriptor each
    metadata     one record per sample, the fields' records side by side, aligned as C structs are
    pages        payloads, no payload crosses a page boundary
    allocations  (sample, address, size) of every payload, up to the end of the file

Two properties let a file be written as a stream, knowing neither the number of images nor their sizes:
room between the metadata and the first page is legal, so records are reserved for `n_max` images and the
true count goes into the header at the end; and a payload within one small page is also within one large
page, so the page size may grow.
"""

import os
import uuid
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

VERSION = 2
JPEG, RAW = 0, 1  # values of an image's `mode`
PAGE = 2 << 20  # smallest page written, and the smallest FFCV knows
LARGEST_PAYLOAD = 1 << 31  # a page size must fit 32 bits

HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")])
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))])
ALLOCATION = np.dtype([("sample", "<u8"), ("address", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
BLOB = np.dtype([("ptr", "<u8"), ("size", "<u8")])
Image = bytes | NDArray[np.uint8]  # a JPEG file, or RGB pixels [h, w, 3]
RECORD = np.dtype([*IMAGE.descr, ("size", "<u8"), ("label", "<i8")])  # what a reader returns per image

FLOAT_FIELD, INT_FIELD, IMAGE_FIELD, BYTES_FIELD, ARRAY_FIELD, JSON_FIELD, TENSOR_FIELD = range(7)
FIELD_RECORDS = {
    FLOAT_FIELD: np.dtype("<f8"),
    INT_FIELD: np.dtype("<i8"),
    IMAGE_FIELD: IMAGE,
    BYTES_FIELD: BLOB,
    ARRAY_FIELD: np.dtype("<u8"),
    JSON_FIELD: BLOB,
    TENSOR_FIELD: np.dtype("<u8"),
}


class BetonError(UserError):
    """A `.beton` file that cannot be read: foreign, cut short, or never finished."""


def _records(types: list[int]) -> np.dtype:
    return np.dtype([("", FIELD_RECORDS[t]) for t in types], align=True)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class BetonWriter:
    """Write images, one after the other, into a `.beton` with the fields `image` and `label`.

    with BetonWriter(path, n_max=1000) as writer:
        writer.write(array)                               # uint8 [h, w, 3], kept as raw pixels
        writer.write(jpeg_bytes, label=3, size=(480, 640))

    The file appears under `path` only when the block ends without an exception, complete and synced to the
    disk; otherwise nothing is left. A missing label is -1. Raises `OSError` where the disk is full.
    """

    def __init__(self, path: str | Path, n_max: int) -> None:
        self.path = Path(path)
        self.images = 0
        self._metadata = np.zeros(n_max, _records([IMAGE_FIELD, INT_FIELD]))
        self._allocations = np.zeros(n_max, ALLOCATION)
        self._page = PAGE
        self._partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:12]}.partial")
        self._descriptors = np.zeros(2, DESCRIPTOR)
        self._descriptors["type"] = (IMAGE_FIELD, INT_FIELD)
        self._descriptors["name"] = (b"image", b"label")
        preamble = HEADER.itemsize + self._descriptors.nbytes + self._metadata.nbytes
        self._end = _round_up(preamble, PAGE)
        self._file: IO[bytes] = open(self._partial, "xb", buffering=1 << 20)  # noqa: SIM115 - closed by __exit__
        self._file.seek(self._end)

    def write(self, image: Image, label: int = -1, size: tuple[int, int] | None = None) -> int:
        """Append one image; returns its index.

        `image`: the bytes of a JPEG file, with `size` = (height, width), or uint8 pixels [h, w, 3], RGB.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"pixels must be uint8 [h, w, 3], not {image.dtype} {list(image.shape)}")
            mode, size = RAW, image.shape[:2]
            payload = image.tobytes()
        else:
            if size is None:
                raise ValueError("JPEG bytes need size=(height, width)")
            mode, payload = JPEG, image
        height, width = size
        if not (0 < height < 1 << 16 and 0 < width < 1 << 16):
            raise ValueError(f"an image of {width}x{height} does not fit a .beton: 1 to 65535 pixels a side")
        if not 0 < len(payload) <= LARGEST_PAYLOAD:
            raise ValueError(f"an image of {len(payload)} bytes does not fit a .beton: 1 byte to 2 GiB")
        if self.images == len(self._metadata):
            raise ValueError(f"{self.path}: more images than the {len(self._metadata)} announced as n_max")
        address = self._allocate(len(payload))
        self._file.write(payload)
        self._metadata[self.images] = ((mode, width, height, address), label)
        self._allocations[self.images] = (self.images, address, len(payload))
        self.images += 1
        return self.images - 1

    def set_labels(self, labels: Sequence[int]) -> None:
        """Give every image written so far its label, once all classes are known."""
        self._metadata["f1"][: self.images] = labels

    def _allocate(self, size: int) -> int:
        """The address of the next payload, with the file placed there."""
        page = max(PAGE, 1 << (size - 1).bit_length())
        start = self._end
        if start // page != (start + size - 1) // page:
            start = _round_up(start, page)
            self._file.seek(start)
        self._page = max(self._page, page)
        self._end = start + size
        return start

    def _finish(self) -> None:
        allocations = self._allocations[: self.images]
        self._file.seek(self._end)
        self._file.truncate()  # makes room where no image was written
        self._file.write(allocations.tobytes())
        header = np.zeros(1, HEADER)
        header[0] = (VERSION, len(self._descriptors), self._page, self.images, self._end)
        self._file.seek(0)
        for part in (header, self._descriptors, self._metadata[: self.images]):
            self._file.write(part.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def __enter__(self) -> "BetonWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            try:
                self._file.close()  # fails a second time on a full disk: the first failure is the one to tell
            except OSError:
                if error is None:
                    raise
            finally:
                self._partial.unlink(missing_ok=True)


class BetonReader:
    """Any `.beton` with an RGB image field: ours, or one written by FFCV under any field names.

    path         the file
    metadata     one record per image: mode (JPEG or RAW), width, height, data_ptr, size (bytes), label or -1
    data         the whole file as uint8, mapped into memory: payload i is data[data_ptr : data_ptr + size]
    image_field  name of the first RGB field
    label_field  name of the integer field that holds the label ("label", else the first), or None

    Raises `BetonError` where the file is foreign, cut short, never finished, or has no image field.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            length = os.fstat(self._file).st_size
            self.data = np.memmap(self.path, np.uint8, mode="r") if length else np.zeros(0, np.uint8)
        except OSError as error:
            raise BetonError(f"{self.path}: cannot be opened ({error.strerror})") from error
        header = self._take(HEADER, 1, 0, "its header")[0]
        if header["version"] != VERSION or not 0 < header["fields"] < 256 or int(header["page"]).bit_count() != 1:
            raise BetonError(f"{self.path}: not a .beton file of version {VERSION}")
        if not 0 < header["table"] <= length:
            state = "never finished" if header["table"] == 0 else "cut short"
            raise BetonError(f"{self.path}: this .beton was {state}; delete it and pack again")
        descriptors = self._take(DESCRIPTOR, int(header["fields"]), HEADER.itemsize, "its field list")
        self._read_fields(descriptors)
        start = HEADER.itemsize + descriptors.nbytes
        dtype = _records(descriptors["type"].tolist())
        records = self._take(dtype, int(header["samples"]), start, "its metadata")
        self._table = int(header["table"])
        self.metadata = self._read_records(records)

    def _take(self, dtype: np.dtype, count: int, start: int, what: str) -> NDArray:
        end = start + count * dtype.itemsize
        if end > len(self.data):
            raise BetonError(f"{self.path}: too short for {what} ({len(self.data)} bytes): cut short, or no .beton")
        return np.frombuffer(self.data[start:end].tobytes(), dtype)

    def _read_fields(self, descriptors: NDArray) -> None:
        types = descriptors["type"].tolist()
        names = [name.decode("ascii", "replace") for name in descriptors["name"]]
        for name, kind in zip(names, types):
            if kind not in FIELD_RECORDS:
                raise BetonError(f"{self.path}: field {name!r} is of an unknown type, {kind}")
        if IMAGE_FIELD not in types:
            raise BetonError(f"{self.path}: no RGB image field among {', '.join(names)}")
        integers = [i for i, kind in enumerate(types) if kind == INT_FIELD]
        integers.sort(key=lambda i: names[i] != "label")
        self._image, self._label = types.index(IMAGE_FIELD), integers[0] if integers else None
        self.image_field = names[self._image]
        self.label_field = None if self._label is None else names[self._label]

    def _read_records(self, records: NDArray) -> NDArray:
        images = records[f"f{self._image}"]
        metadata = np.zeros(len(records), RECORD)
        for name in IMAGE.names or ():
            metadata[name] = images[name]
        metadata["label"] = -1 if self._label is None else records[f"f{self._label}"]
        rest = len(self.data) - self._table
        if rest % ALLOCATION.itemsize:
            raise BetonError(f"{self.path}: its allocation table is damaged: cut short, or never finished")
        table = self._take(ALLOCATION, rest // ALLOCATION.itemsize, self._table, "its allocation table")
        table = table[np.argsort(table["address"])]
        slots = np.searchsorted(table["address"], metadata["data_ptr"])
        found = slots < len(table)
        found[found] = table["address"][slots[found]] == metadata["data_ptr"][found]
        if not found.all():
            raise BetonError(f"{self.path}: image {int(np.argmin(found))} is nowhere: damaged, or never finished")
        metadata["size"] = table["size"][slots]
        pixels = 3 * metadata["width"].astype(np.uint64) * metadata["height"].astype(np.uint64)
        whole = (
            (metadata["data_ptr"] + metadata["size"] <= self._table)
            & ((metadata["mode"] == JPEG) | ((metadata["mode"] == RAW) & (metadata["size"] == pixels)))
            & (metadata["width"] > 0)
            & (metadata["height"] > 0)
        )
        if not whole.all():
            raise BetonError(f"{self.path}: the record of image {int(np.argmin(whole))} is damaged")
        metadata.setflags(write=False)
        return metadata

    def check_whole(self) -> None:
        """Raise `BetonError` where the file has become shorter: to read what it lost would end the process (SIGBUS)."""
        mapped: Any = self.data
        left = mapped._mmap.size()
        if left < len(self.data):
            raise BetonError(
                f"{self.path}: was cut short while it was read ({left:,} of {len(self.data):,} bytes are left); it is "
                "packed again when the run is continued"
            )

    def payload(self, index: int) -> bytes:
        """What is kept of one image, read from the file rather than through its mapping, where a loss is fatal.

        Raises:
            BetonError: the file has become shorter.
            OSError: its disk fails.
        """
        record = self.metadata[index]
        size = int(record["size"])
        found = os.pread(self._file, size, int(record["data_ptr"]))
        if len(found) < size:
            self.check_whole()
        return found

    def __len__(self) -> int:
        return len(self.metadata)

    def read(self, index: int) -> tuple[Image, int, int, int]:
        """(JPEG bytes or pixels [h, w, 3], height, width, label) of one image; pixels are read-only."""
        record = self.metadata[index]
        start, height, width = int(record["data_ptr"]), int(record["height"]), int(record["width"])
        payload = self.data[start : start + int(record["size"])]
        label = int(record["label"])
        if record["mode"] == JPEG:
            return payload.tobytes(), height, width, label
        return payload.view(np.ndarray).reshape(height, width, 3), height, width, label

    def __iter__(self) -> Iterator[tuple[Image, int, int, int]]:
        return (self.read(index) for index in range(len(self)))
