"""Ranks, one of which meets a NaN, go back together and leave the batch out as one process does; it is replayed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import replay
from pipeline.training import worker
from pipeline.training.health import Care
from pipeline.training.links import Links
from pipeline.training.run_folder import RunFolder
from tests.chaos.local_faults import poisoned
from tests.chaos.runs import Place, job_of, losses


def train(rank: int, world: int, words: list[str], meeting: Path) -> None:
    """One rank of a run whose last rank meets a NaN half way."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(str(meeting), world), rank=rank, world_size=world)
    job = dataclasses.replace(job_of(words, rank=rank), val=None)
    links = Links(lambda status: False)
    with poisoned(lambda progress: rank == world - 1 and abs(progress - 0.5) < 1e-9):
        worker.work(job, links)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def test_a_nan_of_one_rank_is_healed_by_both(tmp_path):
    place = Place(tmp_path)
    for world in (1, 2):
        words = place.words(f"on{world}", "--epochs", "4")
        mp.spawn(train, (world, words, tmp_path / f"meeting{world}"), nprocs=world)
    one, two = (RunFolder(str(tmp_path / "runs" / f"on{world}")) for world in (1, 2))
    assert [step.change for step in Care.read(two).done] == ["skip"]
    assert Care.read(two).done == Care.read(one).done
    alone, together = losses(one), losses(two)
    assert [n for n, _ in together] == [n for n, _ in alone]
    assert [n for n, loss in together if loss is None] == [alone[-1][0] // 2 + 8]
    np.testing.assert_allclose(
        [loss for _, loss in together if loss], [loss for _, loss in alone if loss], rtol=1e-4
    )  # fmt: skip


def test_a_bundle_of_three_who_share_most_of_a_batch_is_replayed_on_their_images(tmp_path, capsys):
    place = Place(tmp_path)
    words = place.words("on3", "--epochs", "2", "--engine", "ray", "--workers", "3..4")
    mp.spawn(train, (3, words, tmp_path / "meeting"), nprocs=3)
    (bundle,) = (tmp_path / "runs" / "on3" / "bundles").iterdir()
    with poisoned(lambda progress: abs(progress - 0.5) < 1e-9):
        assert replay.main([str(bundle)]) == 0
    assert "54 images  loss nan" in capsys.readouterr().out  # 48 before, and the 6 of 8 that three can share out
    assert replay.main([str(bundle)]) == 3


def test_what_ends_a_run_that_is_not_to_be_healed_can_be_replayed(tmp_path):
    place = Place(tmp_path)
    with poisoned(lambda progress: abs(progress - 0.5) < 1e-9):
        with pytest.raises(FloatingPointError, match=r"python -m pipeline\.replay .*-end\.pt reproduces it"):
            place.train("ill", "--epochs", "2", "--no-heal")
        (bundle,) = (tmp_path / "runs" / "ill" / "bundles").iterdir()
        assert replay.main([str(bundle)]) == 0
    assert replay.main([str(bundle)]) == 3
