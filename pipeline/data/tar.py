"""Tar archives, read in place, with the labels of WebDataset."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import IO, Any

from pipeline.data.columns import LABEL_COLUMNS, LABEL_LENGTH, as_label
from pipeline.data.containers import Files
from pipeline.data.listing import Item, Payload, is_image_name, labels_from_folders, reason_to_skip
from pipeline.data.magic import HEAD, begins_as_image
from pipeline.data.remote import is_local, said
from pipeline.data.workers import LARGEST_FILE, Extent, Unreadable
from pipeline.errors import UserError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_COMPANIONS = ("cls", "json", "txt")
_COMPANION_SIZE = 1 << 20  # bytes; larger companions of a sample hold no label
_HEADER_SIZE = 1 << 20  # bytes of one extended header of a tar, such as a long name
_XZ_MEMORY = 1 << 28  # bytes that unpacking an .xz may take; `xz -9` needs a quarter of it
_HUGE, _RATIO = 64 << 30, 200  # archives that grow to more bytes than the one and by more than the other are bombs


class TarSource(Files):
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
                    if len(label) <= LABEL_LENGTH:
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
    return head + content.read() if begins_as_image(head) else head


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
        return next((label for name in LABEL_COLUMNS if (label := as_label(facts.get(name)))), None)
    return as_label(facts)
