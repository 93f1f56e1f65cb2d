"""`python -m jobs.list`: what was submitted to a cluster, and how it stands."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tyro.conf import Positional

from jobs.cluster import Client, Submitted
from pipeline.command import command


@dataclass(frozen=True)
class Arguments:
    """List what jobs have submitted to a Ray cluster, oldest firing first."""

    job: Positional[str | None] = None
    """Only this job's."""
    running: bool = False
    """Only what has not ended."""
    address: str | None = None
    """The cluster's job API, http://HOST:8265; left open: RAY_ADDRESS, or the cluster on this machine."""
    debug: bool = False
    """Show the traceback of an error."""


def table(found: Sequence[Submitted], now: datetime) -> None:
    """Print submissions, one a line."""
    from rich.console import Console
    from rich.table import Table

    rows = Table(box=None, header_style="bold")
    for name in ("id", "status", "started", "took"):
        rows.add_column(name, no_wrap=True)
    for s in found:
        took = f"{((s.ended or now) - s.started).total_seconds():.0f} s" if s.started else "–"
        rows.add_row(s.id, s.status.lower(), f"{s.started:%Y-%m-%d %H:%M:%S} UTC" if s.started else "–", took)
    console = Console(width=200)  # an id that is cut off at the terminal's edge is none for jobs.logs
    console.print(rows if found else "nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 a user's mistake."""

    def run(arguments: Arguments) -> int:
        found = Client(arguments.address).submitted(arguments.job)
        table([s for s in found if s.running or not arguments.running], datetime.now(UTC))
        return 0

    return command(Arguments, "jobs.list", run, argv)


if __name__ == "__main__":
    sys.exit(main())
