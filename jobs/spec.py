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
    resources: {cpus: 8, gpus: 1, memory: 32GiB}       of each worker, which trains on a GPU only where it has one; or
                                      of the entry point; left out, workers share the cluster's GPUs and cores
    environment: {NCCL_DEBUG: WARN}   variables of the command, its workers, and what comes after
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

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs import keys, located
from jobs.check import check
from jobs.job import Job
from jobs.located import Located, Place
from pipeline.arguments import nearest
from pipeline.errors import UserError
from pipeline.redaction import SECRET_NAME, redact

FOLDER = Path("jobs")
KEYS = (
    *("run", "arguments", "matrix", "schedule", "workers", "resources", "environment", "secrets", "time_limit"),
    *("retry", "after", "notify", "data_on"),
)
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")


def find(job: str) -> Path:
    """The file of a job, given as a path or as the name of one in `jobs/`."""
    path = Path(job)
    if path.suffix in (".yaml", ".yml") or "/" in job:
        if not path.is_file():
            there = ", ".join(sorted(map(str, path.parent.glob("*.yaml"))))
            raise UserError(f"{job}: no such file{f'; there are {there}' if there else ''}")
        return path
    if (FOLDER / f"{job}.yaml").is_file():
        return FOLDER / f"{job}.yaml"
    raise UserError(f"{job}: no such job{nearest(job, sorted(p.stem for p in FOLDER.glob('*.yaml')) or ['none'])}")


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
    file = located.read(path.read_bytes(), str(path))
    file.known((), KEYS)
    file = _with(file, settings)
    secretless(file)
    step = keys.read_step(file, (), KEYS)
    built = Job(
        name=path.stem,
        path=path,
        step=step,
        cells=keys.read_matrix(file, step),
        workers=keys.read_workers(file, step),
        timetable=keys.read_schedule(file),
        environment=keys.read_environment(file),
        secrets=keys.read_secrets(file),
        time_limit=keys.duration(file, ("time_limit",)),
        retry=keys.read_retry(file),
        after=keys.read_after(file),
        notify=keys.read_notify(file),
        settings=tuple(settings),
    )
    where = file.at(("data_on",))
    if where not in (None, "cluster"):
        file.fail(("data_on",), f"data_on {where!r}: must be cluster, or be left out")
    check(file, built, paths=on_cluster or where is None)
    return built


def _with(file: Located, settings: Sequence[str]) -> Located:
    """The file with some arguments set from outside."""
    arguments, matrix = (file.at((key,)) or {} for key in ("arguments", "matrix"))
    if not settings or not isinstance(arguments, Mapping) or not isinstance(matrix, Mapping):
        return file  # what is wrong in it is told by whoever reads that key
    lines, given = dict(file.lines), dict[Place, str]()
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting}: must be name=value, as in --set epochs=1")
        matrix = {axis: values for axis, values in matrix.items() if keys.named(axis) != keys.named(key)}
        arguments = {**arguments, key: located.plain(value)}
        place = ("arguments", key)
        lines = {inner: line for inner, line in lines.items() if inner[:2] != place}
        given[place] = f"--set {redact(setting)}"
    changed = {**(file.value or {}), "arguments": arguments, "matrix": matrix}
    return dataclasses.replace(file, value=changed, lines=lines, given=given)


def secretless(file: Located, place: Place = ()) -> None:
    """Refuse values that look like secrets: the file is committed, and what is made of it is shown."""
    value = file.at(place)
    if isinstance(value, Mapping):
        for key in value:
            secretless(file, (*place, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            secretless(file, (*place, i))
    elif value is not None:
        named = place[0] == "environment" and re.fullmatch(SECRET_NAME, str(place[-1]), re.IGNORECASE)
        if (named and value not in ("", 0, 1)) or redact(str(value)) != str(value):  # 0, 1, false and true are switches
            key = next(key for key in reversed(place) if isinstance(key, str))  # of a list's entry, the list's
            file.fail(place, f"{key} looks like a secret; name its variable under secrets: and set it on the cluster")
