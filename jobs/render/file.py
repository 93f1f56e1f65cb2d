"""What every rendered file has: who reads it and how it reaches this code, its first lines, what it submits."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from tyro.conf import Positional

from jobs.job import Job, Timetable


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
