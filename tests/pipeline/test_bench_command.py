"""The bench's command on a folder of JPEG files, from the files to the table in a README."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.bench.__main__ import BENCHES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_folder_is_measured_and_the_table_written(tmp_path: Path) -> None:
    photographs, here = tmp_path / "photographs", tmp_path / "here"
    photographs.mkdir()
    here.mkdir()
    rng = np.random.default_rng(0)
    for n in range(12):
        coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        cv2.imwrite(str(photographs / f"{n}.jpg"), cv2.resize(coarse, (200, 150 + n)))
    readme = here / "README.md"
    readme.write_text("before\n<!-- bench:loader -->\nold figures\n<!-- /bench:loader -->\nafter\n")
    command = [sys.executable, "-m", "pipeline.bench", "loader", "--data", str(photographs), "--write", str(readme)]
    command += ["--rounds", "1", "--seconds", "0.1", "--batch-size", "4", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'ssl'}"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:loader -->\n|")
    assert text.endswith("\n<!-- /bench:loader -->\nafter\n")
    assert "old figures" not in text
    assert text.count("images/s") == 1
    assert "12 images" in text
    assert f"{BENCHES['loader'].contenders['opencv'].title} | – " not in text
    assert [path.name for path in here.iterdir()] == ["README.md"]  # nothing is left beside it
