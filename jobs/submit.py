"""`python -m jobs.submit JOB`: one firing of a job goes to a Ray cluster, each cell under an id of its own.

The id is made of job, firing and cell, and Ray takes an id once: whoever submits the same firing again, at the same
time or later, changes nothing. So several schedulers may watch over one job. What failed or was stopped of a firing
goes on with `--firing F --again`, which only a person says.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tyro.conf import Positional

from jobs import spec
from jobs.cluster import ENDED, FAILED, Client, Submitted, environment
from jobs.entry_points import TRAINS
from jobs.firing import which_firing
from jobs.job import Cell, Job
from pipeline.command import command
from pipeline.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Submit one firing of a job to a Ray cluster. The same firing never runs twice."""

    job: Positional[str]
    """A job file, or the name of one in jobs/."""
    firing: str | None = None
    """Which firing: "scheduled" for the newest of its schedule, or one as in 20261124T013000Z; left open: now."""
    again: bool = False
    """Submit anew what failed or was stopped of a firing; training continues its checkpoint."""
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


def submit(job: Job, firing: str, client: Client, working_dir: Path, *, again: bool = False) -> list[str]:
    """Submit every cell of a firing, as the job's overlap says; the ids, those submitted before included.

    Args:
        again: whether what failed or was stopped of this firing is submitted anew.
    """
    check_storage(job)
    known = client.submitted(job.name)
    states = {s.id: s.status for s in known if s.firing == firing}
    new = again or not states.keys() >= {job.submission(firing, cell.name) for cell in job.cells}
    before = [s for s in known if new and s.running and s.firing != firing]
    overlap = job.timetable.overlap if job.timetable else "allow"
    if before and overlap == "skip":
        print(f"{job.name} {firing}: skipped, since {before[0].id} still runs (overlap: skip)", flush=True)
        return []
    if before and overlap == "stop":
        for earlier in before:
            print(f"{job.name} {firing}: stopping {earlier.id} (overlap: stop)", flush=True)
            client.stop(earlier.id)
        client.wait(earlier.id for earlier in before if earlier.status != "PENDING")  # which ends when it is placed
    ids = renew(job, firing, client, working_dir) if again else []
    for cell in job.cells:
        name = job.submission(firing, cell.name)
        taken = client.submit(
            name,
            entry(job, firing, cell, within(job.path, working_dir), before=before if overlap == "wait" else ()),
            environment=environment(working_dir, job.environment),
            about={"job": job.name, "firing": firing, "cell": cell.name},
            cpus=job.holds.cpus, gpus=job.holds.gpus, memory=job.holds.memory,
        )  # fmt: skip
        said = "submitted" if taken else "was submitted before; it is not run again"
        if not taken and states.get(name) in FAILED:
            said = f"was submitted before, and {states[name].lower()}; --firing {firing} --again goes on with it"
        print(f"{name}: {said}", flush=True)
        ids.append(name)
    return ids


def check_storage(job: Job) -> None:
    """Refuse runs whose folder is lost with the code that travels, and found by no other firing.

    Raises:
        UserError: the storage is a path from there.
    """
    for cell in job.cells:
        storage = str(job.of(cell).arguments.get("storage") or "/")
        if "://" not in storage and not storage.startswith(("/", "~")):
            raise UserError(
                f"{job.path}: storage {storage}: would lie in the copy of this folder that the cluster makes for a "
                "while; give the whole path, as in /data/runs"
            )


def renew(job: Job, firing: str, client: Client, working_dir: Path) -> list[str]:
    """Free the ids of what failed or was stopped of a firing, and of what its cells, run again, will send again.

    Returns:
        The ids of steps after it that failed though their cells did not; they are submitted here.
    """
    states = {s.id: s.status for s in client.submitted(job.name, firing)}
    cells = [cell for cell in job.cells if states.get(job.submission(firing, cell.name)) in FAILED]
    old, alone = [job.submission(firing, cell.name) for cell in cells], []
    for number, step in enumerate(job.after):
        for cell in job.cells[:1] if step.once else job.cells:
            name = job.submission(firing, "" if step.once else cell.name, number)
            sent = bool(cells) if step.once else cell in cells
            if states.get(name) in FAILED or (step.once and sent and states.get(name) in ENDED):
                old.append(name)
                alone += [] if sent else [(name, cell, number)]
    client.forget(old)
    for _, cell, number in alone:
        submit_step(job, firing, cell, number, client, str(working_dir), within(job.path, working_dir))
    return [name for name, _, _ in alone]


def submit_step(
    job: Job, firing: str, cell: Cell, number: int, client: Client, working_dir: str, path: str
) -> str | None:
    """Submit a step that comes after a cell, or after all of which it is one; `path` is the job file's in there.

    Returns:
        Its id, None where that was submitted before.
    """
    step = job.after[number]
    about = "" if step.once else cell.name
    name = job.submission(firing, about, number)
    new = client.submit(
        name,
        entry(job, firing, cell, path, step=number),
        environment=environment(working_dir, job.environment),
        about={"job": job.name, "firing": firing, "cell": about, "step": step.run},
        cpus=step.takes.cpus, gpus=step.takes.gpus, memory=step.takes.memory,
    )  # fmt: skip
    if new:
        print(f"submitted {step.run} as {name}", flush=True)
    return name if new else None


def entry(
    job: Job, firing: str, cell: Cell, path: str, *, step: int | None = None, before: Sequence[Submitted] = ()
) -> str:
    """The command that the cluster runs for a cell, or for a step after it, quoted for a shell."""
    words = ["python", "-m", "jobs.run", path, "--firing", firing]
    words += ["--step", str(step + 1)] if step is not None else []
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
    path = within(job.path, working_dir)
    for cell in job.cells:
        step = job.of(cell)
        takes = step.takes
        print(f"{job.submission(firing, cell.name)}\n  on the cluster  {entry(job, firing, cell, path)}")
        print(f"  which runs      {shlex.join(['python', *step.command('RUN')])}")
        each = f"{step.arguments.get('workers', 1)} workers" if step.run in TRAINS else "entry point"
        memory = f", {takes.memory / (1 << 30):g} GiB" if takes.memory else ""
        amounts = f"{takes.cpus:g} CPUs, {takes.gpus:g} GPUs{memory}"
        shares = step.run in TRAINS and step.resources is None
        print(f"  takes           {each}: {'equal shares of the cluster' if shares else amounts}")
    for i, step in enumerate(job.after):
        when = "after all cells" if step.once else "after each cell"
        print(f"{when}: {shlex.join(['python', *step.command('RUN', ['RUN', '…'])])} (…-after{i + 1})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 something failed, 2 a user's mistake."""

    def run(arguments: Arguments) -> int:
        job = spec.load(arguments.job, arguments.set)
        if arguments.again and arguments.firing is None:
            raise UserError("--again: say of which --firing, as in 20261124T013000Z; python -m jobs.list shows them")
        firing = which_firing(job, arguments.firing, datetime.now(UTC))
        folder = Path(arguments.working_dir)
        within(job.path, folder)
        check_storage(job)
        if arguments.dry_run:
            show(job, firing, folder)
            return 0
        client = Client(arguments.address)
        ids = submit(job, firing, client, folder, again=arguments.again)
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
