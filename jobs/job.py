"""What a job is, once its file is read: the command, the cells of its matrix, when it fires, whom it tells.

A firing of a cell is submitted under an id made of the job's name, the firing and the cell's name, the same every time.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jobs.entry_points import TRAINS, entry_points, words
from jobs.schedule import Schedule
from pipeline import config
from pipeline.arguments import nearest
from pipeline.errors import UserError

Overlap = Literal["skip", "wait", "stop", "allow"]
Missed = Literal["last", "all", "none"]
Event = Literal["finish", "failure", "collapse"]


@dataclass(frozen=True)
class Resources:
    """cpus and gpus are counts, memory is in bytes; 0 asks for none."""

    cpus: float = 1
    gpus: float = 0
    memory: int = 0


@dataclass(frozen=True)
class Step:
    """One command: an entry point's name, its arguments by name, and what the file says that it takes."""

    run: str
    arguments: Mapping[str, Any]
    resources: Resources | None = None

    @property
    def takes(self) -> Resources:
        """What it takes, said or not."""
        return self.resources or Resources()

    @property
    def once(self) -> bool:
        """Whether, as what comes after, it runs once for all cells rather than after each."""
        return "{run}" not in str(list(self.arguments.values()))

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
    overlap: Overlap
    missed: Missed


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
    on: tuple[str, ...] = get_args(Event)


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
    settings: tuple[str, ...] = ()

    def group(self, cell: Cell) -> tuple[int, int]:
        """The fewest and the most workers of a cell."""
        return config.Config(workers=self.of(cell).arguments.get("workers", 1)).group

    def of(self, cell: Cell) -> Step:
        """The command of one cell."""
        workers = {"workers": self.workers} if self.workers else {}
        return dataclasses.replace(self.step, arguments={**workers, **self.step.arguments, **cell.values})

    @property
    def holds(self) -> Resources:
        """What the process of a cell keeps until it ends; training's workers take theirs apart from it."""
        return Resources(cpus=0) if self.step.run in TRAINS else self.step.takes

    def cell(self, name: str) -> Cell:
        """The cell of a name. Raises `UserError`."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise UserError(f"{self.path}: has no cell {name!r}{nearest(name, [cell.name for cell in self.cells])}")

    def submission(self, firing: str, cell: str, step: int | None = None) -> str:
        """The id under which a cell's firing, or what comes after it, is submitted."""
        after = "" if step is None else f"after{step + 1}"
        return "-".join(part for part in (self.name, firing, cell, after) if part)


def cell_name(values: Sequence[str]) -> str:
    """A name for a cell that is fit for ids and paths; what had to be changed in it is told apart by a hash."""
    plain = "-".join(values)
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", plain)[:60]
    if safe == plain and not any("-" in value for value in values):
        return safe
    return f"{safe}-{hashlib.sha256(repr(list(values)).encode()).hexdigest()[:8]}"
