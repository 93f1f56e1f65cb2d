"""What the cluster runs for a cell: the command, its limits, its retries, what comes after, who is told."""

import dataclasses
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from job_toys import ROOT, TINY, photographs, python

from jobs import notify, spec
from jobs import run as jobs_run
from jobs.cluster import Submitted
from jobs.job import Notify
from jobs.notify import News
from objectives.views import VitalSign
from pipeline.training.health import Health, Intervention, Unwell
from tests.s3 import s3

FIRING = "20260101T000000Z"


refusals: list[int] = []
"""What the web server answers before it takes anything."""


@pytest.fixture
def heard():
    """A real web server that keeps what is posted to it."""
    news: list[dict] = []
    refusals.clear()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not refusals:
                news.append(said)
            self.send_response(refusals.pop(0) if refusals else 204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/secret-path", news
    server.shutdown()


def write(folder: Path, text: str, name: str = "tiny") -> Path:
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


@pytest.mark.slow
def test_a_cell_trains_is_told_and_found_in_mlflow_and_what_comes_after_sees_its_run(tmp_path, heard):
    photographs(tmp_path / "photos", range(40))
    write(tmp_path, f"""
run: pretrain
arguments: {{data: photos, storage: {tmp_path}/runs}}
matrix: {{seed: [0, 1]}}
after:
  - {{run: evaluate, arguments: {{run: "{{run}}", protocols: [knn]}}}}
  - {{run: pack, arguments: {{data: photos}}}}
notify: {{webhook: $HOOK, command: 'echo "$JOB_EVENT $JOB_CELL" >> told'}}
""")  # fmt: skip
    words = ["-m", "jobs.run", "tiny.yaml", "--firing", FIRING, "--in-place", "--set", *TINY, "--cell"]
    first = python(*words, "0", cwd=tmp_path, timeout=280, HOOK=heard[0], SSL_NODE_CACHE=str(tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "-m pipeline.evaluate" in first.stdout
    assert "-m pipeline.pack" not in first.stdout, "it comes after both cells"
    second = python(*words, "1", cwd=tmp_path, timeout=280, HOOK=heard[0])
    assert "-m pipeline.pack" in second.stdout, second.stdout + second.stderr
    assert [(news["event"], news["cell"]) for news in heard[1]] == [("finish", "0"), ("finish", "1")]
    assert 0 <= heard[1][0]["results"]["knn_top1"] <= 1
    assert heard[0] not in first.stdout + first.stderr
    assert (tmp_path / "told").read_text().split() == ["finish", "0", "finish", "1"]

    import mlflow

    store = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    found = store.search_runs(["1"], f"tags.job = 'tiny' and tags.firing = '{FIRING}'")
    kinds = sorted(run.data.tags["kind"] for run in found)
    assert kinds == ["evaluation", "evaluation", "pretraining", "pretraining"]

    again = python(*words, "1", cwd=tmp_path, timeout=280, HOOK=heard[0])
    assert again.returncode == 0
    assert "$ python" not in again.stdout, "neither what was done nor what came after it is run again"


def test_a_failure_is_told_with_its_reason_and_a_missing_secret_is_refused(tmp_path, heard):
    write(tmp_path, "run: evaluate\narguments: {run: nothing-there}\nnotify: {webhook: $HOOK}\n")
    done = python("-m", "jobs.run", "tiny.yaml", "--firing", FIRING, cwd=tmp_path, HOOK=heard[0], HOME=str(tmp_path))
    assert done.returncode == 2
    assert [news["event"] for news in heard[1]] == ["failure"]
    assert heard[1][0]["text"].endswith("failed with status 2: error: nothing-there: no such run folder or checkpoint")
    write(tmp_path, "run: evaluate\narguments: {run: nothing-there}\nsecrets: [MY_TOKEN]\nnotify: {webhook: $HOOK}\n")
    done = python("-m", "jobs.run", "tiny.yaml", "--firing", FIRING, cwd=tmp_path, HOOK=heard[0], HOME=str(tmp_path))
    assert "MY_TOKEN not set here" in heard[1][1]["text"]
    assert (
        done.stderr.strip() == "error: tiny.yaml: MY_TOKEN not set here; set it where the cluster's nodes are started"
    )


def test_a_webhook_that_fails_and_a_command_that_fails_fail_nothing(capsys, monkeypatch):
    monkeypatch.setattr(notify, "WAITS", (0.0, 0.0))
    news = dataclasses.replace(NEWS, event="finish", text='it\'s "$(touch /tmp/no)" done')
    notify.tell(
        Notify("http://127.0.0.1:9/token123", 'test "$JOB_TEXT" = \'it\'"\'"\'s "$(touch /tmp/no)" done\' && exit 3'),
        news,
    )
    said = capsys.readouterr().err
    assert "the webhook did not take it" in said
    assert "the command ended with status 3" in said
    assert "token123" not in said
    notify.tell(Notify("http://127.0.0.1:9/", "exit 3", ("failure",)), news)
    assert capsys.readouterr().err == ""


NEWS = News("failure", "j", FIRING, "", "it failed", "run", 1.0, {})


def test_a_webhook_that_is_away_for_a_moment_is_told_and_one_that_refuses_is_asked_once(heard, monkeypatch, capsys):
    monkeypatch.setattr(notify, "WAITS", (0.0, 0.0))
    refusals.extend([429, 503])
    notify.tell(Notify(heard[0]), NEWS)
    assert [news["text"] for news in heard[1]] == ["it failed"]
    refusals.extend([404, 404])
    notify.tell(Notify(heard[0]), NEWS)
    assert refusals == [404]
    assert "the webhook did not take it (HTTP Error 404" in capsys.readouterr().err


def test_tries_at_a_webhook_lie_seconds_apart(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(notify.time, "sleep", waits.append)
    notify.tell(Notify("http://127.0.0.1:9/"), NEWS)
    assert waits == [2.0, 10.0]


def test_a_webhook_of_odd_form_fails_nothing_and_is_not_shown(heard, monkeypatch, capsys):
    monkeypatch.setattr(notify, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("HOOK", f"{heard[0]}\n")
    notify.tell(Notify("$HOOK"), NEWS)
    assert len(heard[1]) == 1, "the end of the line that it was read from does not belong to it"
    for odd in ("hooks.example.org/token123", "http://host:port/token123", "https://a b/token123", "http:///token123"):
        monkeypatch.setenv("HOOK", odd)
        notify.tell(Notify("$HOOK"), NEWS)
    said = capsys.readouterr()
    assert said.err.count("notification: ") == 4
    assert "token123" not in said.out + said.err


def test_what_is_told_holds_no_credentials(heard, capsys):
    notify.tell(Notify(heard[0]), dataclasses.replace(NEWS, text="no answer from s3://me:hunter2@store \udce9 \0"))
    assert heard[1][0]["text"].startswith("no answer from s3://***@store")
    assert "hunter2" not in capsys.readouterr().out


def test_a_failure_of_the_job_itself_is_told(tmp_path, monkeypatch, heard):
    """The storage takes nothing: neither how the cell ended can be written there, nor what it came to be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs_run, "attempt", lambda words, job, listen: FINE)
    Path("full").touch()
    write(tmp_path, f"run: pretrain\narguments: {{data: embedded, storage: full}}\nnotify: {{webhook: {heard[0]}}}\n")
    assert jobs_run.main(["tiny.yaml", "--firing", FIRING]) == 1
    assert [news["event"] for news in heard[1]] == ["failure"]
    assert heard[1][0]["text"].startswith(f"tiny-{FIRING}: [Errno ")


def test_a_failure_is_told_though_the_results_cannot_be_read(tmp_path, heard):
    text = "run: pretrain\narguments: {data: embedded, storage: runs}\nsecrets: [MY_TOKEN]\n"
    write(tmp_path, f"{text}notify: {{webhook: {heard[0]}}}\n")
    (tmp_path / "runs" / f"tiny-{FIRING}" / "summary.json").mkdir(parents=True)
    done = python("-m", "jobs.run", "tiny.yaml", "--firing", FIRING, cwd=tmp_path)
    assert "MY_TOKEN not set here" in heard[1][0]["text"]
    assert done.returncode == 2


@pytest.mark.parametrize(("run", "way"), [("pretrain", "continues its checkpoint"), ("pack", "runs it anew")])
def test_a_time_limit_that_is_up_is_told_with_what_again_does(tmp_path, monkeypatch, heard, run, way):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs_run, "attempt", lambda *_: FINE._replace(status=143, why="time limit"))
    text = f"run: {run}\narguments: {{data: embedded}}\ntime_limit: 5s\nnotify: {{webhook: {heard[0]}}}\n"
    write(tmp_path, text)
    assert jobs_run.main(["tiny.yaml", "--firing", FIRING]) == 143
    assert heard[1][0]["text"].endswith(f"its time limit of 5 s is up; this firing, submitted --again, {way}")


def test_who_is_slow_to_be_told_holds_no_command_up(tmp_path, monkeypatch):
    ended, told = threading.Event(), []

    def attempt(words, job, listen):
        listen("warning: collapse at 8 images: spread is 0.1")
        ended.set()
        return FINE

    def tell(whom, news):
        told.append((news.event, ended.wait(20)))

    monkeypatch.setattr(jobs_run, "attempt", attempt)
    monkeypatch.setattr(jobs_run.notify, "tell", tell)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "run: pretrain\narguments: {data: embedded}\n")
    assert jobs_run.main(["tiny.yaml", "--firing", FIRING]) == 0
    assert told == [("collapse", True), ("finish", True)]


@pytest.mark.slow
def test_a_collapse_is_told_while_it_happens(tmp_path, heard):
    photographs(tmp_path / "photos", range(40))
    write(
        tmp_path,
        f"run: pretrain\narguments: {{data: photos, storage: {tmp_path}/runs}}\nnotify: {{webhook: {heard[0]}}}\n",
    )
    # Sharpened without being centred, the teacher calls every image the same.
    settings = [*(word for word in TINY if not word.startswith(("epochs", "objective", "options"))),
                "epochs=40", "objective=dino", "optimiser=adamw", "lr=0.01", "clip=0", "options.local_views=0",
                "options.out_dim=16", "options.hidden_dim=16", "options.centre_momentum=1.0",
                "options.teacher_temp=0.01", "options.teacher_temp_start=0.01", "options.ema_start=0.5"]  # fmt: skip
    python("-m", "jobs.run", "tiny.yaml", "--firing", FIRING, "--set", *settings, cwd=tmp_path, timeout=280)
    assert "collapse" in [news["event"] for news in heard[1]], heard[1]
    told = next(news for news in heard[1] if news["event"] == "collapse")
    assert told["text"].startswith("alarm, no collapse yet: ")


def test_an_alarm_and_a_collapse_are_told_once_each_and_told_apart(tmp_path, monkeypatch):
    sign = VitalSign("spread", low=0.5, high=2.0, meaning="all features are one")
    health = Health([sign], 8)

    def fall() -> None:
        for step in range(1000):
            health.check({"loss": 1.0, "grad_norm": 1.0, "spread": 1.0 if step < 100 else 0.1}, 8 * (step + 1))

    with pytest.raises(Unwell) as collapse:
        fall()
    healed = Intervention("collapse", 0, 8, str(collapse.value), 0, "lr").line()
    in_vain = f"failed: {collapse.value}; tried in vain: lr"
    told = []

    def attempt(words, job, listen):
        for line in [*health.messages, *health.messages, healed, in_vain]:
            listen(line)
        return jobs_run.Outcome(0, 1.0, "", "")

    monkeypatch.setattr(jobs_run, "attempt", attempt)
    monkeypatch.setattr(jobs_run.notify, "tell", lambda notify, news: told.append((news.event, news.text)))
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "run: pretrain\narguments: {data: embedded}\n")
    assert jobs_run.main(["tiny.yaml", "--firing", FIRING]) == 0
    assert told[0] == ("collapse", f"alarm, no collapse yet: {health.messages[0].removeprefix('warning: ')}")
    assert told[1] == ("collapse", healed.removeprefix("warning: "))
    assert [event for event, _ in told] == ["collapse", "collapse", "finish"]


def test_claims_are_won_once(tmp_path):
    for number in range(20):
        with ThreadPoolExecutor(8) as threads:
            wins = list(threads.map(jobs_run.claim, [f"{tmp_path}/after{number}.claimed"] * 8, "abcdefgh"))
        assert sum(wins) == 1
    with s3("runs"):
        assert [jobs_run.claim("s3://runs/after.claimed", cell) for cell in "abca"] == [True, False, False, True]


def test_a_word_is_read_whole_or_not_at_all(tmp_path):
    address, word = f"{tmp_path}/words/a.json", {"run": "r" * 5000, "done": True}
    jobs_run.write(address, word)
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(lambda: [jobs_run.write(address, word) for _ in range(100)])
        while not writing.done():
            assert jobs_run.read(address) == word
        writing.result()
    Path(address).write_text("")  # as a machine that lost its power may leave it
    assert jobs_run.read(address) is None


class Records:
    """The cluster's records of a firing's cells."""

    statuses: ClassVar[dict[str, str]] = {}

    def submitted(self, job: str, firing: str) -> list[Submitted]:
        known = self.statuses.items()
        return [Submitted(cell, job, firing, cell, "", status, "", None, None) for cell, status in known]


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """A job of two cells, with what comes after both, and where each of them runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs_run, "Client", Records)
    text = """
run: pack
arguments: {data: embedded}
resources: {cpus: 0}
matrix: {limit: [20, 30]}
after: [{run: pack, arguments: {data: embedded}}]
"""
    job = spec.load(write(tmp_path, text))
    return job, *(jobs_run.Place(FIRING, cell, f"run-{cell.name}", "meeting") for cell in job.cells)


FINE = jobs_run.Outcome(0, 1.0, "", "")


def test_what_comes_after_is_due_until_it_was_sent(cells):
    job, first, second = cells
    Records.statuses = {"20": "RUNNING", "30": "RUNNING"}
    jobs_run.meet(job, first, FINE)
    assert jobs_run.due(job, first, FINE, in_place=False) == []
    jobs_run.meet(job, second, FINE)
    for _ in range(2):  # the first was killed before it sent
        assert jobs_run.due(job, second, FINE, in_place=False) == [0]
    assert [jobs_run.due(job, cell, FINE, in_place=True) for cell in (second, first, second)] == [[0], [], [0]]


def test_nothing_comes_after_a_cell_that_was_told_to_stop(cells):
    job, first, second = cells
    stopped = FINE._replace(status=143, why="stopped")
    jobs_run.meet(job, first, FINE)
    jobs_run.meet(job, second, stopped)
    Records.statuses = {"20": "SUCCEEDED", "30": "RUNNING"}
    for in_place in (False, True):
        assert jobs_run.due(job, second, stopped, in_place=in_place) == []
    assert jobs_run.due(job, second, stopped._replace(why=""), in_place=False) == [0]


def test_a_cell_that_was_killed_does_not_hold_up_what_comes_after_all(cells):
    job, first, second = cells
    jobs_run.meet(job, second, FINE)
    for status, due in (("PENDING", []), ("RUNNING", []), ("FAILED", [0]), ("STOPPED", [0])):
        Records.statuses = {"20": status, "30": "RUNNING"}
        assert jobs_run.due(job, second, FINE, in_place=False) == due
    assert jobs_run.due(job, second, FINE, in_place=True) == []
    assert jobs_run.runs(job, first) == ["run-30"]


def test_a_cell_that_runs_again_has_not_ended(cells):
    job, first, second = cells
    jobs_run.meet(job, first, FINE._replace(status=1))
    jobs_run.meet(job, second, FINE)
    Records.statuses = {"20": "PENDING", "30": "RUNNING"}
    assert jobs_run.due(job, second, FINE, in_place=False) == []
    Records.statuses["20"] = "RUNNING"
    for _ in range(2):
        jobs_run.forget(first)
    assert jobs_run.due(job, second, FINE, in_place=False) == []


def test_a_step_that_ray_gave_up_for_want_of_room_is_submitted_anew(cells, monkeypatch):
    job, first, _ = cells
    step = job.submission(FIRING, "", 0)
    looks = iter([("PENDING", False), ("FAILED", True), ("PENDING", False), ("RUNNING", False)])
    did = []

    class Full:
        def submit(self, name, command, **options):
            did.append(f"submit {name}")
            return True

        def submitted(self, name, firing):
            status, unplaced = next(looks)
            did.append(status)
            return [Submitted(step, name, firing, "", "pack", status, "", None, None, unplaced)]

        def forget(self, names):
            did.extend(f"forget {name}" for name in names)

    monkeypatch.setattr(jobs_run, "Client", Full)
    monkeypatch.setattr(jobs_run, "LOOK", 0.0)
    jobs_run.send(job, first, [0])
    again = [f"forget {step}", f"submit {step}"]
    assert did == [f"submit {step}", "PENDING", "FAILED", *again, "PENDING", "RUNNING"]


KILLED_ONCE = """
run: pack
arguments: {data: photos}
after: [{run: pack, arguments: {data: photos, limit: 20}}]
notify: {on: [finish], command: 'test -e killed || { touch killed; kill -9 $PPID; }'}
"""


def test_a_firing_that_is_killed_before_what_comes_after_it_goes_on_with_that_and_runs_nothing_twice(tmp_path):
    """Told of the end of the command, the notification kills the process that is to run what comes after."""
    photographs(tmp_path / "photos", range(40))
    write(tmp_path, KILLED_ONCE)
    words = ["-m", "jobs.run", "tiny.yaml", "--firing", FIRING, "--in-place", "--set", f"cache={tmp_path}/cache"]
    runs = [python(*words, cwd=tmp_path, HOME=str(tmp_path)) for _ in range(3)]
    assert [run.returncode for run in runs] == [-signal.SIGKILL, 0, 0], runs[1].stderr
    commands = [[line for line in run.stdout.splitlines() if line.startswith("$ ")] for run in runs]
    assert ["--limit 20" in command for (command,) in commands[:2]] == [False, True]
    assert commands[2] == []
    assert f"tiny-{FIRING}: was done before, and is not run again" in runs[1].stdout
    assert "pack after it was done before, and is not run again" in runs[2].stdout


class Killed(BaseException):
    """What a SIGKILL is to the code that it hits."""


@pytest.fixture
def in_place(cells, monkeypatch):
    """Runs a cell in place; `ends` says of each command how it ends. The limits that were packed."""
    monkeypatch.setattr(jobs_run, "Client", None)

    def run(cell: str, *ends: int | type[Killed]) -> list[str]:
        ran, left = [], iter(ends)

        def attempt(words, job, listen):
            ran.append(words[-1])
            if (end := next(left)) is Killed:
                raise Killed
            return FINE._replace(status=end)

        monkeypatch.setattr(jobs_run, "attempt", attempt)
        try:
            statuses.append(jobs_run.main(["tiny.yaml", "--firing", FIRING, "--in-place", "--cell", cell]))
        except Killed:
            statuses.append(137)
        return ran

    statuses: list[int] = []
    return run, statuses


def test_what_comes_after_all_cells_and_is_cut_off_in_place_is_run_again_by_whose_it_was(in_place):
    run, statuses = in_place
    assert run("20", 0) == ["20"]
    assert run("30", 0, Killed) == ["30", "embedded"]
    assert run("20") == []
    assert run("30", 1) == ["embedded"]
    assert run("30", 0) == ["embedded"]
    assert run("30") == []
    assert statuses == [0, 137, 0, 1, 0, 0]


def test_what_comes_after_all_cells_is_run_in_place_though_the_last_of_them_failed_and_again_once_it_is_done(in_place):
    run, statuses = in_place
    assert run("20", 0) == ["20"]
    assert run("30", 1, 0) == ["30", "embedded"]
    assert run("30", 0, 0) == ["30", "embedded"], "now there are two to compare"
    assert statuses == [0, 1, 0]


@pytest.mark.slow
def test_a_stop_reaches_the_command(tmp_path):
    write(tmp_path, "run: pretrain\narguments: {data: embedded, epochs: 500}\n")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}"}
    small = [word for word in TINY if not word.startswith(("epochs", "data"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.run", "tiny.yaml", "--firing", FIRING, "--set", *small, f"storage={tmp_path}/runs",
         f"cache={tmp_path}/cache"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("[ "):
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, said
    assert "stopped with a checkpoint" in said
