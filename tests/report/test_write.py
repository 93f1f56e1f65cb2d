"""What a comparison leaves beside its report."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

import backbones
from pipeline import classify
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.evaluate import Findings
from pipeline.report import write
from tests.evaluation.test_evaluate import SIDE, pack
from tests.report.contests import contest, entry


def test_the_classifiers_that_a_comparison_trained_are_named_and_name_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    of = backbones.create("lenet5", image_size=SIDE)
    trained = Classifier(of, nn.Linear(of.width, 3), ("a", "b", "c"), SIDE).eval()
    nothing = Findings({}, {}, torch.zeros(0))
    found = nothing._replace(classifiers={"linear": trained, "finetune": trained})
    held = contest([entry("lenet5", "mae", found, nothing), entry("vit_ti8", "mae", nothing, nothing)], nothing, ())
    monkeypatch.setattr(write.contests, "hold", lambda *runs, **options: held)
    monkeypatch.setattr(write.numbers, "as_json", lambda held: {})
    monkeypatch.setattr(write.page, "render", lambda held, drawn, command: "the report")
    monkeypatch.setattr(write, "track", lambda *whatever: None)
    for name in ("claims", "sentences", "unfair"):
        monkeypatch.setattr(write.verdict, name, lambda *held: [])
    monkeypatch.chdir(tmp_path)
    write.compare(
        [], fresh=[], storage="runs", data=None, val_data=None, table=None, protocols=(), limit=None, epochs=None,
        seed=0, cache=None, engine="local", workers=None, output="report", command=[],
    )  # fmt: skip
    said = capsys.readouterr().out
    for protocol in ("linear", "finetune"):
        assert f"python -m pipeline.classify report/classifiers/lenet5-mae-{protocol}.safetensors PHOTOS" in said
    photos = pack(tmp_path, "photos", 12, 0)
    words = ["report/classifiers/lenet5-mae-linear.safetensors", str(photos.path), "--cache", "cache"]
    assert classify.main(words) == 0
    rows = list(csv.DictReader(Path("classes.csv").read_text().splitlines()))
    assert len(rows) == 12
    assert {row["class"] for row in rows} <= {"a", "b", "c"}
