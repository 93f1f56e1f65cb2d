"""Every objective through the whole command: train, checkpoint, export, measure; Gram anchoring goes on from a run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import objectives
from pipeline import pretrain

sys.path.append(str(Path(__file__).resolve().parents[1] / "objectives"))
from every_objective import OPTIONS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(48):
        (folder / "abc"[i % 3]).mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "abc"[i % 3] / f"{i}.png")
    return folder


def words_of(name: str) -> list[str]:
    given = {key: value for key, value in OPTIONS[name].items() if key != "classes"}
    return [word for key, value in given.items() for word in (f"--options.{key.replace('_', '-')}", str(value))]


def train(name: str, backbone: str, photos: Path, folder: Path, *more: str) -> dict:
    run = folder / name
    common = ["--data", str(photos), "--cache", str(photos.parent / "cache"), "--storage", str(folder), "--epochs", "2"]
    small = ["--engine", "local", "--loader", "opencv", "--image-size", "32", "--batch-size", "8", "--knn-every", "0"]
    words = [*common, *small, "--backbone", backbone, "--objective", name, "--run", str(run), *words_of(name), *more]
    assert pretrain.main([*words, "--precision", "fp32", "--debug"]) == 0
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("backbone", ["resnet20", "vit_ti8"])
@pytest.mark.parametrize("name", objectives.NAMES)
def test_the_command_trains_and_measures(name: str, backbone: str, photos: Path, tmp_path: Path) -> None:
    more = []
    if objectives.objective(name).continues:
        train("dino", backbone, photos, tmp_path)
        more = ["--options.checkpoint", str(tmp_path / "dino")]
    summary = train(name, backbone, photos, tmp_path, *more)
    assert summary["images_seen"] > 0
    assert np.isfinite([summary["loss_first"], summary["loss_last"]]).all()
    assert 0 <= summary["knn_top1"] <= 1
    assert (tmp_path / name / "backbone.safetensors").exists()
