"""`ray job submit` against a real cluster of two nodes that share no disk for the data: train, stop, resume."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.jobs.job_toys import kill
from tests.pipeline.small_runs import SMALL, draw, losses

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
WORDS = [*SMALL, "--workers", "2"]


class Cluster(NamedTuple):
    dashboard: str
    environment: dict[str, str]
    photos: Path
    cache: Path
    other_cache: Path  # of the second node


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(what: str, ready, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A head and, in a mount namespace in which the first node's cache does not exist, a second node; a core each."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("hiding a disk from a node takes root and unshare")
    base = tmp_path_factory.mktemp("cluster")
    photos, cache, other = base / "photos", base / "cache", base / "other"
    cache.mkdir()
    draw(photos)
    port, dashboard = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    environment |= {"PATH": f"{RAY.parent}:{environment['PATH']}", "HOME": str(base), "SSL_NODE_CACHE": str(other)}
    environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    environment["RAY_worker_niceness"] = "0"

    def start() -> list[str]:
        agent = f"--dashboard-agent-listen-port={free_port()}"  # its default belongs to another cluster of this machine
        return [str(RAY), "start", "--block", "--num-cpus", "1", "--object-store-memory", str(100 << 20), agent]

    head = [f"--port={port}", "--head", f"--dashboard-port={dashboard}", f"--temp-dir=/tmp/ray-{port}"]
    unpacked = f"/tmp/ray-{port}/session_latest/runtime_resources"  # where a node of this machine would unpack jobs too
    hide = f'mount -t tmpfs none "{cache}" && mount -t tmpfs none "$(readlink -f {unpacked})" && exec "$0" "$@"'
    hidden = ["unshare", "--mount", "sh", "-c", hide]
    log = open(base / "log", "w")  # noqa: SIM115
    options = {"env": environment, "stdout": log, "stderr": log, "cwd": base, "start_new_session": True}
    nodes = [subprocess.Popen([*start(), *head], **options)]
    address = f"http://127.0.0.1:{dashboard}"

    def alive() -> int:
        try:
            with urllib.request.urlopen(f"{address}/api/v0/nodes", timeout=10) as answer:
                return answer.read().count(b'"ALIVE"')
        except OSError:
            return 0

    try:
        wait_for("head", lambda: alive() == 1)
        nodes.append(subprocess.Popen([*hidden, *start(), f"--address=127.0.0.1:{port}"], **options))
        wait_for("second node", lambda: alive() == 2)
        yield Cluster(address, environment, photos, cache, other)
    finally:
        for node in reversed(nodes):
            kill(node)
        log.close()
        shutil.rmtree(f"/tmp/ray-{port}", ignore_errors=True)


def ray_job(cluster: Cluster, verb: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(RAY), "job", verb, "--address", cluster.dashboard, *words],
        env=cluster.environment, capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip


def submit(cluster: Cluster, *words: str, wait: bool = True) -> subprocess.CompletedProcess:
    here = ["--working-dir", ".", *([] if wait else ["--no-wait", "--submission-id", "long"])]
    return ray_job(cluster, "submit", *here, "--", "python", "-m", "pipeline.pretrain", *words)


def test_a_job_trains_on_nodes_that_share_no_disk_for_the_data(cluster, tmp_path):
    """Then, copies damaged, by the installed project: without a working folder, its runs in the home folder."""
    run = tmp_path / "runs" / "job"
    data = ["--data", str(cluster.photos), "--cache", str(cluster.cache), "--storage", str(run.parent)]
    done = submit(cluster, *data, *WORDS, "--epochs", "2", "--run", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers on cpu" in done.stdout
    assert "raw pixels" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images_seen"] == 8 * len(losses(run))
    (kept,) = cluster.cache.rglob("train.beton")
    copies = list(cluster.other_cache.glob("*.beton"))  # of the validation set, too, where rank 0 is on that node
    assert kept.read_bytes() in [path.read_bytes() for path in copies]

    for path in copies:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    installed = ["python", "-m", "pipeline.pretrain", *data[:4], *WORDS, "--epochs", "1"]
    again = ray_job(cluster, "submit", "--", *installed)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "is not as it was brought; it is brought anew" in again.stdout
    assert kept.read_bytes() in [path.read_bytes() for path in copies]
    home = Path(cluster.environment["HOME"], "ssl-runs")
    (run,) = [path for path in home.iterdir() if path.name.startswith("vit_ti8-dino-photos-")]
    assert json.loads((run / "summary.json").read_text())["images_seen"] == 8 * len(losses(run))
    assert f"sqlite:///{home}/mlflow.db" in again.stdout
    assert str(run) in again.stdout


def test_a_job_that_is_stopped_saves_and_goes_on(cluster, tmp_path):
    run = tmp_path / "runs" / "long"
    data = ["--data", str(cluster.photos), "--cache", str(cluster.cache), "--storage", str(run.parent)]
    begun = submit(cluster, *data, *WORDS, "--epochs", "100000", "--run", str(run), wait=False)
    assert begun.returncode == 0, begun.stderr
    wait_for("step", lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3)
    assert ray_job(cluster, "stop", "long").returncode == 0
    (checkpoint,) = (run / "checkpoints").glob("*.pt")
    assert int(checkpoint.stem) == 8 * len(losses(run))
    assert f"python -m pipeline.pretrain --resume {run}" in ray_job(cluster, "logs", "long").stdout
    seen = len(losses(run))
    resumed = ray_job(
        cluster, "submit", "--working-dir", ".", "--no-wait", "--submission-id", "again", "--",
        "python", "-m", "pipeline.pretrain", "--resume", str(run), "--workers", "2",
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    wait_for("further step", lambda: len(losses(run)) > seen + 3)
    assert ray_job(cluster, "stop", "again").returncode == 0
    rows = [json.loads(line)["images"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(8, rows[-1] + 8, 8))
