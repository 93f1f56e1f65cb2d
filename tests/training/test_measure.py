"""The k-NN accuracy that a run tells on its way: of whom, of what, and when."""

from pathlib import Path

import pytest
import torch

import backbones
from pipeline.config import Config
from pipeline.evaluation.features import extract
from pipeline.evaluation.knn import knn
from pipeline.training import measure
from pipeline.training.measure import OnlineKnn
from tests.evaluation.test_evaluate import SIDE, pack


def online(folder: Path, **more: float) -> OnlineKnn:
    train, val = pack(folder, "train", 96, 0), pack(folder, "val", 48, 1)
    config = Config(
        backbone="lenet5", objective="dino", data="photos", image_size=SIDE, epochs=4, precision="fp32", **more
    )
    return OnlineKnn(config, train, val, torch.device("cpu"), planned=4 * train.images)


def test_it_is_the_accuracy_by_the_nearest_of_a_part_of_the_training_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = backbones.create("lenet5", image_size=SIDE).train()
    measured = online(tmp_path)
    assert measured.bank == 64  # a sixth of the 384 images that the run sees
    bank, labels = extract(backbone, measured.train.path, image_size=SIDE, limit=64)
    queries, truth = extract(backbone, tmp_path / "val.beton", image_size=SIDE)
    assert measured(backbone, 96, lambda: False) == knn(bank, labels, queries, truth, ks=(20,))[20] > 0.3
    assert backbone.training


def test_it_measures_on_a_part_of_many_validation_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ONLINE_IMAGES", 40)
    backbone = backbones.create("lenet5", image_size=SIDE).train()
    measured = online(tmp_path)
    bank, labels = extract(backbone, measured.train.path, image_size=SIDE, limit=40)
    queries, truth = extract(backbone, tmp_path / "val.beton", image_size=SIDE, limit=40)
    assert len(truth) == 40
    assert measured(backbone, 96, lambda: False) == knn(bank, labels, queries, truth, ks=(20,))[20]


@pytest.mark.parametrize(("every", "images"), [(1.0, 96), (0.5, 48), (2.0, 192)])
def test_it_is_due_once_an_interval_but_not_at_the_end(tmp_path: Path, every: float, images: int) -> None:
    measured = online(tmp_path, knn_every=every)
    backbone = backbones.create("lenet5", image_size=SIDE)
    due = []
    for seen in range(16, 385, 16):
        if measured.due(seen):
            measured(backbone, seen, lambda: False)
            due.append(seen)
    assert due == list(range(images, 384, images))


def test_it_is_never_due_without_labels_or_where_it_is_not_wanted(tmp_path: Path) -> None:
    assert not any(online(tmp_path, knn_every=0).due(seen) for seen in range(0, 385, 16))
    unlabelled = OnlineKnn(
        Config(backbone="lenet5", objective="dino", data="photos", image_size=SIDE, epochs=4),
        pack(tmp_path, "bare", 12, 2, classes=()), pack(tmp_path, "other", 12, 3), torch.device("cpu"), planned=48,
    )  # fmt: skip
    assert not any(unlabelled.due(seen) for seen in range(48))
