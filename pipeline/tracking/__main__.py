"""`python -m pipeline.tracking RUN …` delivers what runs could not tell MLflow while it did not answer."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from tyro.conf import Positional

from pipeline.command import command
from pipeline.errors import UserError
from pipeline.redaction import redact
from pipeline.tracking.spool import Spool, evaluations_of, spool_of, taken
from pipeline.tracking.store import connect, short, store_of
from pipeline.tracking.tickets import create_evaluation, resolve
from pipeline.tracking.tracker import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arguments:
    """Deliver what runs could not tell MLflow while it did not answer, each run in order."""

    runs: Positional[tuple[str, ...]]
    """Run folders, or folders of them."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 where something still waits, 2 a user's mistake."""

    def send(arguments: Arguments) -> int:
        if not arguments.runs:
            raise UserError("no run is named: give run folders, or folders of them, such as runs/")
        done = [deliver(run) for given in arguments.runs for run in runs_at(given)]
        return 0 if all(done) else 1

    return command(Arguments, "pipeline.tracking", send, argv)


def runs_at(address: str) -> list[str]:
    """The run in a folder, or the runs below it.

    Raises:
        UserError: there is none.
    """
    files, root = fsspec.core.url_to_fs(address)
    if files.exists(f"{root}/mlflow_run_id"):
        return [address.rstrip("/") if "://" in address else root]
    found = sorted(path.rpartition("/")[0] for path in files.glob(f"{root}/*/mlflow_run_id"))
    if not found:
        raise UserError(f"{address}: no run is there (it has no mlflow_run_id), and none below it")
    return [files.unstrip_protocol(path) if "://" in address else path for path in found]


def deliver(run: str) -> bool:
    """Send what waits of a run, by its folder's address, and say what became of it; False where something still waits.

    Raises:
        UserError: it is training now, and delivers by itself.
    """
    path, evaluations = spool_of(run), evaluations_of(run)
    if not any(file.exists() and file.stat().st_size for file in (path, evaluations)):
        print(f"{run}: nothing waits", flush=True)
        return True
    spool = Spool(path, ended=True)
    try:
        if not spool.claim():
            raise UserError(f"{run}: is at work now, and delivers by itself")
        return _send(run, spool, evaluations)
    finally:
        spool.close(delivered=False)


def _send(run: str, spool: Spool, evaluations: Path) -> bool:
    files, root = fsspec.core.url_to_fs(run)
    uri, count = store_of(run), len(spool)
    try:
        with taken(evaluations) as requests:
            count += len(requests)
            client = connect(uri)
            run_id = resolve(client, files.cat_file(f"{root}/mlflow_run_id").decode())
            files.pipe_file(f"{root}/mlflow_run_id", run_id.encode())
            for request in requests:
                create_evaluation(client, run_id, request)
        _name_in_summary(files, f"{root}/summary.json", run_id)
    except Exception as error:
        log.warning("%s: MLflow at %s takes nothing (%s): %d entries wait.", run, redact(uri), short(error), count)
        return False
    tracker = Tracker(uri, run_id, run=run, system_metrics=0, spool=spool)
    tracker.close(timeout=3600.0)
    left = len(spool)
    print(f"{run}: {count - left:,} of {count:,} entries delivered to MLflow at {redact(uri)}", flush=True)
    return not left


def _name_in_summary(files: Any, path: str, run_id: str) -> None:
    """Let a run's summary, written while no store had taken the run, name it."""
    if files.exists(path) and not (summary := json.loads(files.cat_file(path)))["mlflow_run_id"]:
        text = json.dumps(summary | {"mlflow_run_id": run_id}, indent=2, ensure_ascii=False) + "\n"
        files.pipe_file(path, text.encode())


if __name__ == "__main__":
    sys.exit(main())
