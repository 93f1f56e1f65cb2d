"""Every new checkpoint is evaluated by workers that training leaves free: what is tried again, waits, is kept."""

import json
import shlex
import time

import pytest
from job_toys import TINY, Cluster, photographs, python

from jobs.cluster import Client, environment
from jobs.watch import TRIES, Arguments, watch

SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in (word.split("=") for word in TINY)]


@pytest.fixture
def run(tmp_path):
    """A run that has ended, with two checkpoints in its folder."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for file in ("config.yaml", "summary.json", "checkpoints/000000000032.pt", "checkpoints/000000000064.pt"):
        (tmp_path / "run" / file).touch()
    return tmp_path / "run"


def rows(run):
    file = run / "watched.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def watched(run, evaluate):
    """Have a run watched to its end; the images seen at each checkpoint that an evaluation was asked of."""
    asked = []

    def counted(checkpoint):
        asked.append(int(checkpoint[-15:-3]))
        return evaluate(asked[-1], asked.count(asked[-1]))

    watch(Arguments(str(run), every=0.0), counted, time.monotonic() + 60)
    return asked


def test_what_fails_for_a_passing_reason_is_tried_again(run):
    def evaluate(seen, attempt):
        if seen == 32 and attempt == 1:
            raise OSError("the worker died")
        return {"knn_top1": 0.5, "untrained": {}}

    assert watched(run, evaluate) == [32, 64, 32]
    assert rows(run) == [
        {"images": 32, "error": "the worker died"},
        {"images": 64, "knn_top1": 0.5},
        {"images": 32, "knn_top1": 0.5},
    ]
    assert watched(run, evaluate) == []


def test_what_fails_for_good_is_tried_a_few_times_and_what_was_dropped_once(run):
    def evaluate(seen, attempt):
        if seen == 64:
            (run / "checkpoints" / "000000000064.pt").unlink()
        raise OSError("it is torn")

    asked = watched(run, evaluate)
    assert (asked.count(32), asked.count(64)) == (TRIES, 1)
    assert "was dropped before" in next(row["error"] for row in rows(run) if row["images"] == 64)
    assert watched(run, evaluate) == []


WAITS = """
import os, ray, jobs.cluster
from pipeline.cluster import begin
begin(num_cpus=1)
jobs.cluster.SILENT = 1.0
holder = ray.remote(num_cpus=1)(type("Holder", (), {})).remote()
ray.get(holder.__ray_ready__.remote())
try:
    jobs.cluster.on_a_spare_worker(os.getpid, cpus=1, gpus=0, waits=print, patience=2.0)
except jobs.cluster.NoneFree:
    print("none free")
jobs.cluster.SILENT = 60.0
ray.kill(holder)
policy = jobs.cluster.on_a_spare_worker(os.sched_getscheduler, 0, cpus=1, gpus=0, waits=print)
print("idle" if policy == os.SCHED_IDLE else policy)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_watch_without_a_free_core_says_so_and_waits_no_longer_than_asked(tmp_path):
    done = python("-c", WAITS, cwd=tmp_path, timeout=200)
    assert done.stdout.splitlines() == [
        "waiting for a worker with 1 free CPU: nobody has reserved 0 of 1 CPUs",
        "none free",
        "idle",
    ], done.stderr


ONE_CORE = """
import sys
from pipeline import cluster, pretrain
cluster.placement = lambda fewest, most: ("cpu", 1)
sys.exit(pretrain.main(sys.argv[1:]))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_checkpoints_are_evaluated_while_a_run_trains_and_those_of_a_run_that_has_ended(cluster: Cluster, tmp_path):
    import mlflow

    photographs(tmp_path / "photos", range(40))
    storage = tmp_path / "runs"
    fixed = [f"--data={tmp_path}/photos", f"--storage={storage}", f"--cache={tmp_path}/cache", *SMALL]
    words = ["-m", "pipeline.pretrain", *fixed, f"--run={storage}/ended"]
    done = python(*words, cwd=tmp_path, timeout=800, HOME=str(cluster.home))
    assert done.returncode == 0, done.stderr
    client = Client(cluster.address)
    kept = ["--epochs=2000", "--checkpoint-every=0.05", "--keep=1000"]
    trains = ["python", "-c", ONE_CORE, *fixed, *kept, "--engine=ray", "--workers=1", f"--run={storage}/trains"]
    watches = ["python", "-m", "jobs.watch", str(storage), "--every=1", f"--cache={tmp_path}/cache"]
    travels = environment(tmp_path / "photos", {})
    for name, words in (("trains", trains), ("watches", watches)):
        assert client.submit(f"{tmp_path.name}-{name}", shlex.join(words), environment=travels, about={})
    until = time.monotonic() + 800
    while len(rows(storage / "trains")) < 2 or not rows(storage / "ended"):
        assert time.monotonic() < until, "\n".join(client.logs(f"{tmp_path.name}-{n}") for n in ("trains", "watches"))
        time.sleep(0.5)
    states = [client.api.get_job_status(f"{tmp_path.name}-{name}").value for name in ("trains", "watches")]
    for name in ("watches", "trains"):
        client.stop(f"{tmp_path.name}-{name}")
    client.wait(f"{tmp_path.name}-{name}" for name in ("trains", "watches"))
    assert states == ["RUNNING", "RUNNING"]
    assert not (storage / "trains" / "summary.json").exists()
    store = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = (e.experiment_id for e in store.search_experiments() if e.name == "photos")
    for name in ("ended", "trains"):
        found = rows(storage / name)
        assert all(0 <= row["knn_top1"] <= 1 for row in found), found
        parent = (storage / name / "mlflow_run_id").read_text()
        children = store.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        told = {(child.data._metric_objs[0].step, child.data.metrics["knn_top1"]) for child in children}
        assert {(row["images"], row["knn_top1"]) for row in found} <= told
