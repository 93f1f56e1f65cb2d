"""`python -m jobs.render JOB --to …`: a job as a file that another scheduler takes.

    cron          a line for crontab
    systemd       a .service and a .timer, one after the other, each under its name
    kubernetes    a CronJob whose pod submits the firing to a cluster that is there (RAY_ADDRESS)
    raycronjob    KubeRay's RayCronJob (KubeRay >= 1.6, alpha), one to a cell: a cluster is made for each firing
    slurm         a script for sbatch: an array of the cells, each with a cluster of its own (`ray symmetric-run`)

cron, systemd and Kubernetes submit `--firing scheduled`: the newest firing of the schedule, under the id that anyone
else would give it. Every word of a command is quoted for what reads it. Secrets are names, never values.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from jobs.job import Job
from jobs.render import cron, kubernetes, raycronjob, slurm, systemd
from jobs.render.file import Arguments
from pipeline.errors import UserError
from pipeline.redaction import redact

TARGETS: Mapping[str, Callable[[Job, Arguments], str]] = {
    "cron": cron.render, "systemd": systemd.render, "kubernetes": kubernetes.render,
    "raycronjob": raycronjob.render, "slurm": slurm.render,
}  # fmt: skip


def render(job: Job, arguments: Arguments) -> str:
    """The file's text.

    Raises:
        UserError: the job has no schedule, the target cannot express something in it, or a secret would stand in it.
    """
    if arguments.to is None:
        raise UserError(f"--to: say what reads the file: {', '.join(TARGETS)}")
    target = TARGETS[arguments.to]
    if arguments.to != "slurm" and job.timetable is None:
        raise UserError(
            f"{job.path}: has no schedule, which {arguments.to} needs; give it one: schedule: {{cron, time_zone}}"
        )
    arguments = dataclasses.replace(arguments, folder=str(Path(arguments.folder).absolute()))
    given = (arguments.folder, arguments.address, arguments.image, arguments.volume)
    for text in (*job.settings, str(job.path), *filter(None, given)):
        if redact(text) != text:
            raise UserError(f"{redact(text)}: looks like a secret, and a rendered file holds none; leave it out")
        if "\n" in text or "\r" in text or "\0" in text:
            raise UserError(f"{text!r}: holds the end of a line, which a rendered file cannot; leave it out")
    return target(job, arguments)
