"""The table of finished runs."""

import json
from pathlib import Path

import pytest

from pipeline.results import main, table

SUMMARY = {
    "backbone": "resnet18", "objective": "dino", "train_images": 2400, "device": "a processor",
    "knn_top1": 0.431, "linear_top1": 0.5, "versions": {"torch": "2.14"},
    "untrained": {"knn_top1": 0.21, "linear_top1": 0.3}, "pixels": {"knn_top1": None, "linear_top1": 0.351},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text("data: /somewhere/photos\nimage_size: 96\nepochs: 3\nworkers: 2\n")
    return folder


def test_a_run_is_a_row_with_its_floors(run: Path) -> None:
    lines = table([str(run)]).splitlines()
    assert lines[0].startswith("| data | backbone |")
    assert lines[2] == "| photos (2,400) | resnet18 | dino | 96 | 3 | **43.1** / 21.0 / – | **50.0** / 30.0 / 35.1 |"
    assert lines[-1].endswith("a processor, 2 workers, torch 2.14.")
    assert "somewhere" not in table([str(run)])


def test_what_was_measured_again_of_the_same_images_counts(run: Path) -> None:
    summary = {**SUMMARY, "val_images": 100, "checkpoint_images": 64, "fingerprints": ["a", "b"]}
    scores = {**summary, "linear_top1": 0.6, "data": "photos", "seed": 0, "limit": None}
    lacking = {key: value for key, value in scores.items() if key != "linear_top1"}
    others = [
        {**scores, **change, "linear_top1": 0.9}
        for change in (
            {"data": "others"}, {"data": "photos by kind"}, {"checkpoint_images": 32}, {"val_images": 200},
            {"limit": 100}, {"fingerprints": ["a", "c"]},
        )
    ]  # fmt: skip
    earlier = {**scores, "seed": 1, "linear_top1": 0.7}
    for again, expected in (([earlier, scores, lacking, *others], "60.0"), ([lacking, *others], "50.0")):
        evaluations = {str(i): one for i, one in enumerate(again)}
        (run / "summary.json").write_text(json.dumps({**summary, "evaluations": evaluations}))
        assert f"**{expected}** / 30.0 / 35.1 |" in table([str(run)])


def test_rows_of_other_runs_stay_where_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results -->\n<!-- /results -->\n")
    config = run / "config.yaml"
    for objective, knn, device in (("dino", 0.4, "one"), ("mae", 0.5, "two"), ("dino", 0.6, "one")):
        summary = {**SUMMARY, "objective": objective, "knn_top1": knn, "device": device}
        (run / "summary.json").write_text(json.dumps(summary))
        assert main([str(run), "--write", str(readme), "--add"]) == 0
    rows = [line for line in readme.read_text().splitlines() if line.startswith("| photos")]
    assert [row.split(" | ")[2] for row in rows] == ["mae", "dino"]
    assert "**60.0**" in rows[1]
    assert "raw pixels. one, 2 workers, torch 2.14; two, 2 workers, torch 2.14.\n" in readme.read_text()
    config.write_text(config.read_text().replace("photos", "x-rays"))
    assert main([str(run), "--write", str(readme), "--add"]) == 0
    config.write_text(config.read_text().replace("x-rays", "photos").replace("epochs: 3", "epochs: 9"))
    assert main([str(run), "--write", str(readme), "--add"]) == 0
    lines = [line for line in readme.read_text().splitlines() if line.startswith("| ")][2:]
    assert [line.split(" (")[0] for line in lines] == ["| photos", "| photos", "| photos", "| x-rays"]
    assert main([str(run), "--write", str(readme)]) == 0
    assert readme.read_text().count("| photos") == 1


def test_the_block_takes_the_table_and_mistakes_are_one_line(run: Path, tmp_path: Path, capsys) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- results -->\nold\n<!-- /results -->\nend\n")
    assert main([str(run), str(run), "--write", str(readme)]) == 0
    text = readme.read_text()
    assert text.count("photos (2,400)") == 2
    assert "old" not in text
    assert text.endswith("<!-- /results -->\nend\n")
    assert main([str(tmp_path)]) == 2
    assert main([str(run), "--write", str(tmp_path / "absent.md")]) == 2
    assert main([str(run), "--add"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
