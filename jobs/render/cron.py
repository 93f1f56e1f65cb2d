"""A line for crontab."""

import shlex

from jobs.job import Job
from jobs.render.file import Arguments, head, made_up, submission


def render(job: Job, arguments: Arguments) -> str:
    """The line, in its time zone. cron ends a command at an unescaped %, so each is escaped.

    A backslash before it, which the shell's quotes surround, is kept from escaping that escape by two more of them.
    """
    assert job.timetable is not None
    schedule = job.timetable.schedule
    folder = shlex.quote(arguments.folder)
    shell = f"cd {folder} && exec {shlex.join(['.venv/bin/python', *submission(job, arguments)])}"
    line = shell.replace("\\%", "\\''%").replace("%", "\\%")
    return (
        head(job)
        + "# A firing is lost where the cluster is away: cron tries it once, and mails to MAILTO what was said.\n"
        + made_up(job.timetable, "cron", "none is made up for", does="none")
        + "# Debian's cron reads no CRON_TZ: there, the machine's own time zone must be this one.\n"
        + f"CRON_TZ={schedule.zone.key}\n"
        + f"{schedule.cron.line} {line}\n"
    )
