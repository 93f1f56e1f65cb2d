"""Arguments of a job against what its commands really take: options, backbones and objectives, data that is there.

Pretraining's own parser reads the command of every cell, so that what it would say on the cluster is said here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import objectives
from backbones import names
from jobs import search
from jobs.entry_points import TRAINS, entry_points, options, parse, required, words
from jobs.job import Cell, Job, Step
from jobs.keys import named
from jobs.located import Located, Place
from pipeline import config, recipes
from pipeline.arguments import nearest
from pipeline.errors import UserError
from pipeline.evaluation import NAMES

DATA = ("data", "val_data")


def check(file: Located, job: Job, *, paths: bool) -> None:
    """Check the command of every cell, and what comes after. `paths`: whether local data must exist here.

    Raises:
        UserError: names the file, the line, and the way out.
    """
    for cell in job.cells:
        step = job.of(cell)
        _check_folders(file, step)
        if step.run not in TRAINS:
            _check_options(file, step)
        if paths:
            _check_paths(file, step)
        if step.run == "search":
            _check_search(file, step, paths=paths)
        if step.run in TRAINS:
            _check_pretraining(file, step, cell)
    for i, step in enumerate(job.after):
        if step.run in TRAINS:
            file.fail(("after", i, "run"), f"{step.run} cannot come after a job; make it a job of its own")
        _check_folders(file, step, ("after", i))
        _check_options(file, step, ("after", i))
        if paths:
            _check_paths(file, step, ("after", i))
        if step.run == "search":
            _check_search(file, step, ("after", i), paths=paths)


def _check_folders(file: Located, step: Step, around: Place = ()) -> None:
    """Whether what stands in braces will be replaced."""
    for key, value in step.arguments.items():
        for word in map(str, value if isinstance(value, list) else [value]):
            where = _place(file, key, value, around)
            for name in re.findall(r"(?<!\$)\{(\w+)\}", word):
                if name not in ("run", "runs"):
                    file.fail(where, f"{key} {word}: nothing is called {{{name}}}; there are {{run}} and {{runs}}")
                if name == "runs" and not around:
                    file.fail(where, f"{key} {word}: {{runs}} are there for what comes after; here there is {{run}}")
                if name == "runs" and word != "{runs}":
                    file.fail(where, f"{key} {word}: {{runs}} are several words, and stand alone")


def _check_options(file: Located, step: Step, around: Place = ()) -> None:
    """Whether an entry point has the options that are given, takes their values, and is given those that it needs."""
    if not (known := options(step.run)):
        return
    for key, value in step.arguments.items():
        if key not in known:
            hint = nearest(key, [name for name in known if name != "debug"])
            file.fail(_place(file, key, value, around), f"{step.run} has no option {key!r}{hint}")
    for key in sorted(required(step.run) - set(step.arguments)):
        file.fail((*around, "arguments"), f"{step.run} needs the argument {key}")
    protocols = step.arguments.get("protocols", []) if "protocols" in known else []
    for name in protocols if isinstance(protocols, list) else [protocols]:
        if name not in NAMES:
            file.fail(_place(file, "protocols", name, around), f"protocol {name!r}: unknown{nearest(str(name), NAMES)}")
    _check_values(file, step, step.arguments, around)


def _check_paths(file: Located, step: Step, around: Place = ()) -> None:
    for key in DATA:
        value = step.arguments.get(key)
        _one_value(file, step, key, around)
        if value is not None:
            _check_path(file, key, str(value), _place(file, key, value, around))


def _check_path(file: Located, key: str, address: str, place: Place) -> None:
    if not _exists(address):
        file.fail(
            place,
            f"{key} {address}: no such file or folder here; correct it, or where only the cluster's nodes have it "
            "say data_on: cluster",
        )


def _one_value(file: Located, step: Step, key: str, around: Place = ()) -> None:
    if isinstance(value := step.arguments.get(key), list):
        file.fail(_place(file, key, around=around), f"{key} {value}: is one value; several go under matrix")


def _exists(address: str) -> bool:
    elsewhere = "://" in address or "{run" in address or address.startswith("$")
    return elsewhere or recipes.generated(address) or Path(address).exists()


def _check_pretraining(file: Located, step: Step, cell: Cell) -> None:
    """Let pretraining's own parser read a cell's command; say what it says with the line it is about."""
    given = dict(step.arguments)
    for key in ("run", "resume"):
        if key in given:
            file.fail(_place(file, key), f"{key} is the job's own: each firing and cell has a run folder of its name")
    for key in ("backbone", "objective"):
        _one_value(file, step, key)
    if "help" in given:
        file.fail(_place(file, "help"), "help: no such option of a job")
    try:
        names.resolve(str(given.get("backbone", config.Config.backbone)))
    except names.UnknownBackbone as error:
        file.fail(_place(file, "backbone", given["backbone"]), str(error))
    data = str(given.get("data", config.Config.data))
    objective = given["objective"] = str(given.get("objective", recipes.objective_for(data)))
    if objective not in objectives.NAMES:
        hint = nearest(objective, objectives.NAMES)
        file.fail(_place(file, "objective", objective), f"objective {objective!r} is not known{hint}")

    _check_values(file, step, {k: v for k, v in given.items() if k not in DATA}, cell=cell.name)


def _check_search(file: Located, step: Step, around: Place = (), *, paths: bool) -> None:
    """Let pretraining's own parser read what the trials of a search share, and the ends or the values of each axis; say
    what it says with the line of that entry."""

    def entries(key: str) -> list[tuple[Place, str]]:
        given = step.arguments.get(key, [])
        place = _place(file, key, given, around)
        return [((*place, i), str(text)) for i, text in enumerate(given if isinstance(given, list) else [given])]

    shared: dict[str, str] = {}
    places: dict[str, Place] = {}
    for place, text in entries("settings"):
        name, equals, value = text.partition("=")
        if not equals:
            file.fail(place, f"settings {text}: must be name=value")
        if paths and name in DATA:
            _check_path(file, name, value, place)
        shared[named(name)], places[named(name)] = value, place
    objective = recipes.objective_for(shared.get("data", config.Config.data))
    shared = {"objective": objective, **{k: v for k, v in shared.items() if k not in DATA}, "engine": "local"}
    if refused := _refused("pretrain", shared):
        file.fail(places.get(refused[0], around), refused[1])
    for place, text in entries("space"):
        try:
            name, drawn = search.axis(text)
        except UserError as error:
            file.fail(place, str(error))
        for end in drawn[1] if drawn[0] == "of" else drawn[1:]:
            if name not in DATA and (refused := _refused("pretrain", {**shared, name: end})):
                file.fail(place, refused[1])
            if paths and name in DATA:
                _check_path(file, name, str(end), place)


def _check_values(file: Located, step: Step, given: Mapping[str, Any], around: Place = (), *, cell: str = "") -> None:
    """Let an entry point's own parser read a command; say what it says with the line it is about."""
    if refused := _refused(step.run, given):
        key, message = refused
        place = _place(file, key, given.get(key), around)
        file.fail(place, message + (f" (in the cell {cell})" if cell and not place else ""))


def _refused(run: str, given: Mapping[str, Any]) -> tuple[str, str] | None:
    """The argument that an entry point's parser does not take, and what it says of it; None where it takes all."""
    message = _refusal(run, given)
    if message is None:
        return None
    if match := re.match(r"--(?:no-)?([a-z][\w.-]*)", message):
        return named(match[1]), message.removeprefix("--")
    # The parser names no option: the first one by which it is no longer content.
    keys = sorted(given, key=lambda key: key not in {"objective", *required(run)})
    parts = ({k: given[k] for k in keys[: count + 1]} for count in range(len(keys)))
    key = next((list(part)[-1] for part in parts if _refusal(run, part)), "")
    return key, f"{key} {given[key]}: {_NO_VALUE.format(entry_points()[run])}" if key else message


_NO_VALUE = "is no value for it; python -m {} --help says what there is"


def _refusal(run: str, given: Mapping[str, Any]) -> str | None:
    """What an entry point's parser has against arguments, in one sentence."""
    try:
        parse(run, words(run, given, "RUN", ["RUN"]))
    except UserError as error:
        return str(error)
    return None


def _place(file: Located, key: str, value: Any = None, around: Place = ()) -> Place:
    """Where an argument is set: on the command line, in the matrix (at the value), under the arguments of a step (also
    nested), else nowhere."""
    for place in () if around else file.given:
        if f"{key}.".startswith(f"{named(place[-1])}."):
            return place
    matrix = {} if around else file.at(("matrix",)) or {}
    for spelt, values in matrix.items():
        if named(spelt) == key:
            return ("matrix", spelt, values.index(value)) if value in values else ("matrix", spelt)
    for spelt, inner in (file.at((*around, "arguments")) or {}).items():
        place = (*around, "arguments", spelt)
        if named(spelt) == key and place in file.lines:
            return place
        for option in inner if isinstance(inner, Mapping) else ():
            if named(f"{spelt}.{option}") == key and (*place, option) in file.lines:
                return (*place, option)
    return ("workers",) if key == "workers" else around
