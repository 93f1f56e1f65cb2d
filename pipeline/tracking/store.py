"""Where runs are recorded: a store's address, a client for it, and what its errors mean.

An error is one of three: the store may take the same request later (`unreachable`), it never takes this entry
(`hopeless`), or it takes no runs at all, which is a `TrackingError`.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.redaction import redact

BUSY = frozenset(
    {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}
)
REFUSED = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"})


class TrackingError(UserError):
    """The store cannot take runs, and waiting would not change that; the message is one sentence."""


def default_uri(runs_dir: str | Path) -> str:
    """Where runs are recorded: `MLFLOW_TRACKING_URI`, else the file `mlflow.db` in `runs_dir`.

    Addresses of local files come out absolute, since workers of a cluster run in folders of their own. No data base can
    lie in a remote `runs_dir`: then it is in `~/ssl-runs`.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return f"sqlite:///{_lasting(runs_dir) / 'mlflow.db'}"
    if file := _sqlite_file(uri):
        return f"sqlite:///{file.resolve()}"
    return uri


def store_of(run: str) -> str:
    """Where the run in a folder is recorded, by the folder's address: as `default_uri` of the folder around it."""
    return default_uri(run.rstrip("/").rpartition("/")[0] or ".")


def artifacts_of(uri: str, run: str) -> str | None:
    """Where artifacts of a data base lie: in `mlartifacts/` beside its file, else beside the run's folder, or in
    `~/ssl-runs` where that is remote. None: the store is a server, which knows."""
    if _served(uri):
        return None
    file = _sqlite_file(uri)
    folder = file.resolve().parent if file else _lasting(run.rstrip("/").rpartition("/")[0] or ".")
    return (folder / "mlartifacts").as_uri()


def _lasting(runs_dir: str | Path) -> Path:
    """A folder of this machine for what goes with the runs in a folder."""
    return Path.home() / "ssl-runs" if "://" in str(runs_dir) else Path(runs_dir).expanduser().resolve()


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _served(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def connect(uri: str) -> Any:
    """An `MlflowClient` that reports nothing home, writes nothing to the screen, and leaves trying again to us."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)
    for chatty in ("alembic", "urllib3.connectionpool", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    from mlflow import MlflowClient

    file = _sqlite_file(uri)
    if file is None:
        return MlflowClient(tracking_uri=uri)
    with _alone(file):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)  # creates the tables, once
    return client


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Two runs begun at once must not both create the tables of a new sqlite file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(file.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def require(uri: str) -> None:
    """Raise `TrackingError` unless the store answers now."""
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:
        raise TrackingError(
            f"--tracking required: MLflow at {redact(uri)} does not answer ({short(error)}); start it, or leave the "
            "option out: then what is to be recorded waits"
        ) from None


def unreachable(uri: str, error: Exception) -> bool:
    """Whether the same request may succeed later: a server that does not answer or is busy, a locked data base."""
    if _code(error) == "TEMPORARILY_UNAVAILABLE":
        return True
    return _served(uri) and (isinstance(error, OSError) or _code(error) in BUSY)


def hopeless(error: Exception) -> bool:
    """Whether this very entry can never be stored, so that it must not hold up those behind it."""
    return isinstance(error, FileNotFoundError | TypeError | KeyError) or _code(error) in REFUSED


def _code(error: Exception) -> str:
    return getattr(error, "error_code", "")


def short(error: Exception) -> str:
    """An error in a few words, without credentials."""
    line = redact(str(error)).strip().split("\n")[0]
    if "Caused by" in line:  # requests wraps the one useful clause in four others
        line = line.rsplit("Caused by", 1)[1].strip("( )'\"")
        if system := re.search(r"\[Errno -?\d+\] ([^\[\]'\")]+)", line):
            line = system[1]
    if "timed out" in line:
        line = "no answer in time"
    return line[:200] or type(error).__name__


def accepted(name: str) -> str:
    """The name of a metric or parameter as every store takes it: in its characters and length, and a plain path."""
    parts = re.sub(r"[^\w\-./ :]", "_", name).split("/")
    path = "/".join(part if part.strip(".") else "_" for part in parts)
    return re.sub(r"^\.\.", "__", path)[:250].rstrip("/")


def now() -> int:
    """Milliseconds, as MLflow counts them."""
    return int(time.time() * 1000)
