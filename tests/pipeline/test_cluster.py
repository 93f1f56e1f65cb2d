"""Training through Ray: two workers equal one, the loading of a set from another node, stop and resume."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.cluster.driver import _cause, _refusal
from pipeline.training.run_folder import RunFolder
from tests.pipeline.small_runs import SMALL, draw, losses

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
WORDS = [*SMALL, "--epochs", "2"]

ISOLATED: dict[str, str] = {}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module", autouse=True)
def no_cluster() -> Iterator[None]:
    """Let Ray keep to a folder of its own, so that it finds no cluster that another test or person has begun."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ISOLATED["RAY_TMPDIR"] = folder
        yield


def begin(photos: Path, run: Path, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}
    environment["RAY_worker_niceness"] = "0"
    environment.pop("RAY_ADDRESS", None)
    environment |= ISOLATED
    common = ["--data", str(photos), "--cache", str(photos.parent / "cache"), "--storage", str(run.parent)]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.pretrain", *common, *WORDS, "--run", str(run), *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=run.parent,
    )  # fmt: skip


def pretrain(photos: Path, run: Path, *words: str) -> subprocess.CompletedProcess:
    begun = begin(photos, run, *words)
    out, err = begun.communicate(timeout=380)
    return subprocess.CompletedProcess(begun.args, begun.returncode, out, err)


def test_two_workers_train_as_one_process_does(photos, tmp_path):
    batch_norms = ("--backbone", "resnet20", "--options.head-norm", "batch")
    alone = pretrain(photos, tmp_path / "one", "--engine", "local", *batch_norms)
    assert alone.returncode == 0, alone.stderr
    both = pretrain(photos, tmp_path / "two", "--workers", "2", *batch_norms)
    assert both.returncode == 0, both.stderr + both.stdout
    several, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    np.testing.assert_allclose(several[:3], one[:3], rtol=1e-5)
    np.testing.assert_allclose(several, one, rtol=5e-3)  # rounding grows with every step
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["images_seen"] == 8 * len(losses(tmp_path / "two"))
    assert "2 workers" in both.stdout
    assert "raw pixels" in both.stdout


@pytest.mark.slow
def test_two_workers_killed_and_resumed_go_on_to_the_last_bit(photos, tmp_path):
    words = ("--workers", "2", "--backbone", "resnet20", "--options.head-norm", "batch", "--epochs", "12")
    whole = pretrain(photos, tmp_path / "whole", *words)
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    begun = begin(photos, killed, *words, "--checkpoint-every", "0.2")
    try:
        deadline = time.monotonic() + 200
        while len(list(killed.glob("checkpoints/*.pt"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        tree = [*psutil.Process(begun.pid).children(recursive=True), begun]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        begun.communicate()
    kept = sorted(killed.glob("checkpoints/*.pt"))
    assert kept, "it was killed before its first checkpoint"
    assert not (killed / "summary.json").exists()
    resumed = pretrain(photos, killed, *words)
    assert resumed.returncode == 0, resumed.stderr
    assert "continued at" in resumed.stdout
    assert losses(killed) == losses(tmp_path / "whole")
    weights = [(folder / "backbone.safetensors").read_bytes() for folder in (killed, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_a_cluster_that_another_run_has_begun_for_itself_is_left_alone():
    private = (
        "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False); print('up', flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}", **ISOLATED}
    environment.pop("RAY_ADDRESS", None)
    other = subprocess.Popen(
        [sys.executable, "-c", private], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "up\n"
        joined = subprocess.run(
            [sys.executable, "-c", "from pipeline import cluster; print(cluster.connect(1))"],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert joined.stdout == "False\n", joined.stderr
    finally:
        other.communicate("\n")


def test_one_worker_needs_no_cluster(photos, tmp_path):
    done = pretrain(photos, tmp_path / "one", "--engine", "ray")
    assert done.returncode == 0, done.stderr
    assert "Ray Train in this process" in done.stdout


def test_what_a_worker_refuses_is_told_though_the_run_folder_does_not_answer(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path / "one"))
    assert _refusal("mistaken", folder) == "mistaken"
    folder.write("checkpoints/000000000064.pt", b"")
    assert _refusal("mistaken", folder).startswith("mistaken; the checkpoint at 64 images is kept; this continues it")

    def away(self):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(RunFolder, "checkpoints", away)
    assert _refusal("mistaken", folder) == "mistaken; the run folder does not answer either (nobody answers)"


def test_a_failure_without_words_is_told_all_the_same():
    error = RuntimeError("training failed")
    error.worker_failures = {1: ValueError()}  # type: ignore[attr-defined]
    assert _cause(error) == "worker 1 failed: ValueError: without a word"
