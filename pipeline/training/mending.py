"""What was damaged among the small files of a run folder is made again from its checkpoints, before the run goes on.

The damaged file stays beside it, as `….damaged`.
"""

import json
import re
from typing import Any

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.training.checkpoints import INDEX, newest, read_facts
from pipeline.training.health import Care
from pipeline.training.run_folder import MetricsFile, RunFolder

METRICS, CARE, SUMMARY, MLFLOW = "metrics.jsonl", "interventions.json", "summary.json", "mlflow_run_id"


def configuration_again(address: str, why: str) -> Config:
    """The configuration of a run whose `config.yaml` cannot be read: that of its newest checkpoint, written there anew.

    Args:
        why: a sentence on what is wrong with the file.

    Raises:
        UserError: there is no checkpoint.
    """
    folder = RunFolder(address)
    seen, state, said = newest(folder)
    if state is None:
        if folder.exists("config.yaml"):
            why += "; there is no checkpoint to take it from: begin anew with another --run"
        raise UserError(why)
    config = configuration.read(state["config"], f"checkpoint {seen}")
    if folder.exists("config.yaml"):
        _aside(folder, "config.yaml")
    folder.write("config.yaml", configuration.sealed(config))
    print(*said, f"warning: {why}; that of the checkpoint at {seen:,} images is taken", sep="\n", flush=True)
    return config


def mend(folder: RunFolder) -> tuple[dict[str, Any] | None, list[str]]:
    """Make again, or put aside, what is damaged of a run folder.

    Returns:
        The state of the newest sound checkpoint, None without one; a sentence on every file that was damaged.

    Raises:
        UserError: every checkpoint is damaged.
    """
    said = _index(folder)
    seen, state, passed = newest(folder)
    said += passed + _metrics(folder, seen)
    try:
        Care.read(folder)
    except ValueError:
        _aside(folder, CARE)
        care = Care.of((state or {}).get("interventions", []))
        care.write(folder)
        said.append(f"{folder.path(CARE)} cannot be read: what the newest checkpoint lists is taken ({len(care.done)})")
    if folder.exists(MLFLOW) and not re.fullmatch(rb"[\w.=-]+", folder.read(MLFLOW)):
        _aside(folder, MLFLOW)
        said.append(f"{folder.path(MLFLOW)} cannot be read: all that is known of the run is told MLflow as a new one")
    if folder.exists(SUMMARY) and not _is_json(folder, SUMMARY):
        _aside(folder, SUMMARY)
        said.append(f"{folder.path(SUMMARY)} cannot be read: how fast the run was is lost, all else is measured anew")
    return state, [line if line.startswith("warning: ") else f"warning: {line}" for line in said]


def _index(folder: RunFolder) -> list[str]:
    """Have every checkpoint in the index."""
    said: list[str] = []
    try:
        told = read_facts(folder)
    except ValueError:
        _aside(folder, INDEX)
        told = {}
        said.append(f"{folder.path(INDEX)} cannot be read: it is made again from the checkpoints")
    found = folder.checkpoints()
    if set(found) - told.keys():
        folder.write_json(INDEX, {str(n): told.get(n) or folder.facts_of(n) for n in found})
    return said


def _metrics(folder: RunFolder, seen: int) -> list[str]:
    """Leave out what are no rows; say what is missing until `seen` images."""
    rows, damaged = MetricsFile.rows_of(folder)
    said = []
    if damaged:
        _aside(folder, METRICS)
        folder.write(METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        s = "s" * (damaged > 1)
        said.append(
            f"{damaged:,} line{s} of {folder.path(METRICS)} cannot be read, and {'are' if s else 'is'} left out"
        )
    last = max((row["images"] for row in rows if row["images"] <= seen), default=0)
    if last < seen:
        said.append(f"{folder.path(METRICS)} has no row between {last:,} images and the checkpoint at {seen:,}")
    return said


def _is_json(folder: RunFolder, name: str) -> bool:
    try:
        return isinstance(json.loads(folder.read(name)), dict)
    except ValueError:
        return False


def _aside(folder: RunFolder, name: str) -> None:
    folder.rename(name, f"{name}.damaged")
