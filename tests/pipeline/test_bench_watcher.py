"""What watching a run costs it: a real run and a real watch on a cluster of their own, at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.bench import watcher
from pipeline.bench.watcher import evaluations

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
import sys
from pathlib import Path
from pipeline.bench import watcher
from pipeline.bench.contender import Arguments
decoder = [f"--options.decoder-{part}={size}" for part, size in (("width", 16), ("depth", 1), ("heads", 2))]
watcher.TRAINING = ("--backbone", "lenet5", "--objective", "mae", "--image-size", "16", "--limit", "32", "--epochs",
                    "2", "--checkpoint-every", "0.001", "--loader", "opencv", *decoder)
name, watcher.FEWEST = sys.argv[1], int(sys.argv[2])
print(watcher.BENCH.contenders[name].figure(Path(), Arguments("watcher", batch_size=16)))
"""


def small(name: str, fewest: int) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'ssl'}", "RAY_AUTH_MODE": "disabled"}
    environment = {**{key: value for key, value in os.environ.items() if not key.startswith("RAY_")}, **paths}
    command = [sys.executable, "-c", SMALL, name, str(fewest)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", watcher.BENCH.contenders)
def test_a_run_has_its_rate_with_a_watch_beside_it_and_without(name: str) -> None:
    done = small(name, fewest=0)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_hardly_evaluated_has_no_figure() -> None:
    done = small("watched", fewest=10**6)
    assert "evaluations beside the run: too few to call it watched" in done.stderr


def test_evaluations_that_failed_do_not_count(tmp_path: Path) -> None:
    assert evaluations(tmp_path) == 0
    rows = [{"images": 32, "knn_top1": 0.5}, {"images": 64, "error": "it was dropped"}, {"images": 96, "knn_top1": 0.6}]
    (tmp_path / "watched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluations(tmp_path) == 2
