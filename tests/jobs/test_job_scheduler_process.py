"""The scheduler as a process of its own: killed, started again, and told of what was killed elsewhere."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from job_toys import ROOT, photographs

from jobs.scheduler import State

# The scheduler's command line, before a cluster that is a folder: a file for each submission that it has taken, with
# its status and its log.
SCHEDULER = """
import json, sys
from pathlib import Path
from jobs import scheduler
from jobs.cluster import Submitted

class Client:
    def __init__(self, address):
        self.folder = Path(address)

    def submitted(self, job=None, firing=None):
        found = [json.loads(file.read_text()) for file in sorted(self.folder.glob("*.json"))]
        found = [one for one in found if job in (None, one["job"]) and firing in (None, one["firing"])]
        return [Submitted(cell="", step="", message="exit code -9", started=None, ended=None, id=one["id"],
                          job=one["job"], firing=one["firing"], status=one["status"]) for one in found]

    def submit(self, submission, command, *, environment, about, **takes):
        try:
            with open(self.folder / f"{submission}.json", "x") as file:
                json.dump({"id": submission, "status": "SUCCEEDED", **about}, file)
            return True
        except FileExistsError:
            return False

    def logs(self, submission):
        return "it begins"

scheduler.Client = Client
sys.exit(scheduler.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_scheduler_that_is_killed_misses_nothing_and_tells_of_a_driver_that_was_killed(tmp_path):
    photographs(tmp_path / "photos", range(4))
    cluster = tmp_path / "cluster"
    cluster.mkdir()
    (tmp_path / "each.yaml").write_text(f"""
run: pack
arguments: {{data: photos}}
schedule: {{cron: '* * * * *', time_zone: UTC, overlap: allow, missed: all}}
notify: {{command: 'echo "$JOB_EVENT $JOB_TEXT" >> {tmp_path}/told'}}
""")

    def begin() -> subprocess.Popen[str]:
        words = [
            sys.executable,
            "-c",
            SCHEDULER,
            "--jobs",
            "each.yaml",
            "--state",
            "state.json",
            "--address",
            str(cluster),
        ]
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, text=True,
                                    env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}"})  # fmt: skip

    def wait_for(what: Callable[[], object]) -> None:
        until = time.monotonic() + 400
        while not what():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.1)

    def taken() -> list[Path]:
        return sorted(cluster.glob("*.json"))

    process = begin()
    wait_for(lambda: taken() and taken()[0].stat().st_size)
    process.kill()
    process.wait()
    first = json.loads(taken()[0].read_text())
    taken()[0].write_text(json.dumps(first | {"status": "FAILED"}))
    time.sleep(70)  # a firing is missed
    process = begin()
    wait_for(lambda: len(taken()) >= 3 and (tmp_path / "told").exists())
    process.terminate()
    assert process.wait(100) == 0
    times = [datetime.strptime(json.loads(file.read_text())["firing"], "%Y%m%dT%H%M%SZ") for file in taken()]
    assert times == [times[0] + timedelta(minutes=number) for number in range(len(times))]
    assert State(tmp_path / "state.json").until["each"].replace(tzinfo=None) == times[-1]
    told = (tmp_path / "told").read_text().splitlines()
    assert told == [f"failure {first['id']}: failed, and could not say why itself (exit code -9)"]
