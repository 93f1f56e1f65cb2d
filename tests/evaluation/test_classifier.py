"""A classifier that an evaluation trained: kept, loaded and used, it says what the evaluation measured."""

import csv
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import backbones
from pipeline import classify
from pipeline.data.beton import BetonReader
from pipeline.errors import UserError
from pipeline.evaluation import classifier, examine, linear, logistic
from pipeline.evaluation.attentive import Attentive
from tests.evaluation.test_evaluate import SIDE, pack


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fit", [linear.fit, logistic.fit])
def test_a_probe_and_its_layer_say_the_same(fit) -> None:
    x, y = 5 + normal(200, 12) * torch.logspace(-2, 2, 12), torch.arange(200) % 3
    x[:, 3] += y
    probe = fit(x, y, classes=3)
    standardised = linear.standardise(x, probe.mean, probe.deviation).to(probe.weight)
    expected = standardised @ probe.weight + probe.bias
    torch.testing.assert_close(probe.head()(x), expected.float(), rtol=1e-4, atol=1e-3)
    assert torch.equal(probe.head()(x).argmax(1), probe.predict(x))


@pytest.mark.parametrize("head", [nn.Linear, Attentive])
@pytest.mark.parametrize(("backbone", "size"), [("lenet5", 16), ("vit_ti8", (16, 24))])
def test_what_was_saved_comes_back(head, backbone: str, size, tmp_path: Path) -> None:
    torch.manual_seed(0)
    of = backbones.create(backbone, image_size=size)
    kept = classifier.Classifier(of, head(of.width, 3), ("a", "b", "ü, 'c'"), size).eval()
    (tmp_path / "kept.safetensors").write_bytes(classifier.save(kept))
    for address in (tmp_path / "kept.safetensors", f"file://{tmp_path}/kept.safetensors"):
        again = classifier.load(address)
        assert (again.classes, again.image_size, again.training) == (kept.classes, size, False)
        images = normal(4, 3, *((size, size) if isinstance(size, int) else size))
        with torch.no_grad():
            assert torch.equal(again(images), kept(images))


def test_what_is_no_classifier_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "torn").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "foreign").write_bytes(safetensors.torch.save({"weight": torch.ones(3)}))
    of = backbones.create("lenet5", image_size=16)
    whole = classifier.save(classifier.Classifier(of, nn.Linear(of.width, 3), ("a", "b"), 16))
    (tmp_path / "unfit").write_bytes(whole)
    for name in ("torn", "foreign", "unfit"):
        with pytest.raises(UserError, match=f"{name}: not a classifier"):
            classifier.load(tmp_path / name)
    assert classify.main([str(tmp_path / "absent"), str(tmp_path)]) == 2
    assert "absent: cannot be read; python -m pipeline.evaluate RUN leaves" in capsys.readouterr().err


def test_it_names_new_images_as_well_as_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = pack(tmp_path, "train", 160, 0), pack(tmp_path, "val", 60, 1)
    torch.manual_seed(0)
    asked = ("linear", "logistic", "attentive", "finetune")
    found = examine(
        {"": backbones.create("lenet5", image_size=SIDE)}, train, val, image_size=SIDE,
        protocols=asked, epochs=5,
    )[""]  # fmt: skip
    assert set(found.classifiers) == set(asked)
    truth = BetonReader(val.path).metadata["label"].tolist()
    for protocol, trained in found.classifiers.items():
        (tmp_path / "classifier").write_bytes(classifier.save(trained))
        words = [str(tmp_path / "classifier"), str(val.path), "--output", str(tmp_path / "classes.csv")]
        assert classify.main([*words, "--cache", str(tmp_path / "cache")]) == 0
        rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
        right = [row["class"] == val.classes[label] for row, label in zip(rows, truth, strict=True)]
        assert sum(right) / len(right) == pytest.approx(found.numbers[f"{protocol}_top1"])
        assert all(0 < float(row["probability"]) <= 1 for row in rows)
        assert "60 images in " in capsys.readouterr().out
    assert classify.main([*words[:2], "--output", str(tmp_path / "none" / "x.csv")]) == 2
    assert "there is no folder" in capsys.readouterr().err
