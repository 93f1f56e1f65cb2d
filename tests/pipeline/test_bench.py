"""Does a bench count right, tell a failure instead of a figure, and write into its own block of a file only?"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import bench
from pipeline.bench import BENCHES, Arguments, around, main, rate, table
from pipeline.data.beton import BetonReader
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
README = "before\n<!-- bench:loader -->\nold figures\n<!-- /bench:loader -->\nafter\n"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve JPEG files."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for n in range(12):
        coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        cv2.imwrite(str(folder / f"{n}.jpg"), cv2.resize(coarse, (200, 150 + n)))
    return folder


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "drawn.beton"
    bench.draw_photographs(path, images=8)
    return path


def test_a_rate_counts_images_over_time_and_not_the_first_batch() -> None:
    def batches() -> Iterator[int]:
        time.sleep(0.3)  # starting up, compiling
        yield 1000
        for _ in itertools.count():
            time.sleep(0.01)
            yield 4

    assert 200 < rate(batches(), seconds=0.2) <= 400


def test_a_contender_that_ends_early_has_no_rate() -> None:
    with pytest.raises(RuntimeError, match="ended before its time"):
        rate(iter([4, 4]), seconds=60)


@pytest.mark.parametrize(
    ("name", "contender"), [(name, contender) for name, b in BENCHES.items() for contender in b.contenders]
)
def test_every_contender_yields_whole_batches(name: str, contender: str, beton: Path) -> None:
    for module in {"ffcv": ["ffcv"], "kornia": ["kornia"]}.get(contender, []):
        pytest.importorskip(module)
    arguments = Arguments(name, batch_size=4, threads=1)
    batches = BENCHES[name].contenders[contender].batches(beton, arguments)
    assert set(itertools.islice(batches, 3)) <= {1, 4}
    batches.close()  # type: ignore[attr-defined]


def test_the_views_are_two_of_224_and_eight_of_96() -> None:
    assert [view.size for view in bench.views()] == [(224, 224)] * 2 + [(96, 96)] * 8


def test_drawn_photographs_are_jpeg_files_of_photographs_size(beton: Path) -> None:
    reader = BetonReader(beton)
    assert len(reader) == 8
    assert all(isinstance(image, bytes) and {height, width} == {375, 500} for image, height, width, _ in reader)
    assert 30_000 < np.median(reader.metadata["size"]) < 300_000


def test_ratios_are_to_the_first_contender_and_a_failure_has_none() -> None:
    loader = BENCHES["loader"]
    first, *others = loader.contenders
    rates: dict[str, float | str] = {first: 50.0, **dict.fromkeys(others, 200.0), others[-1]: "out of memory"}
    lines = table(loader, rates, "a machine").splitlines()
    assert lines[2].endswith("| 50 | 1.00 |")
    assert lines[3].endswith("| 200 | 4.00 |")
    assert "out of memory" in lines[1 + len(rates)]
    assert lines[-1] == "a machine"
    without = table(loader, rates | {first: "not installed"}, "a machine").splitlines()
    assert without[3].endswith("| 200 | – |")


def test_only_the_block_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(README)
    before, after = around(file, "loader")
    assert (before, after) == ("before\n<!-- bench:loader -->", "<!-- /bench:loader -->\nafter\n")


@pytest.mark.parametrize(
    "text",
    ["", "<!-- bench:loader -->", "<!-- /bench:loader -->\n<!-- bench:loader -->", README + README],
    ids=["no marker", "no end", "reversed", "twice"],
)
def test_a_file_without_its_block_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(UserError, match="needs one line <!-- bench:loader -->"):
        around(file, "loader")
    assert file.read_text() == text
    with pytest.raises(UserError, match="cannot be read"):
        around(tmp_path / "absent.md", "loader")


def test_mistakes_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed"]) == 2
    assert "no bench is called 'speed': choose one of loader" in capsys.readouterr().err
    assert main(["loader", "--only", "dali", "--data", str(tmp_path)]) == 2
    assert "--only dali: choose one of torchvision" in capsys.readouterr().err
    assert main(["loader", "--write", str(tmp_path / "absent.md")]) == 2
    assert main(["loader", "--data", str(tmp_path / "absent")]) == 2


def test_a_folder_is_measured_and_the_table_written(photographs: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    command = [sys.executable, "-m", "pipeline.bench", "loader", "--data", str(photographs), "--write", str(readme)]
    command += ["--rounds", "1", "--seconds", "0.1", "--batch-size", "4", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'ssl'}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:loader -->\n|")
    assert text.endswith("\n<!-- /bench:loader -->\nafter\n")
    assert "old figures" not in text
    assert text.count("images/s") == 1
    assert "12 images" in text
    assert f"{BENCHES['loader'].contenders['opencv'].title} | – " not in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
