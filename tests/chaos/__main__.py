"""`python -m tests.chaos`: do every fault to a real run, check what must hold after it, and print what it cost."""

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.runs import Place, Row

MODULES = ("local_faults", "tracking_faults", "data_faults")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the faults whose names hold a word of `argv` ("cluster": those of a Ray cluster, one after the other), all
    without one; returns 1 where one was not survived."""
    words = list(sys.argv[1:] if argv is None else argv)
    table = Table("fault", "injected", "images seen again", "seconds", "said", show_lines=True)
    failed = 0
    for name, rows in faults():
        if words and not any(word in name for word in words):
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder, open(Path(folder, "out"), "w") as out:
            try:
                with contextlib.redirect_stdout(out):
                    for row in rows(Path(folder, "place")):
                        seconds = "–" if row.seconds is None else f"{row.seconds:.0f}"
                        table.add_row(row.fault, row.injected, f"{row.lost:,}", seconds, row.said)
            except Exception:
                failed += 1
                traceback.print_exc()
                table.add_row(name, "", "", "", "[bold]NOT SURVIVED[/bold]")
    Console(width=160 if not sys.stdout.isatty() else None).print(table)
    return 1 if failed else 0


def alone(fault: Callable[[Place], Row], folder: Path) -> Iterator[Row]:
    """What comes of one fault, in a place of its own."""
    with Place(folder) as place:
        yield fault(place)


def faults() -> Iterator[tuple[str, Callable[[Path], Iterable[Row]]]]:
    """Every fault by name, and what does it in a folder."""
    for module in MODULES:
        for fault in import_module(f"tests.chaos.{module}").FAULTS:
            yield fault.__name__, lambda folder, fault=fault: alone(fault, folder)

    def cluster(folder: Path) -> Iterator[Row]:
        from tests.chaos.cluster_faults import every

        for told in every(folder):
            yield Row(told["fault"], told["injected"], told["lost_images"], told["recovered_s"], told["said"])

    yield "cluster", cluster


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
