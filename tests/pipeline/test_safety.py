"""What a run opens executes nothing, and what it writes or says holds no secret: tried on real servers on loopback."""

import base64
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

import backbones
from jobs import submit
from jobs.render.__main__ import main as render
from objectives import gram, pretrained
from pipeline import compare, evaluate, pack, pretrain
from pipeline.errors import UserError
from pipeline.redaction import bare, hide, redact
from pipeline.training.run_folder import RunFolder
from tests.chaos.runs import Place
from tests.s3 import s3

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--engine", "local", "--loader", "opencv", "--image-size", "16", "--batch-size", "8", "--knn-every", "0"),
    *("--precision", "fp32", "--backbone", "lenet5", "--objective", "mae", "--options.decoder-width", "16"),
    *("--options.decoder-depth", "1", "--options.decoder-heads", "2", "--epochs", "1"),
]
SECRET = "hunter2"
KEY = "AKIAHUNTERSQUARED000"
SIGNED = f"{SECRET}%2Fwith%2Bsigns%3D"


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images of two classes, and a broken one, as a .tar."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "photos.tar", "w") as archive:
        for i in range(48):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (20, 24, 3), np.uint8)).save(buffer, "PNG")
            _add(archive, f"{'ab'[i % 2]}/{i}.png", buffer.getvalue())
        _add(archive, "a/broken.png", b"\x89PNG\r\n\x1a\n cut")
    return folder / "photos.tar"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


# --- nothing is executed ---------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it creates the folder `MARK` of the environment."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (os.environ["MARK"],)


def _bare(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil()))


def _inside(path: Path) -> None:
    torch.save({"objective": Evil(), "config": "backbone: lenet5\n"}, path)


def _old_format(path: Path) -> None:
    torch.save({"objective": Evil(), "config": ""}, path, _use_new_zipfile_serialization=False)


def _in_yaml(path: Path) -> None:
    text = f"!!python/object/apply:os.mkdir ['{os.environ['MARK']}']"
    torch.save({"objective": {}, "config": text, "images_seen": 8}, path)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MARK", str(tmp_path / "executed"))
    return tmp_path / "executed"


@pytest.mark.parametrize("make", [_bare, _inside, _old_format], ids=lambda make: make.__name__)
def test_the_checkpoints_of_these_tests_are_malicious(tmp_path, mark, make):
    make(tmp_path / "evil.pt")
    with contextlib.suppress(RuntimeError):  # after it has happened, what came of it is no checkpoint
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("make", [_bare, _inside, _old_format, _in_yaml], ids=lambda make: make.__name__)
def test_no_place_that_loads_a_checkpoint_executes_it(tmp_path, mark, make, capsys):
    run = tmp_path / "evil"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = run / "checkpoints" / f"{8:012d}.pt"
    make(checkpoint)
    for refused in (
        lambda: pretrained.from_checkpoint(checkpoint.name, lambda _: checkpoint.read_bytes(), "evil"),
        lambda: pretrained.teacher(str(run)),
        lambda: gram.read_checkpoint(str(run)),
        lambda: gram.read_checkpoint(str(checkpoint)),
    ):
        with pytest.raises(ValueError):
            refused()
    if make is not _in_yaml:
        with pytest.raises(UserError):
            RunFolder(str(checkpoint.parent)).load_state(checkpoint.name)
    assert evaluate.main([str(checkpoint)]) == 2
    assert evaluate.main([str(run)]) == 2
    assert compare.main([str(checkpoint), str(run)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line[:7] for line in said] == ["error: "] * 3, said
    assert not mark.exists()


@pytest.mark.parametrize("make", [_bare, _inside], ids=lambda make: make.__name__)
def test_a_malicious_export_is_no_backbone(tmp_path, mark, make):
    make(tmp_path / "backbone.safetensors")
    for place in (tmp_path, tmp_path / "backbone.safetensors"):
        with pytest.raises(ValueError, match="not a backbone that this program exported"):
            backbones.load(place)
    assert not mark.exists()


def test_a_run_goes_on_from_no_malicious_checkpoint(tmp_path, mark, photos, capsys):
    common = ["--data", str(photos), "--cache", str(tmp_path / "cache"), "--storage", str(tmp_path / "runs"), *SMALL]
    run = tmp_path / "runs" / "one"
    assert pretrain.main([*common, "--run", str(run)]) == 0
    (good,) = (run / "checkpoints").glob("*.pt")
    for name, words in {
        "resumed": ["--resume", str(run)],
        "begun with": [*common, "--init", str(run)],
        "taught by": [*common[:-14], "--objective", "distillation", "--options.teacher", str(good), *SMALL[:12]],
    }.items():
        _inside(good)
        (run / "backbone.safetensors").unlink(missing_ok=True)
        capsys.readouterr()
        status = pretrain.main(words)
        assert not mark.exists(), name
        if name != "resumed":  # a damaged newest checkpoint is left for the one before, or for the beginning
            assert status == 2, capsys.readouterr().err


def test_a_configuration_is_data_only(tmp_path, mark, capsys):
    (tmp_path / "config.yaml").write_text(f"backbone: !!python/object/apply:os.mkdir ['{mark}']\n")
    assert pretrain.main(["--config", str(tmp_path / "config.yaml")]) == 2
    assert pretrain.main(["--resume", str(tmp_path)]) == 2
    assert "is not YAML" in capsys.readouterr().err
    assert not mark.exists()


# --- nothing is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "hidden"),
    [
        ("https://me:hunter2@host/x.tar", "https://***@host/x.tar"),
        ("https://host/x.tar?sig=hunter2&se=2026-01-01", "https://host/x.tar?***"),
        ("https://host/x.tar?X-Amz-Date=1&X-Amz-Signature=hunter2", "https://host/x.tar?***"),
        ("https://host/x.tar?d=0123456789abcdef0123", "https://host/x.tar?***"),
        ("https://host/x.tar?download=1", "https://host/x.tar?download=1"),
        ("s3://KEY:hunt/er2@bucket/x", "s3://***@bucket/x"),
        ("ftp://me:hunt/er2@host/x", "ftp://***@host/x"),
        ("http://host:8080/photo@2x/x.tar", "http://host:8080/photo@2x/x.tar"),
        ("s3://bucket/path@v2/x?.tar", "s3://bucket/path@v2/x?.tar"),
        ("abfs://photos@account.dfs.core.windows.net/x", "abfs://photos@account.dfs.core.windows.net/x"),
        ("photos/me?sig=x@home", "photos/me?sig=***"),
        ("$PHOTOS", "$PHOTOS"),
    ],
)
def test_addresses_without_their_credentials(address, hidden):
    assert hide(address) == hidden
    assert hide(hidden) == hidden


def test_a_bare_address_names_its_file():
    assert bare("https://host/x.tar?sig=a/b.c") == "https://host/x.tar"
    assert bare("photos/what?.tar") == "photos/what?.tar"


class Guarded(BaseHTTPRequestHandler):
    """Serves one file: below /private/ to who has the password, below /signed/ to who has the signature."""

    content = b""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        address = urllib.parse.urlsplit(self.path)
        given = base64.b64encode(f"me:{SECRET}".encode()).decode()
        if address.path.startswith("/private/"):
            permitted = self.headers.get("Authorization") == f"Basic {given}"
        else:
            permitted = urllib.parse.parse_qs(address.query).get("sig") == [urllib.parse.unquote(SIGNED)]
        if not permitted:
            self.send_error(401)
            return
        first, last = 0, len(self.content) - 1
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            self.wfile.write(self.content[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Photos", (Guarded,), {"content": photos.read_bytes()}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def told(folder: Path, said: str, *secrets: str) -> list[str]:
    """Where any of some secrets stands: in what was said, in a file below a folder, in a file's name."""
    places = ["what was said"] if any(secret in said for secret in secrets) else []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if any(secret in str(path) or secret.encode() in content for secret in secrets):
            places.append(str(path))
    return places


def packed_and_trained(data: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> str:
    """Pack an address, and train on it in the run `one`; what was said."""
    cache = ["--data", data, "--cache", str(tmp_path / "cache")]
    assert pack.main(cache) == 0, capfd.readouterr().err
    run = tmp_path / "runs" / "one"
    assert pretrain.main([*cache, *SMALL, "--run", str(run)]) == 0, capfd.readouterr().err
    return str(capfd.readouterr())


def judged(data: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> str:
    """Evaluate the run `one` on an address, and compare it with a copy of itself; what was said."""
    more = ["--data", data, "--cache", str(tmp_path / "cache"), "--protocols", "knn", "--limit", "20"]
    more += ["--engine", "local"]
    run = str(tmp_path / "runs" / "one")
    assert evaluate.main([run, *more]) == 0, capfd.readouterr().err
    shutil.copytree(run, tmp_path / "runs" / "two")
    assert compare.main([run, str(tmp_path / "runs" / "two"), *more]) == 0, capfd.readouterr().err
    return str(capfd.readouterr())


@pytest.mark.parametrize("kind", ["password", "signature"])
def test_a_secret_in_an_address_stands_nowhere_and_is_asked_for_again(kind, site, tmp_path, capfd, monkeypatch):
    data = f"http://me:{SECRET}@{site}/private/photos.tar" if kind == "password" else None
    data = data or f"http://{site}/signed/photos.tar?sig={SIGNED}"
    said = packed_and_trained(data, tmp_path, capfd)
    said += judged(data, tmp_path, capfd) if kind == "password" else ""
    assert told(tmp_path, said, SECRET) == []
    run = tmp_path / "runs" / "one"
    assert "broken.png" in (run / "rejected.csv").read_text()
    assert "***" in yaml.safe_load((run / "config.yaml").read_text())["data"]

    for command, words in ((pretrain.main, ["--resume", str(run)]), (evaluate.main, [str(run)])):
        assert command([*words, "--cache", str(tmp_path / "cache")]) == 2
        error = capfd.readouterr().err
        assert "credentials are not saved with a run; give --data again with them, or as '$NAME'" in error
    assert pretrain.main(["--resume", str(run), "--data", data]) == 0
    monkeypatch.setenv("PHOTOS", data)
    assert pretrain.main(["--resume", str(run), "--data", "$PHOTOS"]) == 2  # another address, as far as is known
    wrong = data.replace(SECRET, SECRET + "wrong")
    assert pack.main(["--data", wrong, "--cache", str(tmp_path / "cache")]) == 2
    assert pack.main(["--data", wrong, "--cache", str(tmp_path / "cache"), "--debug"]) == 2
    assert told(tmp_path, str(capfd.readouterr()), SECRET) == []


def test_a_variable_holds_an_address_for_every_command_and_for_going_on(site, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PHOTOS", f"http://me:{SECRET}@{site}/private/photos.tar")
    said = packed_and_trained("$PHOTOS", tmp_path, capfd)
    run = tmp_path / "runs" / "one"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"] == "$PHOTOS"
    assert pretrain.main(["--resume", str(run)]) == 0
    assert told(tmp_path, said + str(capfd.readouterr()), SECRET) == []
    monkeypatch.delenv("PHOTOS")
    assert pretrain.main(["--resume", str(run)]) == 2
    assert "error: --data '$PHOTOS': the variable PHOTOS is not set" in capfd.readouterr().err


def test_keys_of_s3_stand_nowhere(photos, tmp_path, capfd):
    with s3("bucket", KEY, SECRET) as files:
        files.pipe("bucket/photos.tar", photos.read_bytes())
        said = packed_and_trained("s3://bucket/photos.tar", tmp_path, capfd)
        for command in (pack.main, lambda words: pretrain.main([*words, *SMALL])):
            assert command(["--data", f"s3://{KEY}:{SECRET}/x@bucket/photos.tar", "--cache", str(tmp_path / "c")]) == 2
        refused = capfd.readouterr().err
        assert refused.count("error: s3://***@bucket/photos.tar: no credentials can stand in such an address") == 2
        assert "AWS_SECRET_ACCESS_KEY" in refused
    assert told(tmp_path, said + refused, SECRET, KEY) == []


def test_credentials_in_an_address_that_is_written_down_are_refused(tmp_path, capfd):
    for option in ("--storage", "--run", "--init", "--cache"):
        assert pretrain.main([option, f"ftp://me:{SECRET}@host/x", *SMALL]) == 2
        error = capfd.readouterr().err
        assert f"error: {option} ftp://***@host/x: credentials in this address would be written down" in error
        assert SECRET not in error


def test_jobs_take_no_secret_and_name_variables_that_hold_them(tmp_path, capfd, monkeypatch):
    (tmp_path / "cwd" / "jobs").mkdir()
    text = "run: pretrain\narguments: {data: DATA, backbone: lenet5}\nschedule: {cron: 0 1 * * *, time_zone: UTC}\n"
    job = tmp_path / "cwd" / "jobs" / "one.yaml"
    job.write_text(text.replace("DATA", "$PHOTOS") + "secrets: [PHOTOS]\n")
    monkeypatch.setenv("PHOTOS", f"https://me:{SECRET}@host/photos.tar")
    commands = [(submit.main, ["--dry-run"]), *((render, ["--to", kind]) for kind in ("cron", "slurm"))]
    for data in (
        f"https://me:{SECRET}@host/x.tar",
        f"https://host/x.tar?sig={SECRET}",
        f"s3://{KEY}:{SECRET}@bucket/x",
    ):
        for command, words in commands:
            assert command([str(job), *words, "--set", f"data={data}"]) == 2
            assert "data looks like a secret; name its variable under secrets:" in capfd.readouterr().err
    for command, words in commands:
        assert command([str(job), *words]) == 0
    said = capfd.readouterr()
    assert "--data '$PHOTOS'" in said.out
    assert SECRET not in str(said)
    job.write_text(text.replace("DATA", f"https://me:{SECRET}@host/x.tar"))
    assert submit.main([str(job), "--dry-run"]) == 2
    assert told(tmp_path / "home", str(capfd.readouterr()), SECRET) == []


def test_errors_of_other_libraries_are_told_without_secrets(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9/")
    assert pretrain.main(["--data", "embedded", "--tracking", "required", *SMALL, "--debug"]) == 2
    said = capfd.readouterr().err
    assert "MLflow at http://***@127.0.0.1:9/ does not answer" in said
    assert "Traceback" in said
    assert SECRET not in said
    assert json.loads(json.dumps(redact(said))) == said


# --- nobody else is listened to --------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_cluster_that_we_begin_listens_on_loopback_only():
    program = (
        "import psutil; from pipeline.cluster import connect; connect(2)\n"
        "for one in [psutil.Process(), *psutil.Process().children(recursive=True)]:\n"
        "    for c in one.net_connections('inet'):\n"
        "        if c.status == 'LISTEN': print(one.name(), c.laddr.ip)\n"
    )
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}", "RAY_TMPDIR": folder}
        environment.pop("RAY_ADDRESS", None)
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    listening = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}, done.stderr
    assert {address.removeprefix("::ffff:") for _, address in listening} == {"127.0.0.1"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_on_one_machine_listen_on_loopback_only(tmp_path):
    place = Place(tmp_path)
    words = [*place.words("two", "--epochs", "100000", "--workers", "2"), "--engine", "ray"]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {**place.environment(), "RAY_TMPDIR": folder}
        environment.pop("RAY_ADDRESS", None)
        run = subprocess.Popen([sys.executable, "-m", "pipeline.pretrain", *words], env=environment, cwd=tmp_path)
        try:
            metrics = tmp_path / "runs" / "two" / "metrics.jsonl"
            while not (metrics.exists() and metrics.read_text().count("\n") > 5):
                assert run.poll() is None
                time.sleep(0.2)
            listening = set()
            for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found = [c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"]
                    listening |= {(process.name(), ip.removeprefix("::ffff:")) for ip in found}
        finally:
            run.terminate()
            assert run.wait() == 143
    assert {name.split(":")[0] for name, _ in listening} >= {"gcs_server", "raylet", "ray"}
    assert any("TrainWorker" in name for name, _ in listening)
    assert {address for _, address in listening} == {"127.0.0.1"}, listening
