"""Ranks that train, write their checkpoints together, are killed, and go on as a group of another size."""

import dataclasses
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.evaluation import judge
from pipeline.training import checkpoints, shares, worker
from pipeline.training.links import Links
from pipeline.training.run_folder import RunFolder
from tests.chaos.runs import Place, assert_identical, job_of, losses

KIND = (
    *("--backbone", "resnet20", "--objective", "moco_v2", "--options.queue-size", "16", "--options.hidden-dim", "16"),
    *("--options.out-dim", "8", "--keep", "9"),
)


def train(rank: int, world: int, words: list[str], meeting: str, steps: int | None, least: int) -> None:
    """One rank of a group that trains until the end, or for so many steps."""
    torch.set_num_threads(1)
    shares.LEAST, checkpoints.PATIENCE = least, 1.0
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(meeting, world), rank=rank, world_size=world)
    job = dataclasses.replace(job_of(words, rank=rank), val=None)
    asked = iter(range(10**9))
    links = Links(lambda status: steps is not None and next(asked) + 1 >= steps, lambda metrics, step: None)
    worker.work(job, links)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(1, 2), (2, 1)])
def test_groups_of_other_sizes_go_on_from_parts_as_from_one_file_to_the_last_bit(tmp_path, groups):
    place = Place(tmp_path)
    for name, least in (("whole", 1 << 40), ("parts", 1)):
        for i, (world, steps) in enumerate(zip(groups, (4, None))):
            words = place.words(name, "--epochs", "3", "--checkpoint-every", "1000", kind=KIND)
            mp.spawn(train, (world, words, str(tmp_path / f"meeting-{name}-{i}"), steps, least), nprocs=world)
    whole, parts = (RunFolder(str(tmp_path / "runs" / name)) for name in ("whole", "parts"))
    assert whole.parts() == {}
    assert set(parts.parts().values()) == {parts.checkpoints()[groups.index(2)]}
    assert parts.read("metrics.jsonl") == whole.read("metrics.jsonl")
    assert parts.checkpoints() == whole.checkpoints()
    for seen in whole.checkpoints():
        one, other = whole.load_checkpoint(seen), parts.load_checkpoint(seen)
        assert_identical(other | {"config": ""}, one | {"config": ""})
        backbones = [judge.find(run.path(f"checkpoints/{seen:012d}.pt")).backbone for run in (whole, parts)]
        assert_identical(*(backbone.state_dict() for backbone in backbones))


@pytest.mark.slow
def test_a_worker_killed_while_parts_are_written_costs_no_more_than_that_checkpoint(tmp_path):
    place, spawn = Place(tmp_path), mp.get_context("spawn")
    words = place.words("run", "--epochs", "12", "--checkpoint-every", "0.00001", kind=KIND)
    run = RunFolder(str(tmp_path / "runs" / "run"))
    ranks = [spawn.Process(target=train, args=(i, 2, words, str(tmp_path / "meeting"), None, 1)) for i in range(2)]
    for process in ranks:
        process.start()
    try:
        begun = time.monotonic()
        while len(run.checkpoints()) < 3 and time.monotonic() < begun + 120:
            time.sleep(0.001)
        ranks[1].kill()
        ranks[0].join(120)
        assert ranks[0].exitcode == 1  # it waits for a part that will not come, and no longer
    finally:
        for process in ranks:
            process.kill()
            process.join()
    reached = losses(run)[-1][0]
    kept = run.checkpoints()
    assert reached - kept[-1] <= 2 * 8
    assert [run.load_checkpoint(seen)["images_seen"] for seen in kept] == kept
    mp.spawn(train, (1, words, "", None, 1), nprocs=1)
    images = [seen for seen, _ in losses(run)]
    assert images == list(range(8, images[-1] + 1, 8))
    assert run.checkpoints()[-1] == images[-1] > reached
