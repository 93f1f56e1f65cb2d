"""Tracking against real stores: an sqlite file, and an MLflow server on this machine that comes and goes."""

import fcntl
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from pipeline import tracking
from pipeline.errors import UserError
from pipeline.redaction import redact
from pipeline.tracking import Tracker, child_run, default_uri, description, end_run, resume_run, start_run
from pipeline.tracking.__main__ import main
from pipeline.tracking.description import PARAM_LENGTH, DatasetInput
from pipeline.tracking.entries import Recipient
from pipeline.tracking.spool import Spool, read, spool_of
from pipeline.tracking.store import TrackingError, accepted, artifacts_of, connect
from pipeline.tracking.tickets import PENDING

DATASET: DatasetInput = {
    "name": "flowers", "digest": "f00d" * 16, "path": "s3://key:hunter2@bucket/flowers", "images": 1020, "classes": 17,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default spools and stray files land where this test can see them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sqlite store with its tables, which take seconds to create."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{file}")
    return file


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path) -> str:
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return default_uri(tmp_path / "runs")


class Server:
    """`mlflow server` on a loopback port of its own, over a store that outlives it."""

    def __init__(self, folder: Path, store: Path) -> None:
        folder.mkdir()
        shutil.copy(store, folder / "mlflow.db")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "log", "ab") as out:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                with urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        pytest.fail(f"mlflow server did not start: {(self.folder / 'log').read_text()[-2000:]}")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Server(tmp_path / "server", empty_store)
    yield server
    server.stop()


def begin(uri: str, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "experiment": "flowers",
        "name": "vit_s16-dino-flowers-0712",
        "tags": {"backbone": "vit_s16", "objective": "dino", "data": "flowers", "family": "vit"},
        "params": {"lr": 0.001, "options": {"out_dim": 2048}},
        "dataset": DATASET,
        "config_path": None,
        "run": "runs/one",
    }
    return start_run(uri, **(settings | changes))


def history(uri: str, run_id: str, key: str = "loss") -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in connect(uri).get_metric_history(run_id, key)]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith(tracking.__name__)]


def eventually(true: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# addresses and secrets


def test_default_is_a_file_of_the_runs_folder(tmp_path: Path) -> None:
    assert default_uri(tmp_path / "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert default_uri("runs") == f"sqlite:///{tmp_path}/cwd/runs/mlflow.db"
    assert default_uri("s3://bucket/runs") == f"sqlite:///{tmp_path}/home/ssl-runs/mlflow.db"


def test_environment_names_another_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert default_uri("runs") == "http://mlflow:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    assert default_uri("runs") == f"sqlite:///{tmp_path}/cwd/here.db"


@pytest.mark.parametrize(
    ("run", "place"),
    [("s3://bucket/runs/one", "home/ssl-runs"), ("runs/one", "cwd/runs"), ("one", "cwd")],
)
def test_artifacts_of_a_data_base_have_a_lasting_place(run: str, place: str, tmp_path: Path) -> None:
    assert artifacts_of("postgresql://db/mlflow", run) == (tmp_path / place / "mlartifacts").as_uri()
    assert artifacts_of(f"sqlite:///{tmp_path}/here/mlflow.db", run) == (tmp_path / "here" / "mlartifacts").as_uri()
    assert artifacts_of("http://mlflow:5000", run) is None


def test_artifacts_of_a_run_elsewhere_lie_where_it_is_said(uri: str, tmp_path: Path) -> None:
    copy = tmp_path / "temporary" / "copy" / "config.yaml"  # of what lies in a remote storage
    copy.parent.mkdir(parents=True)
    copy.write_text("seed: 0\n")
    begin(uri.replace("sqlite:", "sqlite+pysqlite:"), config_path=copy, run="s3://bucket/runs/one")
    (kept,) = tmp_path.rglob("artifacts/config.yaml")
    assert kept.is_relative_to(tmp_path / "home" / "ssl-runs" / "mlartifacts")


@pytest.mark.parametrize(
    "text",
    [
        "http://me:hunter2@mlflow.example:5000/path",
        "postgresql://me:hunter2@db/mlflow",
        "--data s3://hunter2@bucket/x",
        "https://x.example/a.tar?X-Amz-Signature=hunter2&X-Amz-Date=1",
        "https://x.blob.example/a?sv=1&sig=hunter2",
        "password=hunter2",
        "AWS_SECRET_ACCESS_KEY=hunter2 python",
        '{"api_key": "hunter2"}',
        "storage.secret: hunter2",
        "--s3-token hunter2",
        "Authorization: Bearer hunter2",
        "Authorization: Basic hunter2==",
        "ghp_hunter2hunter2hunter2",
        "AKIAHUNTER2HUNTER2AB".replace("hunter2", ""),
        "s3://KEY:hunt/hunter2@bucket/x",
        "sftp://me:hunt/hunter2@host/x",
        "sftp://me:p@ss-hunter2@host/x",
        "s3://KEY:hunt/er@hunter2@bucket/x",
        "AZURE_STORAGE_KEY=hunter2==",
        "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=hunter2==;EndpointSuffix=core.windows.net",
        "AZURE_STORAGE_CONNECTION_STRING=hunter2",
        "SECRET_KEY=hunter2",
        "PRIVATE_KEY=hunter2",
        "DB_PASS=hunter2",
        "https://hooks.slack.com/services/T00000000/B00000000/hunter2",
        "https://discord.com/api/webhooks/1/hunter2",
        "https://api.telegram.org/bot1:hunter2/sendMessage",
        "https://me.webhook.office.com/webhookb2/1@2/IncomingWebhook/hunter2",
    ],
)
def test_secrets_are_redacted(text: str) -> None:
    assert "hunter2" not in redact(text).lower()
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/path@v2/x.tar",
        "photos/me@home",
        "tokens=196",
        "vit_s16 --lr 0.001",
        "mask_token",
        "sigma=0.1",
        "http://h:80/a@2x",
        "s3://bucket/a@2x/b@2x.png",
        "bypass=1 compass: north",
        "https://hooks.example.org/services/photos",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


# a run in an sqlite file


def test_run_says_what_it_is(uri: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("backbone: vit_s16\ndata: s3://key:hunter2@bucket/flowers\n")
    run_id = begin(
        uri,
        config_path=config,
        params={"lr": 0.001, "options": {"out_dim": 2048, "text": "x" * 9999}, "api_key": "hunter2", "data set!": 1},
        command=["/usr/bin/python3", "-m", "pipeline.pretrain", "--data", "s3://key:hunter2@bucket/flowers"],
    )
    client = connect(uri)
    run = client.get_run(run_id)
    assert run.info.run_name == "vit_s16-dino-flowers-0712"
    assert run.info.status == "RUNNING"
    assert client.get_experiment(run.info.experiment_id).name == "flowers"
    assert run.data.params["lr"] == "0.001"
    assert run.data.params["options.out_dim"] == "2048"
    assert len(run.data.params["options.text"]) == PARAM_LENGTH
    assert run.data.params["data set_"] == "1"
    assert run.data.tags["mlflow.source.name"] == "pipeline.pretrain"
    assert "python -m pipeline.pretrain --data" in run.data.tags["mlflow.note.content"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?", run.data.tags.get("commit", "0" * 12))
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, json.loads(data.dataset.profile)["num_rows"]) == ("flowers", 1020)
    assert run.info.artifact_uri.startswith((tmp_path / "runs" / "mlartifacts").as_uri())
    (kept,) = (tmp_path / "runs" / "mlartifacts").rglob("config.yaml")
    everything = kept.read_text() + str(run.to_dictionary())
    assert "hunter2" not in everything
    assert "backbone: vit_s16" in everything
    assert list((tmp_path / "cwd").iterdir()) == []  # MLflow's own defaults would write here


def test_metrics_artifacts_and_system_load_arrive(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = begin(uri)
    weights = tmp_path / "backbone.safetensors"
    weights.write_bytes(b"weights")
    send, answers = Recipient.send, threading.Event()
    monkeypatch.setattr(Recipient, "send", lambda store, request: answers.wait(60) and send(store, request))
    tracker = Tracker(uri, run_id, system_metrics=0.1, interval=0.05)
    for step in range(1, 2501):
        tracker.log({"loss": 1 / step, "images_per_second": 80.0, "knn_top1": None}, step * 64)
    assert len(tracker.spool) >= 5000  # all handed over while the store has not taken one
    answers.set()
    tracker.log_artifact(weights, "checkpoints")
    tracker.log_backbone(weights, {"name": "vit_s16", "image_size": 64}, usage="import backbones\n")
    eventually(lambda: "system/cpu_utilization_percentage" in connect(uri).get_run(run_id).data.metrics)
    tracker.finish("FINISHED")
    run = connect(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert history(uri, run_id) == [(step * 64, pytest.approx(1 / step)) for step in range(1, 2501)]
    assert "knn_top1" not in run.data.metrics
    kept = [str(path) for path in (tmp_path / "runs" / "mlartifacts").rglob("*") if path.is_file()]
    assert {path.split("/artifacts/")[1] for path in kept} == {
        "checkpoints/backbone.safetensors",
        "backbone/backbone.safetensors",
        "backbone/config.json",
        "backbone/README.md",
    }


@pytest.mark.parametrize("kind", ["sqlite", "server"])
def test_resumed_run_has_every_step_once(kind: str, uri: str, request: pytest.FixtureRequest) -> None:
    if kind == "server":
        server = request.getfixturevalue("server")
        server.start()
        uri = server.uri
    run_id = begin(uri)
    killed = Tracker(uri, run_id, system_metrics=0)
    for step in range(0, 100, 10):  # the last checkpoint is at 50 images; the steps after it are already recorded
        killed.log({"loss": step / 7}, step)
    assert killed.flush()
    killed._stop(False)
    assert resume_run(uri, run_id, 50) == run_id
    resumed = Tracker(uri, run_id, system_metrics=0)
    for step in range(60, 200, 10):
        resumed.log({"loss": step / 7, "knn_top1": 0.5}, step)
    resumed.finish("KILLED")
    assert history(uri, run_id) == [(step, pytest.approx(step / 7)) for step in range(0, 200, 10)]
    assert [step for step, _ in history(uri, run_id, "knn_top1")] == list(range(60, 200, 10))
    run = connect(uri).get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["resumed_at"] == "50 images"


def test_what_is_sent_again_from_the_beginning_is_stored_once(uri: str) -> None:
    """As a resumed run does with what it wrote down: the killed process had told a part of it, and not the rest."""
    run_id = begin(uri)
    killed = Tracker(uri, run_id, system_metrics=0)
    for step in range(0, 50, 10):
        killed.log({"loss": step / 7, "lr": 0.1}, step)
    assert killed.flush()
    killed._stop(True)
    resumed = Tracker(uri, run_id, system_metrics=0)
    for step in range(0, 100, 10):
        resumed.log({"loss": step / 7, "lr": 0.1, "late": 1.0}, step)
    resumed.finish("FINISHED")
    for key in ("loss", "lr", "late"):
        assert [step for step, _ in history(uri, run_id, key)] == list(range(0, 100, 10))


@pytest.mark.parametrize("told", [True, False], ids=["told", "killed before it was told"])
def test_a_run_that_goes_back_has_the_values_that_count(uri: str, tmp_path: Path, told: bool) -> None:
    run_id, run = begin(uri), tmp_path / "runs" / "one"
    run.mkdir()
    ill = Tracker(uri, run_id, run=str(run), system_metrics=0, interval=0.1 if told else 1e9)
    for step in range(0, 100, 10):
        ill.log({"loss": step / 7, "lr": 0.1}, step)
    assert ill.flush()
    time.sleep(0.01)
    ill.rewind(50)
    if told:
        ill.log({"loss": -6.0}, 60)
        assert ill.flush()
    ill._closed = True  # as if killed: what it had in memory alone is gone
    ill.spool._file.close()
    resumed = Tracker(uri, run_id, run=str(run), system_metrics=0)
    for step in range(0, 90, 10):  # as a resumed run does with all that it wrote down
        resumed.log({"loss": step / 7 if step <= 50 else -step / 10, "lr": 0.1 if step <= 50 else 0.05}, step)
    resumed.finish("FINISHED")
    entries = connect(uri).get_metric_history(run_id, "loss")
    newest = {m.step: m.value for m in sorted(entries, key=lambda m: m.timestamp)}
    assert newest == {s: pytest.approx(s / 7 if s <= 50 or s > 80 else -s / 10) for s in range(0, 100, 10)}
    assert sorted(m.step for m in entries) == sorted([*range(0, 100, 10), 60, 70, 80])
    assert connect(uri).get_run(run_id).data.tags["rewound"].startswith("to 50 images at ")


def test_what_waits_outlives_a_kill_in_the_middle_of_a_line(uri: str, tmp_path: Path) -> None:
    run_id, run = begin(uri), tmp_path / "runs" / "one"
    run.mkdir()
    spool = spool_of(str(run))
    entries = [{"metric": "loss", "value": step / 7, "step": step, "time": 1000 + step} for step in range(3)]
    ended = {"status": "KILLED", "time": 2000}
    spool.write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, ended]) + '{"metric": "lo')
    tracker = Tracker(uri, run_id, run=str(run), system_metrics=0)
    tracker.log({"loss": 3 / 7}, 3)
    tracker.close()
    assert history(uri, run_id) == [(step, pytest.approx(step / 7)) for step in range(4)]
    assert connect(uri).get_run(run_id).info.status == "RUNNING"  # the end was of an earlier process
    assert not spool.exists()


def test_a_run_at_work_delivers_by_itself(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_id, run = begin(uri), tmp_path / "runs" / "one"
    run.mkdir()
    (run / "mlflow_run_id").write_text(run_id)
    entry = {"metric": "loss", "value": 1.0, "step": 1, "time": 1000}
    spool_of(str(run)).write_text(json.dumps(entry) + "\n" + json.dumps({"status": "FAILED", "time": 2000}) + "\n")
    with open(spool_of(str(run))) as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as a `Tracker` does
        assert main([str(run)]) == 2
        assert "is at work now, and delivers by itself" in capsys.readouterr().err
    assert main([str(run.parent)]) == 0
    assert f"{run}: 2 of 2 entries delivered" in capsys.readouterr().out
    assert history(uri, run_id) == [(1, 1.0)]
    assert connect(uri).get_run(run_id).info.status == "FAILED"
    assert main([str(run)]) == 0
    assert "nothing waits" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 2
    assert "no run is there" in capsys.readouterr().err
    assert main([]) == 2
    assert "no run is named" in capsys.readouterr().err


def test_a_run_resumed_during_a_delivery_loses_nothing(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, run = begin(uri), tmp_path / "runs" / "one"
    run.mkdir()
    (run / "mlflow_run_id").write_text(run_id)
    entries = [{"metric": "loss", "value": step / 7, "step": step, "time": 1000 + step} for step in range(3)]
    ended = {"status": "KILLED", "time": 2000}
    spool_of(str(run)).write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, ended]))
    begun: list[Tracker] = []

    class Delivery(Tracker):
        def close(self, timeout: float = 10.0) -> None:
            assert self.flush(timeout)  # all is sent; now the run is resumed, before the file is let go
            begun.append(Tracker(uri, run_id, run=str(run), system_metrics=0, interval=0.05))
            begun[0].log({"loss": 3 / 7}, 3)
            time.sleep(1.0)
            assert len(history(uri, run_id)) == 3  # it waits for its turn
            super().close(timeout)

    monkeypatch.setattr("pipeline.tracking.__main__.Tracker", Delivery)
    assert main([str(run)]) == 0
    resumed = begun[0]
    eventually(lambda: len(history(uri, run_id)) == 4)
    assert connect(uri).get_run(run_id).info.status == "RUNNING"

    def away(*request: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(resumed._recipient, "send", away)
    resumed.log({"loss": 4 / 7}, 4)
    assert not resumed.flush()
    resumed._stop(False)  # as a kill leaves it
    end_run(uri, run_id, "FINISHED", str(run))
    assert history(uri, run_id) == [(step, pytest.approx(step / 7)) for step in range(5)]


def test_what_a_run_says_to_its_end_waits_for_the_delivery(tmp_path: Path) -> None:
    delivery = Spool(tmp_path / "spool", ended=True)
    resumed = Spool(tmp_path / "spool", ended=False)
    resumed.add({"metric": "loss"})
    resumed.write()
    assert not resumed.claim()
    assert not delivery.path.stat().st_size
    closing = threading.Thread(target=lambda: resumed.close(delivered=False))
    closing.start()
    delivery.close(delivered=True)
    closing.join(30.0)
    assert list(read(resumed.path)) == [{"metric": "loss"}]


@pytest.mark.parametrize("required", [True, False])
def test_a_required_store_is_lost_after_a_while(monkeypatch: pytest.MonkeyPatch, required: bool) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Tracker, "PATIENCE", 0.5)
    said: list[str] = []
    tracker = Tracker("http://127.0.0.1:9", "0" * 32, system_metrics=0, required=required, say=said.append)
    tracker.log({"loss": 1.0}, 1)
    assert not tracker.lost
    eventually(lambda: tracker._silent_since and time.monotonic() - tracker._silent_since > 0.6)
    assert tracker.lost == required
    tracker.close(0.1)
    assert ("the run stops, with a checkpoint" in said[0]) == required


def test_a_required_store_has_to_answer(uri: str) -> None:
    tracking.require(uri)
    with pytest.raises(UserError, match=r"--tracking required: MLflow at http://127\.0\.0\.1:9 does not answer"):
        tracking.require("http://127.0.0.1:9")


def test_run_of_another_store_is_not_resumed(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    assert resume_run(uri, "0" * 32, 0) is None
    assert "does not hold this run" in caplog.text


def test_evaluation_stands_below_its_run(uri: str) -> None:
    run_id = begin(uri)
    end_run(uri, run_id, "FAILED")
    child = child_run(uri, run_id, name="linear", tags={"protocol": "linear"}, metrics={"linear_top1": 0.8}, step=640)
    assert child is not None
    run = connect(uri).get_run(child)
    assert run.data.tags["mlflow.parentRunId"] == run_id
    assert run.data.tags["backbone"] == "vit_s16"
    assert run.data.tags["kind"] == "evaluation"
    assert run.info.status == "FINISHED"
    assert history(uri, child, "linear_top1") == [(640, 0.8)]
    assert connect(uri).get_run(run_id).info.status == "FAILED"


def test_runs_of_one_data_set_compare_at_a_click(uri: str) -> None:
    client = connect(uri)
    cnn, vit = (client.get_run(begin(uri, tags={"backbone": backbone})) for backbone in ("resnet18", "vit_s16"))
    experiment = client.get_experiment(cnn.info.experiment_id)
    view = json.loads(json.loads(experiment.tags["mlflow.sharedViewState.comparison"])["state"])
    assert {"tags.`backbone`", "metrics.`knn_top1`", "metrics.`linear_top1`"} <= set(view["selectedColumns"])
    assert "viewStateShareKey=comparison" in experiment.tags["mlflow.note.content"]
    assert {run.data.tags["kind"] for run in (cnn, vit)} == {"pretraining"}
    assert cnn.data.tags["mlflow.runColor"] != vit.data.tags["mlflow.runColor"]


def test_entry_that_cannot_be_stored_holds_up_nothing(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(uri, begin(uri), system_metrics=0)
    tracker.log_artifact(tmp_path / "deleted.txt")
    tracker.log({"loss": float("nan"), "odd (name)": 2}, 1)
    tracker.finish("FINISHED")
    assert [step for step, _ in history(uri, tracker.run_id)] == [1]
    assert [step for step, _ in history(uri, tracker.run_id, "odd _name_")] == [1]
    assert len(warnings_in(caplog)) == 1
    assert "deleted.txt" in caplog.text


def test_a_refused_metric_takes_no_other_with_it(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_id, run = begin(uri), tmp_path / "runs" / "one"
    run.mkdir()
    names = ("loss", "top//1", "lr")
    entries = [{"metric": name, "value": 0.5, "step": step, "time": 1000} for step in range(500) for name in names]
    spool_of(str(run)).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    Tracker(uri, run_id, run=str(run), system_metrics=0).finish("FINISHED")
    for name in ("loss", "lr"):
        assert history(uri, run_id, name) == [(step, 0.5) for step in range(500)]
    (said,) = warnings_in(caplog)
    assert "refuses top//1, left out here" in said


@pytest.mark.parametrize("name", ["a//b", "/a", "a/", "../a", "..a", ".", "", "a/./b", "ä(ö)|", "x" * 400, "/" * 400])
def test_names_are_made_such_as_a_store_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(accepted(name))


def test_store_of_an_unknown_kind_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="cannot record this run"):
        begin(f"file://{tmp_path}/mlruns")


def test_two_runs_may_create_the_store_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pipeline.tracking import start_run\n"
        "print(start_run(sys.argv[1], experiment='e', name='n', tags={}, params={}, dataset=None, config_path=None, "
        "run='runs/one'))"
    )
    uri = default_uri(tmp_path / "fresh")
    root = Path(tracking.__file__).parents[2]
    both = [
        subprocess.Popen([sys.executable, "-c", program, uri], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [err for _, err in said] == [b"", b""]  # nor does creating the tables chatter
    assert len({out for out, _ in said}) == 2


def test_a_locked_data_base_is_waited_for(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow tells of it after 20 s."""
    from mlflow.exceptions import TEMPORARILY_UNAVAILABLE, MlflowException

    def locked(uri: str) -> None:
        raise MlflowException("(sqlite3.OperationalError) database is locked", TEMPORARILY_UNAVAILABLE)

    run_id = begin(uri)
    monkeypatch.setattr("pipeline.tracking.runs.connect", locked)
    assert resume_run(uri, run_id, 0) == run_id
    assert "database is locked): the run is recorded once it does" in caplog.text
    assert begin(uri).startswith(PENDING)


def test_a_machine_that_hides_its_load_is_no_store_that_is_away(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden() -> None:
        raise AttributeError("'NoneType' object has no attribute 'bytes_recv'")

    monkeypatch.setattr("psutil.net_io_counters", hidden)
    said: list[str] = []
    tracker = Tracker(uri, begin(uri), system_metrics=0.1, interval=0.05, say=said.append)
    eventually(lambda: said)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("FINISHED")
    assert said == ["the load of this machine is not recorded: 'NoneType' object has no attribute 'bytes_recv'"]
    assert history(uri, tracker.run_id) == [(1, 1.0)]


def test_a_disk_that_fills_up_tears_no_entry(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", ended=False)
    entries = [{"text": "x" * 1000, "file": f"{i}"} for i in range(100)]
    spool.add(*entries)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        spool.write()
        spool.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    spool.write()
    assert list(read(spool.path)) == entries
    spool.close(delivered=False)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_of_this_code_and_no_project_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    (tmp_path / "description.py").touch()
    monkeypatch.setattr(description, "__file__", str(tmp_path / "description.py"))
    assert description._commit() == ""
    subprocess.run([*git, "add", "description.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert re.fullmatch(r"[0-9a-f]{12}", description._commit())
    (tmp_path / "description.py").write_text("changed")
    assert re.fullmatch(r"[0-9a-f]{12}\+", description._commit())


# a server that comes and goes


def test_server_down_in_the_middle_costs_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    server.start()
    run_id = begin(server.uri)
    tracker = Tracker(server.uri, run_id, system_metrics=0, interval=0.1)
    tracker.log({"loss": 0.0}, 0)
    assert tracker.flush()
    server.stop()
    for step in range(1, 1001):
        tracker.log({"loss": float(step)}, step)
    assert not tracker.flush(2.0)
    assert len(tracker.spool.path.read_text().splitlines()) == 1000
    server.start()
    tracker.log({"loss": 1001.0}, 1001)
    tracker.finish("FINISHED")
    assert history(server.uri, run_id) == [(step, float(step)) for step in range(1002)]
    assert not tracker.spool.path.exists()
    down, up = warnings_in(caplog)
    assert "takes no entries" in down
    assert "answers again" in up


def test_server_down_at_the_start_and_a_kill(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("seed: 0\n")
    begun = time.monotonic()
    ticket = begin(server.uri, config_path=config)
    assert time.monotonic() - begun < 20
    assert "is recorded once it does" in caplog.text
    assert resume_run(server.uri, ticket, 0) == ticket
    assert child_run(server.uri, ticket, name="knn", tags={}, metrics={}, step=0) is None
    killed = Tracker(server.uri, ticket, system_metrics=0, interval=0.1)
    killed.log({"loss": 1.0}, 64)
    killed.flush(2.0)  # as before a checkpoint; what a kill takes is the thread and the memory
    killed._stop(False)
    server.start()
    tracker = Tracker(server.uri, ticket, system_metrics=0, interval=0.1)
    tracker.log({"loss": 1.0}, 64)
    tracker.log({"loss": 0.5}, 128)
    tracker.finish("FINISHED")
    assert not tracker.run_id.startswith(PENDING)
    again = Tracker(server.uri, ticket, system_metrics=0, interval=0.1)
    again.close()
    assert again.run_id == tracker.run_id
    assert history(server.uri, tracker.run_id) == [(64, 1.0), (128, 0.5)]
    client = connect(server.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "vit_s16-dino-flowers-0712"
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["config.yaml"]
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_server_killed_while_it_stores_has_everything_once(server: Server) -> None:
    server.start()
    run_id = begin(server.uri)
    tracker = Tracker(server.uri, run_id, system_metrics=0, interval=0.1)
    for step in range(20_000):
        tracker.log({"loss": float(step)}, step)
    eventually(lambda: len(tracker.spool) < 19_000)  # some requests are answered, one is under way
    server.stop()
    assert tracker.spool
    tracker.flush(1.0)
    server.start()
    tracker.finish("FINISHED", timeout=120.0)
    assert history(f"sqlite:///{server.folder / 'mlflow.db'}", run_id) == [
        (step, float(step)) for step in range(20_000)
    ]


def test_memory_is_bounded_while_nothing_is_taken(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.tracker.MOST_WAITING", 100)
    tracker = Tracker(server.uri, "0" * 32, system_metrics=0, interval=0.1)
    for step in range(1000):
        tracker.log({"loss": 1.0}, step)
    tracker.close(0.1)
    assert len(tracker.spool) == 100
    assert len([warning for warning in warnings_in(caplog) if "metrics from step 100 on are lost" in warning]) == 1


def test_server_that_stays_away_ends_no_run(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(server.uri, "0" * 32, system_metrics=0, interval=0.1)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("FINISHED", timeout=2.0)
    assert "did not take the last 2 entries" in caplog.text
    assert len(tracker.spool.path.read_text().splitlines()) == 2
