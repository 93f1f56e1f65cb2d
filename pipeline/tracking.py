"""What a run leaves in MLflow: parameters, metrics against images seen, system load, the data set, the backbone.

The driver calls `start_run` (or `resume_run`) and hands the id to the training loop, where one `Tracker` sends what it
is given from a thread of its own. Tracking never delays training, nor stops it unless asked to: while a server does not
answer, entries wait in memory and in a file of the run folder, the spool, and go out in order once it does: with the
run, with the one that continues it, or by

    python -m pipeline.tracking RUN …      # run folders, or folders of them

A metric's step is the number of images seen. Per metric, steps only grow: an entry at or below the last step the store
holds is not sent again. Since a resumed run computes the same values as the uninterrupted one, this leaves no step
twice and none missing, on every kind of store.
"""

import base64
import fcntl
import getpass
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypedDict

import fsspec

from pipeline.command import guarded
from pipeline.errors import UserError
from pipeline.redaction import SECRET_NAME, redact

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

PARAM_LENGTH = 500  # what servers of every version store; the whole configuration is the artifact config.yaml
TAG_LENGTH = 5000
METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
PATIENCE = 600.0  # seconds that `--tracking required` lets a store be away
MOST_WAITING = 1_000_000  # entries, some 350 MB: a day without a server at ten a second
BUSY = frozenset(
    {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}
)
REFUSED = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"})
PENDING = "pending."
TAGS_VARIABLE = "SSL_RUN_TAGS"
"""Environment variable with more tags for every run begun, as a JSON object: a job's name and firing."""
TICKET_TAG = "mlflow.pretraining.ticket"  # tags below `mlflow.` are no columns in the UI


# The table as it opens shows no metric; this view of it, in the UI under "Views", sets a CNN beside a ViT.
COLUMNS = (
    *(f"tags.`{name}`" for name in ("backbone", "objective")),
    *(f"metrics.`{name}`" for name in ("knn_top1", "linear_top1", "untrained_knn_top1", "pixels_knn_top1")),
    *(f"metrics.`{name}`" for name in ("images_per_second", "data_wait", "loss")),
    *(f"params.`{name}`" for name in ("epochs", "batch_size", "image_size", "lr")),
)
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


class DatasetInput(TypedDict):
    """The training images as MLflow lists them; `digest` is the packed file's fingerprint, the last two are counts."""

    name: str
    digest: str
    path: str
    images: int
    classes: int


class TrackingError(UserError):
    """The store cannot take runs, and waiting would not change that; the message is one sentence."""


# --- addresses ------------------------------------------------------------------------------------------------------


def default_uri(runs_dir: str | Path) -> str:
    """Where runs are recorded: `MLFLOW_TRACKING_URI`, else the file `mlflow.db` in `runs_dir`.

    Addresses of local files come out absolute, since workers of a cluster run in folders of their own. Artifacts of an
    sqlite store lie in `mlartifacts/` beside its file. No data base can lie in a remote `runs_dir`: then it is in
    `~/ssl-runs`.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        folder = Path.home() / "ssl-runs" if "://" in str(runs_dir) else Path(runs_dir).expanduser().resolve()
        return f"sqlite:///{folder / 'mlflow.db'}"
    if file := _sqlite_file(uri):
        return f"sqlite:///{file.resolve()}"
    return uri


def store_of(run: str) -> str:
    """Where the run in a folder is recorded, by the folder's address: as `default_uri` of the folder around it."""
    return default_uri(run.rstrip("/").rpartition("/")[0] or ".")


def spool_of(run: str) -> Path:
    """The file in which what a run has to say waits: in its folder, or below `~/.cache` where that is remote."""
    return Path(run, "mlflow.spool") if "://" not in run else _spool_below_home(run)


def _spool_below_home(name: str) -> Path:
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "ssl-pretraining" / "tracking" / f"{digest}.jsonl"


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


# --- the store ------------------------------------------------------------------------------------------------------


def _client(uri: str) -> Any:
    """An `MlflowClient` that reports nothing home, writes nothing to the screen, and leaves trying again to us."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)
    for chatty in ("alembic", "urllib3.connectionpool", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    with _alone(_sqlite_file(uri)):
        client = MlflowClient(tracking_uri=uri)
        if _sqlite_file(uri):
            client.search_experiments(max_results=1)  # creates the tables, once
    return client


@contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Two runs begun at once must not both create the tables of a new sqlite file."""
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(file.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _code(error: Exception) -> str:
    return getattr(error, "error_code", "")


def _unreachable(uri: str, error: Exception) -> bool:
    """Whether the same request may succeed later: a server that does not answer, or is busy."""
    if not uri.startswith(("http://", "https://", "databricks")):
        return False
    return isinstance(error, OSError) or _code(error) in BUSY


def _hopeless(error: Exception) -> bool:
    """Whether this very entry can never be stored, so that it must not hold up those behind it."""
    return isinstance(error, FileNotFoundError | TypeError) or _code(error) in REFUSED


def _short(error: Exception) -> str:
    line = redact(str(error)).strip().split("\n")[0]
    if "Caused by" in line:  # requests wraps the one useful clause in four others
        line = line.rsplit("Caused by", 1)[1].strip("( )'\"")
        if system := re.search(r"\[Errno -?\d+\] ([^\[\]'\")]+)", line):
            line = system[1]
    if "timed out" in line:
        line = "no answer in time"
    return line[:200] or type(error).__name__


# --- starting, resuming and ending a run, in the driver -------------------------------------------------------------


def require(uri: str) -> None:
    """Raise `TrackingError` unless the store answers now."""
    try:
        _client(uri).search_experiments(max_results=1)
    except Exception as error:
        raise TrackingError(
            f"--tracking required: MLflow at {redact(uri)} does not answer ({_short(error)}); start it, or leave the "
            "option out: then what is to be recorded waits"
        ) from None


def start_run(
    uri: str,
    *,
    experiment: str,
    name: str,
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    dataset: DatasetInput | None,
    config_path: str | Path | None,
    parent_run_id: str | None = None,
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
        config_path: a text file, any fsspec address, kept as an artifact.
        parent_run_id: shows the run below another.
        command: what was typed; the process's own command line unless given.

    Where a server does not answer, the run is not lost: a warning says so, and the id is a ticket (`pending.…`) with
    which the first `Tracker` that reaches the server creates the run.

    Raises:
        TrackingError: the store refuses (no permission, no such kind of store): waiting would not help.
    """
    command = list(command if command is not None else sys.orig_argv)
    typed = redact(shlex.join(["python", *command[1:]]))
    tags = {key: redact(str(value)) for key, value in {**_given_tags(), **tags}.items() if value is not None}
    tags.setdefault("kind", "pretraining")
    tags.setdefault("commit", _commit())
    if dataset is not None:
        tags.setdefault("images", f"{dataset['images']}")
    request = {
        "ticket": uuid.uuid4().hex,
        "experiment": experiment,
        "artifacts": _artifacts(uri, config_path),
        "name": name,
        "start": _now(),
        "tags": {key: value[:TAG_LENGTH] for key, value in tags.items() if value}
        | {
            "mlflow.user": _user(),
            "mlflow.source.name": _entry_point(command),
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": tags["commit"],
            "mlflow.note.content": _note(tags, dataset, typed),
        }
        | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {}),
        "params": _flat(params),
        "dataset": dict(dataset) if dataset else None,
        "config": redact(_read(config_path)) if config_path else None,
    }
    try:
        return _create(_client(uri), request)
    except Exception as error:
        if not _unreachable(uri, error):
            raise TrackingError(f"MLflow at {redact(uri)} cannot record this run: {_short(error)}") from error
        log.warning("MLflow at %s does not answer (%s): the run is recorded once it does.", redact(uri), _short(error))
        packed = zlib.compress(json.dumps(request).encode(), 9)
        return PENDING + base64.urlsafe_b64encode(packed).decode()


def resume_run(uri: str, run_id: str, last_step: int) -> str | None:
    """Open a run again, to continue from a checkpoint at `last_step` images; gives the run's id.

    What the store already holds beyond `last_step` stays, and is not sent a second time (see the head of this file).
    None, after a warning, where the store does not hold the run: it was begun with another store, or deleted.
    """
    try:
        client = _client(uri)
        run_id = _resolve(client, run_id)
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "resumed_at", f"{last_step} images")
    except Exception as error:
        if not _unreachable(uri, error):
            log.warning("MLflow at %s does not hold this run any more (%s).", redact(uri), _short(error))
            return None
        log.warning("MLflow at %s does not answer (%s): the run is recorded once it does.", redact(uri), _short(error))
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
        "tags": {key: redact(str(value))[:TAG_LENGTH] for key, value in tags.items() if value is not None},
        "metrics": {_metric_name(key): float(value) for key, value in metrics.items() if value is not None},
        "step": step,
        "time": _now(),
    }
    try:
        client = _client(uri)
        return _create_child(client, _resolve(client, parent_run_id), request)
    except Exception as error:
        kept = run is not None and not _hopeless(error) and _keep_child(run, request)
        waits = f"python -m pipeline.tracking {shlex.quote(str(run))} delivers it" if kept else "it is left out"
        log.warning("MLflow at %s did not record the evaluation %s (%s); %s.", redact(uri), name, _short(error), waits)
        return None


def _create_child(client: Any, parent_run_id: str, request: Mapping[str, Any]) -> str:
    """Create an evaluation's run, or find the one an earlier attempt created; safe to repeat."""
    from mlflow.entities import Metric

    parent = client.get_run(parent_run_id)
    experiment, own = parent.info.experiment_id, dict(request["tags"])
    made = client.search_runs([experiment], f"tags.`{TICKET_TAG}` = '{request['ticket']}'", max_results=1)
    if made:
        run = made[0]
    else:
        shared = {key: value for key, value in parent.data.tags.items() if not key.startswith("mlflow.")}
        shared.pop("resumed_at", None)
        run = client.create_run(
            experiment,
            request["time"],
            run_name=own.pop("mlflow.runName", f"{request['name']} of {parent.info.run_name}"),
            tags=shared
            | {"kind": "evaluation", "mlflow.parentRunId": parent_run_id, "mlflow.user": _user()}
            | {key: parent.data.tags[key] for key in ("mlflow.runColor",) if key in parent.data.tags}
            | {TICKET_TAG: request["ticket"]}
            | own,
        )
    metrics = [Metric(key, value, request["time"], request["step"]) for key, value in request["metrics"].items()]
    client.log_batch(run.info.run_id, metrics)
    client.set_terminated(run.info.run_id, "FINISHED")
    return str(run.info.run_id)


def _children_of(run: str) -> Path:
    """Where evaluations of a run wait; a file of their own, since the run may be training."""
    return spool_of(run).with_suffix(".evaluations")


def _keep_child(run: str, request: Mapping[str, Any]) -> bool:
    try:
        with _appending(_children_of(run)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _append(file, [request])
    except OSError:
        return False
    return True


# --- delivering what waits -------------------------------------------------------------------------------------------


def deliver(run: str) -> bool:
    """Send what a run's spools hold, and say what became of it; False where something still waits.

    Args:
        run: address of the run's folder.

    Raises:
        UserError: it is no run, or it is training now, and delivers by itself.
    """
    files, root = fsspec.core.url_to_fs(run)
    if not files.exists(f"{root}/mlflow_run_id"):
        raise UserError(f"{run}: no run is there (it has no mlflow_run_id)")
    spool, children = spool_of(run), _children_of(run)
    if not any(file.exists() and file.stat().st_size for file in (spool, children)):
        print(f"{run}: nothing waits", flush=True)
        return True
    uri, given = store_of(run), files.cat_file(f"{root}/mlflow_run_id").decode()
    with _sole(spool, run), _sole(children, run):
        count = sum(1 for file in (spool, children) for _ in _read_spool(file))
        try:
            client = _client(uri)
            run_id = _resolve(client, given)
            files.pipe_file(f"{root}/mlflow_run_id", run_id.encode())
            for request in _read_spool(children):
                _create_child(client, run_id, request)
            if children.exists():
                os.truncate(children, 0)
            _name_in_summary(files, f"{root}/summary.json", run_id)
        except Exception as error:
            log.warning("%s: MLflow at %s takes nothing (%s): %d entries wait.", run, redact(uri), _short(error), count)
            return False
    tracker = Tracker(uri, run_id, run=run, system_metrics=0, ended=True)
    tracker.close(timeout=3600.0)
    left = len(tracker._waiting)
    print(f"{run}: {count - left:,} of {count:,} entries delivered to MLflow at {redact(uri)}", flush=True)
    return not left


def _name_in_summary(files: Any, path: str, run_id: str) -> None:
    """Let a run's summary, written while no store had taken the run, name it."""
    if files.exists(path) and not (summary := json.loads(files.cat_file(path)))["mlflow_run_id"]:
        text = json.dumps(summary | {"mlflow_run_id": run_id}, indent=2, ensure_ascii=False) + "\n"
        files.pipe_file(path, text.encode())


@contextmanager
def _sole(spool: Path, run: str) -> Iterator[None]:
    """Hold a spool that no living process writes to."""
    if not spool.exists():
        yield
        return
    with open(spool, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run}: is at work now, and delivers by itself") from None
        yield


def _given_tags() -> dict[str, Any]:
    try:
        given = json.loads(os.environ.get(TAGS_VARIABLE) or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        log.warning("%s is no JSON object, so its tags are left out.", TAGS_VARIABLE)
        return {}
    return given


def _create(client: Any, request: Mapping[str, Any]) -> str:
    """Create the run of a ticket, or find the one an earlier attempt created; safe to repeat."""
    from mlflow.entities import Dataset, InputTag, Param
    from mlflow.entities import DatasetInput as Input

    experiment = _experiment(client, request["experiment"], request["artifacts"])
    made = client.search_runs([experiment], f"tags.`{TICKET_TAG}` = '{request['ticket']}'", max_results=1)
    tags = request["tags"] | {TICKET_TAG: request["ticket"], "mlflow.runColor": _next_colour(client, experiment)}
    run = made[0] if made else client.create_run(experiment, request["start"], tags, request["name"])
    run_id = str(run.info.run_id)
    params = [Param(key, value) for key, value in request["params"].items()]
    for start in range(0, len(params), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])
    if data := request["dataset"]:
        path = redact(str(data["path"]))
        listed = Dataset(
            name=redact(data["name"])[:500],
            digest=str(data["digest"])[:36],
            source_type=path.split("://")[0] if "://" in path else "local",
            source=json.dumps({"uri": path}),
            profile=json.dumps({"num_rows": data["images"], "classes": data["classes"]}),
        )
        client.log_inputs(run_id, [Input(listed, [InputTag("mlflow.data.context", "pretraining")])])
    if request["config"]:
        try:
            client.log_text(run_id, request["config"], "config.yaml")
        except Exception as error:  # the artifact store is another service, often with other permissions
            log.warning("MLflow did not keep config.yaml (%s).", _short(error))
    return run_id


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    for _ in range(2):
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        with suppress(Exception):  # another run may be creating it right now: then it is found
            return _new_experiment(client, name, artifacts)
    return _new_experiment(client, name, artifacts)


def _new_experiment(client: Any, name: str, artifacts: str | None) -> str:
    """Create an experiment whose page says training rather than chats, and has our columns one click away."""
    state = {
        "searchFilter": "tags.kind = 'pretraining'",
        "orderByKey": "metrics.`knn_top1`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": COLUMNS,
        "columnOrder": COLUMNS,
        "columnWidths": dict.fromkeys(COLUMNS, 110),
        "runsHiddenMode": "FIRST_10_RUNS",
        "hideEmptyCharts": True,
    }
    view = {"name": "Comparison", "createdAt": _now(), "state": json.dumps(state)}
    tags = {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.sharedViewState.comparison": json.dumps(view),
    }
    experiment = str(client.create_experiment(name, artifacts, tags))
    link = f"#/experiments/{experiment}/runs?viewStateShareKey=comparison&workflowType=machine_learning"
    client.set_experiment_tag(experiment, "mlflow.note.content", f"[Compare the pretraining runs]({link})")
    return experiment


def _next_colour(client: Any, experiment: str) -> str:
    """Neighbours in a chart differ: the colour after that of the run begun last."""
    last = client.search_runs([experiment], "tags.kind = 'pretraining'", max_results=1, order_by=["start_time DESC"])
    colour = last[0].data.tags.get("mlflow.runColor", "") if last else ""
    return COLOURS[(COLOURS.index(colour) + 1) % len(COLOURS)] if colour in COLOURS else COLOURS[0]


def _resolve(client: Any, run_id: str) -> str:
    """A run's own id, which a ticket gets here at the latest."""
    if not run_id.startswith(PENDING):
        client.get_run(run_id)
        return run_id
    return _create(client, json.loads(zlib.decompress(base64.urlsafe_b64decode(run_id.removeprefix(PENDING)))))


def _artifacts(uri: str, config_path: str | Path | None) -> str | None:
    """Where artifacts of a data base that has no server lie: beside its file, or beside the run folders."""
    if file := _sqlite_file(uri):
        return (file.resolve().parent / "mlartifacts").as_uri()
    if uri.startswith(("http://", "https://", "databricks")) or config_path is None:
        return None
    return (Path(config_path).resolve().parent.parent / "mlartifacts").as_uri()


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
            continue
        text = "***" if value and re.fullmatch(SECRET_NAME, str(key), re.IGNORECASE) else redact(str(value))
        name = re.sub(r"[^\w\-./ :]", "_", f"{prefix}{key}")[:250]
        flat[name] = text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"
    return flat


def _note(tags: Mapping[str, str], dataset: DatasetInput | None, typed: str) -> str:
    parts = [tags[key] for key in ("backbone", "objective") if key in tags]
    if dataset is not None:
        parts.append(f"{redact(dataset['name'])}, {dataset['images']:,} images, fingerprint {dataset['digest'][:12]}")
    return f"{' · '.join(parts)}\n\n```\n{typed}\n```"[:TAG_LENGTH]


def _entry_point(command: Sequence[str]) -> str:
    """`pipeline.pretrain` of `python -m pipeline.pretrain …`, else the script's name."""
    if "-m" in command[:-1]:
        return command[list(command).index("-m") + 1]
    return Path(command[1]).name if len(command) > 1 else "python"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return "unknown"


def _commit() -> str:
    """The checked-out commit of this code, with `+` where files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10).returncode == 1
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout[:12] + ("+" if changed else "")


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w\-./ :]", "_", name)[:250]


def _read(address: str | Path) -> str:
    if "://" not in str(address):
        return Path(address).read_text()
    with fsspec.open(str(address), "rt") as file:
        return str(file.read())


def _now() -> int:
    return int(time.time() * 1000)


# --- during training ------------------------------------------------------------------------------------------------


class Tracker:
    """Sends what one run logs, in order, from a background thread.

    Args:
        uri: the store.
        run_id: what `start_run` or `resume_run` gave.
        run: the run's folder, in which entries wait while the store does not answer, so that they outlive the process:
            the next `Tracker` of the same run sends them (see `spool_of`). Left open, they wait below `~/.cache`.
        required: whether a store that stays away is a reason to stop, see `lost`.
        ended: the run is over, and only what its spool holds is to be delivered.
        say: takes a sentence for the user: that the store went away, that it came back.
        system_metrics: seconds between two measurements of processor, memory, disk, network and GPU; 0 takes none.
        interval: seconds between two deliveries, and between two attempts while the store does not answer.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        *,
        run: str | None = None,
        system_metrics: float = 10.0,
        interval: float = 1.0,
        required: bool = False,
        ended: bool = False,
        say: Callable[[str], object] = log.warning,
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._run = run
        self._spool = _spool_below_home(f"{uri} {run_id}") if run is None else spool_of(run)
        self._file: IO[str] | None = None
        self._system_metrics = system_metrics
        self._interval = interval
        self._required, self._ended, self._say = required, ended, say
        self._lost = False
        self._changed = threading.Condition()
        # The end of an earlier process is not this one's: with it, the run goes on.
        self._waiting = deque(entry for entry in _read_spool(self._spool) if ended or "status" not in entry)
        self._spooled = len(self._waiting)  # so many entries at the head stand in the spool too
        self._attempts = 0  # deliveries tried to the end, for `flush`
        self._hurry = False
        self._closed = False
        self._client: Any = None
        self._stored: dict[str, int] = {}  # the last step of each metric
        self._step = 0
        self._silent_since: float | None = None  # when the store failed to answer, if it has not since
        self._refused = False
        self._full = False
        self._open_spool()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether no store has taken the run yet, so that `run_id` is a ticket."""
        return self.run_id.startswith(PENDING)

    @property
    def lost(self) -> bool:
        """Whether the store is required and was once away for more than `PATIENCE` seconds."""
        since = self._silent_since
        self._lost = self._lost or (self._required and since is not None and time.monotonic() - since > PATIENCE)
        return self._lost

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Note metrics at `step` images seen; returns at once. None is left out; a metric's steps must grow."""
        now = _now()
        entries = [
            {"metric": _metric_name(key), "value": float(value), "step": int(step), "time": now}
            for key, value in metrics.items()
            if value is not None
        ]
        with self._changed:
            self._step = max(self._step, int(step))
            full = len(self._waiting) >= MOST_WAITING
            if not full:
                self._waiting.extend(entries)
            elif not self._full:
                self._say(f"MLflow at {redact(self.uri)} is away too long: metrics from step {step} on are lost.")
            self._full = full

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a file, or a local folder, with the run, below `folder`; it must stay until it is sent."""
        address = str(path) if "://" in str(path) else str(Path(path).resolve())
        self._add({"artifact": address, "folder": folder or None})

    def log_backbone(self, weights: str | Path, config: Mapping[str, Any], usage: str = "") -> None:
        """Keep the trained backbone in the folder `backbone` of the run's artifacts.

        Plain files, readable without this project and safe to open: the weights (safetensors), `config.json` with what
        re-creates the module, and `usage` (lines to paste) as README.md.
        """
        self._add({"text": json.dumps(dict(config), indent=2, default=str) + "\n", "file": "backbone/config.json"})
        if usage:
            self._add({"text": usage, "file": "backbone/README.md"})
        self.log_artifact(weights, "backbone")

    def flush(self, timeout: float = 10.0) -> bool:
        """Send what is waiting; True once the store has it all.

        After `timeout` seconds, or when the store does not answer, what is left stands in the spool: call this before
        writing a checkpoint, and a killed process loses no entry from before it.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            wanted = self._attempts + 2  # the delivery under way may have begun before the last entry
            while self._waiting and self._attempts < wanted and (left := deadline - time.monotonic()) > 0:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait(left)
            self._write_spool()
            return not self._waiting

    def close(self, timeout: float = 10.0) -> None:
        """Send or keep what is waiting and end the thread; the run goes on, with another `Tracker`."""
        self._stop(self.flush(timeout))

    def finish(self, status: Status, timeout: float = 30.0) -> None:
        """End the run as FINISHED, FAILED or KILLED; waits at most `timeout` seconds for what is still to be sent."""
        self._add({"status": status, "time": _now()})
        if self._stop(self.flush(timeout)):
            return
        way = f"see {self._spool}"
        if self._run:
            way = f"python -m pipeline.tracking {shlex.quote(self._run)} delivers them"
        self._say(f"MLflow at {redact(self.uri)} did not take the last {len(self._waiting):,} entries; {way}.")

    def _stop(self, delivered: bool) -> bool:
        """End the thread and let go of the spool, which stays where it holds something."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._silent_since is None:
            self._thread.join(5.0)
        with self._changed:
            if delivered:
                self._spool.unlink(missing_ok=True)
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
                self._file = None
        return delivered

    def _add(self, entry: dict[str, Any]) -> None:
        with self._changed:
            self._waiting.append(entry)

    # the thread

    def _work(self) -> None:
        monitor = None
        measured = time.monotonic()
        while not self._closed:
            with self._changed:
                if not self._hurry:
                    self._changed.wait(self._interval)
                self._hurry = False
            try:
                self._deliver()
                if self._system_metrics and monitor is None:
                    monitor = _monitor(self.uri)
                if monitor is not None and time.monotonic() - measured >= self._system_metrics:
                    measured = time.monotonic()
                    self.log(_measure(monitor), self._step)
            except Exception as error:
                self._fail(error)
            with self._changed:
                self._attempts += 1
                self._changed.notify_all()

    def _deliver(self) -> None:
        if self._client is None:
            client = _client(self.uri)
            self.run_id = _resolve(client, self.run_id)
            run = client.get_run(self.run_id)
            self._stored = {metric.key: metric.step for metric in run.data._metric_objs}
            if run.info.status != "RUNNING" and not self._ended:
                client.update_run(self.run_id, status="RUNNING")
            self._client = client
        while batch := self._next():
            try:
                self._send(batch)
            except Exception as error:
                if not _hopeless(error):
                    raise
                if not self._refused:
                    self._say(f"MLflow at {redact(self.uri)} refused an entry, which is left out: {_short(error)}")
                self._refused = True
            with self._changed:
                for _ in batch:
                    self._waiting.popleft()
                self._spooled = max(0, self._spooled - len(batch))
                if not self._waiting and self._file is not None:
                    self._file.truncate(0)
        if self._silent_since is not None:
            self._silent_since = None
            self._say(f"MLflow at {redact(self.uri)} answers again and has everything that waited.")

    def _next(self) -> list[dict[str, Any]]:
        """The metrics at the head of the queue, as many as a request takes, or the one entry of another kind there."""
        batch: list[dict[str, Any]] = []
        with self._changed:
            for entry in self._waiting:
                if "metric" not in entry or len(batch) == METRICS_PER_REQUEST:
                    break
                batch.append(entry)
            return batch or ([self._waiting[0]] if self._waiting else [])

    def _send(self, batch: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        entry = batch[0]
        if "text" in entry:
            self._client.log_text(self.run_id, entry["text"], entry["file"])
        elif "artifact" in entry:
            with _local(entry["artifact"]) as path:
                keep = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                keep(self.run_id, str(path), entry["folder"])
        elif "status" in entry:
            self._client.set_terminated(self.run_id, entry["status"], entry["time"])
        else:
            stored = dict(self._stored)
            new = []
            for entry in batch:
                if entry["step"] > stored.get(entry["metric"], -1):
                    stored[entry["metric"]] = entry["step"]
                    new.append(Metric(entry["metric"], entry["value"], entry["time"], entry["step"]))
            if new:
                self._client.log_batch(self.run_id, metrics=new)
            self._stored = stored

    def _fail(self, error: Exception) -> None:
        if self._silent_since is None:
            self._silent_since = time.monotonic()
            limit = f"; after {PATIENCE / 60:g} minutes the run stops, with a checkpoint" if self._required else ""
            if not self._waiting or "status" not in self._waiting[-1]:  # else `finish` is about to say it
                self._say(f"MLflow at {redact(self.uri)} takes no entries ({_short(error)}): they wait{limit}.")
        with self._changed:
            self._write_spool()

    def _open_spool(self) -> None:
        """Open the spool and mark it as written to by a living process."""
        with suppress(OSError):  # a full or read-only disk: entries are still in memory
            self._file = _appending(self._spool)
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def _write_spool(self) -> None:
        """Append the entries that do not stand in the spool yet; the caller holds the lock."""
        if len(self._waiting) == self._spooled or self._closed:
            return
        if self._file is None:
            self._open_spool()
        with suppress(OSError):
            if self._file is not None:
                _append(self._file, list(self._waiting)[self._spooled :])
                self._spooled = len(self._waiting)


def _appending(spool: Path) -> IO[str]:
    """A spool to append to; a line that a killed process left unfinished is ended first."""
    spool.parent.mkdir(parents=True, exist_ok=True)
    file = open(spool, "a+")  # noqa: SIM115 - the caller closes it
    file.seek(max(0, file.tell() - 1))
    if file.read(1) not in ("", "\n"):
        file.write("\n")
    return file


def _append(file: IO[str], entries: Sequence[Mapping[str, Any]]) -> None:
    file.writelines(json.dumps(entry) + "\n" for entry in entries)
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _local(address: str) -> Iterator[Path]:
    """The file at an address, on this machine's disk."""
    if "://" not in address:
        yield Path(address)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / address.rsplit("/", 1)[1]
        filesystem, inside = fsspec.core.url_to_fs(address)
        filesystem.get(inside, str(path))
        yield path


def _read_spool(spool: Path) -> Iterator[dict[str, Any]]:
    if not spool.is_file():
        return
    for line in spool.read_text().splitlines():
        with suppress(ValueError):  # a process killed while writing leaves half a line at the end
            yield json.loads(line)


def _monitor(uri: str) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    return SystemMetricsMonitor("", tracking_uri=uri)


def _measure(monitor: Any) -> dict[str, float]:
    """Load of this machine since the last measurement, under MLflow's names.

    MLflow's own thread counts measurements instead of images, and ends for good when the store fails once.
    """
    monitor.collect_metrics()
    measured = monitor.aggregate_metrics()
    for part in monitor.monitors:
        part.clear_metrics()
    return {f"system/{key}": value for key, value in measured.items()}


# --- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """Deliver what runs could not tell MLflow while it did not answer, each run in order."""

    runs: tuple[str, ...]
    """Run folders, or folders of them."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 where something still waits, 2 a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        import tyro

        kind = Annotated[Arguments, tyro.conf.arg(name="")]
        arguments = tyro.cli(
            kind, args=argv, prog="python -m pipeline.tracking", config=(tyro.conf.PositionalRequiredArgs,)
        )
        done = [deliver(run) for given in arguments.runs for run in _runs_at(given)]
        return 0 if all(done) else 1

    return guarded(command, debug="--debug" in argv)


def _runs_at(address: str) -> list[str]:
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


if __name__ == "__main__":
    sys.exit(main())
