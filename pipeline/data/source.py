"""Where images come from: the source at an address, of any kind.

    a folder, any depth     labels from its subfolders: the first level below what all images share, if every image
                            lies in one and there are at least two
    .tar, .tar.gz …         one archive or a folder of shards; labels from WebDataset's `key.cls`, `key.json`, or a
                            `key.txt` that repeats; else from folders as above
    .parquet                one file or a folder of them; images as bytes, as Hugging Face's struct of bytes and path,
                            or as paths
    .csv, .tsv              paths, relative to the table, and labels

Each may be local or anything that fsspec reads (s3://, gs://, https://, memory:// …). Nothing is extracted to disk, so
no name in an archive reaches anything. A table or parquet file of this machine may name any file that its user may
read: what is no image is left out, and only its name and the reason are written down. A remote one names no file here.
"""

import os
import posixpath
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property

import fsspec

from pipeline.data.listing import Item, Payload, Source, is_image_name, labels_from_folders, reason_to_skip
from pipeline.data.parquet import ParquetSource
from pipeline.data.remote import fetch, is_local, locate, version
from pipeline.data.table import TABLE_SUFFIXES, TableSource
from pipeline.data.tar import TAR_SUFFIXES, TarSource
from pipeline.data.workers import Extent
from pipeline.errors import UserError
from pipeline.redaction import bare


def open_source(address: str) -> Source:
    """The source at an address. Raises `UserError` where there is none, or it holds no image."""
    files, path, info = locate(address)
    name = bare(path).lower()
    if info["type"] == "directory":
        return _open_folder(address, files, path)
    if name.endswith(TAR_SUFFIXES):
        return TarSource(address, files, [path])
    if name.endswith(".parquet"):
        return ParquetSource(address, files, [path])
    if name.endswith(TABLE_SUFFIXES):
        return TableSource(address, files, path)
    if is_image_name(name):
        raise UserError(f"{address}: a single image; give the folder it is in")
    unzip = " (unzip it first)" if name.endswith(".zip") else ""
    raise UserError(f"{address}: no source of images; give a folder, a .tar, .parquet, .csv or .beton{unzip}")


def _open_folder(address: str, files: fsspec.AbstractFileSystem, path: str) -> Source:
    folder: Source = LocalFolder(address, path) if is_local(files) else RemoteFolder(address, files, path)
    names = [item.key for item in folder.items if not item.skip.startswith("hidden")]
    if any(map(is_image_name, names)):
        return folder
    parquet = [posixpath.join(path, name) for name in names if name.lower().endswith(".parquet")]
    if parquet:
        return ParquetSource(address, files, parquet)
    archives = [posixpath.join(path, name) for name in names if name.lower().endswith(TAR_SUFFIXES)]
    if archives:
        return TarSource(address, files, archives)
    if not folder.wanted():
        others = f"; {len(names)} files of other kinds" if names else ""
        raise UserError(f"{address}: no image found below it (looked for .jpg .jpeg .png .webp .gif .tif …{others})")
    return folder


class _Folder(Source):
    """Files below a folder, in the order of their names."""

    def identity(self) -> Iterator[str]:
        return (f"{item.key} {item.size} {item.version}" for item in self.items if not item.skip)

    def labels(self, wanted: Sequence[int]) -> list[str | None]:
        return labels_from_folders([self.items[index].key for index in wanted])


class LocalFolder(_Folder):
    """A folder of this machine. Links are followed, each real folder once; only regular files are opened."""

    def __init__(self, address: str, root: str) -> None:
        super().__init__(address)
        self.root = root

    def payloads(self, wanted: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        for index in wanted:
            yield index, Extent(os.path.join(self.root, self.items[index].key))

    @cached_property
    def items(self) -> list[Item]:
        found: list[Item] = []
        seen: set[str] = set()
        folders = deque([(self.root, "")])
        links: deque[tuple[str, str]] = deque()  # after real folders, so that a link never takes a folder's place
        while folders or links:
            path, prefix = folders.popleft() if folders else links.popleft()
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            try:
                with os.scandir(path) as scan:
                    entries = sorted(scan, key=lambda entry: entry.name)
            except OSError as error:
                if not prefix:
                    raise UserError(f"{self.address}: {error.strerror}") from error
                found.append(Item(prefix, skip=f"unreadable: a folder, {error.strerror}"))
                continue
            for entry in entries:
                item = _item(entry, prefix)
                if not item.key.endswith("/") or item.skip:
                    found.append(item)
                else:
                    (links if entry.is_symlink() else folders).append((entry.path, item.key))
        return sorted(found)


def _item(entry: os.DirEntry[str], prefix: str) -> Item:
    """What is listed of a file, or of a folder: its key then ends in a slash."""
    key = prefix + entry.name
    try:
        facts = entry.stat()
    except OSError as error:
        return Item(key, skip=f"unreadable: {error.strerror}")
    skip = reason_to_skip(entry.name)
    if stat.S_ISDIR(facts.st_mode):
        return Item(key + "/", skip=skip if skip.startswith("hidden") else "")
    if not stat.S_ISREG(facts.st_mode):
        return Item(key, skip="not an image: not a regular file")
    return Item(key, facts.st_size, str(facts.st_mtime_ns), skip=skip)


class RemoteFolder(_Folder):
    """A folder of a remote place."""

    def __init__(self, address: str, files: fsspec.AbstractFileSystem, root: str) -> None:
        super().__init__(address)
        self.files, self.root = files, root.rstrip("/")

    def payloads(self, wanted: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        return fetch(self.files, ((index, f"{self.root}/{self.items[index].key}") for index in wanted))

    @cached_property
    def items(self) -> list[Item]:
        found = []
        for path, info in self.files.find(self.root, detail=True).items():
            key = path[len(self.root) :].lstrip("/")
            if key and not key.endswith("/"):
                found.append(Item(key, int(info.get("size") or 0), version(info), skip=reason_to_skip(key)))
        return sorted(found)
