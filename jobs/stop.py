"""`python -m jobs.stop JOB`: end what runs of a job, with a checkpoint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from jobs.cluster import STOPPING, Client, select
from pipeline.command import command


@dataclass(frozen=True)
class Arguments:
    """Stop a job's newest firing, or one submission. A run leaves a checkpoint, which `submit --again` continues."""

    job: Positional[str]
    """A job, or the id of a submission as `python -m jobs.list` shows it."""
    firing: str | None = None
    """Another firing than the newest."""
    cell: str | None = None
    """One cell of the matrix."""
    address: str | None = None
    """The cluster's job API, http://HOST:8265; left open: RAY_ADDRESS, or the cluster on this machine."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 a user's mistake."""

    def run(arguments: Arguments) -> int:
        client = Client(arguments.address)
        found = select(client, arguments.job, arguments.firing, arguments.cell)
        running = [s for s in found if s.running]
        for submitted in running:
            client.stop(submitted.id)
            waits = submitted.status == "PENDING"
            how = "ends once there is room for it" if waits else f"has {STOPPING} s to leave a checkpoint"
            print(f"{submitted.id}: stopping; it {how}", flush=True)
        states = client.wait((s.id for s in running if s.status != "PENDING"), every=0.5)
        for s in found:
            print(f"{s.id}: {states.get(s.id, s.status).lower()}")
        return 0

    return command(Arguments, "jobs.stop", run, argv)


if __name__ == "__main__":
    sys.exit(main())
