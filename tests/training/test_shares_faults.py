"""What befalls the workers that write a checkpoint together: a full disk, no memory, a kill at any moment."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.training import checkpoints
from pipeline.training.checkpoints import Checkpoints, Keep, newest
from pipeline.training.run_folder import RunFolder
from tests.chaos.runs import assert_identical
from tests.parts import names, shared, state, write

pytestmark = pytest.mark.usefixtures("quick")


def test_a_full_disk_of_one_worker_makes_room_then_costs_the_new_checkpoint_only(folder, monkeypatch):
    for seen in (64, 128):
        write(folder, seen, state(seen), 2)
    save = RunFolder.save_state

    def full(self, name, content):
        if name.endswith("2-of-2.part") and len(self.checkpoints()) > room:
            raise OSError(28, "No space left on device")
        return save(self, name, content)

    monkeypatch.setattr(RunFolder, "save_state", full)
    room = 1
    write(folder, 192, state(192), 2)
    assert folder.checkpoints() == [128, 192]
    room = 0
    rank0, rank1 = (Checkpoints(folder, Keep(), rank) for rank in range(2))
    rank1.save(256, state(256), shared(state(256), 256, 1, 2))
    rank0.save(256, state(256), shared(state(256), 256, 0, 2), well=True)
    rank1.wait()
    rank0.wait()
    assert "No space left on device" in rank1.trouble
    assert "no checkpoint could be written at 256 images" in rank0.trouble
    assert "the last good one is at 192 images" in rank0.trouble
    assert_identical(newest(folder)[1], state(192))
    monkeypatch.undo()
    write(folder, 320, state(320), 2)
    assert newest(folder)[0] == 320
    assert not [name for name in names(folder) if name.startswith(f"{256:012d}")]


def test_the_worker_without_memory_is_the_one_that_is_ended(folder, monkeypatch):
    rank0, rank1 = (Checkpoints(folder, Keep(), rank) for rank in range(2))

    def starved(self, name, content):
        if name.endswith("2-of-2.part"):
            raise MemoryError

    monkeypatch.setattr(RunFolder, "save_state", starved)
    for seen in (64, 128):
        for writer in (rank1, rank0):
            writer.save(seen, state(seen), shared(state(seen), seen, writer.rank, 2))
            writer._lost = None if writer.rank else f"worker 1: {rank1.trouble}"
        rank1.wait()
        rank0.wait()
    rank0.save(192, state(192))
    with pytest.raises(MemoryError):
        rank1.save(192, state(192))


def settling(rank: int, folder: str) -> None:
    """A rank of two, the second of which cannot write its part."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meeting", 2), rank=rank, world_size=2)
    checkpoints.POLL, writer = 0.01, Checkpoints(RunFolder(f"{folder}/run"), Keep(), rank)
    save = RunFolder.save_state

    def full(self: RunFolder, name: str, content: Any) -> str:
        if f"{64:012d}" in name:
            raise OSError(28, "No space left on device")
        return save(self, name, content)

    if rank:
        RunFolder.save_state = full  # type: ignore[method-assign]
    said = []
    for seen in (64, 128):
        writer.save(seen, state(seen), shared(state(seen), seen, rank, 2))
        writer.settle()
        said.append(writer.trouble)
    Path(folder, f"said-{rank}").write_text(json.dumps(said))
    dist.destroy_process_group()


def test_rank_0_hears_of_a_part_that_could_not_be_written(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=settling, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    first, second = json.loads((tmp_path / "said-0").read_text())
    assert "at 64 images (worker 1: [Errno 28] No space left on device); there is none yet" in first
    assert second is None
    assert RunFolder(str(tmp_path / "run")).checkpoints() == [128]


def writing(rank: int, folder: str, meeting: Any) -> None:
    """A rank of two that writes one checkpoint after the other until it is killed; the second is slow now and then."""
    writer, save, draw = Checkpoints(RunFolder(folder), Keep(last=2), rank), RunFolder.save_state, random.Random(rank)

    def slow(self: RunFolder, name: str, content: Any) -> str:
        time.sleep(rank * draw.random() * 0.1)
        return save(self, name, content)

    RunFolder.save_state = slow  # type: ignore[method-assign]
    for seen in range(1, 10**6):
        whole = state(seen, 50_000)
        writer.save(seen, whole, shared(whole, seen, rank, 2, f"{seen:x}"))
        writer.wait()
        meeting.wait()


@pytest.mark.parametrize("seed", range(4))
def test_what_is_killed_at_any_moment_leaves_nothing_that_counts_and_is_not_whole(tmp_path, seed):
    draw, folder = random.Random(seed), RunFolder(str(tmp_path / "run"))
    spawn = multiprocessing.get_context("spawn")
    meeting = spawn.Barrier(2)
    ranks = [spawn.Process(target=writing, args=(rank, folder.root, meeting)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        begun = time.monotonic()
        while len(folder.checkpoints()) < 2 and time.monotonic() < begun + 60:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.2)
        os.kill(draw.choice(ranks).pid, signal.SIGKILL)
        time.sleep(draw.random() * 0.02)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    kept = folder.checkpoints()
    assert len(kept) >= 2
    for seen in kept:
        assert_identical(folder.load_checkpoint(seen), state(seen, 50_000))
    folder.tidy()
    assert newest(folder)[::2] == (kept[-1], [])
    assert [name for name in names(folder) if name != "index.json" and int(name[:12]) not in kept] == []
