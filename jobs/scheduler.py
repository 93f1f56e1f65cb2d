"""`python -m jobs.scheduler`: fires every job in `jobs/` by its schedule, in the foreground.

A firing counts once the cluster has taken it: only then is it written down, in `--state`. Killed at any moment, the
next scheduler begins where the last one stopped: what was missed is submitted (of several firings of a job the newest,
or as its `missed` says), and what was submitted but not yet written down is submitted again under the same id, which
Ray does not take twice. For the same reason two schedulers may watch over the same jobs. While the cluster does not
answer, firings wait.

Whom a job names is told of a failure that nobody else can tell of: a firing that could not be submitted `TRIES` times,
and a submission whose driver was killed, or lost with its node.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from jobs import notify, spec
from jobs.cluster import Client
from jobs.firing import firing_name
from jobs.job import Job
from jobs.submit import submit
from pipeline.command import command
from pipeline.errors import UserError
from pipeline.redaction import redact

LOOK = 60.0
"""Seconds at most between two looks at the job files and the clock, which may be set or sleep with the machine."""

TRIES = 5
"""Looks in a row at which a firing could not be submitted, after which this is told."""


@dataclass(frozen=True)
class Arguments:
    """Fire jobs by their schedules until stopped."""

    jobs: tuple[str, ...] = ()
    """Job files, or names of those in jobs/; left open: every one in jobs/ that has a schedule."""
    state: str = "runs/scheduler.json"
    """What has fired: the file that a restart goes on from."""
    address: str | None = None
    """The cluster's job API, http://HOST:8265; left open: RAY_ADDRESS, or the cluster on this machine."""
    working_dir: str = "."
    """The folder that travels to the cluster; the job files must lie in it."""
    debug: bool = False
    """Show the traceback of an error."""


class Clock(Protocol):
    """The time, and sleeping; tests have a fast one."""

    def now(self) -> datetime: ...

    def sleep(self, seconds: float) -> bool:
        """Sleep; whether to stop."""


class State:
    """Until when each job's firings have been submitted; written whole, before it is relied on.

    Beside it, in `….failed`, stand the failed submissions that were dealt with, by their ids and when they began: the
    same id may fail again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.until: dict[str, datetime] = {}
        self._failed = path.with_name(path.name + ".failed")
        self.failed = set(self._failed.read_text().split()) if self._failed.exists() else set()
        with contextlib.suppress(FileNotFoundError):
            try:
                kept = json.loads(path.read_text())
                self.until = {name: datetime.fromisoformat(when) for name, when in kept.items()}
            except (ValueError, AttributeError, TypeError) as error:
                raise UserError(f"--state {path}: is none of ours ({error}); give another file, or delete it") from None

    def advance(self, job: str, until: datetime) -> None:
        """Write down that all firings of a job up to a time are dealt with."""
        self.until[job] = until
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w") as file:
            json.dump({name: when.isoformat() for name, when in self.until.items()}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def dealt_with(self, failed: str) -> None:
        """Write down that a failed submission needs no look any more."""
        self.failed.add(failed)
        self._failed.parent.mkdir(parents=True, exist_ok=True)
        with self._failed.open("a") as file:
            file.write(f"{failed}\n")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep a second scheduler from writing the same state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--state {path}: another scheduler uses it; stop that one, or give another file") from None
        yield


def serve(
    load: Callable[[], list[Job]], fire: Callable[[Job, str], object], state: State, clock: Clock,
    say: Callable[[str], object] = print, look: Callable[[list[Job]], object] = lambda jobs: None,
) -> None:  # fmt: skip
    """Fire jobs until the clock says to stop.

    Args:
        load: the jobs as they are now; asked again at every look, so that files may change.
        fire: submits one firing of a job; whatever it raises, the firing is tried again at the next look.
        look: sees to failures that nobody has told of.
    """
    refused: Counter[str] = Counter()
    tried: dict[str, datetime] = {}
    away = False
    while True:
        now, soon = clock.now(), LOOK
        jobs = load()
        for job in jobs:
            if job.timetable is None:
                continue
            if job.name not in state.until:  # never seen before: what lies in the past is none of ours
                state.advance(job.name, now)
            for firing in due(job, state.until[job.name], now, tried.get(job.name)):
                try:
                    fire(job, firing_name(firing))
                except Exception as error:
                    say(f"{job.name} {firing_name(firing)}: not submitted, tried again soon ({error})")
                    refused[job.name] += 1
                    tried[job.name] = firing
                    if refused[job.name] == TRIES:
                        text = f"not submitted in {TRIES} tries, and tried on ({redact(str(error))})"
                        tell(job, firing_name(firing), "", f"{job.name}-{firing_name(firing)}: {text}")
                    break
                refused[job.name] = 0
                tried.pop(job.name, None)
                state.advance(job.name, firing)
            else:
                state.until[job.name] = now  # what a changed schedule has in the past is none of ours
                upcoming = job.timetable.schedule.firings(now, now + timedelta(seconds=LOOK))
                soon = min([soon, *((firing - now).total_seconds() for firing in upcoming)])
        try:
            look(jobs)
            away = False
        except Exception as error:
            if not away:
                say(f"what failed is not looked for until the cluster answers ({error})")
            away = True
        if clock.sleep(max(0.05, soon)):
            return


def due(job: Job, after: datetime, now: datetime, tried: datetime | None = None) -> list[datetime]:
    """Firings to submit now: all that came since, or of several the last alone, or none but the fresh ones and the one
    that the cluster was asked for in time and did not take."""
    assert job.timetable is not None
    firings = job.timetable.schedule.firings(after, now)
    if job.timetable.missed == "last":
        return firings[-1:]
    if job.timetable.missed == "none":
        return [firing for firing in firings if now - firing <= timedelta(seconds=2 * LOOK) or firing == tried]
    return firings


def tell(job: Job, firing: str, cell: str, text: str) -> None:
    """Tell of a failure whom the job names."""
    notify.tell(job.notify, notify.News("failure", job.name, firing, cell, text, "", 0.0, {}))


def look_for_lost(jobs: Sequence[Job], client: Client, state: State) -> None:
    """Tell, once each, of the jobs' failed submissions that did not do so themselves, as their logs show."""
    named = {job.name: job for job in jobs}
    submitted = client.submitted()
    cells = {(s.job, s.firing) for s in submitted if s.running and not s.step}
    for one in submitted:
        failed = f"{one.id}@{one.started.isoformat() if one.started else ''}"
        if one.status != "FAILED" or one.job not in named or failed in state.failed:
            continue
        if one.step and one.unplaced and (one.job, one.firing) in cells:
            continue  # the cell that sent it submits it anew
        log = client.logs(one.id) or ""
        if not re.search(f"^{notify.LOGGED}failure: ", log, re.MULTILINE):
            why = redact((one.message.splitlines() or ["without a word"])[0])
            tell(named[one.job], one.firing, one.cell, f"{one.id}: failed, and could not say why itself ({why})")
        state.dealt_with(failed)


class JobFiles:
    """The jobs whose schedules are kept.

    Args:
        asked: their files, or names of those in jobs/; none asks for every one in jobs/.

    Raises:
        UserError: one is wrong, two have one name, or none has a schedule.
    """

    def __init__(self, asked: Sequence[str] = ()) -> None:
        self._asked = asked
        self._wrong: dict[str, str] = {}
        for name, count in Counter(Path(name).stem for name in self._names()).items():
            if count > 1:
                same = " ".join(one for one in self._names() if Path(one).stem == name)
                raise UserError(
                    f"--jobs {same}: all are called {name}, and a firing of one would pass for another's; rename them"
                )
        self._known = {Path(name).stem: spec.load(name) for name in self._names()}
        if not any(job.timetable for job in self._known.values()):
            where = f"--jobs {' '.join(asked)}" if asked else f"{spec.FOLDER}/"
            raise UserError(f"{where}: no job there has a schedule, so none would be fired; give one a schedule: key")

    def _names(self) -> Sequence[str]:
        return self._asked or sorted(map(str, spec.FOLDER.glob("*.yaml")))

    def look(self) -> list[Job]:
        """The jobs as their files are now; one that was right before and is wrong or away now stays as it was, and this
        is said once."""
        found, wrong = {}, {}
        for name in self._names():
            job = Path(name).stem
            try:
                found[job] = spec.load(name)
            except (UserError, OSError) as error:
                wrong[job] = str(error)
                if wrong[job] != self._wrong.get(job):
                    print(f"{error}{'; as it was before, it goes on' if job in self._known else ''}", flush=True)
                if job in self._known:
                    found[job] = self._known[job]
        self._known, self._wrong = found, wrong
        return list(found.values())


class WallClock:
    """The real time; sleeping ends at once when a stop is asked for."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def now(self) -> datetime:
        return datetime.now(UTC)

    def sleep(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.stop.is_set() and (left := until - time.monotonic()) > 0:
            self.stop.wait(min(left, 1.0))
        return self.stop.is_set()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line until SIGTERM or Ctrl-C; returns 0, or 2 a user's mistake."""

    def run(arguments: Arguments) -> int:
        folder = Path(arguments.working_dir)
        files = JobFiles(arguments.jobs)
        state = State(Path(arguments.state))
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        with alone(state.path):
            for job in files.look():
                if job.timetable:
                    upcoming = job.timetable.schedule.next(datetime.now(UTC)).astimezone(job.timetable.schedule.zone)
                    print(f"{job.name}: next at {upcoming:%Y-%m-%d %H:%M %Z}", flush=True)
            serve(
                files.look, lambda job, firing: submit(job, firing, Client(arguments.address), folder), state,
                WallClock(stop), lambda text: print(text, flush=True),
                lambda jobs: look_for_lost(jobs, Client(arguments.address), state),
            )  # fmt: skip
        return 0

    return command(Arguments, "jobs.scheduler", run, argv)


if __name__ == "__main__":
    sys.exit(main())
