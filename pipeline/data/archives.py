"""Sources that are files with many images inside: tar archives, parquet files, and tables of paths."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import IO, Any

import fsspec

from pipeline.data.decode import HEAD, Rejected, check_is_image
from pipeline.data.listing import Item, Payload, Source, is_image_name, labels_from_folders, reason_to_skip
from pipeline.data.remote import fetch, is_local, said, version
from pipeline.data.workers import LARGEST_FILE, Extent, Unreadable
from pipeline.errors import UserError
from pipeline.redaction import bare

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TABLE_SUFFIXES = (".csv", ".tsv")
PATH_COLUMNS = ("path", "image_path", "filepath", "file_path", "file_name", "filename", "file", "image", "img", "url")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "picture", "image_bytes", "bytes", *PATH_COLUMNS)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "cls", "fine_label", "y")
_COMPANIONS = ("cls", "json", "txt")
_COMPANION_SIZE = 1 << 20  # bytes; larger companions of a sample hold no label
_LABEL_LENGTH = 1000  # characters; longer texts are none
_HEADER_SIZE = 1 << 20  # bytes of one extended header of a tar, such as a long name
_ROWS = 1024  # of labels, read at a time
_TABLE_SIZE = 4 << 30  # bytes of a .csv or .tsv: a hundred million lines
_XZ_MEMORY = 1 << 28  # bytes that unpacking an .xz may take; `xz -9` needs a quarter of it
_HUGE, _RATIO = 64 << 30, 200  # archives that grow to more bytes than the one and by more than the other are bombs


class _Files(Source):
    """One or more files of one kind. Keys begin with the name of the file they are in where there are several."""

    def __init__(self, address: str, files: fsspec.AbstractFileSystem, paths: Sequence[str]) -> None:
        super().__init__(address)
        self.files, self.paths = files, sorted(paths)
        plain = [bare(path) for path in self.paths]
        folder = posixpath.commonpath([posixpath.dirname(path) for path in plain])
        self.names = [posixpath.relpath(path, folder) if folder else path for path in plain]

    def identity(self) -> Iterator[str]:
        for path, name in zip(self.paths, self.names):
            info = self.files.info(path)
            yield f"{name} {info.get('size')} {version(info)}"


# -------------------------------------------------------------------------------------------------------------- tar


class TarSource(_Files):
    """Tar archives, read in place. From a plain local one, decoders read images by themselves, at their offsets."""

    @cached_property
    def items(self) -> list[Item]:
        found: list[Item] = []
        self._places: list[tuple[int, int, Extent | None]] = []  # of each item: archive, member, bytes in a local file
        companions: dict[str, dict[str, str]] = {}
        for number, path in enumerate(self.paths):
            prefix = self.names[number] + "/" if len(self.paths) > 1 else ""
            plain = is_local(self.files) and path.lower().endswith(".tar")
            for ordinal, (archive, member) in enumerate(self._members(path)):
                key = prefix + _inside(member.name)
                stem, suffix = _sample(key)
                if member.isdir():
                    continue
                if member.isreg() and suffix in _COMPANIONS and member.size <= _COMPANION_SIZE:
                    content = archive.extractfile(member)
                    text = content.read().decode("utf-8", "replace").strip() if content else ""
                    label = (_label_in_json(text) or "") if suffix == "json" else text
                    if len(label) <= _LABEL_LENGTH:
                        companions.setdefault(stem, {})[suffix] = label
                skip = reason_to_skip(key) if member.isreg() else "not an image: not a regular file of its archive"
                found.append(Item(key, member.size, skip=skip))
                extent = Extent(path, member.offset_data, member.size) if plain and not member.issparse() else None
                self._places.append((number, ordinal, extent))
        return self._as_samples(found, companions)

    def _as_samples(self, found: list[Item], companions: dict[str, dict[str, str]]) -> list[Item]:
        """Items with the labels of their companions, and without the companions."""
        labels = _labels_of_samples(companions)
        samples = {_sample(item.key)[0] for item in found if is_image_name(item.key)}
        kept = [n for n, item in enumerate(found) if not _is_companion(item.key, samples)]
        self._places = [self._places[n] for n in kept]
        return [found[n]._replace(label=labels.get(_sample(found[n].key)[0])) for n in kept]

    def labels(self, wanted: Sequence[int]) -> list[str | None]:
        given = super().labels(wanted)
        if any(label is not None for label in given):
            return given
        shards = [len(self.names[self._places[i][0]]) + 1 if len(self.paths) > 1 else 0 for i in wanted]
        return labels_from_folders([self.items[i].key[shard:] for i, shard in zip(wanted, shards)])

    def payloads(self, wanted: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        for number, group in groupby(wanted, key=lambda index: self._places[index][0]):
            indices = list(group)
            if all(self._places[index][2] for index in indices):
                yield from ((index, self._places[index][2] or b"") for index in indices)
            else:
                yield from self._stream(self.paths[number], indices)

    def _stream(self, path: str, indices: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        remaining = iter(indices)
        index = next(remaining, None)
        for ordinal, (archive, member) in enumerate(self._members(path)):
            if index is None:
                return
            if ordinal == self._places[index][1]:
                content = archive.extractfile(member) if member.size <= LARGEST_FILE else None
                yield index, _whole_image(content) if content else Unreadable(f"too large: {member.size / 1e9:.1f} GB")
                index = next(remaining, None)

    def _members(self, path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        count = 0
        try:
            with open(path, "rb") if is_local(self.files) else self.files.open(path, "rb") as file:
                plain = is_local(self.files) and path.lower().endswith(".tar")
                content = file if plain else _unpacked(file)
                size = self.files.info(path).get("size")
                with tarfile.open(fileobj=content, mode="r:" if plain else "r|", tarinfo=_Member) as archive:
                    for member in archive:
                        end = member.offset_data + member.size
                        if not plain and size and end > max(_HUGE, _RATIO * size):
                            raise tarfile.ReadError(f"it grows to {end / 1e9:.0f} GB, as no archive of images does")
                        yield archive, member
                        count += 1
                        archive.members.clear()  # type: ignore[attr-defined] # else it remembers every member
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            place = self.files.unstrip_protocol(path) if not is_local(self.files) else path
            raise UserError(f"{place}: a damaged archive, after {count} files ({said(error)})") from error


def _unpacked(file: Any) -> Any:
    """What a file holds that may be compressed, unpacked as it is read.

    Not left to tarfile, which skips a member in steps that each copy all that is unpacked already.
    """
    packed = io.BufferedReader(file)
    head = packed.peek(64)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=packed)
    if head.startswith(b"BZh"):
        return bz2.BZ2File(packed)
    if head.startswith(b"\xfd7zXZ"):
        lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(head, max_length=0)
        return lzma.LZMAFile(packed)
    return packed


class _Member(tarfile.TarInfo):
    """A member whose own headers, all of which tarfile reads into memory, have an end that is near."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        headers = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.type in (*headers, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK) and self.size > _HEADER_SIZE:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse(archive)
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_gnusparse_10(self, member: tarfile.TarInfo, headers: Mapping[str, str], archive: tarfile.TarFile) -> None:
        self._refuse_sparse(archive)
        super()._proc_gnusparse_10(member, headers, archive)  # type: ignore[misc]

    def _refuse_sparse(self, archive: tarfile.TarFile) -> None:
        """The list of a sparse file's parts ends where it says so: unpacked on the fly, that may be never."""
        if isinstance(archive.fileobj, tarfile._Stream):  # type: ignore[attr-defined]
            raise tarfile.ReadError("sparse files, which are read from plain .tar files only")


def _whole_image(content: IO[bytes]) -> Payload:
    """The bytes of an open member, only its beginning where that is no image."""
    head = content.read(HEAD)
    return head + content.read() if _begins_as_image(head) else head


def _image_or_head(content: bytes) -> Payload:
    """The bytes of a file, only its beginning where that is no image: what refuses it needs no more."""
    return content if _begins_as_image(content[:HEAD]) else content[:HEAD]


def _begins_as_image(head: bytes) -> bool:
    try:
        check_is_image(head)
    except Rejected:
        return False
    return True


def _inside(name: str) -> str:
    """A member's name as a path that stays inside the archive."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _sample(name: str) -> tuple[str, str]:
    """WebDataset's (key, extension): the extension begins at the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}", extension.lower()


def _is_companion(name: str, samples: set[str]) -> bool:
    stem, extension = _sample(name)
    return extension in _COMPANIONS and stem in samples


def _labels_of_samples(companions: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The label of each sample: its .cls, else the label in its .json, else its .txt unless those are captions."""
    labels = {}
    for stem, texts in companions.items():
        label = texts.get("cls") or texts.get("json")
        if label:
            labels[stem] = label
    if labels:
        return labels
    texts = {stem: texts["txt"] for stem, texts in companions.items() if texts.get("txt")}
    repeat = 2 * len(Counter(texts.values())) <= len(texts)
    return texts if repeat else {}


def _label_in_json(text: str) -> str | None:
    try:
        facts = json.loads(text)
    except ValueError:
        return None
    if isinstance(facts, dict):
        return next((label for name in LABEL_COLUMNS if (label := _as_label(facts.get(name)))), None)
    return _as_label(facts)


def _as_label(value: Any, names: Sequence[str] = ()) -> str | None:
    """A label as text; None for what is none: missing, empty, -1, or a structure. `names`: of integer labels."""
    if isinstance(value, float):
        if value != value:  # not a number
            return None
        value = int(value) if value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value).strip() or None if isinstance(value, (str, float, bool)) else None
    if value == -1:
        return None
    return names[value] if 0 <= value < len(names) else str(value)


# ---------------------------------------------------------------------------------------------------------- parquet


class ParquetSource(_Files):
    """Parquet files with one row per image. Keys are `file.parquet/row`."""

    @cached_property
    def items(self) -> list[Item]:
        found: list[Item] = []
        for path, name in zip(self.paths, self.names):
            with self._opened(path) as file:
                schema = file.schema_arrow
                self._image_column(schema)
                column = next((c for c in LABEL_COLUMNS if c in schema.names), None)
                names, rows = _huggingface_names(schema.metadata, column), file.metadata.num_rows
            if column is None:
                found += [Item(f"{name}/{row}") for row in range(rows)]
                continue
            with self._opened(path, column) as file:
                labels = self._labels(path, file, column)
                found += [Item(f"{name}/{row}", label=_as_label(value, names)) for row, value in enumerate(labels)]
        return found

    def _labels(self, path: str, file: Any, column: str) -> Iterator[Any]:
        """The values of a column, each text held once however often it stands in it."""
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            values = batch.column(0)
            if hasattr(values, "dictionary"):
                if values.dictionary.nbytes > _LABEL_LENGTH * (len(values.dictionary) + 1):
                    raise UserError(
                        f"{path}: the labels in its column {column} are texts of over {_LABEL_LENGTH} bytes"
                    )
                known = values.dictionary.to_pylist()
                yield from (None if index is None else known[index] for index in values.indices.to_pylist())
            else:
                yield from values.to_pylist()

    def payloads(self, wanted: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        first = 0  # index of the file's first row
        remaining = list(reversed(wanted))
        for path in self.paths:
            with self._opened(path) as file:
                column = self._image_column(file.schema_arrow)
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if remaining and remaining[-1] < first + rows:
                        yield from self._rows(path, file, column, group, first, remaining)
                    first += rows

    def _rows(
        self, path: str, file: Any, column: str, group: int, first: int, remaining: list[int]
    ) -> Iterator[tuple[int, Payload]]:
        for batch in file.iter_batches(batch_size=1, row_groups=[group], columns=[column]):
            if remaining and remaining[-1] == first:
                if batch.nbytes > LARGEST_FILE:
                    yield remaining.pop(), Unreadable(f"too large: {batch.nbytes / 1e9:.1f} GB")
                else:
                    yield remaining.pop(), self._payload(path, batch.column(0)[0].as_py())
            first += 1

    def _payload(self, path: str, value: Any) -> Payload:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return _image_or_head(value)
        if not value:
            return Unreadable("empty: no image in this row")
        place = posixpath.join(posixpath.dirname(bare(path)), value)
        if is_local(self.files):
            return Extent(place)
        return next(fetch(self.files, [(0, place)]))[1]

    @contextmanager
    def _opened(self, path: str, column: str | None = None) -> Iterator[Any]:
        """A file; a column of texts that is named is read as numbers of texts."""
        import pyarrow
        from pyarrow import parquet

        try:
            texts = [column] if column else None
            with self.files.open(path, "rb") as raw, parquet.ParquetFile(raw, read_dictionary=texts) as file:
                yield file
        except (pyarrow.ArrowException, MemoryError) as error:
            raise UserError(f"{path}: a parquet file that cannot be read ({said(error)})") from error

    def _image_column(self, schema: Any) -> str:
        """The column of images: one of the usual names, else the first that holds bytes."""
        kinds = {field.name: _holds(field.type) for field in schema}
        named = [name for usual in IMAGE_COLUMNS for name in schema.names if name.lower() == usual and kinds[name]]
        found = [*named, *(name for name, kind in kinds.items() if kind == "bytes")]
        if not found:
            raise UserError(f"{self.address}: no column of images among {', '.join(schema.names)}; name it 'image'")
        return found[0]


def _holds(kind: Any) -> str:
    """Whether a column of this Arrow type may hold images: "bytes", "path", or "" for neither."""
    from pyarrow import types

    if types.is_struct(kind):
        return "bytes" if "bytes" in {kind.field(n).name for n in range(kind.num_fields)} else ""
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    return "path" if types.is_string(kind) or types.is_large_string(kind) else ""


def _huggingface_names(metadata: Mapping[bytes, bytes] | None, column: str | None) -> list[str]:
    """The names of a ClassLabel column, which `datasets` writes into the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return list(features[column].get("names") or ())
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


# ----------------------------------------------------------------------------------------------------------- tables


class TableSource(Source):
    """A table with a column of paths (relative to the table, absolute, or addresses) and perhaps one of labels.

    With a header, columns are found by their usual names; without, the first is the path and the second the label.
    """

    def __init__(self, address: str, files: fsspec.AbstractFileSystem, path: str) -> None:
        super().__init__(address)
        self.files, self.path = files, path

    def identity(self) -> Iterator[str]:
        return (f"{item.key} {item.size} {item.version} {item.label}" for item in self.items)

    @cached_property
    def items(self) -> list[Item]:
        if (size := int(self.files.info(self.path).get("size") or 0)) > _TABLE_SIZE:
            raise UserError(f"{self.address}: {size / 1e9:.0f} GB are no table of paths")
        text = self.files.cat_file(self.path).decode("utf-8-sig", "surrogateescape")
        first, _, _ = text.partition("\n")
        delimiter = max(",;\t|", key=first.count)
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
        except csv.Error as error:
            raise UserError(f"{self.address}: is no table ({error})") from None
        path, label, header = self._columns(rows[0] if rows else [])
        return [self._item(row, path, label) for row in rows[header:]]

    def _columns(self, first: Sequence[str]) -> tuple[int, int | None, int]:
        """(column of the path, column of the label, rows of header)."""
        names = [cell.strip().lower() for cell in first]
        path = next((names.index(usual) for usual in PATH_COLUMNS if usual in names), None)
        if path is not None:
            label = next((names.index(usual) for usual in LABEL_COLUMNS if usual in names), None)
            return path, label, 1
        if names and is_image_name(names[0]):
            return 0, 1 if len(names) > 1 else None, 0
        raise UserError(f"{self.address}: no column of paths among {', '.join(names) or 'none'}; name it 'path'")

    def _item(self, row: Sequence[str], path: int, label: int | None) -> Item:
        key = row[path].strip() if path < len(row) else ""
        if not key:
            return Item("", skip="unreadable: a row without a path")
        size, changed = 0, ""
        if self._is_here(key):
            try:
                facts = os.stat(self._place(key))
                size, changed = facts.st_size, str(facts.st_mtime_ns)
            except OSError:
                pass  # reported when it is read
        given = row[label].strip() if label is not None and label < len(row) else ""
        return Item(key, size, changed, None if given in ("", "-1") else given)

    def payloads(self, wanted: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        for here, group in groupby(wanted, key=lambda index: self._is_here(self.items[index].key)):
            places = ((index, self._place(self.items[index].key)) for index in group)
            if here:
                yield from ((index, Extent(place)) for index, place in places)
            else:
                yield from self._fetch(places)

    def _fetch(self, places: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Payload]]:
        for scheme, group in groupby(places, key=lambda place: place[1].partition("://")[0]):
            indexed = list(group)
            try:
                files = self.files if "://" not in indexed[0][1] else fsspec.filesystem(scheme)
            except (ImportError, ValueError) as error:
                yield from ((index, Unreadable(f"unreadable: {said(error)}")) for index, _ in indexed)
                continue
            if is_local(files) and not is_local(self.files):
                yield from ((index, Unreadable("refused: a remote table names a file here")) for index, _ in indexed)
            else:
                yield from fetch(files, indexed)

    def _is_here(self, key: str) -> bool:
        return is_local(self.files) and "://" not in key

    def _place(self, key: str) -> str:
        return key if "://" in key else posixpath.join(posixpath.dirname(bare(self.path)), key)
