"""A command as a job runs it: tried again, limited in time, stopped."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from job_toys import ROOT

from jobs import attempt as attempts
from jobs.cluster import STOPPING
from jobs.job import Cell, Job, Notify, Retry, Step

ONCE = Retry()


def outcome_of(program: str, retry: Retry = ONCE, limit: float | None = None) -> attempts.Outcome:
    step, cells = Step("pretrain", {}), (Cell("", {}),)
    job = Job("j", Path("j.yaml"), step, cells, None, None, {}, (), limit, retry, (), Notify())
    return attempts.attempt(["-c", program], job, lambda line: None)


def counting(log: Path) -> str:
    """The beginning of a program: `n` is how often it has run, by the letters in `log`."""
    return f"open({str(log)!r}, 'a').write('x'); n = len(open({str(log)!r}).read()); import sys; "


def test_a_failure_is_tried_again_and_a_users_mistake_is_not(tmp_path):
    log = tmp_path / "log"
    count = counting(log)
    assert outcome_of(count + "sys.exit(0 if n == 3 else 1)", Retry(2)).status == 0
    assert log.read_text() == "xxx"
    log.write_text("")
    assert outcome_of(count + "sys.exit(2)", Retry(5)).status == 2
    assert log.read_text() == "x"
    log.write_text("")
    assert outcome_of(count + "print('why'); sys.exit(7)", Retry(1)).last == "why"
    assert log.read_text() == "xx"


def test_where_machines_were_taken_away_too_few_of_them_are_no_mistake(tmp_path):
    log = tmp_path / "log"
    count = counting(log)
    assert outcome_of(count + "sys.exit({1: 75, 4: 0}.get(n, 2))", Retry(5)).status == 0
    assert log.read_text() == "xxxx"
    log.write_text("")
    assert outcome_of(count + "sys.exit(75 if n == 1 else 143)", Retry(5)).status == 143
    assert log.read_text() == "xx"


def test_a_time_limit_asks_first_and_kills_then(monkeypatch):
    monkeypatch.setattr(attempts, "GRACE", 1.0)
    orderly = outcome_of(
        "import signal, time; signal.signal(15, lambda *_: exit(143)); print('up', flush=True); time.sleep(60)", limit=3
    )
    assert (orderly.status, orderly.why) == (143, "time limit")
    deaf = outcome_of("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)", Retry(3), limit=3)
    assert (deaf.status, deaf.why) == (137, "time limit")
    assert deaf.seconds < 30
    assert "SIGKILL" in deaf.last


def test_the_last_line_is_known_though_whoever_listens_is_slow(monkeypatch):
    monkeypatch.setattr(attempts, "LINGER", 0.5)
    asked = threading.Event()
    words = [sys.executable, "-c", "print('why'); exit(1)"]
    outcome = attempts.execute(words, None, lambda line: asked.wait(20))
    asked.set()
    assert outcome.last == "why"


def test_a_command_has_the_time_that_a_stop_promises():
    assert STOPPING - 20 < attempts.GRACE < STOPPING - attempts.LINGER


def test_what_a_command_leaves_running_does_not_hold_the_job_up():
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(300)']"
    program = f"import subprocess, sys; subprocess.Popen({sleeper}); print('done')"
    started = time.monotonic()
    assert outcome_of(program).status == 0
    assert time.monotonic() - started < 60


def test_a_command_ends_where_the_process_that_runs_it_is_killed(tmp_path):
    command = "import os, time; open('part', 'w').write(f'{os.getpid()}'); os.rename('part', 'pid'); time.sleep(300)"
    program = f"import sys; from jobs.attempt import execute; execute([sys.executable, '-c', {command!r}], None, print)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}"}
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment) as driver:
        while not (tmp_path / "pid").exists():
            assert driver.poll() is None
            time.sleep(0.05)
        orphan = psutil.Process(int((tmp_path / "pid").read_text()))
        assert orphan.ppid() == driver.pid
        driver.kill()
    try:
        orphan.wait(30)
    finally:
        if orphan.is_running():
            orphan.kill()
