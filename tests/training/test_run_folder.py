"""A run's folder, on a disk and at an fsspec address."""

import contextlib
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives import checkpoint
from pipeline.errors import UserError
from pipeline.training.run_folder import MetricsFile, RunFolder


def state(value: float) -> dict:
    return {"objective": {"w": torch.full((2,), value)}, "config": "", "images_seen": 1}


def test_what_is_written_comes_back(folder):
    assert not folder.exists("summary.json")
    folder.write("summary.json", "one")
    folder.write("summary.json", "two")
    assert folder.exists("summary.json")
    assert folder.read("summary.json") == b"two"


def test_checkpoints_come_back(folder):
    assert folder.checkpoints() == []
    for images in (1_000_000, 64):
        folder.save_checkpoint(images, state(float(images)))
    assert folder.checkpoints() == [64, 1_000_000]
    torch.testing.assert_close(folder.load_checkpoint(64)["objective"]["w"], torch.full((2,), 64.0))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.save_checkpoint(64, state(1.0))
    (tmp_path / "checkpoints" / ".writing-abc").write_bytes(b"half")
    folder.tidy()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"{64:012d}.pt"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_and_no_cut_changes_a_tensor_unnoticed(data):
    buffer = io.BytesIO()
    torch.save({"objective": {"w": torch.arange(500.0)}, "config": ""}, buffer)
    content = bytearray(buffer.getvalue())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:place]
    with contextlib.suppress(ValueError):
        found = checkpoint.read("64", lambda _: bytes(content))  # padding between the tensors
        assert torch.equal(found["objective"]["w"], torch.arange(500.0))


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
    folder.save_checkpoint(64, state(1.0))
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


def test_metrics_that_a_full_disk_refused_are_written_with_the_next_flush(tmp_path):
    folder = RunFolder(str(tmp_path))
    metrics = MetricsFile(folder, until=0)
    metrics.add({"images": 10, "loss": 1.0})
    file = tmp_path / "metrics.jsonl"
    aside = file.rename(tmp_path / "aside")
    file.mkdir()  # as good as a disk that takes nothing
    metrics.add({"images": 20, "loss": 2.0})
    with pytest.raises(OSError):
        metrics.flush()
    file.rmdir()
    aside.rename(file)
    metrics.add({"images": 30, "loss": 3.0})
    metrics.flush()
    assert [row["images"] for row in MetricsFile.read(folder, until=30)] == [10, 20, 30]
