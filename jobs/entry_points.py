"""What a job can run: the entry points, their options, and arguments as words of their command lines.

Entry points are found in the sources; one is imported when its options are asked for, which imports no torch.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pipeline
from pipeline import asked, config
from pipeline.arguments import read

OWN = {"arrivals": "jobs.arrivals", "search": "jobs.search", "watch": "jobs.watch"}
TRAINS = ("pretrain", "arrivals")
"""Entry points that take pretraining's options and fill the run folder that `--run` names."""


@cache
def entry_points() -> dict[str, str]:
    """Name → module, as `python -m` takes it."""
    folder = Path(pipeline.__path__[0])
    files = [path.stem for path in folder.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
    packages = [path.parent.name for path in folder.glob("*/__main__.py")]
    return {name: f"pipeline.{name}" for name in sorted([*files, *packages])} | OWN


def options(run: str) -> dict[str, Any]:
    """The options of an entry point with their defaults, MISSING where there is none; empty where it does not say."""
    kind = config.Config if run in TRAINS else getattr(_module(run), "Arguments", None)
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in (dataclasses.fields(kind) if kind else ())
    }


def parse(run: str, argv: Sequence[str]) -> object:
    """Read a command line as an entry point does.

    Raises:
        UserError: it refuses that.
    """
    if run in TRAINS:
        return asked.parse(argv)
    kind = getattr(_module(run), "Arguments", None)
    return kind and read(kind, argv, f"python -m {entry_points()[run]}")


def words(run: str, arguments: Mapping[str, Any], folder: str = "", folders: Sequence[str] = ()) -> list[str]:
    """Arguments by name as words of the command line, those first that the entry point takes without their names.

    Args:
        folder: what {run} in a value becomes.
        folders: what the value {runs} becomes.
    """
    known, unnamed = options(run), _unnamed(run)
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
        if key in unnamed:
            positional += given
        elif len(given) == 1 and given[0].startswith("-"):
            named.append(f"{option}={given[0]}")
        else:
            named += [option, *given]
    return [*positional, *named]


def _unnamed(run: str) -> set[str]:
    """The options that an entry point takes without their names."""
    if run in TRAINS:
        return set()
    from tyro.conf import Positional

    (mark,) = get_args(Positional[str])[1:]
    hints = get_type_hints(getattr(_module(run), "Arguments", object), include_extras=True)
    return {name for name, hint in hints.items() if mark in getattr(hint, "__metadata__", ())}


def required(run: str) -> set[str]:
    """The options that an entry point cannot do without."""
    return {name for name, default in options(run).items() if default is dataclasses.MISSING}


def _module(run: str) -> ModuleType:
    """The module of an entry point that is no training; of a package its `__main__`."""
    name = entry_points()[run]
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
