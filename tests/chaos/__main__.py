"""`python -m tests.chaos`: do every fault to a real run, check what must hold after it, and print what it cost."""

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.runs import Place, Row

MODULES = ("local_faults", "tracking_faults", "data_faults", "cluster_faults")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the faults whose names hold a word of `argv`, all without one; returns 1 where one was not survived."""
    words = list(sys.argv[1:] if argv is None else argv)
    table = Table("fault", "injected", "images seen again", "seconds", "said", show_lines=True)
    failed = 0
    for module in MODULES:
        for fault in import_module(f"tests.chaos.{module}").FAULTS:
            if words and not any(word in fault.__name__ for word in words):
                continue
            print(f"{fault.__name__} …", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="chaos-") as folder, open(Path(folder, "out"), "w") as out:
                try:
                    with contextlib.redirect_stdout(out):
                        row: Row = fault(Place(Path(folder, "place")))
                except Exception:
                    failed += 1
                    traceback.print_exc()
                    table.add_row(fault.__name__, "", "", "", "[bold]NOT SURVIVED[/bold]")
                    continue
            seconds = "–" if row.seconds is None else f"{row.seconds:.0f}"
            table.add_row(row.fault, row.injected, f"{row.lost:,}", seconds, row.said)
    Console(width=160 if not sys.stdout.isatty() else None).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
