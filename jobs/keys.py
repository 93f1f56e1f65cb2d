"""The keys of a job file: each `read_…` takes one of them, and says by file and line what is wrong with it.

Options may be spelt with hyphens, as on the command line; `named` gives them the one name that they are known by.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from jobs.entry_points import TRAINS, entry_points
from jobs.job import Cell, Event, Missed, Notify, Overlap, Resources, Retry, Step, Timetable, cell_name
from jobs.located import Located, Place
from jobs.schedule import Schedule, parse
from pipeline import config
from pipeline.arguments import nearest
from pipeline.errors import UserError

MOST_CELLS = 100
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


def named(key: Any) -> str:
    """The name of an option, however it is spelt."""
    return str(key).replace("-", "_")


def read_step(file: Located, place: Place, keys: Sequence[str] = ("run", "arguments", "resources")) -> Step:
    """A command: `run`, `arguments` and `resources` at a place, where `keys` may stand."""
    file.known(place, keys)
    run = file.at((*place, "run"))
    entries = entry_points()
    if run is None:
        file.fail((*place, "run"), f"run is missing; there are {', '.join(entries)}")
    if not isinstance(run, str) or run not in entries:
        file.fail((*place, "run"), f"run {run!r}: no such entry point{nearest(str(run), list(entries))}")
    arguments = file.at((*place, "arguments")) or {}
    if not isinstance(arguments, Mapping):
        file.fail((*place, "arguments"), "arguments must be a mapping of the command's options")
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        here = (*place, "arguments", key)
        if key.startswith("-"):
            file.fail(here, f"{key}: write {key.lstrip('-')}, without the dashes of the command line")
        inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
        for name, given in inner.items():
            if named(name) in flat and here not in file.given:
                file.fail(here, f"{key} is given twice, spelt in two ways; keep one")
            if given in (None, ""):
                file.fail(here, f"{name} has no value; give it one, or leave it out")
            flat[named(name)] = given
    resources = read_resources(file, (*place, "resources"))
    if run in TRAINS and resources:
        if not 1 <= resources.cpus == int(resources.cpus):
            file.fail((*place, "resources", "cpus"), f"cpus {resources.cpus}: a worker has whole cores, at least 1")
        if resources.gpus not in (0, 1):
            file.fail((*place, "resources", "gpus"), f"gpus {resources.gpus}: a worker has one GPU; give more workers")
    return Step(run, flat, resources)


def read_resources(file: Located, place: Place) -> Resources | None:
    """cpus, gpus and memory at a place, None where none are given."""
    given = file.known(place, ("cpus", "gpus", "memory"))
    if not given:
        return None
    memory = given.get("memory")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|[KMG]B|)", "0" if memory is None else str(memory))
    if not match:
        file.fail((*place, "memory"), f"memory {memory!r}: must be a size such as 512MiB or 32GiB")
    return Resources(
        cpus=number(file, (*place, "cpus"), 1),
        gpus=number(file, (*place, "gpus"), 0),
        memory=int(float(match[1]) * _BYTES[match[2]]),
    )


def read_matrix(file: Located, step: Step) -> tuple[Cell, ...]:
    """Every combination of the matrix, in the file's order, its last axis running fastest."""
    matrix = file.at(("matrix",))
    if matrix is None:
        return (Cell("", {}),)
    if not isinstance(matrix, Mapping):
        file.fail(("matrix",), "matrix must be a mapping from an argument to a list of its values")
    for key, values in matrix.items():
        if not isinstance(values, list) or not values or any(isinstance(v, list | Mapping) for v in values):
            file.fail(("matrix", key), f"matrix {key}: must be a list of values, as in [resnet50, vit_s16]")
        for i, value in enumerate(values[:MOST_CELLS]):
            if str(value) in map(str, values[:i]):
                file.fail(("matrix", key, i), f"matrix {key}: {value} is given twice; keep one")
        if named(key) in step.arguments:
            file.fail(("matrix", key), f"{key} is set under arguments too; keep one of the two")
    count = math.prod(map(len, matrix.values()))
    if count > MOST_CELLS:
        sizes = " × ".join(str(len(values)) for values in matrix.values())
        file.fail(
            ("matrix",), f"a matrix of {sizes} = {count:,} cells is more than {MOST_CELLS}; split it into several jobs"
        )
    names = [named(key) for key in matrix]
    return tuple(
        Cell(cell_name([str(value) for value in values]), dict(zip(names, values)))
        for values in itertools.product(*matrix.values())
    )


def read_schedule(file: Located) -> Timetable | None:
    """The schedule, None where there is none."""
    schedule = file.known(("schedule",), ("cron", "time_zone", "overlap", "missed"))
    if not schedule:
        return None
    line, zone = schedule.get("cron"), schedule.get("time_zone")
    if not isinstance(line, str):
        file.fail(("schedule", "cron"), 'a schedule needs a cron line, as in "15 1 * * *"')
    try:
        cron = parse(line)
    except ValueError as error:
        file.fail(("schedule", "cron"), f"cron line {line!r} {error}")
    if not isinstance(zone, str):
        file.fail(("schedule", "time_zone"), "a schedule needs a time_zone, as in Europe/Berlin or UTC")
    try:
        known_zone = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        hint = nearest(zone, sorted(available_timezones()))
        hint = hint if hint.startswith("; did") else "; write it as in Europe/Berlin or UTC"
        file.fail(("schedule", "time_zone"), f"time_zone {zone!r}: unknown{hint}")
    for key, choices in (("overlap", get_args(Overlap)), ("missed", get_args(Missed))):
        if schedule.get(key, choices[0]) not in choices:
            file.fail(("schedule", key), f"{key} {schedule[key]!r}: must be one of {', '.join(choices)}")
    return Timetable(Schedule(cron, known_zone), schedule.get("overlap", "skip"), schedule.get("missed", "last"))


def read_workers(file: Located, step: Step) -> int | str | None:
    """How many workers train, as `--workers` takes it; what stands under arguments goes first. None where nothing is
    said, or each cell has its own."""
    inside, axis = ("arguments", "workers"), ("matrix", "workers")
    place = inside if step.run in TRAINS and file.at(inside) is not None else ("workers",)
    value = file.at(place)
    if value is not None and step.run not in TRAINS:
        file.fail(place, f"workers: {step.run} is one process; give resources for it")
    of_cells = file.at(axis) or []
    if value is not None and of_cells:
        file.fail(axis, "workers is set outside the matrix too; keep one of the two")
    for where, given in [(place, value)] if value is not None else [((*axis, i), v) for i, v in enumerate(of_cells)]:
        try:
            fewest, most = config.Config(workers=given).group
        except UserError:
            fewest, most = 0, 0
        if not 1 <= fewest <= most:
            file.fail(where, f"workers {given!r}: must be a whole number, at least 1, or two as in 2..8")
    return value if value is None or isinstance(value, int) else str(value)


def read_environment(file: Located) -> dict[str, str]:
    """Plain variables by name."""
    environment = file.at(("environment",)) or {}
    if not isinstance(environment, Mapping):
        file.fail(("environment",), "environment must be a mapping of variables to values")
    for key, value in environment.items():
        if not _VARIABLE.fullmatch(str(key)):
            file.fail(("environment", key), f"environment {key!r}: is no name of a variable")
        if isinstance(value, Mapping | list) or value is None:
            file.fail(("environment", key), f"environment {key}: must be one value")
    written = {True: "true", False: "false"}
    return {str(key): written[v] if isinstance(v, bool) else str(v) for key, v in environment.items()}


def read_secrets(file: Located) -> tuple[str, ...]:
    """Names of variables; their values live on the cluster."""
    secrets = file.at(("secrets",)) or []
    if not isinstance(secrets, list) or not all(isinstance(s, str) and _VARIABLE.fullmatch(s) for s in secrets):
        file.fail(
            ("secrets",), "secrets must be a list of names of variables, as in [MLFLOW_TRACKING_TOKEN]; no values"
        )
    return tuple(map(str, secrets))


def read_retry(file: Located) -> Retry:
    """How often to try again."""
    file.known(("retry",), ("times", "wait"))
    return Retry(number(file, ("retry", "times"), 0, whole=True), duration(file, ("retry", "wait")) or 0.0)


def read_after(file: Located) -> tuple[Step, ...]:
    """What comes after."""
    after = file.at(("after",)) or []
    if not isinstance(after, list):
        file.fail(("after",), "after must be a list of steps, each with run and arguments")
    return tuple(read_step(file, ("after", i)) for i in range(len(after)))


def read_notify(file: Located) -> Notify:
    """Whom to tell of what."""
    events = get_args(Event)
    notify = file.known(("notify",), ("webhook", "command", "on"))
    webhook, command, on = notify.get("webhook"), notify.get("command"), notify.get("on", list(events))
    if webhook is not None and not re.fullmatch(r"\$[A-Za-z_]\w*|https?://\S+", str(webhook)):
        file.fail(
            ("notify", "webhook"),
            f"webhook {webhook!r}: must be an http(s) address, or $NAME of a variable that holds it",
        )
    if command is not None and not isinstance(command, str):
        file.fail(("notify", "command"), "notify's command must be one line for bash; it finds JOB_EVENT, JOB_TEXT …")
    if not isinstance(on, list):
        file.fail(("notify", "on"), f"on must be a list of {', '.join(events)}")
    for i, event in enumerate(on):
        if event not in events:
            file.fail(("notify", "on", i), f"event {event!r}: unknown{nearest(str(event), events)}")
    return Notify(webhook, command, tuple(on))


def number(file: Located, place: Place, otherwise: int, *, whole: bool = False) -> Any:
    """A number at a place."""
    value = file.at(place)
    if value is None:
        return otherwise
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < math.inf:
        file.fail(place, f"{place[-1]} {value!r}: must be a {'whole ' if whole else ''}number, at least 0")
    return value


def duration(file: Located, place: Place) -> float | None:
    """Seconds at a place, written as in 90s, 30m, 8h, 2d."""
    value = file.at(place)
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", str(value))
    if not match or (not float(match[1]) and place == ("time_limit",)):
        file.fail(place, f"{place[-1]} {value!r}: must be a time such as 90s, 30m, 8h or 2d")
    return float(match[1]) * _SECONDS[match[2]]
