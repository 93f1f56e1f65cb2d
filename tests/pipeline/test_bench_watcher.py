"""What watching a run costs it: a real run and a real watch on a cluster of their own, at a small size."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.bench import watcher
from pipeline.bench.__main__ import main
from pipeline.cluster import nodes

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
import json
import sys
from pipeline.bench import watcher
from pipeline.bench.contender import Arguments
decoder = [f"--options.decoder-{part}={size}" for part, size in (("width", 16), ("depth", 1), ("heads", 2))]
watcher.TRAINING = ("--backbone", "lenet5", "--objective", "mae", "--image-size", "16", "--limit", "32",
                    "--checkpoint-every", "0.05", "--keep", "99", "--loader", "opencv", *decoder, *sys.argv[1:])
print(json.dumps(watcher.by_turns(Arguments("watcher", batch_size=16, rounds=2, seconds=2))))
"""
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core alone makes no two machines")


def small(*words: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'ssl'}", "RAY_AUTH_MODE": "disabled"}
    environment = {**{key: value for key, value in os.environ.items() if not key.startswith("RAY_")}, **paths}
    command = [sys.executable, "-c", SMALL, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@two_cores
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_has_its_rate_alone_and_watched() -> None:
    done = small()
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {name: len(of) for name, of in figures.items()} == {"alone": 2, "watched": 2}
    assert all(figure > 0 for of in figures.values() for figure in of)


@two_cores
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_fails_says_why() -> None:
    assert "the run ended: error: " in small("--options.decoder-heads=7").stderr


def test_a_run_that_nothing_evaluates_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "PATIENCE", 0.3)
    with (
        watcher.beside([sys.executable, "-c", "while True: pass"], os.environ, os.sched_getaffinity(0)) as training,
        pytest.raises(RuntimeError, match=r"nothing was evaluated within 0.3 s: too little to call it watched"),
    ):
        watcher.wait(training, tmp_path / "said", lambda: False)


def test_both_are_measured_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watcher", "--only", "watched"]) == 2
    assert "both are measured in one run" in capsys.readouterr().err


def test_what_is_started_on_cores_stays_there_and_nobody_else_does() -> None:
    before = os.sched_getaffinity(0)
    (core, *_) = sorted(before)
    with nodes.on({core}):
        asked = [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
        assert subprocess.run(asked, capture_output=True, text=True).stdout.strip() == str({core})
    assert os.sched_getaffinity(0) == before


def test_what_is_halted_stands_still_and_goes_on() -> None:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def until(stopped: bool) -> None:  # signals arrive when they arrive
        deadline = time.monotonic() + 60
        while (psutil.Process(process.pid).status() == psutil.STATUS_STOPPED) != stopped:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    try:
        with watcher.halted(process.pid, os.getpid()):  # no child of ours evaluates
            until(stopped=True)
        until(stopped=False)
    finally:
        process.kill()
        process.wait()


def test_steps_are_counted_between_the_first_and_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("a step before\n")

    class Clock:
        """A run that ends a step every half second, from 0.3 s on, and is over after 2."""

        now = 0.0
        perf_counter = staticmethod(lambda: Clock.now)

        @staticmethod
        def sleep(seconds: float) -> None:
            before, Clock.now = Clock.now, Clock.now + seconds
            if any(before < at <= Clock.now for at in (0.3, 0.8, 1.3, 1.8)):
                with file.open("a") as opened:
                    opened.write("a step\n")

    monkeypatch.setattr(watcher, "time", Clock)
    assert watcher.steps(file, seconds=9) == pytest.approx(2, rel=0.02)
    with pytest.raises(RuntimeError, match=r"0 steps in 9 s: --seconds must be longer"):
        watcher.steps(file, seconds=9)


def test_evaluations_that_failed_do_not_count(tmp_path: Path) -> None:
    assert watcher.evaluations(tmp_path) == 0
    watcher.refuse_failed(tmp_path)
    rows = [{"images": 32, "knn_top1": 0.5}, {"images": 64, "error": "it was dropped"}, {"images": 96, "knn_top1": 0.6}]
    (tmp_path / "watched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert watcher.evaluations(tmp_path) == 2
    with pytest.raises(RuntimeError, match=r"an evaluation failed \(it was dropped\)"):
        watcher.refuse_failed(tmp_path)
