"""Checkpoints written beside the training: what stays, what a fault leaves, what is found when they are read."""

import contextlib
import errno
import os
import subprocess
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.training.checkpoints import Checkpoints, Keep, newest, read_facts
from pipeline.training.run_folder import RunFolder


def state(value: float) -> dict:
    return {"objective": {"w": torch.full((1000,), value)}, "optimiser": {"state": [torch.ones(2)]}, "config": ""}


@given(
    steps=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    well=st.lists(st.booleans(), min_size=30, max_size=30),
    knn=st.lists(st.none() | st.floats(0, 1), min_size=30, max_size=30),
    last=st.integers(1, 4),
    every=st.sampled_from([0.0, 25.0, 64.0]),
)
def test_the_rule_keeps_the_newest_the_best_one_of_each_interval_and_a_healthy_one(steps, well, knn, last, every):
    keep, found, facts, lost = Keep(last, every, best=True), [], {}, set()
    for i, step in enumerate(steps):
        seen = (found[-1] if found else 0) + step
        found.append(seen)
        facts[seen] = {"well": well[i]} | ({} if knn[i] is None else {"knn_top1": knn[i]})
        spared = keep.spared(found, facts)
        assert set(found[-last:]) <= spared
        lost |= set(found) - spared
        found = [n for n in found if n in spared]
    everything = sorted(facts)
    healthy = [n for n in everything if facts[n]["well"]]
    assert not healthy or healthy[-1] in found
    measured = [facts[n]["knn_top1"] for n in everything if "knn_top1" in facts[n]]
    if measured:
        assert max(measured) in [facts[n].get("knn_top1") for n in found]
    if every:
        for multiple in range(1, int(everything[-1] / every) + 1):
            first = next(n for n in everything if n >= multiple * every)
            assert first in found
    assert lost.isdisjoint(found)


def test_training_goes_on_while_a_checkpoint_is_written_and_what_is_written_is_what_was(folder, monkeypatch):
    checkpoints, may_write = Checkpoints(folder, Keep(last=1)), threading.Event()
    slow = RunFolder.save_checkpoint
    monkeypatch.setattr(RunFolder, "save_checkpoint", lambda *a: may_write.wait(10) and slow(*a))
    trained = state(1.0)
    checkpoints.save(64, trained, well=True)
    assert folder.checkpoints() == []
    trained["objective"]["w"].fill_(2.0)
    may_write.set()
    checkpoints.save(128, trained, well=False, knn_top1=0.5)
    checkpoints.wait()
    assert folder.checkpoints() == [64, 128]  # the newest, and the newest healthy one
    assert folder.load_checkpoint(64)["objective"]["w"][0] == 1.0
    assert folder.load_checkpoint(128)["objective"]["w"][0] == 2.0
    assert read_facts(folder) == {64: {"well": True}, 128: {"well": False, "knn_top1": 0.5}}


def test_a_disk_that_is_full_costs_nothing_but_the_new_checkpoint(folder, monkeypatch):
    checkpoints = Checkpoints(folder, Keep(last=3))
    for seen in (64, 128):
        checkpoints.save(seen, state(seen), well=True)
    write = RunFolder.save_checkpoint

    def full(self, seen, content):
        if len(self.checkpoints()) > room:
            raise OSError(28, "No space left on device")
        return write(self, seen, content)

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    room = 1  # for one beside the new one: the older makes way
    checkpoints.save(192, state(192), well=True)
    checkpoints.wait()
    assert checkpoints.trouble is None
    assert folder.checkpoints() == [128, 192]
    room = 0
    checkpoints.save(256, state(256), well=True)
    checkpoints.wait()
    assert "No space left on device" in checkpoints.trouble
    assert "the last good one is at 192 images" in checkpoints.trouble
    assert folder.load_checkpoint(192)["objective"]["w"][0] == 192
    monkeypatch.undo()
    checkpoints.save(320, state(320), well=True)
    checkpoints.wait()
    assert checkpoints.trouble is None
    assert newest(folder)[0] == 320


@pytest.fixture
def small(tmp_path):
    """A disk of 8 MiB of its own."""
    if os.geteuid() != 0:
        pytest.skip("a small disk to fill takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_on_a_full_disk_the_oldest_are_given_up_then_the_best_and_the_last_good_one_never(small):
    folder = RunFolder(str(small / "run"))
    checkpoints = Checkpoints(folder, Keep(last=9))

    def save(seen, size, **facts):
        checkpoints.save(seen, {**state(seen), "optimiser": torch.zeros(int(size * (1 << 18)))}, **facts)
        checkpoints.wait()
        return checkpoints.trouble, folder.checkpoints()

    for seen, knn in ((64, 0.1), (128, 0.5), (192, 0.2), (256, 0.3)):
        save(seen, 1, well=True, knn_top1=knn)
    assert save(320, 1, well=False) == (None, [64, 128, 192, 256, 320])
    with open(small / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert save(384, 0.9, well=False) == (None, [128, 192, 256, 320, 384])
    assert save(448, 0.9, well=False) == (None, [128, 256, 320, 384, 448])
    assert save(512, 2.5, well=False) == (None, [128, 256, 512])
    assert save(576, 3.2, well=False) == (None, [256, 576])
    trouble, kept = save(640, 7, well=True)
    assert kept == [256]
    assert "at 640 images ([Errno 28] No space left on device); the last good one is at 256 images" in trouble
    assert folder.load_checkpoint(256)["objective"]["w"][0] == 256
    (small / "ballast").unlink()
    assert save(704, 1, well=True) == (None, [256, 704])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("PytorchStreamWriter failed writing file"), PermissionError("Access Denied by the bucket"),
        OSError(errno.EFBIG, "File too large"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_for_another_reason_costs_no_checkpoint(folder, monkeypatch, error):
    checkpoints = Checkpoints(folder, Keep(last=3))
    for seen in (64, 128, 192):
        checkpoints.save(seen, state(seen), well=True)
    checkpoints.wait()

    def refuse(*_):
        raise error

    monkeypatch.setattr(RunFolder, "save_checkpoint", refuse)
    checkpoints.save(256, state(256), well=True)
    checkpoints.wait()
    monkeypatch.undo()
    assert str(error) in checkpoints.trouble
    assert folder.checkpoints() == [64, 128, 192]
    checkpoints.save(320, state(320), well=True)
    checkpoints.wait()
    assert checkpoints.trouble is None
    assert folder.checkpoints() == [128, 192, 320]


def test_a_server_that_does_not_answer_at_all_ends_nothing(folder, monkeypatch):
    checkpoints = Checkpoints(folder, Keep())
    checkpoints.save(64, state(64), well=True)
    checkpoints.wait()

    def away(*_):
        raise ConnectionError("no route to host")

    for name in ("save_state", "checkpoints", "parts"):
        monkeypatch.setattr(RunFolder, name, away)
    checkpoints.save(128, state(128), well=True)
    checkpoints.wait()
    assert "at 128 images (no route to host); the last good one is at 64 images" in checkpoints.trouble
    monkeypatch.undo()
    checkpoints.save(192, state(192), well=True)
    checkpoints.wait()
    assert checkpoints.trouble is None
    assert newest(folder)[0] == 192


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried to allocate 8 bytes")])
def test_a_process_without_memory_for_a_checkpoint_does_not_train_on_unsaved(folder, monkeypatch, error):
    checkpoints = Checkpoints(folder, Keep())
    checkpoints.save(64, state(64), well=True)
    checkpoints.wait()

    def starved(self, seen, content):
        raise error

    monkeypatch.setattr(RunFolder, "save_checkpoint", starved)
    checkpoints.save(128, state(128), well=True)
    checkpoints.wait()
    monkeypatch.undo()  # once: another process may have had it, for a moment
    checkpoints.save(192, state(192), well=True)
    checkpoints.wait()
    assert newest(folder)[0] == 192
    assert checkpoints.trouble is None
    monkeypatch.setattr(RunFolder, "save_checkpoint", starved)
    for seen in (256, 320):
        checkpoints.save(seen, state(seen), well=True)
        checkpoints.wait()  # as at a run's end, whose backbone is exported all the same
    with pytest.raises(MemoryError, match=r"at 320 images .*emory.*the last good one is at 192 images"):
        checkpoints.save(384, state(384), well=True)


@pytest.mark.parametrize("fault", ["cut", "bit"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(folder, fault):
    for seen in (64, 128):
        folder.save_checkpoint(seen, state(seen))
    content = bytearray(folder.read(f"checkpoints/{128:012d}.pt"))
    if fault == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 4
    folder.write(f"checkpoints/{128:012d}.pt", bytes(content))
    seen, found, said = newest(folder)
    assert (seen, found["objective"]["w"][0]) == (64, 64)
    assert len(said) == 1
    assert "checkpoint 128" in said[0]
    assert "000000000128.pt.damaged" in said[0]
    assert folder.checkpoints() == [64]
    folder.write(f"checkpoints/{64:012d}.pt", b"PK nothing")
    with pytest.raises(UserError, match=r"every checkpoint is damaged.*checkpoint 64"):
        newest(folder)


def test_the_newest_healthy_one_is_found_and_later_ones_can_be_dropped(folder):
    checkpoints = Checkpoints(folder, Keep(last=3))
    for seen, well in ((64, True), (128, False), (192, False)):
        checkpoints.save(seen, state(seen), well=well)
    checkpoints.wait()
    assert newest(folder)[0] == 192
    assert newest(folder, well=True)[0] == 64
    checkpoints.drop_after(64)
    assert folder.checkpoints() == [64]
    assert set(read_facts(folder)) == {64}
