"""`python -m jobs.logs JOB`: what a job's newest firing, or one submission, has said."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from jobs.cluster import Client, select
from pipeline.command import command


@dataclass(frozen=True)
class Arguments:
    """Show the logs of a job's newest firing, or of one submission."""

    job: Positional[str]
    """A job, or the id of a submission as `python -m jobs.list` shows it."""
    firing: str | None = None
    """Another firing than the newest."""
    cell: str | None = None
    """One cell of the matrix."""
    follow: bool = False
    """Go on until it ends."""
    address: str | None = None
    """The cluster's job API, http://HOST:8265; left open: RAY_ADDRESS, or the cluster on this machine."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 a log is gone, 2 a user's mistake."""

    def run(arguments: Arguments) -> int:
        client = Client(arguments.address)
        found = select(client, arguments.job, arguments.firing, arguments.cell)
        gone = False
        for submitted in found:
            if len(found) > 1:
                print(f"--- {submitted.id}", flush=True)
            shown = 0
            while True:
                running = next((s.running for s in client.submitted() if s.id == submitted.id), False)
                text = client.logs(submitted.id)
                if text is None:
                    gone = True
                    print(f"{submitted.id}: its log is gone, as where its node is", file=sys.stderr, flush=True)
                    break
                print(text[shown:], end="", flush=True)
                shown = len(text)
                if not (arguments.follow and running):
                    break
                time.sleep(1)
        return int(gone)

    return command(Arguments, "jobs.logs", run, argv)


if __name__ == "__main__":
    sys.exit(main())
