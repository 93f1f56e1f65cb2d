"""The table of short runs: what it says of seeds, floors and noise, and which run a cell needs first."""

import json
from pathlib import Path

import pytest

from pipeline.learns import Cell, errors_above, table


def finish(cell: Cell, storage: Path, trained: float, untrained: float) -> None:
    summary = {
        "knn_top1": trained, "linear_top1": 0.6, "untrained": {"knn_top1": untrained, "linear_top1": 0.58},
        "pixels": {"knn_top1": 0.35, "linear_top1": 0.5}, "val_images": 1000, "images_seen": 2048,
        "device": "a processor", "versions": {"torch": "2.14"},
    }  # fmt: skip
    cell.folder(storage).mkdir(parents=True)
    (cell.folder(storage) / "summary.json").write_text(json.dumps(summary))


def test_seeds_share_a_line_and_what_is_within_noise_is_marked(tmp_path: Path) -> None:
    cells = [Cell(name, "resnet20", seed) for seed in (0, 1) for name in ("dino", "mae", "swav")]
    for cell in cells[:4]:
        finish(cell, tmp_path, {"dino": 0.4, "mae": 0.27, "swav": 0.5}[cell.objective] + cell.seed / 50, 0.25)
    lines = table(cells, tmp_path).splitlines()
    assert lines[2:5] == [
        "| dino | **41.0** ± 1.4 / 25.0 | **60.0**° ± 0.0 / 58.0 |",
        "| mae | **27.0**° / 25.0 | **60.0**° / 58.0 |",
        "| swav | **50.0** / 25.0 | **60.0**° / 58.0 |",
    ]
    assert "(raw pixels: k-NN 35.0, linear 50.0), mean of up to 2 seeds" in lines[-1]
    assert "2,048 images of 32 px" in lines[-1]


def test_lines_of_other_objectives_stay_where_the_columns_are_the_same(tmp_path: Path) -> None:
    cells = [Cell(name, "resnet20", 0) for name in ("byol", "mae", "swav")]
    for cell in cells:
        finish(cell, tmp_path, 0.4, 0.25)
    before = table(cells, tmp_path)
    again = Cell("mae", "resnet20", 1)
    finish(again, tmp_path, 0.5, 0.25)
    assert table([again], tmp_path, before).splitlines()[2:5] == [
        "| byol | **40.0** / 25.0 | **60.0**° / 58.0 |",
        "| mae | **50.0** / 25.0 | **60.0**° / 58.0 |",
        "| swav | **40.0** / 25.0 | **60.0**° / 58.0 |",
    ]
    other = Cell("mae", "vit_ti8", 0)
    finish(other, tmp_path, 0.5, 0.25)
    assert [line for line in table([other], tmp_path, before).splitlines() if "byol" in line] == []


def test_what_has_not_run_is_a_dash_and_a_table_of_nothing_is_refused(tmp_path: Path) -> None:
    cells = [Cell("dino", backbone, 0) for backbone in ("resnet20", "vit_ti8")]
    with pytest.raises(ValueError, match="none of 2 runs has finished"):
        table(cells, tmp_path)
    finish(cells[1], tmp_path, 0.4, 0.25)
    lines = table(cells, tmp_path).splitlines()
    assert lines[0] == "| objective | resnet20, k-NN | resnet20, linear | vit_ti8, k-NN | vit_ti8, linear |"
    assert lines[2] == "| dino | – | – | **40.0** / 25.0 | **60.0**° / 58.0 |"
    assert "px: **trained** / the same untrained" in lines[-1]
    assert ", one seed; ° is less than two standard errors above untrained; –" in lines[-1]


def test_noise_is_that_of_two_shares_of_the_validation_images() -> None:
    summary = {"knn_top1": 0.5, "untrained": {"knn_top1": 0.4}, "val_images": 400}
    assert errors_above(summary) == pytest.approx(0.1 / ((0.25 + 0.24) / 400) ** 0.5)


@pytest.mark.parametrize(("objective", "option"), [("gram", "checkpoint"), ("distillation", "teacher")])
def test_what_builds_on_a_run_takes_that_of_its_own_backbone_and_seed(objective, option, tmp_path: Path) -> None:
    base = Cell("dino", "vit_ti8", 3)
    cell = Cell(objective, "vit_ti8", 3)
    assert cell.needs() == base
    words = cell.words(tmp_path)
    assert words[words.index(f"--options.{option}") + 1] == str(base.folder(tmp_path))
