"""Pack a source of images once into a .beton below a cache, split into train and val, and reuse it from then on.

cache/photos-3f2a91c07be4/train.beton   with what `pipeline.data.packed` keeps beside it
                          val.beton     where there is a validation part
                          done.json     written last: without it, the folder is packed again
cache/photos-3f2a91c07be4.lock          held while packing, released by the kernel when the process ends
cache/photos-3f2a91c07be4.rejected.csv  where too much was broken: path, reason
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import heapq
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.data.beton import BetonError, BetonReader, BetonWriter
from pipeline.data.decode import DecodedImage
from pipeline.data.listing import Source
from pipeline.data.packed import Packed, read_packed, write_atomically, write_facts
from pipeline.data.remote import given, is_local, locate, version
from pipeline.data.source import open_source
from pipeline.data.workers import Decoders, Task, cores
from pipeline.errors import UserError
from pipeline.redaction import bare, hide, redact

VERSION = 2  # of what packing does; a new one packs anew
CHUNK = 32  # files that a decoding process is given at a time
CHUNK_BYTES = 16 << 20  # or fewer, where the files are large
HELD_OUT = 10  # without a validation part, one image in so many is held out
MAX_REJECTED = 0.5

Progress = Callable[[int, int], None]
Choice = Literal["split", "train", "val", "all"]  # of a source: divided, one part of an existing division, all of it
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class Split(NamedTuple):
    """A training and a validation set, and a sentence on where the latter comes from."""

    train: Packed
    val: Packed | None
    note: str


def open_split(
    data: str,
    val_data: str | None,
    cache: str | Path,
    *,
    limit: int | None = None,
    resize: int | None = None,
    workers: int | None = None,
    max_rejected: float = MAX_REJECTED,
    hold_out: bool = False,
    on_progress: Progress | None = None,
) -> Split:
    """The packed training and validation images of `data`.

    Validation images are those of `val_data`; else those of an existing val part (folders or shards named train and
    val); else, where there are labels, one image in ten, chosen by a hash of its content, so that copies of an image
    never lie on both sides. Without labels nothing is held out unless `hold_out` is set.

    Args:
        data, val_data: anything `open_source` takes, or a .beton.
        cache: the folder that packed sets are kept in.
        limit: at most so many training images, always the same ones.
        resize: bring the shorter side down to so many pixels; None keeps the original JPEG bytes.
        workers: decoding processes; by default one to a core.
        max_rejected: the share of files that may be broken before packing stops.
        on_progress: called with (files done, files in all).

    Raises:
        UserError: nothing is there, nothing in it is an image, too much of it is broken, or the disk is full.
    """
    options = _Options(limit, resize, workers or cores(), max_rejected, on_progress, hold_out)
    folder = Path(cache).expanduser()
    shown = None if val_data is None else hide(val_data)
    data, val_data = given(data), None if val_data is None else given(val_data)
    if val_data is None:
        return _packed(data, folder, options, "split")
    train = _packed(data, folder, options, "train").train
    val = _packed(val_data, folder, options._replace(limit=None), "val").train
    return Split(train, val, f"from {shown}" + (", the training images themselves" if val_data == data else ""))


def pack(
    address: str,
    cache: str | Path,
    *,
    limit: int | None = None,
    resize: int | None = None,
    workers: int | None = None,
    max_rejected: float = MAX_REJECTED,
    on_progress: Progress | None = None,
) -> Packed:
    """All images of one source as one packed set; arguments as of `open_split`."""
    options = _Options(limit, resize, workers or cores(), max_rejected, on_progress)
    return _packed(given(address), Path(cache).expanduser(), options, "all").train


class _Options(NamedTuple):
    limit: int | None
    resize: int | None
    workers: int
    max_rejected: float
    on_progress: Progress | None
    hold_out: bool = False


def _packed(address: str, cache: Path, options: _Options, choice: Choice) -> Split:
    """The packed parts of one source: from the cache, or packed now. Without a division there is only `train`."""
    source: Source | Packed
    if bare(address).endswith(".beton"):
        if options.resize:
            raise UserError(f"{address}: is packed already; --resize needs the images it was made of")
        source = _beton_here(address, cache)
        if choice != "split" and options.limit is None:
            return Split(source, None, "")
        identity = [source.fingerprint]
    else:
        source = open_source(address)
        identity = list(source.identity())
    key = hashlib.blake2b(digest_size=6)
    held = ["held out"] if options.hold_out else []
    for word in (VERSION, options.limit, options.resize, choice, *identity, *held):
        key.update(f"{word}\n".encode(errors="surrogateescape"))
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(bare(address).rstrip("/")).stem)[:40]
    folder = cache / f"{name}-{key.hexdigest()}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            return _read(folder) or _fill_anew(folder, address, source, options, choice)
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"{cache}: the disk is full; free some space, or give --cache another place") from error
        if error.errno in _UNWRITABLE and str(cache) in str(error):
            raise UserError(f"{cache}: cannot be written ({error.strerror}); give --cache another place") from error
        raise


def _read(folder: Path) -> Split | None:
    """What was packed into a folder, or None where packing did not end or its result was damaged since."""
    try:
        note = json.loads((folder / "done.json").read_text())["note"]
        val = folder / "val.beton"
        return Split(read_packed(folder / "train.beton"), read_packed(val) if val.exists() else None, note)
    except (BetonError, FileNotFoundError, ValueError, KeyError):
        return None


def _fill_anew(folder: Path, address: str, source: Source | Packed, options: _Options, choice: Choice) -> Split:
    """Pack into an empty folder, which is gone again unless that succeeds."""
    shutil.rmtree(folder, ignore_errors=True)
    _sweep(folder.parent)
    folder.mkdir()
    try:
        note = _fill(folder, address, source, options, choice)
        write_atomically(folder / "done.json", json.dumps({"source": hide(address), "note": note}) + "\n")
        done = _read(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if done is None:
        raise UserError(f"{folder}: what was packed cannot be read back; give --cache another place")
    return done


def _sweep(cache: Path) -> None:
    """Remove what interrupted runs left: folders that are not done and that no living process holds the lock of."""
    for path in cache.glob("*.lock"):
        folder = path.with_suffix("")
        if folder.is_dir() and not (folder / "done.json").is_file():
            with open(path) as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; a second process waits here, and a dead one's lock is gone with it."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger(__name__).warning("another process packs the same images; waiting for it …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fill(folder: Path, address: str, source: Source | Packed, options: _Options, choice: Choice) -> str:
    """Write the parts of a source into a folder; returns the note on its validation part."""
    rejected: list[tuple[str, str]] = []
    divided = False
    if isinstance(source, Packed):
        entries, labels, part_of = _entries_of_beton(source, options.limit)
    else:
        parts = source.parts() if choice != "all" else {}
        divided = choice == "split" and bool(parts)
        chosen = parts.get("val" if choice == "val" else "train", source.wanted())
        train = _limited(source, chosen, options, spare=choice == "split" and not divided)
        val = parts["val"] if divided else []
        part_of = dict.fromkeys(train, "train") | dict.fromkeys(val, "val")
        labels = dict(zip(train, source.labels(train))) | dict(zip(val, source.labels(val)))
        rejected += [(item.key, item.skip) for item in source.items if item.skip and not item.skip.startswith("hidden")]
        entries = _entries_of_source(source, sorted(part_of), options)
    total = len(part_of)
    if not total:
        raise UserError(f"{address}: no image found in it")
    labelled = any(label is not None for label in labels.values())
    held_out = choice == "split" and not divided and (labelled or options.hold_out)

    writers: dict[str, _Part] = {}
    broken: Counter[str] = Counter()
    first = b""  # the first image stays in train, with its copies, so that train is never empty
    with contextlib.ExitStack() as stack:
        for done, entry in enumerate(entries, 1):
            if entry.image is None:
                rejected.append((entry.name, entry.reason))
                broken[entry.reason.split(":")[0]] += not entry.reason.startswith("not an image")
                if broken.total() > options.max_rejected * total:
                    _refuse(address, folder, rejected, broken, done, total, options.max_rejected)
            else:
                part = part_of[entry.item]
                first = first or entry.digest
                if held_out and entry.digest != first and int.from_bytes(entry.digest[:8]) % HELD_OUT == 0:
                    part = "val"
                if part not in writers:
                    writers[part] = _Part(stack.enter_context(BetonWriter(folder / f"{part}.beton", total)))
                full = part == "train" and options.limit is not None and writers[part].writer.images >= options.limit
                if not full:
                    writers[part].add(entry, labels[entry.item])
            if options.on_progress:
                options.on_progress(done, total)
        if "train" not in writers:
            reasons = "; ".join(f"{n} × {reason}" for reason, n in Counter(r for _, r in rejected).most_common(3))
            raise UserError(f"{address}: none of its {total:,} files is an image that can be read ({reasons})")
        classes = ordered(label for writer in writers.values() for label in writer.labels)
        for writer in writers.values():
            writer.label(classes)
    csv_path = _write_rejected(folder / "rejected.csv", rejected) if rejected else None
    for part, writer in writers.items():
        writer.describe(folder / f"{part}.beton", address, csv_path, len(rejected))
    if divided:
        return "its own validation part"
    return f"1 image in {HELD_OUT} held out by a hash of its content" if "val" in writers else "nothing held out"


def ordered(labels: Iterable[str | None]) -> tuple[str, ...]:
    """The classes among these labels, in the order of their names; numbers in the order of their values."""
    classes = {label for label in labels if label is not None}
    numbers = all(label.isdecimal() for label in classes)
    return tuple(sorted(classes, key=int) if numbers else sorted(classes))


class _Entry(NamedTuple):
    item: int  # its number in the source
    name: str
    image: DecodedImage | None
    reason: str
    digest: bytes


def shown(name: str) -> str:
    """An image's name to be written down; only addresses hold credentials."""
    return hide(name) if "://" in name else name


class _Part:
    """One part while it is written."""

    def __init__(self, writer: BetonWriter) -> None:
        self.writer = writer
        self.names: list[str] = []
        self.labels: list[str | None] = []
        self.classes: tuple[str, ...] = ()
        self.digests: Counter[bytes] = Counter()
        self.warnings: list[tuple[str, str]] = []
        self.content = hashlib.blake2b(digest_size=16)

    def add(self, entry: _Entry, label: str | None) -> None:
        assert entry.image is not None
        self.writer.write(entry.image.image, size=entry.image.size)
        self.names.append(shown(entry.name))
        self.labels.append(label)
        self.digests[entry.digest] += 1
        self.warnings += [(shown(entry.name), warning) for warning in entry.image.warnings]
        self.content.update(entry.digest + f"{label}\n".encode(errors="surrogateescape"))

    def label(self, classes: tuple[str, ...]) -> None:
        """Give every image the number of its class."""
        self.classes = classes
        number = {name: i for i, name in enumerate(classes)}
        self.writer.set_labels([-1 if label is None else number[label] for label in self.labels])

    def describe(self, path: Path, address: str, rejected: Path | None, rejected_count: int) -> None:
        """Write the facts beside the part."""
        packed = Packed(path, len(self.names), self.classes, self.content.hexdigest(), rejected, rejected_count)
        write_facts(
            packed,
            self.names,
            source=hide(address),
            duplicates=sum(count - 1 for count in self.digests.values()),
            warnings=self.warnings[:1000],
            warnings_count=len(self.warnings),
        )


def _entries_of_source(source: Source, wanted: Sequence[int], options: _Options) -> Iterator[_Entry]:
    """Read and decode every wanted file, in order."""

    def chunks() -> Iterator[list[Task]]:
        chunk: list[Task] = []
        size = 0
        for index, payload in source.payloads(wanted):
            chunk.append(Task(index, payload))
            size += len(payload) if isinstance(payload, bytes) else source.items[index].size
            if len(chunk) == CHUNK or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    with Decoders(options.workers, resize=options.resize) as decoders:
        for tasks, outcomes in decoders.decode(chunks()):
            for task, outcome in zip(tasks, outcomes):
                name = source.items[task.item].key
                yield _Entry(task.item, name, outcome.image, outcome.reason, outcome.digest)


def _entries_of_beton(
    packed: Packed, limit: int | None
) -> tuple[Iterator[_Entry], dict[int, str | None], dict[int, str]]:
    """The images of a .beton as entries, their labels, and the part (train) of each."""
    reader = BetonReader(packed.path)
    numbers = [int(label) for label in reader.metadata["label"]]
    labels = {i: packed.classes[n] if 0 <= n < len(packed.classes) else None for i, n in enumerate(numbers)}

    def entries() -> Iterator[_Entry]:
        for index in range(len(reader)):
            image, height, width, _ = reader.read(index)
            content = image if isinstance(image, bytes) else image.tobytes()
            digest = hashlib.blake2b(content, digest_size=16).digest()
            yield _Entry(index, str(index), DecodedImage(image, (height, width)), "", digest)

    return entries(), labels, dict.fromkeys(range(len(reader)), "train")


def _limited(source: Source, wanted: list[int], options: _Options, *, spare: bool) -> list[int]:
    """At most `limit` of the wanted items, drawn by a hash of their names; a few more where some will be held out."""
    if options.limit is None:
        return wanted
    count = options.limit * (HELD_OUT + 2) // HELD_OUT + 8 if spare else options.limit
    count = min(len(wanted), count)

    def drawn(index: int) -> bytes:
        return hashlib.blake2b(source.items[index].key.encode(errors="surrogateescape"), digest_size=8).digest()

    return sorted(heapq.nsmallest(count, wanted, key=drawn))


def _refuse(
    address: str,
    folder: Path,
    rejected: Sequence[tuple[str, str]],
    broken: Counter[str],
    done: int,
    total: int,
    most: float,
) -> None:
    """Stop because more than the permitted share of all files is broken."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in broken.most_common(3) if count)
    listed = _write_rejected(folder.with_name(f"{folder.name}.rejected.csv"), rejected)
    raise UserError(
        f"{address}: {broken.total():,} of the first {done:,} files are broken ({reasons}), more than {most:.0%} of "
        f"all {total:,}; see {listed}, or pack what is left with python -m pipeline.pack --max-rejected 1"
    )


def _write_rejected(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([("path", "reason"), *((shown(path), redact(reason)) for path, reason in rows)])
    write_atomically(path, text.getvalue())
    return path


def _beton_here(address: str, cache: Path) -> Packed:
    """A .beton as a packed set; a remote one is brought into the cache first."""
    files, path, info = locate(address)
    try:
        if is_local(files):
            return read_packed(path)
        key = hashlib.blake2b(f"{address} {version(info)}".encode(), digest_size=6).hexdigest()
        target = cache / f"{Path(bare(address)).stem}-{key}.beton"
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                partial = target.with_suffix(".partial")
                files.get_file(path, str(partial))
                partial.replace(target)
        return replace(read_packed(target), path=target)
    except BetonError as error:
        raise UserError(str(error)) from error
