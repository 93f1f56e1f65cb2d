"""What every rendered file has: who reads it and how it reaches this code, its first lines, what it submits."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Literal

from tyro.conf import Positional

from jobs.entry_points import options
from jobs.job import Job, Resources, Step, Timetable


@dataclass(frozen=True)
class Arguments:
    """Write a job as a file for another scheduler."""

    job: Positional[str]
    """A job file, or the name of one in jobs/."""
    to: Literal["cron", "systemd", "kubernetes", "raycronjob", "slurm"] | None = None
    """What reads it; has to be given."""
    image: str = "ssl-pretraining:latest"
    """The container that holds this code (kubernetes, raycronjob)."""
    address: str | None = None
    """The cluster's job API, http://HOST:8265 (cron, systemd, kubernetes); left open: RAY_ADDRESS where it runs, or the
    cluster on that machine; on kubernetes http://ray-head:8265."""
    folder: str = "."
    """Where this code lies on the machine that runs it (cron, systemd, slurm); left open: here."""
    volume: str | None = None
    """A persistent volume claim with data and runs, mounted at /data (raycronjob)."""
    set: tuple[str, ...] = ()
    """name=value: arguments that take the place of the file's."""
    debug: bool = False
    """Show the traceback of an error."""


def submission(job: Job, arguments: Arguments) -> list[str]:
    """The words that submit the newest firing, after the interpreter."""
    words = ["-m", "jobs.submit", str(job.path), "--firing", "scheduled"]
    words += ["--address", arguments.address] if arguments.address else []
    return words + (["--set", *job.settings] if job.settings else [])


def head(job: Job) -> str:
    """The comment that every file begins with."""
    lines = [f"{job.name}: made from {job.path} by python -m jobs.render; change it there."]
    if job.timetable:
        schedule = job.timetable.schedule
        lines.append(f"{schedule.cron.line} in {schedule.zone.key}")
    if job.secrets:
        lines.append(f"It needs {', '.join(job.secrets)}; their values are kept elsewhere.")
    if name := webhook(job):
        lines.append(f"It tells the webhook whose address {name} holds, also kept elsewhere; not set, nobody is told.")
    return "".join(f"# {line}\n" for line in lines)


def webhook(job: Job) -> str:
    """The variable with the webhook's address: a secret, but one that the job runs without; "" where there is none, the
    file holds it, or it stands under secrets too."""
    name = (job.notify.webhook or "").removeprefix("$")
    plain = name == job.notify.webhook or name in (*job.environment, *job.secrets)
    return "" if plain else name


def takes_of(steps: Iterable[Step]) -> Resources:
    """What a machine needs on which commands run one after another: of each resource the most that one of them takes,
    or that a trial or an evaluation does which it starts (the arguments `cpus` and `gpus` of search and watch)."""
    found = [Resources(0)]
    for step in steps:
        given = {**options(step.run), **step.arguments}
        found += [step.takes, Resources(float(given.get("cpus", 0)), float(given.get("gpus", 0)))]
    return Resources(*(max(getattr(one, field.name) for one in found) for field in fields(Resources)))


def seconds(job: Job) -> float | None:
    """The longest that a cell and what comes after it take in one place: each command has the job's time limit."""
    return job.time_limit and job.time_limit * (1 + len(job.after))


def made_up(timetable: Timetable, who: str, how: str = "the last is made up for", *, does: str = "last") -> str:
    """A warning where a scheduler treats the firings in an outage otherwise than the job says."""
    if timetable.missed == does:
        return ""
    return f"# {who} cannot do missed: {timetable.missed}; of the firings in an outage, {how}.\n"


def gap(timetable: Timetable, who: str) -> str:
    """A warning where a scheduler leaves out what the clocks skip."""
    now = datetime.now(UTC)
    skipped = timetable.schedule.skipped(now, now + timedelta(days=366))
    if not skipped:
        return ""
    return (
        f"# {skipped[0]:%Y-%m-%d %H:%M} does not exist in {timetable.schedule.zone.key}: {who} skips that firing;\n"
        "# another time of day, or python -m jobs.scheduler, does not.\n"
    )
