"""A run's folder, on a disk and at an fsspec address."""

import pickle
import uuid

import pytest
import torch

from pipeline.errors import UserError
from pipeline.training.run_folder import MetricsFile, RunFolder


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    return RunFolder(str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/run")


def state(value: float) -> dict:
    return {"objective": {"w": torch.full((2,), value)}, "config": "", "images_seen": 1}


def test_what_is_written_comes_back(folder):
    assert not folder.exists("summary.json")
    folder.write("summary.json", "one")
    folder.write("summary.json", "two")
    assert folder.exists("summary.json")
    assert folder.read("summary.json") == b"two"


def test_the_newest_checkpoints_are_kept(folder):
    assert folder.checkpoints() == []
    for images in (64, 128, 1_000_000):
        folder.save_checkpoint(images, state(float(images)), keep=2)
    assert folder.checkpoints() == [128, 1_000_000]
    torch.testing.assert_close(folder.load_checkpoint(128)["objective"]["w"], torch.full((2,), 128.0))


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path))
    folder.write("a", "whole")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write("a", "torn")
    assert folder.read("a") == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_torn_checkpoint_and_a_pickle_are_refused_by_name(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.save_checkpoint(64, state(1.0), keep=1)
    path = tmp_path / "checkpoints" / f"{64:012d}.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="checkpoint 64: cannot be read"):
        folder.load_checkpoint(64)

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot be read"):
        folder.load_checkpoint(64)
    assert not (tmp_path / "executed").exists()


def test_metrics_are_cut_back_to_the_checkpoint(folder):
    metrics = MetricsFile(folder, until=0)
    for images in (10, 20, 30):
        metrics.add({"images": images, "loss": images / 3})
    metrics.flush()
    again = MetricsFile(folder, until=20)
    again.add({"images": 30, "loss": 7.0})
    again.flush()
    assert MetricsFile(folder, until=30).rows() == [
        {"images": 10, "loss": 10 / 3},
        {"images": 20, "loss": 20 / 3},
        {"images": 30, "loss": 7.0},
    ]
