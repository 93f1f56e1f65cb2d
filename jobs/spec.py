"""What a job is: one small YAML file, read and checked before anything runs.

    run: pretrain                     what `python -m pipeline.…` (or `jobs.…`) is called
    arguments:                        its options, as on the command line; {run} is this cell's run folder,
      data: /data/photos              {runs} those of all cells
    matrix:                           one cell for every combination
      backbone: [resnet50, vit_s16]
      objective: [dino, mae]
    schedule:
      cron: 15 1 * * *                minute, hour, day of month, month, day of week
      time_zone: Europe/Berlin
      overlap: skip                   while the last firing still runs: skip | wait | stop | allow
      missed: last                    after an outage of the scheduler: last | all | none
    workers: 2                        processes that train, as `--workers`; also 2..8
    resources: {cpus: 8, gpus: 1, memory: 32GiB}       of each worker, or of the entry point where there are none
    environment: {NCCL_DEBUG: WARN}
    secrets: [MLFLOW_TRACKING_TOKEN]  names of variables that the cluster must have; values never stand here
    time_limit: 8h
    retry: {times: 2, wait: 5m}
    after:                            with {run}: after each cell; otherwise once, after all
      - run: evaluate
        arguments: {run: "{run}", data: /data/labelled}
    notify: {webhook: $WEBHOOK, command: …, on: [finish, failure, collapse]}
    data_on: cluster                  local paths are the cluster's; left open: they must exist where this is read

Imports no torch: backbones, objectives and options are known by name.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import objectives
import pipeline
from backbones import names
from jobs import located
from jobs.located import Located, Place, nearest
from jobs.schedule import Schedule, parse
from pipeline import config
from pipeline.errors import UserError
from pipeline.redaction import SECRET_NAME, redact

MOST_CELLS = 100
FOLDER = Path("jobs")
KEYS = (
    *("run", "arguments", "matrix", "schedule", "workers", "resources", "environment", "secrets", "time_limit"),
    *("retry", "after", "notify", "data_on"),
)
OVERLAPS = ("skip", "wait", "stop", "allow")
MISSED = ("last", "all", "none")
EVENTS = ("finish", "failure", "collapse")
OWN_ENTRIES = {"arrivals": "jobs.arrivals", "search": "jobs.search", "watch": "jobs.watch"}
TRAINS = ("pretrain", "arrivals")
"""Entry points that take pretraining's options and fill the run folder that `--run` names."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_HELD = re.compile(r"\{(runs?)\}")


@dataclass(frozen=True)
class Resources:
    """cpus and gpus are counts, memory is in bytes; 0 asks for none."""

    cpus: float = 1
    gpus: float = 0
    memory: int = 0


@dataclass(frozen=True)
class Step:
    """One command: an entry point's name, its arguments by name, and what it takes."""

    run: str
    arguments: Mapping[str, Any]
    resources: Resources = Resources()

    @property
    def once(self) -> bool:
        """Whether, as what comes after, it runs once for all cells rather than after each."""
        return "run" not in {match[1] for match in _HELD.finditer(str(list(self.arguments.values())))}

    def command(self, run: str = "", runs: Sequence[str] = ()) -> list[str]:
        """The words after `python`; {run} and {runs} become the given run folders."""
        return ["-m", entry_points()[self.run], *words(self.run, self.arguments, run, runs)]


@dataclass(frozen=True)
class Cell:
    """One combination of the matrix: what is set in it, and its name, "" where there is no matrix."""

    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Timetable:
    """When a job fires; overlap: what happens while the last firing still runs; missed: after an outage."""

    schedule: Schedule
    overlap: Literal["skip", "wait", "stop", "allow"]
    missed: Literal["last", "all", "none"]


@dataclass(frozen=True)
class Retry:
    """How often a failed command is run again, and the seconds in between."""

    times: int = 0
    wait: float = 0


@dataclass(frozen=True)
class Notify:
    """webhook: an address, or $NAME of a variable that holds it; command: for bash; on: events."""

    webhook: str | None = None
    command: str | None = None
    on: tuple[str, ...] = EVENTS


@dataclass(frozen=True)
class Job:
    """A job file, checked. `path` is as it was given, `settings` what `--set` changed in it."""

    name: str
    path: Path
    step: Step
    cells: tuple[Cell, ...]
    workers: int | str | None
    timetable: Timetable | None
    environment: Mapping[str, str]
    secrets: tuple[str, ...]
    time_limit: float | None
    retry: Retry
    after: tuple[Step, ...]
    notify: Notify
    settings: tuple[str, ...] = field(default=())

    @property
    def group(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return config.Config(workers=self.workers or 1).group

    def of(self, cell: Cell) -> Step:
        """The command of one cell."""
        workers = {"workers": self.workers} if self.workers else {}
        return dataclasses.replace(self.step, arguments={**workers, **self.step.arguments, **cell.values})

    def cell(self, name: str) -> Cell:
        """The cell of a name. Raises `UserError`."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise UserError(f"{self.path}: has no cell {name!r}{nearest(name, [cell.name for cell in self.cells])}")

    def submission(self, firing: str, cell: str, step: int | None = None) -> str:
        """The id under which a cell's firing, or what comes after it, is submitted; the same every time."""
        after = "" if step is None else f"after{step + 1}"
        return "-".join(part for part in (self.name, firing, cell, after) if part)


def find(job: str) -> Path:
    """The file of a job, given as a path or as the name of one in `jobs/`."""
    path = Path(job)
    if path.suffix in (".yaml", ".yml") or "/" in job:
        if not path.is_file():
            raise UserError(f"{job}: no such file{_here(path.parent)}")
        return path
    if (FOLDER / f"{job}.yaml").is_file():
        return FOLDER / f"{job}.yaml"
    raise UserError(f"{job}: no such job{nearest(job, sorted(p.stem for p in FOLDER.glob('*.yaml')) or ['none'])}")


def _here(folder: Path) -> str:
    found = sorted(str(path) for path in folder.glob("*.yaml")) if folder.is_dir() else []
    return f"; there are {', '.join(found)}" if found else ""


def load(job: str | Path, settings: Sequence[str] = (), *, on_cluster: bool = False) -> Job:
    """Read and check a job file.

    Args:
        job: a path, or the name of a file in `jobs/`.
        settings: "name=value" for arguments, which take the place of the file's and of a matrix' axis.
        on_cluster: whether this is the cluster, where paths under `data_on: cluster` must exist.

    Raises:
        UserError: one sentence that names the file, the line, and the way out.
    """
    path = find(str(job))
    if not _NAME.fullmatch(path.stem):
        raise UserError(f"{path}: a job is named by its file: up to 40 small letters, digits and hyphens, then .yaml")
    file = located.read(path.read_text(encoding="utf-8"), str(path))
    file.known((), KEYS)
    job_file = _with(file, settings)
    secretless(job_file)
    step = read_step(job_file, (), extra=KEYS)
    after = job_file.at(("after",)) or []
    if not isinstance(after, list):
        job_file.fail(("after",), "after must be a list of steps, each with run and arguments")
    built = Job(
        name=path.stem,
        path=path,
        step=step,
        cells=read_matrix(job_file),
        workers=read_workers(job_file),
        timetable=read_schedule(job_file),
        environment=read_environment(job_file),
        secrets=read_secrets(job_file),
        time_limit=duration(job_file, ("time_limit",)),
        retry=read_retry(job_file),
        after=tuple(read_step(job_file, ("after", i), extra=()) for i in range(len(after))),
        notify=read_notify(job_file),
        settings=tuple(settings),
    )
    if built.workers and step.run not in TRAINS:
        job_file.fail(("workers",), f"workers: {step.run} is one process; give resources for it")
    where = job_file.at(("data_on",))
    if where not in (None, "cluster"):
        job_file.fail(("data_on",), f"data_on {where!r}: must be cluster, or be left out")
    check_arguments(job_file, built, paths=on_cluster or where is None)
    return built


def _with(file: Located, settings: Sequence[str]) -> Located:
    """The file with some arguments set from outside."""
    if not settings:
        return file
    arguments, matrix = dict(file.at(("arguments",)) or {}), dict(file.at(("matrix",)) or {})
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting}: must be name=value, as in --set epochs=1")
        matrix.pop(key, None)
        arguments[key] = located.plain(value)
    return dataclasses.replace(file, value={**file.value, "arguments": arguments, "matrix": matrix or None})


def secretless(file: Located, place: Place = ()) -> None:
    """Refuse values that look like secrets: the file is committed, and what is made of it is shown."""
    value = file.at(place)
    if isinstance(value, Mapping):
        for key in value:
            secretless(file, (*place, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            secretless(file, (*place, i))
    elif isinstance(value, str):
        named = place[0] == "environment" and re.fullmatch(SECRET_NAME, str(place[-1]), re.IGNORECASE) and value
        if named or redact(value) != value:
            file.fail(
                place, f"{place[-1]} looks like a secret; name its variable under secrets: and set it on the cluster"
            )


def read_step(file: Located, place: Place, extra: Sequence[str]) -> Step:
    """A command: `run`, `arguments` and `resources` at a place."""
    file.known(place, extra or ("run", "arguments", "resources"))
    run = file.at((*place, "run"))
    entries = entry_points()
    if not isinstance(run, str):
        file.fail((*place, "run"), f"run is missing; there are {', '.join(entries)}")
    if run not in entries:
        file.fail((*place, "run"), f"run {run!r}: no such entry point{nearest(run, list(entries))}")
    arguments = file.at((*place, "arguments")) or {}
    if not isinstance(arguments, Mapping):
        file.fail((*place, "arguments"), "arguments must be a mapping of the command's options")
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
        flat |= {str(name).replace("-", "_"): v for name, v in inner.items()}
    return Step(run, flat, read_resources(file, (*place, "resources")))


def read_resources(file: Located, place: Place) -> Resources:
    """cpus, gpus and memory at a place."""
    file.known(place, ("cpus", "gpus", "memory"))
    memory = file.at((*place, "memory"))
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|[KMG]B|)", str(memory)) if memory is not None else None
    if memory is not None and not match:
        file.fail((*place, "memory"), f"memory {memory!r}: must be a size such as 512MiB or 32GiB")
    return Resources(
        cpus=number(file, (*place, "cpus"), least=0) or (1 if file.at((*place, "cpus")) is None else 0),
        gpus=number(file, (*place, "gpus"), least=0) or 0,
        memory=int(float(match[1]) * _BYTES[match[2]]) if match else 0,
    )


def read_matrix(file: Located) -> tuple[Cell, ...]:
    """Every combination of the matrix, in the file's order, its last axis running fastest."""
    matrix = file.at(("matrix",))
    if matrix is None:
        return (Cell("", {}),)
    if not isinstance(matrix, Mapping):
        file.fail(("matrix",), "matrix must be a mapping from an argument to a list of its values")
    count = 1
    for key, values in matrix.items():
        if not isinstance(values, list) or not values or any(isinstance(v, list | Mapping) for v in values):
            file.fail(("matrix", key), f"matrix {key}: must be a list of values, as in [resnet50, vit_s16]")
        for i, value in enumerate(values):
            if i < MOST_CELLS and value in values[:i]:
                file.fail(("matrix", key, i), f"matrix {key}: {value} is given twice; keep one")
        if key in (file.at(("arguments",)) or {}):
            file.fail(("matrix", key), f"{key} is set under arguments too; keep one of the two")
        count *= len(values)
    if count > MOST_CELLS:
        sizes = " × ".join(str(len(values)) for values in matrix.values())
        file.fail(
            ("matrix",), f"a matrix of {sizes} = {count:,} cells is more than {MOST_CELLS}; split it into several jobs"
        )
    axes = [[(str(key).replace("-", "_"), value) for value in values] for key, values in matrix.items()]
    cells = [Cell(cell_name([str(value) for _, value in pairs]), dict(pairs)) for pairs in itertools.product(*axes)]
    return tuple(cells)


def cell_name(values: Sequence[str]) -> str:
    """A name for a cell that is fit for ids and paths; what had to be changed in it is told apart by a hash."""
    plain = "-".join(values)
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", plain)[:60]
    if safe == plain and not any("-" in value for value in values):
        return safe
    return f"{safe}-{hashlib.sha256(repr(list(values)).encode()).hexdigest()[:8]}"


def read_schedule(file: Located) -> Timetable | None:
    """The schedule, None where there is none."""
    schedule = file.known(("schedule",), ("cron", "time_zone", "overlap", "missed"))
    if not schedule:
        return None
    line, zone = schedule.get("cron"), schedule.get("time_zone")
    try:
        cron = parse(str(line))
    except ValueError as error:
        file.fail(("schedule", "cron"), f"cron line {str(line)!r} {error}")
    if not isinstance(zone, str):
        file.fail(("schedule", "time_zone"), "a schedule needs a time_zone, as in Europe/Berlin or UTC")
    try:
        known_zone = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        from zoneinfo import available_timezones

        file.fail(("schedule", "time_zone"), f"time_zone {zone!r}: unknown{_near_zone(zone, available_timezones())}")
    for key, choices in (("overlap", OVERLAPS), ("missed", MISSED)):
        if schedule.get(key, choices[0]) not in choices:
            file.fail(("schedule", key), f"{key} {schedule[key]!r}: must be one of {', '.join(choices)}")
    return Timetable(Schedule(cron, known_zone), schedule.get("overlap", "skip"), schedule.get("missed", "last"))


def _near_zone(zone: str, known: set[str]) -> str:
    hint = nearest(zone, sorted(known))
    return hint if hint.startswith("; did") else "; write it as in Europe/Berlin or UTC"


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
    return {str(key): str(value) for key, value in environment.items()}


def read_secrets(file: Located) -> tuple[str, ...]:
    """Names of variables; their values live on the cluster."""
    secrets = file.at(("secrets",)) or []
    if not isinstance(secrets, list) or not all(_VARIABLE.fullmatch(str(name)) for name in secrets):
        file.fail(
            ("secrets",), "secrets must be a list of names of variables, as in [MLFLOW_TRACKING_TOKEN]; no values"
        )
    return tuple(map(str, secrets))


def read_retry(file: Located) -> Retry:
    """How often to try again."""
    file.known(("retry",), ("times", "wait"))
    times = number(file, ("retry", "times"), least=0) or 0
    return Retry(int(times), duration(file, ("retry", "wait")) or 0.0)


def read_notify(file: Located) -> Notify:
    """Whom to tell of what."""
    notify = file.known(("notify",), ("webhook", "command", "on"))
    webhook, command, on = notify.get("webhook"), notify.get("command"), notify.get("on", list(EVENTS))
    if webhook is not None and not re.fullmatch(r"\$[A-Za-z_]\w*|https?://\S+", str(webhook)):
        file.fail(
            ("notify", "webhook"),
            f"webhook {webhook!r}: must be an http(s) address, or $NAME of a variable that holds it",
        )
    if command is not None and not isinstance(command, str):
        file.fail(("notify", "command"), "notify's command must be one line for bash; it finds JOB_EVENT, JOB_TEXT …")
    if not isinstance(on, list):
        file.fail(("notify", "on"), f"on must be a list of {', '.join(EVENTS)}")
    for i, event in enumerate(on):
        if event not in EVENTS:
            file.fail(("notify", "on", i), f"event {event!r}: unknown{nearest(str(event), EVENTS)}")
    return Notify(webhook, command, tuple(on))


def read_workers(file: Located) -> int | str | None:
    """How many workers train, as `--workers` takes it."""
    value = file.at(("workers",))
    if value is None:
        return None
    try:
        fewest, most = config.Config(workers=value).group
    except UserError:
        fewest, most = 0, 0
    if not 1 <= fewest <= most:
        file.fail(("workers",), f"workers {value!r}: must be a whole number, at least 1, or two as in 2..8")
    return value if isinstance(value, int) else str(value)


def number(file: Located, place: Place, *, least: float) -> Any:
    """A number at a place, None where nothing is; whole where it is a count of things."""
    value = file.at(place)
    if value is None:
        return None
    whole = place[-1] == "times"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value < least:
        file.fail(place, f"{place[-1]} {value!r}: must be a {'whole ' if whole else ''}number, at least {least:g}")
    return value


def duration(file: Located, place: Place) -> float | None:
    """Seconds at a place, written as in 90s, 30m, 8h, 2d."""
    value = file.at(place)
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", str(value))
    if not match:
        file.fail(place, f"{place[-1]} {value!r}: must be a time such as 90s, 30m, 8h or 2d")
    return float(match[1]) * _SECONDS[match[2]]


# --- commands -------------------------------------------------------------------------------------------------------


def entry_points() -> dict[str, str]:
    """What a job can run: name → module. Found in the sources, so nothing is imported."""
    folder = Path(pipeline.__path__[0])
    found = [path.stem for path in sorted(folder.glob("*.py")) if 'if __name__ == "__main__"' in path.read_text()]
    return {name: f"pipeline.{name}" for name in found} | OWN_ENTRIES


def words(run: str, arguments: Mapping[str, Any], folder: str = "", folders: Sequence[str] = ()) -> list[str]:
    """Arguments by name as words of the command line; first, without their names, those that the entry point reads
    so."""
    known = _options(run)
    module = importlib.import_module(entry_points()["pack" if run in TRAINS else run])
    bare = any(mark in inspect.getsource(module) for mark in ("PositionalRequiredArgs", "from jobs.command import"))
    unnamed = _unnamed(module)
    positional: list[str] = []
    named: list[str] = []
    for key, value in arguments.items():
        if value is None:
            continue
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool) and (not known or isinstance(known.get(key), bool)):
            named.append(option if value else option.replace("--", "--no-", 1))
            continue
        given = [str(v) for v in (value if isinstance(value, list) else [value])]
        given = [w for word in given for w in (folders if word == "{runs}" else [word.replace("{run}", folder)])]
        if key in unnamed or (bare and known.get(key) is dataclasses.MISSING):
            positional += given
        elif len(given) == 1 and given[0].startswith("-"):
            named.append(f"{option}={given[0]}")
        else:
            named += [option, *given]
    return [*positional, *named]


def _unnamed(module: Any) -> set[str]:
    """The options that an entry point takes without their names, whether or not they have a default."""
    import tyro

    (mark,) = get_args(tyro.conf.Positional[str])[1:]
    hints = get_type_hints(getattr(module, "Arguments", object), include_extras=True)
    return {name for name, hint in hints.items() if mark in getattr(hint, "__metadata__", ())}


def _options(run: str) -> dict[str, Any]:
    """The options of an entry point with their defaults, MISSING where there is none; empty where it does not say."""
    if run in TRAINS:
        return {f.name: f.default for f in dataclasses.fields(config.Config)}
    module = importlib.import_module(entry_points()[run])
    if not hasattr(module, "Arguments"):
        return {}
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(module.Arguments)
    }


def check_arguments(file: Located, job: Job, *, paths: bool) -> None:
    """Check every cell's command as the command itself would, and what comes after it by the names of its options."""
    for key in ("run", "resume"):
        if job.step.run in TRAINS and key in {**job.step.arguments, **job.cells[0].values}:
            file.fail(_place(file, key), f"{key} is the job's own: each firing and cell has a run folder of its name")
    for cell in job.cells:
        step = job.of(cell)
        _check_names(file, step, ("arguments",), cell)
        if step.run in TRAINS:
            _check_pretraining(file, step, cell, paths=paths)
        elif paths:
            _check_paths(file, step.arguments, ("arguments",))
    for i, step in enumerate(job.after):
        _check_names(file, step, ("after", i, "arguments"))
        if paths:
            _check_paths(file, step.arguments, ("after", i, "arguments"))
        if step.run in TRAINS:
            file.fail(("after", i, "run"), f"{step.run} cannot come after a job; make it a job of its own")


def _check_names(file: Located, step: Step, place: Place, cell: Cell | None = None) -> None:
    known = _options(step.run)
    if step.run in TRAINS:
        for key, check in (("backbone", names.resolve), ("objective", _objective)):
            if key in step.arguments:
                try:
                    check(str(step.arguments[key]))
                except (names.UnknownBackbone, UserError) as error:
                    file.fail(_place(file, key, step.arguments[key]), str(error))
        return
    if not known:
        return
    for key in step.arguments:
        if key not in known:
            where = _place(file, key, step.arguments[key]) if cell else (*place, key)
            file.fail(where, f"{step.run} has no option {key!r}{nearest(key, [k for k in known if k != 'debug'])}")
    for key, default in known.items():
        if default is dataclasses.MISSING and key not in step.arguments:
            file.fail(place, f"{step.run} needs the argument {key}")


def _objective(name: str) -> None:
    if name not in objectives.NAMES:
        raise UserError(f"objective {name!r} is not known{nearest(name, objectives.NAMES)}")


def _check_paths(file: Located, arguments: Mapping[str, Any], place: Place) -> None:
    for key in ("data", "val_data"):
        value = arguments.get(key)
        if isinstance(value, str) and not _exists(value):
            file.fail((*place, key), f"{key} {value}: {MISSING_DATA}")


MISSING_DATA = "no such file or folder here; correct it, or where only the cluster's nodes have it say data_on: cluster"


def _exists(address: str) -> bool:
    elsewhere = "://" in address or "{run" in address or address.startswith("$")
    return elsewhere or address.split(":")[0] == "embedded" or Path(address).exists()


def _check_pretraining(file: Located, step: Step, cell: Cell, *, paths: bool) -> None:
    """Let pretraining's own parser read a cell's command; say what it says with the line it is about."""
    for key in ("data", "val_data"):
        value = step.arguments.get(key)
        if paths and isinstance(value, str) and not _exists(value):
            file.fail(_place(file, key, value), f"{key} {value}: {MISSING_DATA}")
    given = {k: v for k, v in step.arguments.items() if k not in ("data", "val_data")}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            config.parse(words(step.run, given))
    except UserError as error:
        message = str(error)
    except SystemExit:
        message = _told(said.getvalue())
    else:
        return
    match = re.search(r"--(?:no-)?([a-z][\w.-]*)", message)
    key = match[1].replace("-", "_") if match else "run"
    in_cell = f" (in the cell {cell.name})" if cell.name and not _place(file, key) else ""
    file.fail(_place(file, key, step.arguments.get(key)), message.removeprefix("--") + in_cell)


def _told(box: str) -> str:
    """The sentence in the box that tyro draws about a mistake."""
    lines = [line.strip("│ ╭╮╰╯─") for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    match = re.search(r"--([a-z][\w.-]*).*?from \['?(.*?)'?\]", text)
    if match:
        return f"--{match[1]} {match[2]}: is no value for it; `python -m pipeline.pretrain --help` says what is"
    return re.split(r"Argument helptext|For full helptext", text)[0].strip() or "is refused by the command"


def _place(file: Located, key: str, value: Any = None) -> Place:
    """Where an argument is set: in the matrix (at the value), under arguments (also nested), else nowhere."""
    for spelt in (key, key.replace("_", "-")):
        if isinstance(file.at(("matrix",)), Mapping) and spelt in file.at(("matrix",)):
            values = file.at(("matrix", spelt))
            return ("matrix", spelt, values.index(value)) if value in values else ("matrix", spelt)
        place: Place = ("arguments", spelt)
        if place in file.lines:
            return place
    group, _, option = key.partition(".")
    for spelt in (option, option.replace("_", "-")):
        if ("arguments", group, spelt) in file.lines:
            return ("arguments", group, spelt)
    return ("workers",) if key == "workers" else ()


# --- firings --------------------------------------------------------------------------------------------------------

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
