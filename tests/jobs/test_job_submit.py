"""What a submission decides by what was submitted before; a stand-in for the cluster keeps records as Ray does."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from job_toys import ROOT

from jobs import list as jobs_list
from jobs import spec
from jobs import submit as jobs_submit
from jobs.cluster import Client, Submitted
from jobs.firing import firing_name
from jobs.job import Job
from jobs.submit import submit
from pipeline.errors import UserError

FIRING, EARLIER = "20260102T000000Z", "20260101T000000Z"
TEXT = """
run: pretrain
arguments: {data: embedded}
matrix: {backbone: [lenet5, vit_ti8]}
schedule: {cron: 0 0 * * *, time_zone: UTC, overlap: skip}
after:
  - {run: evaluate, arguments: {run: "{run}"}}
  - {run: compare, arguments: {runs: "{runs}"}}
"""
CNN, VIT = f"night-{FIRING}-lenet5", f"night-{FIRING}-vit_ti8"
BEFORE = f"night-{EARLIER}-vit_ti8"


@dataclass
class Cluster:
    """Takes an id once, until its record is given up."""

    records: dict[str, Submitted] = field(default_factory=dict)
    did: list[str] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    environments: dict[str, dict] = field(default_factory=dict)

    def submitted(self, job: str, firing: str | None = None) -> list[Submitted]:
        return [s for s in self.records.values() if s.job == job and firing in (None, s.firing)]

    def submit(self, name: str, command: str, *, environment: dict, about: dict[str, str], **takes: float) -> bool:
        if name in self.records:
            return False
        known = {"cell": "", "step": "", **about}
        self.records[name] = Submitted(id=name, status="PENDING", message="", started=None, ended=None, **known)
        self.commands[name], self.environments[name] = command, environment
        self.did.append(f"submit {name}")
        return True

    def stop(self, name: str) -> None:
        self.did.append(f"stop {name}")

    def wait(self, names) -> None:
        for name in names:
            self.ended(name, "STOPPED")

    def forget(self, names: list[str]) -> None:
        for name in names:
            assert not self.records.pop(name).running

    def ended(self, name: str, status: str) -> None:
        self.records[name] = replace(self.records[name], status=status)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str = TEXT) -> Job:
        Path("night.yaml").write_text(text)
        return spec.load("night.yaml")

    return write


def steps(cluster: Cluster, job: Job, *cells: str) -> None:
    """What the cells send when they have ended."""
    for cell in job.cells:
        for number in range(len(job.after)):
            if cell.name in cells:
                jobs_submit.submit_step(job, FIRING, cell, number, cluster, ".", "night.yaml")


def fired(cluster: Cluster, job: Job, **options) -> list[str]:
    """What is submitted of the firing."""
    cluster.did.clear()
    submit(job, FIRING, cluster, Path(), **options)
    return [word.removeprefix("submit ") for word in cluster.did]


def test_a_firing_that_runs_or_succeeded_is_not_run_again(job, capsys):
    night, cluster = job(), Cluster()
    assert fired(cluster, night) == [CNN, VIT]
    for status in ("PENDING", "RUNNING", "SUCCEEDED"):
        cluster.ended(CNN, status)
        cluster.ended(VIT, status)
        assert fired(cluster, night, again=True) == []
    assert capsys.readouterr().out.count("was submitted before; it is not run again") == 6


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_what_failed_or_was_stopped_runs_again_where_that_is_said(job, capsys, status):
    night, cluster = job(), Cluster()
    fired(cluster, night)
    cluster.ended(CNN, "SUCCEEDED")
    cluster.ended(VIT, status)
    assert fired(cluster, night) == []
    assert f"{VIT}: was submitted before, and {status.lower()}; --firing {FIRING} --again" in capsys.readouterr().out
    first = cluster.commands[VIT]
    assert fired(cluster, night, again=True) == [VIT]
    assert cluster.commands[VIT] == first, "the same command goes on in the same run folder"


def test_what_comes_after_is_sent_again_by_cells_that_run_again_and_submitted_where_it_failed_alone(job):
    night, cluster = job(), Cluster()
    fired(cluster, night)
    steps(cluster, night, "lenet5", "vit_ti8")
    for name in list(cluster.records):
        cluster.ended(name, "SUCCEEDED")
    cluster.ended(f"{CNN}-after1", "FAILED")
    assert fired(cluster, night, again=True) == [f"{CNN}-after1"]
    assert cluster.commands[f"{CNN}-after1"].endswith(f"night.yaml --firing {FIRING} --step 1 --cell lenet5")
    cluster.ended(f"{CNN}-after1", "SUCCEEDED")
    cluster.ended(VIT, "FAILED")
    assert fired(cluster, night, again=True) == [VIT]
    cluster.did.clear()
    steps(cluster, night, "vit_ti8")
    assert cluster.did == [f"submit night-{FIRING}-after2"], "of what is done, the comparison alone has more to see"


def test_variables_of_a_job_go_with_its_cells_and_with_what_comes_after(job):
    night, cluster = job(TEXT + "environment: {NCCL_DEBUG: WARN}\n"), Cluster()
    fired(cluster, night)
    steps(cluster, night, "lenet5", "vit_ti8")
    assert len(cluster.environments) == 5
    assert {known["env_vars"]["NCCL_DEBUG"] for known in cluster.environments.values()} == {"WARN"}


@pytest.mark.parametrize(
    ("overlap", "did"),
    [
        ("skip", []),
        ("wait", [f"submit {CNN}", f"submit {VIT}"]),
        ("stop", [f"stop {BEFORE}", f"submit {CNN}", f"submit {VIT}"]),
        ("allow", [f"submit {CNN}", f"submit {VIT}"]),
    ],
)
def test_while_the_last_firing_still_runs_overlap_decides(job, overlap, did):
    night, cluster = job(TEXT.replace("skip", overlap)), Cluster()
    submit(night, EARLIER, cluster, Path())
    cluster.ended(f"night-{EARLIER}-lenet5", "SUCCEEDED")
    cluster.did.clear()
    assert submit(night, FIRING, cluster, Path()) == ([CNN, VIT] if did else [])
    assert cluster.did == did
    for name in (CNN, VIT) if did else ():
        assert (f"--after {BEFORE}" in cluster.commands[name]) == (overlap == "wait")


@pytest.mark.parametrize("overlap", ["skip", "wait", "stop"])
def test_a_firing_that_is_submitted_once_more_changes_nothing_of_a_later_one(job, capsys, overlap):
    night, cluster = job(TEXT.replace("skip", overlap)), Cluster()
    for name in submit(night, EARLIER, cluster, Path()):
        cluster.ended(name, "SUCCEEDED")
    submit(night, FIRING, cluster, Path())
    cluster.did.clear()
    submit(night, EARLIER, cluster, Path())
    assert cluster.did == []
    assert capsys.readouterr().out.count("was submitted before; it is not run again") == 2


def test_what_has_no_room_yet_is_stopped_and_not_waited_for(job):
    night, cluster = job(TEXT.replace("skip", "stop")), Cluster()
    submit(night, EARLIER, cluster, Path())
    cluster.ended(f"night-{EARLIER}-lenet5", "RUNNING")
    assert fired(cluster, night) == [f"stop night-{EARLIER}-lenet5", f"stop {BEFORE}", CNN, VIT]
    assert [s.status for s in cluster.submitted("night", EARLIER)] == ["STOPPED", "PENDING"]


def test_no_day_is_unwatched_where_the_last_days_watch_still_runs(monkeypatch):
    """That of 2026-03-29, which has 23 hours, runs on into the next."""
    monkeypatch.chdir(ROOT)
    watch, cluster = spec.load("checkpoints"), Cluster()
    days = watch.timetable.schedule.firings(datetime(2026, 3, 28, 12, tzinfo=UTC), datetime(2026, 3, 30, tzinfo=UTC))
    assert days[1] - days[0] < timedelta(hours=watch.step.arguments["hours"])
    ids = [name for day in days for name in submit(watch, firing_name(day), cluster, Path())]
    assert len(ids) == 2
    assert f"--after {ids[0]}" in cluster.commands[ids[1]]


def test_a_firing_that_has_ended_holds_none_up(job):
    night, cluster = job(), Cluster()
    for name in submit(night, EARLIER, cluster, Path()):
        cluster.ended(name, "FAILED")
    assert fired(cluster, night) == [CNN, VIT]


def test_again_is_said_of_a_firing(job, capsys):
    job()
    assert jobs_submit.main(["night.yaml", "--again"]) == 2
    assert "--again: say of which --firing" in capsys.readouterr().err


def test_an_id_that_is_gone_while_it_is_submitted_anew_is_waited_for(monkeypatch):
    answers = iter(["RUNNING", RuntimeError("does not exist"), "SUCCEEDED"])

    class Api:
        def get_job_status(self, name: str) -> str:
            if isinstance(answer := next(answers), RuntimeError):
                raise answer
            return answer

    client = Client.__new__(Client)
    client.api = Api()
    monkeypatch.setattr("jobs.cluster.SETTLED", 0.0)
    assert client.wait(["a"], every=0.0) == {"a": "SUCCEEDED"}


def test_storage_that_would_be_lost_with_the_code_is_refused(job, capsys):
    night = job(TEXT.replace("embedded}\nm", "embedded, storage: runs}\nm"))
    with pytest.raises(UserError, match=r"night\.yaml: storage runs: would lie in the copy of this folder"):
        submit(night, FIRING, Cluster(), Path())
    assert jobs_submit.main(["night.yaml", "--dry-run"]) == 2
    for kept in ("/data/runs", "s3://bucket/runs", "~/runs"):
        assert jobs_submit.main(["night.yaml", "--dry-run", "--set", f"storage={kept}"]) == 0


def test_an_id_is_shown_whole_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    now = datetime(2026, 1, 2, tzinfo=UTC)
    name = f"weekly-{FIRING}-resnet50-dino-after1"
    jobs_list.table([Submitted(name, "weekly", FIRING, "", "", "SUCCEEDED", "", now, now)], now)
    assert name in capsys.readouterr().out


def test_the_list_takes_a_job(capsys):
    assert jobs_list.main(["packs", "--address", "http://127.0.0.1:9"]) == 2
    assert "--address http://127.0.0.1:9: no cluster's job API answers there" in capsys.readouterr().err
