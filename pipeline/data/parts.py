"""The parts of a source, train and val, decoded and written: who is in which, under which label, who is left out."""

import contextlib
import csv
import hashlib
import heapq
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.data.beton import BetonReader, BetonWriter
from pipeline.data.decode import DecodedImage
from pipeline.data.listing import Source
from pipeline.data.packed import Packed, write_atomically, write_facts
from pipeline.data.workers import Decoders, Task
from pipeline.errors import UserError
from pipeline.redaction import hide, redact

CHUNK = 32  # files that a decoding process is given at a time
CHUNK_BYTES = 16 << 20  # or fewer, where the files are large
HELD_OUT = 10  # without a validation part, one image in so many is held out

Progress = Callable[[int, int], None]
Choice = Literal["split", "train", "val", "all"]  # of a source: divided, one part of an existing division, all of it


class Options(NamedTuple):
    """How a source is packed; `open_split` of `pipeline.data.pack` says what each means."""

    limit: int | None
    resize: int | None
    workers: int
    max_rejected: float
    on_progress: Progress | None
    hold_out: bool = False


def fill(folder: Path, address: str, source: Source | Packed, options: Options, choice: Choice) -> str:
    """Write the parts of a source into a folder; returns the note on its validation part.

    Raises:
        UserError: there is no image, or too many files are broken.
    """
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


def _entries_of_source(source: Source, wanted: Sequence[int], options: Options) -> Iterator[_Entry]:
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


def _limited(source: Source, wanted: list[int], options: Options, *, spare: bool) -> list[int]:
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
