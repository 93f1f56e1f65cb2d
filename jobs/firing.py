"""Which firing of a job this is: the instant it was due, in UTC, as it is written in ids and names of run folders.

`python -m jobs.firing JOB` prints the newest of a job's schedule, or now where it has none.
"""

import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tyro.conf import Positional

from jobs.job import Job
from pipeline.command import command
from pipeline.errors import UserError

FIRING = re.compile(r"\d{8}T\d{6}Z")
EARLY = 30.0
"""Seconds by which a machine that fires may be ahead of the one that asks which firing this is."""


def firing_name(instant: datetime) -> str:
    """A firing as it is written in ids: 20261124T013000Z."""
    return instant.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


def which_firing(job: Job, asked: str | None, now: datetime) -> str:
    """The firing that `--firing` asks for: now, "scheduled" for the newest of the schedule, or one by name.

    Raises:
        UserError: no such form, or the job has no schedule.
    """
    if asked is None:
        return firing_name(now)
    if FIRING.fullmatch(asked):
        return asked
    if asked != "scheduled":
        raise UserError(f"--firing {asked}: must be scheduled, or a time as in 20261124T013000Z")
    if job.timetable is None:
        raise UserError(f"{job.path}: has no schedule, so there is no scheduled firing; leave --firing out")
    newest = job.timetable.schedule.newest(now + timedelta(seconds=EARLY))
    if newest is None:
        raise UserError(f"{job.path}: its schedule has not fired in eight years")
    return firing_name(newest)


@dataclass(frozen=True)
class Arguments:
    """Print which firing of a job this is: the newest of its schedule, or now where it has none."""

    job: Positional[str]
    """A job file, or the name of one in jobs/."""
    set: tuple[str, ...] = ()
    """name=value: arguments that take the place of the file's."""
    debug: bool = False
    """Show the traceback of an error."""


def show(arguments: Arguments) -> int:
    """Print the firing of the job that is named."""
    from jobs import spec

    job = spec.load(arguments.job, arguments.set)
    print(which_firing(job, "scheduled" if job.timetable else None, datetime.now(UTC)))
    return 0


if __name__ == "__main__":
    sys.exit(command(Arguments, "jobs.firing", show, None))
