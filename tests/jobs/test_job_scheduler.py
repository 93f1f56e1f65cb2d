"""The scheduler on a fast clock: days pass in milliseconds, it is killed where it hurts most, and no firing is lost."""

import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs import notify, scheduler, spec
from jobs.cluster import Submitted
from jobs.firing import firing_name
from jobs.job import Job
from jobs.scheduler import TRIES, JobFiles, State, alone, due, look_for_lost, serve
from pipeline.errors import UserError

TEXT = """
run: pack
arguments: {{data: embedded}}
schedule: {{cron: '{cron}', time_zone: Europe/Berlin, missed: {missed}}}
"""


class Killed(BaseException):
    """What a SIGKILL is to the code that it hits."""


class FastClock:
    """Time that passes by sleeping alone, until `end`."""

    def __init__(self, start: datetime, end: datetime) -> None:
        self.time, self.end = start, end

    def now(self) -> datetime:
        return self.time

    def sleep(self, seconds: float) -> bool:
        self.time += timedelta(seconds=seconds)
        return self.time >= self.end


class Cluster:
    """Takes an id once, as Ray does. A firing may be hit before the cluster hears of it, or after."""

    def __init__(self, seed: int, trouble: float) -> None:
        self.taken: Counter[str] = Counter()
        self.asked = 0
        self.trouble, self.random = trouble, random.Random(seed)

    def __call__(self, job: Job, firing: str) -> None:
        self.asked += 1
        fate = self.random.random()
        if fate < self.trouble:
            raise Killed if fate < self.trouble / 2 else ConnectionError("no cluster answers")
        self.taken.setdefault(job.submission(firing, ""), 0)
        self.taken[job.submission(firing, "")] += self.taken[job.submission(firing, "")] == 0
        if fate > 1 - self.trouble:
            raise Killed


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: on some disks every rename waits for the platter."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, cron: str, missed: str = "all") -> Job:
        Path(f"{name}.yaml").write_text(TEXT.format(cron=cron, missed=missed))
        return spec.load(f"{name}.yaml")

    return write


def expected(job: Job, start: datetime, end: datetime) -> set[str]:
    return {job.submission(firing_name(f), "") for f in job.timetable.schedule.firings(start, end)}


@pytest.mark.parametrize("day", ["2026-03-28", "2026-10-24", "2026-12-31", "2028-02-28"])
@pytest.mark.parametrize("seed", range(2))
def test_two_days_with_kills_and_outages_lose_and_double_nothing(job, tmp_path, monkeypatch, day, seed):
    monkeypatch.setattr(scheduler, "LOOK", 600.0)
    jobs = [job("quarter", "*/15 * * * *"), job("nightly", "30 2 * * *"), job("monthly", "0 0 1 * *")]
    start = datetime.fromisoformat(day).replace(tzinfo=UTC) - timedelta(hours=2, seconds=7)
    clock, cluster = FastClock(start, start + timedelta(days=2)), Cluster(seed, trouble=0.2)
    kills = 0
    while clock.time < clock.end:
        try:
            serve(lambda: jobs, cluster, State(tmp_path / "state.json"), clock, say=lambda text: None)
        except Killed:
            kills += 1
            clock.time += timedelta(seconds=cluster.random.choice([0, 3, 40, 1900]))  # until somebody starts it again
    cluster.trouble = 0
    clock.end = clock.time + timedelta(seconds=1)
    serve(lambda: jobs, cluster, State(tmp_path / "state.json"), clock, say=print)
    want = set().union(*(expected(each, start, clock.time - timedelta(seconds=60)) for each in jobs))
    assert kills > 5
    assert cluster.asked > len(want)
    assert want <= set(cluster.taken)
    assert set(cluster.taken) <= set().union(*(expected(each, start, clock.time) for each in jobs))
    assert set(cluster.taken.values()) == {1}


def test_firings_are_on_time(job, tmp_path):
    quarter = job("quarter", "*/15 * * * *")
    start = datetime(2026, 5, 1, 0, 3, 20, tzinfo=UTC)
    clock, late = FastClock(start, start + timedelta(hours=3)), []

    def fire(job: Job, firing: str) -> None:
        late.append((clock.time - datetime.strptime(firing, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)).total_seconds())

    serve(lambda: [quarter], fire, State(tmp_path / "state.json"), clock)
    assert len(late) == 12
    assert max(late) < 0.1


def test_what_an_outage_missed(job):
    now = datetime(2026, 11, 24, 9, 0, tzinfo=UTC)
    nights = [datetime(2026, 11, day, 1, 30, tzinfo=UTC) for day in (22, 23, 24)]
    last = nights[0] - timedelta(hours=1)
    assert due(job("a", "30 2 * * *", "all"), last, now) == nights
    assert due(job("b", "30 2 * * *", "last"), last, now) == nights[-1:]
    assert due(job("c", "30 2 * * *", "none"), last, now) == []
    assert due(job("d", "30 2 * * *", "none"), last, nights[2] + timedelta(seconds=30)) == nights[2:]


@pytest.mark.parametrize("missed", ["none", "last", "all"])
def test_a_firing_waits_for_a_cluster_that_does_not_answer_for_a_while(job, tmp_path, missed):
    nightly = job("nightly", "0 3 * * *", missed)
    start = datetime(2026, 11, 24, 1, 55, tzinfo=UTC)  # five minutes before
    clock, back, fired = FastClock(start, start + timedelta(hours=3)), start + timedelta(minutes=45), []

    def fire(job: Job, firing: str) -> None:
        if clock.time < back:
            raise ConnectionError("no cluster answers")
        fired.append(firing)

    serve(lambda: [nightly], fire, State(tmp_path / "state.json"), clock, say=lambda text: None)
    assert fired == ["20261124T020000Z"]


def test_a_changed_schedule_fires_from_then_on(job, tmp_path):
    start, fired = datetime(2026, 11, 24, 1, 55, tzinfo=UTC), []
    clock = FastClock(start, start + timedelta(hours=31))

    def load() -> list[Job]:
        return [job("nightly", "0 3 * * *" if clock.time < start + timedelta(hours=10) else "0 9 * * *", "last")]

    serve(load, lambda job, firing: fired.append(firing), State(tmp_path / "state.json"), clock)
    assert fired == ["20261124T020000Z", "20261125T080000Z"]


@pytest.mark.parametrize("named", [True, False])
def test_a_job_file_that_is_away_for_a_moment_ends_no_scheduler(job, tmp_path, monkeypatch, capsys, named):
    monkeypatch.setattr(spec, "FOLDER", tmp_path)
    monkeypatch.setattr(scheduler.signal, "signal", lambda *_: None)
    job("nightly", "0 3 * * *")
    whole, seen = Path("nightly.yaml").read_text(), []

    def serve(load, *_):
        Path("nightly.yaml").unlink()
        seen.append([job.name for job in load()])
        for text in (whole[:-9], whole):
            Path("nightly.yaml").write_text(text)
            seen.append([job.name for job in load()])

    monkeypatch.setattr(scheduler, "serve", serve)
    assert scheduler.main(["--state", "state.json", *(["--jobs", "nightly.yaml"] if named else [])]) == 0
    assert seen == ([["nightly"]] * 3 if named else [[], [], ["nightly"]])
    assert "nightly.yaml" in capsys.readouterr().out


def test_a_job_that_fails_to_submit_holds_up_no_other(job, tmp_path):
    jobs, fired = [job("bad", "0 * * * *"), job("good", "0 * * * *")], Counter()

    def fire(job: Job, firing: str) -> None:
        fired[job.name] += 1
        if job.name == "bad":
            raise UserError("the cluster refuses it")

    start = datetime(2026, 5, 1, 0, 30, tzinfo=UTC)
    serve(
        lambda: jobs,
        fire,
        State(tmp_path / "state.json"),
        FastClock(start, start + timedelta(hours=2)),
        say=lambda t: None,
    )
    assert fired["good"] == 2
    assert fired["bad"] > 60  # once a minute


@pytest.fixture
def told(monkeypatch):
    news: list[notify.News] = []
    monkeypatch.setattr(notify, "tell", lambda whom, one: news.append(one))
    return news


def test_a_firing_that_cannot_be_submitted_is_told_once(job, tmp_path, told):
    bad = job("bad", "0 0 1 * *")
    start = datetime(2026, 4, 30, 21, 59, tzinfo=UTC)
    answers = iter([False] * 2 * TRIES + [True])

    def fire(job: Job, firing: str) -> None:
        if not next(answers):
            raise UserError("no cluster answers at https://me:hunter2@head:8265")

    clock = FastClock(start, start + timedelta(hours=1))
    serve(lambda: [bad], fire, State(tmp_path / "state.json"), clock, say=lambda text: None)
    (news,) = told
    assert (news.event, news.job, news.firing) == ("failure", "bad", "20260430T220000Z")
    assert f"bad-20260430T220000Z: not submitted in {TRIES} tries" in news.text
    assert "hunter2" not in news.text


class Answers:
    """What a cluster says of its submissions."""

    def __init__(self, **failed: str | None) -> None:
        self.failed, self.began = failed, datetime(2026, 1, 1, tzinfo=UTC)

    def submitted(self) -> list[Submitted]:
        states = ((name, "FAILED") for name in self.failed)
        return [
            Submitted(id=f"{name}-1", job=name, firing="1", cell="", step="", status=status,
                      message="killed by signal 9\nlogs", started=self.began, ended=None)
            for name, status in [*states, ("good", "SUCCEEDED"), ("stopped", "STOPPED"), ("runs", "RUNNING")]
        ]  # fmt: skip

    def logs(self, submission: str) -> str | None:
        return self.failed[submission.removesuffix("-1")]


def test_a_failure_that_nobody_could_tell_of_is_told_once(job, tmp_path, told):
    names = ("killed", "lost", "said", "good", "stopped", "runs")
    jobs = [job(name, "0 0 1 * *") for name in names]
    cluster = Answers(killed="it begins\n", lost=None, said="it begins\njob failure: why\n", foreign="")
    for _ in range(2):  # a restart, too, tells nothing twice
        look_for_lost(jobs, cluster, State(tmp_path / "state.json"))
    assert [news.text for news in told] == [
        f"{name}-1: failed, and could not say why itself (killed by signal 9)" for name in ("killed", "lost")
    ]
    cluster.began += timedelta(minutes=1)  # submitted --again, and killed again between two looks
    look_for_lost(jobs, cluster, State(tmp_path / "state.json"))
    assert [news.job for news in told] == ["killed", "lost"] * 2


def test_a_firing_that_is_submitted_again_and_killed_again_is_told_again(job, tmp_path, told):
    class Begun(Answers):
        hour = 0

        def submitted(self) -> list[Submitted]:
            return [replace(one, started=datetime(2026, 5, 1, self.hour, tzinfo=UTC)) for one in super().submitted()]

    cluster = Begun(killed="")
    for cluster.hour in (0, 0, 1):
        look_for_lost([job("killed", "0 0 1 * *")], cluster, State(tmp_path / "state.json"))
    assert len(told) == 2


@pytest.mark.parametrize("cell", ["RUNNING", "FAILED"])
def test_a_step_that_found_no_room_is_told_where_no_cell_is_left_to_submit_it_anew(job, tmp_path, told, cell):
    class Full(Answers):
        def submitted(self) -> list[Submitted]:
            gave_up = Submitted("a-1-after1", "a", "1", "", "pack", "FAILED", "no room", None, None, unplaced=True)
            return [Submitted("a-1", "a", "1", "", "", cell, "killed", None, None), gave_up]

        def logs(self, submission: str) -> str:
            return ""

    look_for_lost([job("a", "0 0 1 * *")], Full(), State(tmp_path / "state.json"))
    assert [news.text.split(":")[0] for news in told] == (["a-1", "a-1-after1"] if cell == "FAILED" else [])


def test_a_cluster_that_is_away_is_no_end_of_the_looks(job, tmp_path):
    said: list[str] = []
    looks = iter([ConnectionError("no answer"), ConnectionError("no answer"), None, ConnectionError("no answer")])

    def look(jobs: list[Job]) -> None:
        if error := next(looks, None):
            raise error

    start = datetime(2026, 5, 1, 0, 30, tzinfo=UTC)
    clock = FastClock(start, start + timedelta(minutes=8))
    serve(lambda: [job("a", "0 0 1 * *")], print, State(tmp_path / "state.json"), clock, said.append, look)
    assert said == ["what failed is not looked for until the cluster answers (no answer)"] * 2


def test_a_job_whose_file_is_away_or_wrong_for_a_while_goes_on_as_it_was(job, capsys):
    nightly, other = job("nightly", "30 2 * * *"), job("other", "0 0 1 * *")
    files, text = JobFiles(["nightly.yaml", "other.yaml"]), Path("nightly.yaml").read_text()
    assert files.look() == [nightly, other]
    Path("nightly.yaml").unlink()
    assert files.look() == files.look() == [nightly, other]
    assert capsys.readouterr().out.count("nightly.yaml: no such file") == 1
    Path("nightly.yaml").write_text("run: pakc\n")
    assert files.look() == files.look() == [nightly, other]
    assert capsys.readouterr().out.count("no such entry point; did you mean pack?; as it was before, it goes on") == 1
    Path("nightly.yaml").write_text(text.replace("30 2", "45 2"))
    assert [each.timetable.schedule.cron.minutes for each in files.look()] == [(45,), (0,)]


@pytest.mark.parametrize("asked", [[], ["never.yaml"]])
def test_a_scheduler_without_a_schedule_does_not_begin(job, asked, capsys):
    job("never", "0 0 1 * *")
    Path("never.yaml").write_text("run: pack\narguments: {data: embedded}\n")
    assert scheduler.main(["--jobs", *asked] if asked else []) == 2
    assert f"{'--jobs never.yaml' if asked else 'jobs/'}: no job there has a schedule" in capsys.readouterr().err


def test_two_jobs_of_one_name_are_not_kept_apart_by_their_folders(job, capsys):
    job("nightly", "30 2 * * *")
    Path("more").mkdir()
    Path("more/nightly.yaml").write_text(Path("nightly.yaml").read_text())
    assert scheduler.main(["--jobs", "nightly.yaml", "more/nightly.yaml"]) == 2
    assert "--jobs nightly.yaml more/nightly.yaml: all are called nightly" in capsys.readouterr().err


def test_state_is_guarded(tmp_path):
    with (
        alone(tmp_path / "s.json"),
        pytest.raises(UserError, match="another scheduler uses it"),
        alone(tmp_path / "s.json"),
    ):
        pass
    (tmp_path / "s.json").write_text("[1")
    with pytest.raises(UserError, match=r"s\.json: is none of ours"):
        State(tmp_path / "s.json")
