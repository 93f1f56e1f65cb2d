"""A service and a timer of systemd."""

from collections.abc import Mapping, Sequence

from jobs.job import Job, Timetable
from jobs.render.file import Arguments, gap, head, made_up, submission, webhook
from jobs.schedule import DAYS

TRIES = 60
"""Times that a firing is submitted anew where that failed, a minute apart; firings count towards the limit as well."""


def render(job: Job, arguments: Arguments) -> str:
    """Both files, one after the other, each under its name."""
    assert job.timetable is not None
    words = " ".join(map(systemd_word, submission(job, arguments)))
    service: dict[str, dict[str, str | list[str]]] = {
        "Unit": {"Description": f"Submit {job.name} to the Ray cluster", "Wants": "network-online.target",
                 "After": "network-online.target", "StartLimitIntervalSec": "4h",
                 "StartLimitBurst": f"{TRIES + 4 * len(job.timetable.schedule.cron.minutes)}"},
        # systemd starts no program whose path holds quotes or $, but env does, from the working directory; that one's
        # slash at the end keeps a blank or a backslash before it.
        "Service": {"Type": "oneshot", "WorkingDirectory": arguments.folder.rstrip("/").replace("%", "%%") + "/",
                    "ExecStart": f"/usr/bin/env .venv/bin/python {words}",
                    "Restart": "on-failure", "RestartSec": "60"},
    }  # fmt: skip
    if job.secrets or webhook(job):
        service["Service"]["EnvironmentFile"] = f"-%E/ssl-pretraining/{job.name}.env"
    none = job.timetable.missed == "none"
    timer: dict[str, dict[str, str | list[str]]] = {
        "Unit": {"Description": f"When {job.name} fires"},
        "Timer": {"OnCalendar": calendars(job.timetable), "Persistent": "false" if none else "true",
                  "AccuracySec": "1s"},
        "Install": {"WantedBy": "timers.target"},
    }  # fmt: skip
    name = f"ssl-{job.name}"
    late = made_up(job.timetable, "systemd", does="none" if none else "last")
    return (
        f"# --- {name}.service\n{head(job)}{_ini(service)}\n"
        f"# --- {name}.timer\n{head(job)}{gap(job.timetable, 'systemd')}{late}{_ini(timer)}"
    )


def systemd_word(word: str) -> str:
    """A word of ExecStart: quoted, with systemd's own specifiers and variables made plain."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"'


def calendars(timetable: Timetable) -> list[str]:
    """The schedule in systemd's calendar language; where either kind of day suffices, one line for each."""
    cron = timetable.schedule.cron
    names = {number: name.capitalize() for name, number in DAYS.items()}
    weekdays = ",".join(names[day] for day in cron.weekdays)
    months, days = _numbers(cron.months, 12), _numbers(cron.days, 31)
    clock = f"{_numbers(cron.hours, 24)}:{_numbers(cron.minutes, 60)}:00 {timetable.schedule.zone.key}"
    if cron.either:
        return [f"*-{months}-{days} {clock}", f"{weekdays} *-{months}-* {clock}"]
    day = f"{weekdays} " if len(cron.weekdays) < 7 else ""
    return [f"{day}*-{months}-{days} {clock}"]


def _numbers(values: Sequence[int], every: int) -> str:
    return "*" if len(values) == every else ",".join(f"{value:02d}" for value in values)


def _ini(sections: Mapping[str, Mapping[str, str | list[str]]]) -> str:
    text = ""
    for section, entries in sections.items():
        text += f"\n[{section}]\n"
        for key, values in entries.items():
            text += "".join(f"{key}={value}\n" for value in (values if isinstance(values, list) else [values]))
    return text
