"""Are validation images told that a run was pretrained on? However they get there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import compare, evaluate, pretrain
from pipeline.data.packed import read_names

TINY = (
    *("--backbone", "lenet5", "--loader", "opencv", "--image-size", "16", "--batch-size", "8", "--epochs", "1"),
    *("--knn-every", "0", "--precision", "fp32", "--engine", "local", "--cache", "cache"),
)
MAE = (
    *("--objective", "mae", "--options.decoder-width", "16", "--options.decoder-depth", "1"),
    *("--options.decoder-heads", "2"),
)


def draw(folder: str, count: int, seed: int) -> None:
    """Images of noise in the class folders `folder`/a and `folder`/b."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        Path(folder, "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(Path(folder, "ab"[i % 2], f"{seed}-{i}.png"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `labels`, supervised on all of `pool/` but what its hash holds out, `others`, judged on
    `apart/` and so pretrained on all of `pool/`, and `bare`, on images without labels."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        draw("pool", 64, 0)
        draw("apart", 12, 1)
        Path("bare").mkdir()
        for file in Path("pool").rglob("*.png"):
            shutil.copy(file, Path("bare", file.name))
        assert pretrain.main([*TINY, "--objective", "supervised", "--data", "pool", "--run", "runs/labels"]) == 0
        assert pretrain.main([*TINY, *MAE, "--data", "pool", "--val-data", "apart", "--run", "runs/others"]) == 0
        assert pretrain.main([*TINY, *MAE, "--data", "bare", "--run", "runs/bare"]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def judged(run: str, *words: str) -> dict:
    """What `evaluate` keeps of an evaluation."""
    before = json.loads(Path(run, "summary.json").read_text()).get("evaluations", {})
    assert evaluate.main([run, "--engine", "local", "--cache", "cache", *words]) == 0
    after = json.loads(Path(run, "summary.json").read_text())["evaluations"]
    (name,) = set(after) - set(before)
    return after[name]


def test_what_is_held_out_of_images_without_labels_was_pretrained_on(capsys: pytest.CaptureFixture[str]) -> None:
    scores = judged("runs/bare", "--protocols", "label_free")
    held_out = scores["val_images"]
    assert 0 < held_out == scores["pretrained_on"] < 20
    assert (
        f"{held_out} of the {held_out} validation images were among those that lenet5 + mae was pretrained on, without "
        "labels: accuracies may be somewhat too good" in capsys.readouterr().out
    )


def test_labelled_images_from_among_those_of_pretraining_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    draw("labelled/train", 20, 2)
    draw("labelled/val", 7, 3)
    (packed,) = (file for file in Path("cache").glob("pool-*/train.beton") if file.with_name("val.beton").exists())
    learnt = read_names(packed)
    held_out = [str(file.relative_to("pool")) for file in Path("pool").rglob("*.png")]
    held_out = [name for name in held_out if name not in learnt]
    for name in (*learnt[:5], held_out[0]):
        shutil.copy(Path("pool", name), Path("labelled", "val", name))
    scores = judged("runs/labels", "--data", "labelled", "--protocols", "knn")
    assert (scores["val_images"], scores["pretrained_on"], scores["duplicates"]) == (13, 5, 0)
    said = "5 of the 13 validation images were among those that lenet5 + supervised was pretrained on, with labels: acc"
    assert said in capsys.readouterr().out
    # On what the hash of its own data held out, nothing is to be told.
    assert judged("runs/labels", "--protocols", "knn")["pretrained_on"] == 0
    assert "pretrained on" not in capsys.readouterr().out


def test_a_run_that_was_judged_elsewhere_learnt_from_what_the_other_holds_out() -> None:
    words = ["runs/labels", "runs/others", "--engine", "local", "--cache", "cache", "--protocols", "knn"]
    assert compare.main([*words, "--output", "report"]) == 0
    numbers = json.loads(Path("report/numbers.json").read_text())
    count = numbers["val_images"]
    assert [one["pretrained_on"] for one in numbers["entries"]] == [0, count]
    said = (
        f"{count} of the {count} validation images were among those that lenet5 + mae was pretrained on, without labels"
    )
    assert said in numbers["unfair"][0]
    assert "validation data of pretraining: lenet5 + supervised left open, lenet5 + mae apart" in numbers["unfair"]
    assert said in Path("report/report.html").read_text()


def test_what_cannot_be_compared_any_more_is_said_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    Path("cache").rename("away")
    try:
        draw("later", 40, 4)
        scores = judged("runs/bare", "--data", "later", "--protocols", "knn")
    finally:
        shutil.rmtree("cache")
        Path("away").rename("cache")
    assert scores["pretrained_on"] is None
    assert "whether lenet5 + mae was pretrained on some of the" in capsys.readouterr().out
