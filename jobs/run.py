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
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from tyro.conf import Positional

from jobs import notify, spec
from jobs.attempt import Outcome, attempt
from jobs.cluster import Client
from jobs.entry_points import TRAINS
from jobs.firing import which_firing
from jobs.job import Cell, Event, Job, Resources
from jobs.submit import submit_step
from pipeline import cluster
from pipeline.command import command
from pipeline.errors import UserError
from pipeline.tracking import TAGS_VARIABLE

TOLD = ("knn_top1", "linear_top1", "images_seen", "images_per_second", "loss_last", "alarms")
LOOK = 5.0  # seconds between two looks at whether what comes after has begun
ALARMS = {
    re.compile(r"warning: (\S+ is \S+, healthy is .*)"): "alarm, no collapse yet: ",
    re.compile(r"(?:warning|failed): (collapse at .*)"): "",
}
"""What pretraining says of a vital sign outside its range, and of a collapse; and how each of them is told."""


@dataclass(frozen=True)
class Arguments:
    """Run one cell of a job's firing here; `python -m jobs.submit` has a cluster do this."""

    job: Positional[str]
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
        return run_there(job, place, arguments)
    except Exception as error:
        name = job.submission(firing, cell.name)
        tell(job, place, "failure", f"{name}: {str(error) or type(error).__name__}", 0.0)
        raise


def run_there(job: Job, place: Place, arguments: Arguments) -> int:
    """The cell or the step that is asked for; returns its exit status, or that of what failed after it."""
    spec.load(arguments.job, arguments.set, on_cluster=True)
    if missing := [name for name in job.secrets if not os.environ.get(name)]:
        raise UserError(f"{job.path}: {', '.join(missing)} not set here; set it where the cluster's nodes are started")
    os.environ.update(job.environment)
    os.environ[TAGS_VARIABLE] = json.dumps({"job": job.name, "firing": place.firing})
    if arguments.step is not None:
        return follow(job, place, arguments.step - 1)
    before = last_word(place)
    if not before:
        forget(place)
    if arguments.after:
        print(f"waiting for {', '.join(arguments.after)} (overlap: wait)", flush=True)
        Client().wait(arguments.after)

    step = job.of(place.cell)
    if step.run in TRAINS:
        storage = place.run.rpartition("/")[0]
        step = dataclasses.replace(step, arguments={**step.arguments, "run": place.run, "storage": storage})
        if step.resources and not arguments.in_place:  # a cluster of its own has machines of that size, and all of them
            os.environ[cluster.TAKES] = json.dumps(
                {"CPU": step.takes.cpus, "GPU": step.takes.gpus, "memory": step.takes.memory}
            )
    heard = set()

    started = time.monotonic()
    with ThreadPoolExecutor(1) as messenger:  # whoever is slow to be told holds up neither the command nor its output

        def listen(line: str) -> None:
            for pattern, prefix in ALARMS.items():
                if (match := pattern.match(line)) and pattern not in heard:
                    heard.add(pattern)
                    seconds = time.monotonic() - started
                    messenger.submit(tell, job, place, "collapse", prefix + match[1], seconds)

        outcome = before or attempt(step.command(place.run), job, listen)
    if before:
        name = job.submission(place.firing, place.cell.name)
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


def report(job: Job, place: Place, outcome: Outcome, what: str = "") -> None:
    """Tell how a cell, or a step after it, ended; a collapse is told while it happens."""
    name = job.submission(place.firing, place.cell.name) + (f" {what}" if what else "")
    if outcome.why == "stopped":
        return
    if outcome.why == "time limit":
        limit = f"{job.time_limit or 0:g} s"
        way = "continues its checkpoint" if job.step.run in TRAINS and not what else "runs it anew"
        text = f"{name}: its time limit of {limit} is up; this firing, submitted --again, {way}"
        tell(job, place, "failure", text, outcome.seconds)
    elif outcome.status:
        tell(job, place, "failure", f"{name}: failed with status {outcome.status}: {outcome.last}", outcome.seconds)
    else:
        tell(job, place, "finish", f"{name}: finished in {outcome.seconds:.0f} s", outcome.seconds)


def tell(job: Job, place: Place, event: Event, text: str, seconds: float) -> None:
    """Notify of an event, with what the run's summary knows, if that can be read."""
    summary: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # no reason to tell nobody; it may be the reason of the failure
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
    Nothing comes after a cell that was told to stop.
    """
    if outcome.why == "stopped":
        return []
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

    The cluster may be full for longer than Ray lets a job wait: a step that it gave up is submitted anew. A cell that
    holds resources does not stay: what it holds may be all that the step waits for.
    """
    if not numbers:
        return
    here = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    client = Client()

    def submit(number: int) -> str | None:
        return submit_step(job, place.firing, place.cell, number, client, here.get("working_dir", "."), str(job.path))

    waiting = {name: number for number in numbers if (name := submit(number))}
    while waiting and job.holds == Resources(cpus=0):
        time.sleep(LOOK)
        known = {s.id: s for s in client.submitted(job.name, place.firing) if s.id in waiting}
        lost = [name for name, s in known.items() if s.unplaced]
        client.forget(lost)
        for name in lost:
            submit(waiting[name])
        waiting = {name: waiting[name] for name, s in known.items() if s.unplaced or s.status == "PENDING"}


def write(address: str, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all, and the folders that it lies in."""
    from pipeline.training.run_folder import RunFolder  # torch comes with it

    folder, _, name = address.rpartition("/")
    RunFolder(folder).write_json(name, value)


def read(address: str) -> dict[str, Any] | None:
    """A JSON file, None where there is none, or none that is whole."""
    try:
        with fsspec.open(address) as file:
            return dict(json.load(file))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main())
