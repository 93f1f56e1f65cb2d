"""From what the command line says of data to packed sets, with a progress bar while they are packed."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipeline import recipes
from pipeline.config import Config
from pipeline.data import embedded
from pipeline.data.beton import BetonReader
from pipeline.data.pack import Split, open_split
from pipeline.data.packed import Packed
from pipeline.errors import UserError

EMBEDDED = {"train": 2048, "val": 1024}  # images of the generated set
EMBEDDED_SIZE = 64  # their side in pixels


def prepare(config: Config, *, hold_out: bool = False) -> Split:
    """The packed training and validation sets that a configuration names, packed or drawn now where they are not.

    Args:
        hold_out: hold validation images out of a source without labels, too.

    Raises:
        UserError: as of `open_split`, or an address was saved without its credentials.
    """
    for option, address in (("--data", config.data), ("--val-data", config.val_data)):
        if address and "://" in address and "***" in address:
            raise UserError(
                f"{option} {address}: credentials are not saved with a run; give {option} again with them, or as "
                "'$NAME' of a variable that holds the address"
            )
    cache = cache_folder(config.cache)
    if recipes.generated(config.data):
        counts = EMBEDDED | ({"train": config.limit} if config.limit else {})
        factor = embedded.factor_of(config.data)
        train, val = (embedded.packed(cache, part, n, EMBEDDED_SIZE, factor=factor) for part, n in counts.items())
        return Split(train, val, "generated, val drawn apart from train")
    with progress_bar("packing", "files") as progress:
        return open_split(
            config.data, config.val_data, cache, limit=config.limit, hold_out=hold_out, on_progress=progress
        )


def cache_folder(given: str | None) -> Path:
    """Where packed sets are kept."""
    return Path(given).expanduser() if given else Path.home() / ".cache" / "ssl-pretraining"


def median_side(packed: Packed) -> int:
    """The median of the images' shorter sides, in pixels."""
    metadata = BetonReader(packed.path).metadata
    return int(np.median(np.minimum(metadata["height"], metadata["width"])))


@contextlib.contextmanager
def progress_bar(doing: str, unit: str, every: float = 20.0) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears with the first call (files or other units done, in all); in a log lines.

    Args:
        every: seconds between two of those, and before the first.
    """
    if not sys.stderr.isatty():
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= every:
                last = time.monotonic()
                print(f"{doing}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("", total=None)

    def progress(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        bar.stop()
