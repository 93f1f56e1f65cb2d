"""What a source of images is: a deterministic listing, the labels and parts it implies, and a way to read."""

import mimetypes
import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.data.workers import Extent, Unreadable

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".ico", ".psd", ".ppm", ".pgm"),
        *(".pbm", ".pnm", ".mpo", ".qoi"),
    }
)
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SHARD = re.compile(r"([a-z]+)(?:[-_.].*)?\.(?:parquet|tar|tgz|tar\.\w+)")
_TYPES = mimetypes.MimeTypes()  # the standard library's own table, whatever this machine has in /etc/mime.types

Payload = bytes | Extent | Unreadable


class Item(NamedTuple):
    """One entry of a listing.

    key      its name within the source
    size     bytes, 0 where the listing does not tell
    version  changes when the content does: a time of modification or an ETag
    label    its class as the source spells it, or None
    skip     why it is not even read, or ""
    """

    key: str
    size: int = 0
    version: str = ""
    label: str | None = None
    skip: str = ""


class Source(ABC):
    """Images and, perhaps, their labels, at some address."""

    def __init__(self, address: str) -> None:
        self.address = address

    @abstractmethod
    def identity(self) -> Iterator[str]:
        """Strings that change when the content may have. Cheaper than `items` where those take long to list."""

    @property
    @abstractmethod
    def items(self) -> list[Item]:
        """The listing, in an order that depends on nothing but the source."""

    @abstractmethod
    def payloads(self, wanted: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        """(index, its bytes or where they are) of the items `wanted`, which ascend as what is yielded does."""

    def labels(self, wanted: Sequence[int]) -> list[str | None]:
        """The label of each of these items; all None where they have none."""
        return [self.items[index].label for index in wanted]

    def wanted(self) -> list[int]:
        """Indices of the items worth reading."""
        return [index for index, item in enumerate(self.items) if not item.skip]

    def parts(self) -> dict[str, list[int]]:
        """{"train": …, "val": …}: the wanted items of an existing division, or {} where there is none.

        Recognised: folders `train` and `val` (also valid, validation, dev; else test) below what all images share, or
        shards named so (`train-00000-of-00004.parquet`). Where both are found, what lies in neither is left out.
        """
        wanted = self.wanted()
        found: dict[str, list[int]] = {}
        for index, folders in zip(wanted, folders_below_common([self.items[i].key for i in wanted])):
            name = folders[0].lower() if folders else ""
            shard = _SHARD.fullmatch(name)
            name = shard[1] if shard else name
            for part, names in PARTS.items():
                if name in names:
                    found.setdefault(part, []).append(index)
        validation = found.get("val") or found.get("test")
        return {"train": found["train"], "val": validation} if "train" in found and validation else {}


def is_image_name(name: str) -> bool:
    """Whether a file is an image to judge by its name."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def reason_to_skip(name: str) -> str:
    """Why a file of this name (with its folders) is not even read, or "": unknown kinds are read and looked at."""
    parts = name.split("/")
    if "__MACOSX" in parts:
        return "hidden: a macOS side file"
    if any(part.startswith(".") for part in parts):
        return "hidden: the name begins with a dot"
    suffix = posixpath.splitext(name)[1].lower()
    if suffix not in IMAGE_SUFFIXES and (_TYPES.guess_type(f"x{suffix}")[0] or suffix == ".cls"):
        return f"not an image: by its name ({suffix})"
    return ""


def folders_below_common(names: Sequence[str]) -> list[list[str]]:
    """The folders of each path, without those that all images share; none for a path that does not share them."""
    folders = [name.split("/")[:-1] for name in names]
    of_images = [folder for name, folder in zip(names, folders) if is_image_name(name)] or folders
    if not of_images:
        return folders
    low, high = min(of_images), max(of_images)
    shared = 0
    while shared < min(len(low), len(high)) and low[shared] == high[shared]:
        shared += 1
    return [folder[shared:] if folder[:shared] == low[:shared] else [] for folder in folders]


def labels_from_folders(names: Sequence[str]) -> list[str | None]:
    """The class of each path: its first folder below what all images share (torchvision's ImageFolder convention).

    None for all, unless every image lies in such a folder and there are at least two of them.
    """
    folders = folders_below_common(names)
    of_images = [folder for name, folder in zip(names, folders) if is_image_name(name)] or folders
    if all(of_images) and len({folder[0] for folder in of_images}) > 1:
        return [folder[0] if folder else None for folder in folders]
    return [None] * len(names)
