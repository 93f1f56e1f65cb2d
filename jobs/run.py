"""`python -m jobs.run JOB --firing F --cell C`: one cell of a firing, on the cluster, from start to notification.

Every attempt gets the same run folder, `STORAGE/JOB-FIRING-CELL`, so a second one continues where the first stopped:
its command is not run again where it had succeeded, nor, in place, what came after it and had.

    STORAGE/firings/JOB/FIRING/CELL.json          how the cell ended: whoever ends last finds all of them
                              afterN/CELL.json    how the Nth step after it ended (--in-place)
                              afterN/K.json       and one after all cells, K of which were done
                              after-K.claimed     the cell whose it is to run those after all cells (--in-place)
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec

from jobs import notify, spec
from jobs.cluster import STOPPING, Client
from jobs.command import command
from jobs.entry_points import TRAINS
from jobs.firing import which_firing
from jobs.job import Cell, Event, Job
from jobs.submit import submit_step
from pipeline import cluster
from pipeline.errors import UserError
from pipeline.tracking import TAGS_VARIABLE

GRACE = STOPPING - 15.0  # seconds from asking a command to end to killing it; the rest is for saying how it ended
TOLD = ("knn_top1", "linear_top1", "images_seen", "images_per_second", "loss_last", "alarms")
LINGER = 5.0  # seconds that output may come after a command has ended
LOOK = 5.0  # seconds between two looks at whether what comes after has begun
ALARMS = {
    re.compile(r"warning: (\S+ is \S+, healthy is .*)"): "alarm, no collapse yet: ",
    re.compile(r"(?:warning|failed): (collapse at .*)"): "",
}
"""What pretraining says of a vital sign outside its range, and of a collapse; and how each of them is told."""
FINAL = (2, 130, 143)
"""Exit statuses that trying again would not change: a user's mistake, Ctrl-C, SIGTERM."""


@dataclass(frozen=True)
class Arguments:
    """Run one cell of a job's firing here; `python -m jobs.submit` has a cluster do this."""

    job: str
    """A job file, or the name of one in jobs/."""
    firing: str | None = None
    """Which firing: "scheduled" for the newest of its schedule, or one as in 20261124T013000Z; left open: now."""
    cell: str = ""
    """The cell of the matrix, by name."""
    step: int | None = None
    """Run only so much of what comes after: 1 for the first."""
    set: tuple[str, ...] = ()
    """name=value: arguments that take the place of the file's."""
    after: tuple[str, ...] = ()
    """Submissions to wait for."""
    in_place: bool = False
    """Run what comes after in this process, where the cluster lasts no longer than it (SLURM, a RayJob)."""
    debug: bool = False
    """Show the traceback of an error."""


class Outcome(NamedTuple):
    """How a command ended: exit status, seconds, its last line, and whether its time was up or it was told to stop."""

    status: int
    seconds: float
    last: str
    why: Literal["", "time limit", "stopped"]


class Place(NamedTuple):
    """Where this runs: a firing's cell, its run folder, and the folder in which the firing's cells find each other."""

    firing: str
    cell: Cell
    run: str
    meeting: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status of the cell's command, or of what failed after it."""
    return command(Arguments, "jobs.run", run, argv)


def run(arguments: Arguments) -> int:
    """One cell, what comes after it, and the notifications."""
    job = spec.load(arguments.job, arguments.set)
    firing = which_firing(job, arguments.firing, datetime.now(UTC))
    cell = job.cell(arguments.cell)
    storage = str(job.of(cell).arguments.get("storage") or default_storage())
    place = Place(
        firing, cell, f"{storage}/{job.submission(firing, cell.name)}", f"{storage}/firings/{job.name}/{firing}"
    )
    try:
        spec.load(arguments.job, arguments.set, on_cluster=True)
        if missing := [name for name in job.secrets if not os.environ.get(name)]:
            raise UserError(
                f"{job.path}: {', '.join(missing)} not set here; set it where the cluster's nodes are started"
            )
    except UserError as error:
        tell(job, place, "failure", f"{job.submission(firing, cell.name)}: {error}", 0.0)
        raise
    os.environ.update(job.environment)
    os.environ[TAGS_VARIABLE] = json.dumps({"job": job.name, "firing": firing})
    if arguments.step is not None:
        return follow(job, place, arguments.step - 1)
    before = last_word(place)
    if not before:
        forget(place)
    if arguments.after:
        print(f"waiting for {', '.join(arguments.after)} (overlap: wait)", flush=True)
        Client().wait(arguments.after)

    step = job.of(cell)
    if step.run in TRAINS:
        step = dataclasses.replace(step, arguments={**step.arguments, "run": place.run, "storage": storage})
        if step.resources and not arguments.in_place:  # a cluster of its own has machines of that size, and all of them
            os.environ[cluster.TAKES] = json.dumps(
                {"CPU": step.takes.cpus, "GPU": step.takes.gpus, "memory": step.takes.memory}
            )
    heard = set()

    def listen(line: str) -> None:
        for pattern, prefix in ALARMS.items():
            if (match := pattern.match(line)) and pattern not in heard:
                heard.add(pattern)
                tell(job, place, "collapse", prefix + match[1], time.monotonic() - started)

    started = time.monotonic()
    outcome = before or attempt(step.command(place.run), job, listen)
    if before:
        name = job.submission(firing, cell.name)
        print(f"{name}: was done before, and is not run again; what comes after it goes on", flush=True)
    else:
        meet(job, place, outcome)
        report(job, place, outcome)
    numbers = due(job, place, outcome, in_place=arguments.in_place)
    if not arguments.in_place:
        send(job, place, numbers)
        return outcome.status
    statuses = [follow_once(job, place, number) for number in numbers]
    return next(filter(None, [outcome.status, *statuses]), 0)


def default_storage() -> str:
    """Where runs go: as pretraining itself decides."""
    return str(Path.home() / "ssl-runs" if cluster.in_job() else Path("runs").absolute())


def attempt(words: Sequence[str], job: Job, listen: Callable[[str], None]) -> Outcome:
    """Run a command until it succeeds, as often as the job allows, within its time limit over all attempts."""
    started = time.monotonic()
    for number in range(job.retry.times + 1):
        left = None if job.time_limit is None else job.time_limit - (time.monotonic() - started)
        outcome = execute([sys.executable, *words], left, listen)
        if outcome.status == 0 or outcome.why or outcome.status in FINAL or number == job.retry.times:
            break
        print(f"attempt {number + 1} failed ({outcome.last}); the next in {job.retry.wait:g} s", flush=True)
        time.sleep(job.retry.wait)
    return outcome._replace(seconds=time.monotonic() - started)


def execute(words: Sequence[str], limit: float | None, listen: Callable[[str], None]) -> Outcome:
    """Run a command once; its lines go to standard output and to `listen`.

    At its limit, and on SIGTERM or Ctrl-C to this process, it is asked to end and killed `GRACE` seconds later.
    """
    started = time.monotonic()
    print("$ " + shlex.join(["python", *words[1:]]), flush=True)
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    why: list[Literal["time limit", "stopped"]] = []
    timers: list[threading.Timer] = []

    def end(cause: Literal["time limit", "stopped"]) -> None:
        if why:
            return
        why.append(cause)
        process.terminate()
        timers.append(threading.Timer(GRACE, lambda: _kill(process)))
        timers[-1].start()

    if limit is not None:
        timers.append(threading.Timer(max(0.0, limit), end, ["time limit"]))
        timers[-1].start()
    before = {s: signal.signal(s, lambda *_: end("stopped")) for s in (signal.SIGTERM, signal.SIGINT)}
    last = [""]

    def relay() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            listen(line.strip())
            last[0] = line.strip() or last[0]

    reader = threading.Thread(target=relay, daemon=True)
    reader.start()
    try:
        status = process.wait()
        reader.join(LINGER)
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        _kill(process)  # whatever it left running, which may hold its output open
        reader.join(LINGER)
    if status < 0:
        last[0] = f"killed by {signal.Signals(-status).name}" + (f" after: {last[0]}" if last[0] else "")
    return Outcome(128 - status if status < 0 else status, time.monotonic() - started, last[0], why[0] if why else "")


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def report(job: Job, place: Place, outcome: Outcome, what: str = "") -> None:
    """Tell how a cell, or a step after it, ended; a collapse is told while it happens."""
    name = job.submission(place.firing, place.cell.name) + (f" {what}" if what else "")
    if outcome.why == "stopped":
        return
    if outcome.why == "time limit":
        limit = f"{job.time_limit or 0:g} s"
        text = f"{name}: its time limit of {limit} is up; this firing, submitted --again, continues its checkpoint"
        tell(job, place, "failure", text, outcome.seconds)
    elif outcome.status:
        tell(job, place, "failure", f"{name}: failed with status {outcome.status}: {outcome.last}", outcome.seconds)
    else:
        tell(job, place, "finish", f"{name}: finished in {outcome.seconds:.0f} s", outcome.seconds)


def tell(job: Job, place: Place, event: Event, text: str, seconds: float) -> None:
    """Notify of an event, with what the run's summary knows."""
    summary = read(f"{place.run}/summary.json") or {}
    results = {key: summary[key] for key in TOLD if summary.get(key) is not None}
    news = notify.News(event, job.name, place.firing, place.cell.name, text, place.run, round(seconds, 1), results)
    notify.tell(job.notify, news)


# --- what comes after -----------------------------------------------------------------------------------------------


def done(job: Job, place: Place, outcome: Outcome) -> bool:
    """Whether a cell left something to go on with: it succeeded and, where it trains, there was what to train on."""
    return outcome.status == 0 and (job.step.run not in TRAINS or bool(read(f"{place.run}/summary.json")))


def meet(job: Job, place: Place, outcome: Outcome) -> None:
    """Leave word for the firing's other cells."""
    word = {"run": place.run, "done": done(job, place, outcome), **outcome._asdict()}
    write(f"{place.meeting}/{place.cell.name or 'only'}.json", word)


def last_word(place: Place) -> Outcome | None:
    """How an earlier attempt at this cell ended, where it was done."""
    word = read(f"{place.meeting}/{place.cell.name or 'only'}.json")
    return Outcome(*(word[key] for key in Outcome._fields)) if word and word["done"] else None


def forget(place: Place) -> None:
    """Take back the word of an earlier attempt at this cell."""
    files, path = fsspec.core.url_to_fs(f"{place.meeting}/{place.cell.name or 'only'}.json")
    with contextlib.suppress(FileNotFoundError):
        files.rm(path)


def ended(job: Job, place: Place, *, in_place: bool) -> bool:
    """Whether all of the firing's cells have: each left word or, on a shared cluster, was killed before it could."""
    over = {cell.name for cell in job.cells if read(f"{place.meeting}/{cell.name or 'only'}.json") is not None}
    if not in_place:
        cells = [s for s in Client().submitted(job.name, place.firing) if not s.step]
        over |= {s.cell for s in cells if not s.running}
        over -= {s.cell for s in cells if s.status == "PENDING"}  # its word is that of an earlier attempt
    return over.issuperset(cell.name for cell in job.cells)


def runs(job: Job, place: Place) -> list[str]:
    """Run folders of the firing's cells that are done."""
    words = [read(f"{place.meeting}/{cell.name or 'only'}.json") for cell in job.cells]
    return [str(word["run"]) for word in words if word and word["done"]]


def due(job: Job, place: Place, outcome: Outcome, *, in_place: bool) -> list[int]:
    """Which of the steps after are this cell's to run: those for each cell, and those for all if it ended last.

    Two that end at the same time may both be last: in place one of them has a claim, elsewhere an id is taken once.
    """
    each = [i for i, step in enumerate(job.after) if not step.once and done(job, place, outcome)]
    once = [i for i, step in enumerate(job.after) if step.once]
    last = once and ended(job, place, in_place=in_place) and (found := runs(job, place))
    if last and (not in_place or claim(f"{place.meeting}/after-{len(found)}.claimed", place.cell.name or "only")):
        return each + once
    return each


def claim(address: str, owner: str) -> bool:
    """Whether this cell is the first to create a file, now or in an attempt that was cut off: exclusive creation on a
    disk, a conditional write on S3."""
    files, path = fsspec.core.url_to_fs(address)
    try:
        with files.open(path, "xb") as file:  # not left empty: s3fs writes an empty file unconditionally
            file.write(owner.encode())
    except FileExistsError:
        return bool(files.cat_file(path).decode() == owner)
    return True


def follow(job: Job, place: Place, number: int) -> int:
    """Run a step that comes after; returns its exit status."""
    if not 0 <= number < len(job.after):
        raise UserError(f"{job.path}: has {len(job.after)} steps after it, so no step {number + 1}")
    step = job.after[number]
    outcome = attempt(step.command(place.run, runs(job, place)), job, lambda line: None)
    if outcome.status:
        report(job, place, outcome, f"({step.run} after it)")
    return outcome.status


def follow_once(job: Job, place: Place, number: int) -> int:
    """Run a step that comes after in place, unless an earlier attempt at this firing had it done."""
    step = job.after[number]
    about = len(runs(job, place)) if step.once else place.cell.name or "only"
    address = f"{place.meeting}/after{number + 1}/{about}.json"
    if (read(address) or {}).get("status") == 0:
        print(f"{step.run} after it was done before, and is not run again", flush=True)
        return 0
    status = follow(job, place, number)
    write(address, {"status": status})
    return status


def send(job: Job, place: Place, numbers: Sequence[int]) -> None:
    """Submit steps that come after, with the code this runs from, and stay until each has begun.

    The cluster may be full for longer than Ray lets a job wait: a step that it gave up is submitted anew.
    """
    if not numbers:
        return
    here = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    client = Client()

    def submit(number: int) -> str | None:
        return submit_step(job, place.firing, place.cell, number, client, here.get("working_dir", "."), str(job.path))

    waiting = {name: number for number in numbers if (name := submit(number))}
    while waiting:
        time.sleep(LOOK)
        known = {s.id: s for s in client.submitted(job.name, place.firing) if s.id in waiting}
        lost = [name for name, s in known.items() if s.unplaced]
        client.forget(lost)
        for name in lost:
            submit(waiting[name])
        waiting = {name: waiting[name] for name, s in known.items() if s.unplaced or s.status == "PENDING"}


def write(address: str, value: dict[str, Any]) -> None:
    """Write a JSON file, and the folders that it lies in."""
    with fsspec.open(address, "w", auto_mkdir=True) as file:
        json.dump(value, file)


def read(address: str) -> dict[str, Any] | None:
    """A JSON file, None where there is none."""
    try:
        with fsspec.open(address) as file:
            return dict(json.load(file))
    except (FileNotFoundError, NotADirectoryError):
        return None


if __name__ == "__main__":
    sys.exit(main())
