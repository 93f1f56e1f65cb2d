"""Jobs on a real Ray cluster: submitted once, seen, stopped, continued."""

import time

import pytest
from job_toys import ROOT, TINY, Cluster, photographs, python

from jobs.cluster import Client, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
FIRING = "20260101T000000Z"


@pytest.fixture
def folder(tmp_path):
    photographs(tmp_path / "photos", range(40))
    return tmp_path


def test_a_firing_is_submitted_once_and_its_logs_are_seen(cluster: Cluster, folder):
    (folder / "packs.yaml").write_text("run: pack\narguments: {data: photos}\nmatrix: {limit: [20, 30]}\n")
    words = ["packs.yaml", "--address", cluster.address, "--firing", FIRING, "--wait"]
    first = python("-m", "jobs.submit", *words, cwd=folder, timeout=280)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count(": submitted") == 2
    again = python("-m", "jobs.submit", *words, cwd=folder, timeout=280)
    assert again.stdout.count("was submitted before; it is not run again") == 2
    listed = python("-m", "jobs.list", "packs", "--address", cluster.address, cwd=folder).stdout
    assert listed.count("succeeded") == 2
    assert f"packs-{FIRING}-20" in listed
    logs = python("-m", "jobs.logs", "packs", "--cell", "30", "--address", cluster.address, cwd=folder).stdout
    assert "$ python -m pipeline.pack --data photos --limit 30" in logs
    unknown = python("-m", "jobs.logs", "pack", "--address", cluster.address, cwd=folder)
    assert "pack: no such submission or job; there are submissions of packs" in unknown.stderr


def test_a_job_that_cannot_reach_the_job_api_asks_through_the_head(cluster: Cluster, folder):
    """As on another node than the head, on whose loopback it listens: here the job is told a port of nobody."""
    (folder / "apart.yaml").write_text(
        "run: pack\narguments: {data: photos}\nenvironment: {RAY_API_SERVER_ADDRESS: 'http://127.0.0.1:9'}\n"
        "after:\n  - {run: pack, arguments: {data: photos, limit: 20}}\n"
    )
    words = ["apart.yaml", "--address", cluster.address, "--firing", FIRING, "--wait"]
    until = time.monotonic() + 240  # the node's agent may be slower to come up than the API
    while "No available agent" in (done := python("-m", "jobs.submit", *words, cwd=folder, timeout=280)).stderr:
        assert time.monotonic() < until, done.stderr
    logs = python("-m", "jobs.logs", "apart", "--address", cluster.address, cwd=folder).stdout
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert f"apart-{FIRING}-after1: succeeded" in done.stdout


def test_a_cluster_that_does_not_answer_is_named(folder):
    (folder / "packs.yaml").write_text("run: pack\narguments: {data: photos}\n")
    done = python("-m", "jobs.submit", "packs.yaml", "--address", "http://127.0.0.1:9", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --address http://127.0.0.1:9: no cluster's job API answers")


def test_a_stopped_job_leaves_a_checkpoint_and_its_firing_goes_on(cluster: Cluster, folder):
    (folder / "long.yaml").write_text(f"run: pretrain\narguments: {{data: photos, storage: {folder}/runs}}\n")
    small = [word for word in TINY if not word.startswith("epochs")]
    words = ["long.yaml", "--firing", FIRING, "--set", *small, "epochs=400"]
    done = python("-m", "jobs.submit", *words, "--address", cluster.address, cwd=folder)
    assert done.returncode == 0, done.stderr
    until = time.monotonic() + 240
    while "[ " not in python("-m", "jobs.logs", "long", "--address", cluster.address, cwd=folder).stdout:
        assert time.monotonic() < until
    stopped = python("-m", "jobs.stop", "long", "--address", cluster.address, cwd=folder, timeout=200)
    assert f"long-{FIRING}: stopped" in stopped.stdout
    kept = list((folder / "runs" / f"long-{FIRING}" / "checkpoints").glob("*.pt"))
    assert kept
    assert (
        "stopped with a checkpoint"
        in python("-m", "jobs.logs", "long", "--address", cluster.address, cwd=folder).stdout
    )
    refused = python("-m", "jobs.submit", *words, "--address", cluster.address, cwd=folder)
    assert f"was submitted before, and stopped; --firing {FIRING} --again goes on with it" in refused.stdout
    again = python("-m", "jobs.submit", *words, "--again", "--address", cluster.address, cwd=folder)
    assert again.returncode == 0, again.stderr
    while "continued at" not in python("-m", "jobs.logs", "long", "--address", cluster.address, cwd=folder).stdout:
        assert time.monotonic() < until + 240
    python("-m", "jobs.stop", "long", "--address", cluster.address, cwd=folder, timeout=200)


def test_a_worker_takes_what_its_job_says(cluster: Cluster, folder):
    text = f"run: pretrain\narguments: {{data: photos, storage: {folder}/runs}}\n"
    (folder / "half.yaml").write_text(text + "resources: {cpus: 1, memory: 64MiB}\n")
    settings = [word for word in TINY if not word.startswith("engine")]
    words = ["half.yaml", "--firing", FIRING, "--wait", "--address", cluster.address, "--set", *settings]
    done = python("-m", "jobs.submit", *words, cwd=folder, timeout=500)
    logs = python("-m", "jobs.logs", "half", "--address", cluster.address, cwd=folder).stdout
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "Ray Train, 1 worker on cpu, 1 core each" in logs, "the cluster has two"


def test_a_task_of_a_job_sees_its_variables(cluster: Cluster, folder):
    (folder / "task.py").write_text(
        "import os, ray\nray.init()\nprint(ray.get(ray.remote(os.getenv).remote('WORD')))\n"
    )
    client, word = Client(cluster.address), 'it\'s "so" $(x)'
    client.submit(
        "task", "python task.py", environment=environment(folder, {"WORD": word}), about={"job": "task", "firing": ""}
    )
    client.wait(["task"])
    assert word in client.logs("task").splitlines()


SMALL = {
    "nightly": [*(word for word in TINY if not word.startswith(("limit", "engine")))],
    "weekly": [word for word in TINY if not word.startswith(("backbone", "objective", "engine"))],
    "checkpoints": ["hours=0.001"],
    "tuning": [
        'space=["lr=1e-4..1e-1"]', "trials=2", "rungs=2", "cpus=1", "gpus=0",
        f"settings={[word for word in TINY if not word.startswith('engine')] + ['data=/data/photos']}",
    ],
}  # fmt: skip
SMALLER = {
    "gpus: 1": "gpus: 0", "cpus: 8": "cpus: 1", "cpus: 4": "cpus: 1", "memory: 32GiB": "memory: 64MiB",
    "[resnet50, vit_s16]": "[lenet5, vit_ti8]", "[dino, mae]": "[mae]", "/data/labelled": "/data/photos",
}  # fmt: skip


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "jobs").glob("*.yaml")))
def test_every_job_of_the_repository_runs_at_a_small_size(cluster: Cluster, folder, name):
    text = (ROOT / "jobs" / f"{name}.yaml").read_text()
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    (folder / "runs").mkdir()
    (folder / f"{name}.yaml").write_text(text.replace("/data/", f"{folder}/"))
    settings = [word.replace("/data/", f"{folder}/") for word in SMALL[name]]
    words = [f"{name}.yaml", "--firing", "scheduled", "--wait", "--address", cluster.address, "--set", *settings]
    done = python("-m", "jobs.submit", *words, cwd=folder, timeout=1400)
    logs = python("-m", "jobs.logs", name, "--address", cluster.address, cwd=folder).stdout
    assert done.returncode == 0, done.stdout + done.stderr + logs
    if name in ("nightly", "weekly"):
        assert "Ray Train, 2 workers" in logs
    if name == "weekly":
        assert list((folder / "runs").glob("comparison-*/*.html"))
