"""`python -m pipeline.pack --data PHOTOS`: pack images once, and see what is in them before training."""

import csv
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.command import command


@dataclass(frozen=True)
class Arguments:
    """Pack a source of images into the cache that pretraining reads, and report on it."""

    data: str
    """A folder, .tar, .parquet, .csv or .beton, here or at any fsspec address."""
    val_data: str | None = None
    """Held-out images; left open: a train/ + val/ pair, else a split by content."""
    cache: str | None = None
    """Where packed sets are kept; left open: ~/.cache/ssl-pretraining."""
    limit: int | None = None
    """At most so many training images."""
    resize: int | None = None
    """Bring the shorter side down to so many pixels; left open: original JPEG bytes are kept."""
    workers: int | None = None
    """Decoding processes; left open: one to a core."""
    max_rejected: float = 0.5
    """Stop where a larger share of the files is broken."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 Ctrl-C."""
    return command(Arguments, "pipeline.pack", report, argv)


def report(arguments: Arguments) -> None:
    """Pack, and print what was found."""
    from pipeline.data.pack import open_split
    from pipeline.data.packed import read_facts
    from pipeline.data.preparation import cache_folder, progress_bar

    started = time.monotonic()
    with progress_bar("packing", "files") as progress:
        train, val, note = open_split(
            arguments.data,
            arguments.val_data,
            cache_folder(arguments.cache),
            limit=arguments.limit,
            resize=arguments.resize,
            workers=arguments.workers,
            max_rejected=arguments.max_rejected,
            on_progress=progress,
        )
    for name, packed in (("train", train), ("val", val)):
        if packed is None:
            continue
        facts = read_facts(packed.path)
        size = packed.path.stat().st_size / 1e6
        classes = f"{len(packed.classes)} classes" if packed.classes else "no labels"
        print(f"{name:>9}  {packed.images:,} images, {classes}, {size:,.1f} MB in {packed.path}")
        if facts.get("duplicates"):
            print(f"{'':>9}  {facts['duplicates']:,} are exact copies of others")
        kinds: dict[str, list[str]] = {}
        for _, text in facts.get("warnings", ()):
            kinds.setdefault(text.split(":")[0], []).append(text)
        for kind, texts in kinds.items():
            print(f"{'':>9}  {len(texts):,} look wrong: {texts[0] if len(set(texts)) == 1 else kind}")
    print(f"{'split':>9}  {note}")
    if train.rejected:
        with train.rejected.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            reasons = Counter(row["reason"].split(":")[0] for row in csv.DictReader(file))
        print(f"{'left out':>9}  {train.rejected_count:,} files ({train.rejected})")
        for reason, count in reasons.most_common():
            print(f"{'':>9}  {count:,} {reason}")
    print(f"{'took':>9}  {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
