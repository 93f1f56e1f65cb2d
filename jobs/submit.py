"""`python -m jobs.submit JOB`: one firing of a job goes to a Ray cluster, each cell under an id of its own.

The id is made of job, firing and cell, and Ray takes an id once: whoever submits the same firing again, at the same
time or later, changes nothing. So several schedulers may watch over one job.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jobs import spec
from jobs.cluster import Client, Submitted, environment
from jobs.command import command
from jobs.entry_points import TRAINS
from jobs.firing import which_firing
from jobs.job import Cell, Job, Resources
from pipeline.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Submit one firing of a job to a Ray cluster. The same firing never runs twice."""

    job: str
    """A job file, or the name of one in jobs/."""
    firing: str | None = None
    """Which firing: "scheduled" for the newest of its schedule, or one as in 20261124T013000Z; left open: now."""
    set: tuple[str, ...] = ()
    """name=value: arguments that take the place of the file's, to try a job at a small size."""
    address: str | None = None
    """The cluster's job API, http://HOST:8265; left open: RAY_ADDRESS, or the cluster on this machine."""
    working_dir: str = "."
    """The folder that travels to the cluster; the job file must lie in it."""
    dry_run: bool = False
    """Show what would be submitted; contact nothing."""
    wait: bool = False
    """Wait until all of it has ended, what comes after it included; fail where any of it failed."""
    debug: bool = False
    """Show the traceback of an error."""


def submit(job: Job, firing: str, client: Client, working_dir: Path) -> list[str]:
    """Submit every cell of a firing, as the job's overlap says; the ids, those submitted before included."""
    before = [s for s in client.submitted(job.name) if s.running and s.firing != firing]
    overlap = job.timetable.overlap if job.timetable else "allow"
    if before and overlap == "skip":
        print(f"{job.name} {firing}: skipped, since {before[0].id} still runs (overlap: skip)", flush=True)
        return []
    if before and overlap == "stop":
        for earlier in before:
            print(f"{job.name} {firing}: stopping {earlier.id} (overlap: stop)", flush=True)
            client.stop(earlier.id)
        client.wait(earlier.id for earlier in before)
    ids = []
    for cell in job.cells:
        ids.append(job.submission(firing, cell.name))
        resources = job.step.resources
        own = resources if job.step.run not in TRAINS else Resources(cpus=0)
        new = client.submit(
            ids[-1],
            entry(job, firing, cell, working_dir, before if overlap == "wait" else ()),
            environment=environment(working_dir),
            about={"job": job.name, "firing": firing, "cell": cell.name},
            cpus=own.cpus, gpus=own.gpus, memory=own.memory,
        )  # fmt: skip
        print(f"{ids[-1]}: {'submitted' if new else 'was submitted before; it is not run again'}", flush=True)
    return ids


def entry(job: Job, firing: str, cell: Cell, working_dir: Path, before: Sequence[Submitted] = ()) -> str:
    """The command that the cluster runs for a cell, quoted for a shell."""
    path = within(job.path, working_dir)
    words = ["python", "-m", "jobs.run", path, "--firing", firing]
    words += ["--cell", cell.name] if cell.name else []
    words += ["--set", *job.settings] if job.settings else []
    words += ["--after", *(earlier.id for earlier in before)] if before else []
    return shlex.join(words)


def within(path: Path, working_dir: Path) -> str:
    """Where a job file lies in the folder that travels."""
    try:
        return str(path.resolve().relative_to(working_dir.resolve()))
    except ValueError:
        raise UserError(f"{path}: lies outside {working_dir.resolve()}, which travels to the cluster; move it, "
                        "or give --working-dir") from None  # fmt: skip


def show(job: Job, firing: str, working_dir: Path) -> None:
    """Print what would be submitted."""
    for cell in job.cells:
        step = job.of(cell)
        takes = step.resources
        print(f"{job.submission(firing, cell.name)}\n  on the cluster  {entry(job, firing, cell, working_dir)}")
        print(f"  which runs      {shlex.join(['python', *step.command('RUN')])}")
        each = f"{step.arguments.get('workers', 1)} workers" if step.run in TRAINS else "entry point"
        memory = f", {takes.memory / (1 << 30):g} GiB" if takes.memory else ""
        print(f"  takes           {each}: {takes.cpus:g} CPUs, {takes.gpus:g} GPUs{memory}")
    for i, step in enumerate(job.after):
        when = "after all cells" if step.once else "after each cell"
        print(f"{when}: {shlex.join(['python', *step.command('RUN', ['RUN', '…'])])} (…-after{i + 1})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 something failed, 2 a user's mistake."""

    def run(arguments: Arguments) -> int:
        job = spec.load(arguments.job, arguments.set)
        firing = which_firing(job, arguments.firing, datetime.now(UTC))
        folder = Path(arguments.working_dir)
        within(job.path, folder)
        if arguments.dry_run:
            show(job, firing, folder)
            return 0
        client = Client(arguments.address)
        ids = submit(job, firing, client, folder)
        if not arguments.wait:
            return 0
        states: dict[str, str] = {}
        while set(ids) - set(states):  # what comes after is submitted by the cells, before they end
            states = client.wait(ids)
            ids = [s.id for s in client.submitted(job.name, firing)] if ids else []
        for name, status in states.items():
            print(f"{name}: {status.lower()}")
        return int(any(status != "SUCCEEDED" for status in states.values()))

    return command(Arguments, "jobs.submit", run, argv)


if __name__ == "__main__":
    sys.exit(main())
