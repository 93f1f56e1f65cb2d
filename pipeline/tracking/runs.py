"""The driver's side: a run is started, resumed and ended here, and its evaluations are recorded below it."""

import logging
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.redaction import redact
from pipeline.tracking.description import DatasetInput, flat, plain_tags, run_tags, user
from pipeline.tracking.spool import evaluations_of, keep
from pipeline.tracking.store import TrackingError, accepted, artifacts_of, connect, hopeless, now, short, unreachable
from pipeline.tracking.tickets import PENDING, create, create_evaluation, pack, resolve
from pipeline.tracking.tracker import Status, Tracker

log = logging.getLogger(__name__)


def start_run(
    uri: str,
    *,
    experiment: str,
    name: str,
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    dataset: DatasetInput | None,
    config_path: str | Path | None,
    run: str,
    command: Sequence[str] | None = None,
) -> str:
    """Create a run and give its id.

    Args:
        uri: the store, see `default_uri`.
        experiment: one per data set, so that the UI's table holds what can be compared.
        name: as in `vit_s16-dino-imagenette160-0712`.
        tags: backbone, family, objective, data, … : what the table is filtered and grouped by.
        params: the configuration, nested or flat; long values are cut, `config_path` holds them whole.
        dataset: the training images, listed as the run's input.
        config_path: a text file, kept as an artifact.
        run: the run's folder.
        command: what was typed; the process's own command line unless given.

    Where a server does not answer, the run is not lost: a warning says so, and the id is a ticket (`pending.…`) with
    which the first `Tracker` that reaches the server creates the run.

    Raises:
        TrackingError: the store refuses (no permission, no such kind of store): waiting would not help.
    """
    request = {
        "ticket": uuid.uuid4().hex,
        "experiment": experiment,
        "artifacts": artifacts_of(uri, run),
        "name": name,
        "start": now(),
        "tags": run_tags(tags, dataset, sys.orig_argv if command is None else command),
        "params": flat(params),
        "dataset": dict(dataset) if dataset else None,
        "config": redact(Path(config_path).read_text()) if config_path else None,
    }
    try:
        return create(connect(uri), request)
    except Exception as error:
        if not unreachable(uri, error):
            raise TrackingError(f"MLflow at {redact(uri)} cannot record this run: {short(error)}") from error
        log.warning("MLflow at %s does not answer (%s): the run is recorded once it does.", redact(uri), short(error))
        return pack(request)


def resume_run(uri: str, run_id: str, last_step: int) -> str | None:
    """Open a run again, to continue from a checkpoint at `last_step` images; gives the run's id.

    What the store already holds beyond `last_step` stays, and is not sent a second time (see `pipeline.tracking`).
    None, after a warning, where the store does not hold the run: it was begun with another store, or deleted. A ticket
    stays one: the `Tracker` creates the run, after another process that may be about to.
    """
    if run_id.startswith(PENDING):
        return run_id
    try:
        client = connect(uri)
        run_id = resolve(client, run_id)
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "resumed_at", f"{last_step} images")
    except Exception as error:
        if not unreachable(uri, error):
            log.warning("MLflow at %s does not hold this run any more (%s).", redact(uri), short(error))
            return None
        log.warning("MLflow at %s does not answer (%s): the run is recorded once it does.", redact(uri), short(error))
    return run_id


def end_run(uri: str, run_id: str, status: Status, run: str | None = None) -> None:
    """Mark a run as over from a process that holds no `Tracker`, such as the driver of workers that died.

    `run` is the run's folder, from whose spool goes out first what waits there.
    """
    Tracker(uri, run_id, run=run, system_metrics=0).finish(status)


def child_run(
    uri: str,
    parent_run_id: str,
    *,
    name: str,
    tags: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    step: int,
    run: str | None = None,
) -> str | None:
    """Record an evaluation below its pretraining run, whose tags it shares; gives its id, or None where that failed.

    Args:
        name: such as `knn` or `linear`.
        tags: what tells this evaluation from others: protocol, data; `mlflow.runName` for a name without the parent's.
        metrics: accuracies in [0, 1]; what is None is left out.
        step: images the evaluated backbone had seen.
        run: the pretraining run's folder, in whose spool the evaluation waits where the store does not answer.
    """
    request = {
        "ticket": uuid.uuid4().hex,
        "name": name,
        "tags": {"mlflow.user": user()} | plain_tags(tags),
        "metrics": {accepted(key): float(value) for key, value in metrics.items() if value is not None},
        "step": step,
        "time": now(),
    }
    try:
        client = connect(uri)
        return create_evaluation(client, resolve(client, parent_run_id), request)
    except Exception as error:
        kept = run is not None and not hopeless(error) and keep(evaluations_of(run), request)
        waits = f"python -m pipeline.tracking {shlex.quote(str(run))} delivers it" if kept else "it is left out"
        log.warning("MLflow at %s did not record the evaluation %s (%s); %s.", redact(uri), name, short(error), waits)
        return None
