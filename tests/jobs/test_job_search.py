"""The search: ASHA ends what ranks low, the best is written down, and MLflow holds the search and its trials."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_toys import ROOT, TINY, photographs, python

from jobs import cluster, search
from jobs.search import METRICS
from pipeline.tracking import TAGS_VARIABLE

FIRING = "20260101T000000Z"
SMALL = [*(word for word in TINY if not word.startswith(("engine", "epochs"))), "epochs=4"]

ASHA = """
import json
from jobs.cluster import tune

def trial(drawn, fixed, report, name):
    for rung in (1, 2, 3):
        report({"value": drawn["x"] + fixed["more"] * rung, "rung": rung})

if __name__ == "__main__":
    print(json.dumps(tune(trial, {"x": ("even", 0.0, 1.0)}, {"more": 10}, trials=6, rungs=3, cpus=1, gpus=0, seed=0)))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_ranks_low_is_ended_and_the_best_goes_on_to_the_end(tmp_path):
    (tmp_path / "asha.py").write_text(ASHA)
    done = python("asha.py", cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len({row["run"] for row in found}) == 6
    assert all(row["value"] == pytest.approx(row["drawn"]["x"] + 10 * row["rung"]) for row in found)
    assert {row["rung"] for row in found} >= {1, 3}
    best = max(found, key=lambda row: row["drawn"]["x"])
    assert best["rung"] == 3


def in_turn(trial, space, fixed, *, trials, rungs, cpus, gpus, seed, stop):
    """What `cluster.tune` does, here: the second of three trials is ended at its first rung, the third fails."""
    found = []
    for number, lr in enumerate((0.01, 0.001, 0.1)):
        row = {"drawn": {"lr": lr}, "run": f"trial{number}"}

        def report(values, row=row, name=f"trial{number}"):
            row |= values
            if name == "trial1":
                raise SystemExit

        try:
            trial({"lr": lr}, fixed, report, f"trial{number}")
        except SystemExit:
            pass
        except MemoryError as error:
            row["error"] = str(error)
        found.append(row)
    return found


@pytest.mark.timeout(600)
def test_mlflow_holds_a_search_and_below_it_its_trials_by_job_and_firing(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv(TAGS_VARIABLE, json.dumps({"job": "tuning", "firing": FIRING}))
    monkeypatch.setattr(cluster, "tune", in_turn)
    measure = search.measure

    def measured(folder, *rest):
        if folder.address.endswith("trial2"):
            raise MemoryError("no memory")
        return measure(folder, *rest)

    monkeypatch.setattr(search, "measure", measured)
    photographs(tmp_path / "photos", range(40))
    settings = [*SMALL, "data=photos", f"cache={tmp_path}/cache"]
    words = ["lr=1e-5..1e-1", "--rungs", "2", "--run", "runs/found", "--settings", *settings]
    assert search.main(words) == 0
    trials = json.loads(Path("runs/found/search.json").read_text())["trials"]
    assert [row.get("rung") for row in trials] == [2, 1, None]
    store = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = (e.experiment_id for e in store.search_experiments() if e.name == "photos")
    found = store.search_runs([experiment], f"tags.job = 'tuning' and tags.firing = '{FIRING}'")
    (parent,) = (run for run in found if run.data.tags["kind"] == "search")
    children = {run.info.run_name: run for run in found if run is not parent}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert {name: run.info.status for name, run in children.items()} == {
        "trial0": "FINISHED", "trial1": "KILLED", "trial2": "FAILED",
    }  # fmt: skip
    key = METRICS["rankme"]
    first, second = store.get_metric_history(children["trial0"].info.run_id, key)
    assert first.step < second.step
    assert second.value == trials[0]["value"]
    assert children["trial1"].data.metrics[key] == trials[1]["value"]
    assert children["trial1"].data.params["lr"] == "0.001"
    assert (parent.info.status, parent.data.metrics[key]) == ("FINISHED", trials[0]["value"])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_that_is_stopped_keeps_what_came_out_and_nothing_of_it_runs_on_in_mlflow(tmp_path):
    import mlflow

    photographs(tmp_path / "photos", range(40))
    settings = [*(word for word in SMALL if not word.startswith("epochs")), "epochs=100000", "data=photos"]
    words = ["lr=1e-5..1e-1", "--trials", "2", "--rungs", "2", "--run", "runs/found", "--settings", *settings]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}", "HOME": str(tmp_path)}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jobs.search", *words, f"cache={tmp_path}/cache"],
                                   cwd=tmp_path, env=environment, stdout=log, stderr=log)  # fmt: skip
    until = time.monotonic() + 300
    while not list(tmp_path.glob("runs/found/*/metrics.jsonl")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.2)
    process.terminate()
    assert process.wait(100) == 143, (tmp_path / "log").read_text()
    assert len(json.loads((tmp_path / "runs/found/search.json").read_text())["trials"]) == 2
    store = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    found = store.search_runs([e.experiment_id for e in store.search_experiments()])
    assert {run.data.tags["kind"] for run in found} == {"search", "trial"}
    assert {run.info.status for run in found} == {"KILLED"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("metric", METRICS)
def test_a_job_that_searches_ends_what_ranks_low_by_either_metric(tmp_path, metric):
    photographs(tmp_path / "photos", range(40))
    settings = [*SMALL, "data=photos"]
    (tmp_path / "tuning.yaml").write_text(json.dumps({
        "run": "search",
        "arguments": {"space": ["lr=1e-5..1e-1"], "settings": settings, "metric": metric, "trials": 4, "rungs": 2,
                      "cpus": 1, "storage": f"{tmp_path}/runs", "run": "{run}"},
    }))  # fmt: skip
    words = ["jobs.run", "tuning.yaml", "--firing", FIRING]
    done = python("-m", *words, cwd=tmp_path, timeout=1400, HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads((tmp_path / "runs" / f"tuning-{FIRING}" / "search.json").read_text())["trials"]
    assert len(trials) == 4
    assert all("error" not in row for row in trials), trials
    through = [row["value"] for row in trials if row["rung"] == 2]
    assert trials[0]["value"] == max(through)
    if metric == "rankme":  # no two are equal, so that one of four ranks low
        assert len(through) < 4
