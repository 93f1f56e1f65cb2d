"""Checkpoints in parts: all of one, or none, whoever wrote it, whoever reads it, and whatever befalls its parts."""

import os
import pickle
import time
import uuid
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.training import shares
from pipeline.training.checkpoints import Checkpoints, Keep, newest, read_facts
from pipeline.training.run_folder import RunFolder
from tests.chaos.runs import assert_identical
from tests.parts import names, shared, state, write
from tests.s3 import s3

pytestmark = pytest.mark.usefixtures("quick")


def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    kind = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    return torch.randint(0, 2 if kind == torch.bool else 100, shape).to(kind)


leaves = st.composite(tensors)() | st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
keys = st.text("ab.1", max_size=3) | st.integers(0, 9)
nests = st.recursive(
    leaves,
    lambda inner: st.dictionaries(keys, inner, max_size=4) | st.lists(inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=25, deadline=None)
@given(objective=nests, optimiser=nests, workers=st.integers(1, 5), others=st.integers(1, 5))
def test_every_state_comes_back_from_any_number_of_workers(objective, optimiser, workers, others):
    folder = RunFolder(f"memory://{uuid.uuid4().hex}/run")
    wanted = {"objective": objective, "optimiser": optimiser, "config": "", "images_seen": 64}
    write(folder, 64, wanted, workers)
    seen, found, said = newest(folder)
    assert (seen, said) == (64, [])
    assert_identical(found, wanted)
    write(folder, 128, found, others)  # another group goes on
    assert_identical(folder.load_checkpoint(128), wanted)
    assert folder.checkpoints() == [64, 128]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), workers=st.integers(1, 8), buffers=st.integers(0, 5)
)
def test_shares_are_even_and_every_tensor_is_in_one(sizes, workers, buffers):
    whole = {"objective": {str(i): torch.zeros(size) for i, size in enumerate(sizes)}}
    first = {("objective", str(i)) for i in range(buffers)}
    old, shares.LEAST = shares.LEAST, 40
    try:
        parts = shares.divide(whole, workers, first)
    finally:
        shares.LEAST = old
    assert sorted(key for part in parts for key in part) == sorted(("objective", str(i)) for i in range(len(sizes)))
    assert len(parts) == max(1, min(workers, 4 * sum(sizes) // 40))
    assert first & set(shares.tensors_of(whole)) <= parts[0]  # rank 0's buffers are those of all
    loads = [sum(sizes[int(name)] for _, name in part) for part in parts]
    assert max(loads) - min(loads) <= max(max(sizes), sum(sizes[:buffers]))


def test_one_worker_or_a_small_state_is_one_file(folder):
    assert shares.share(state(1.0), 64, "5eed", 0, 8) is None
    assert shared(state(1.0), 64, 0, 1) is None
    write(folder, 64, state(1.0), 1)
    assert names(folder) == [f"{64:012d}.pt", "index.json"]


def test_a_checkpoint_counts_once_its_last_part_is_there_and_goes_with_all_of_them(folder):
    writers = [Checkpoints(folder, Keep(last=1), rank) for rank in range(3)]
    for seen in (64, 128):
        for rank in (0, 2, 1):
            now, facts = folder.checkpoints(), {} if rank else {"well": True}
            writers[rank].save(seen, state(seen), shared(state(seen), seen, rank, 3), **facts)
            time.sleep(0.05)
            assert rank == 1 or folder.checkpoints() == now
        for writer in reversed(writers):
            writer.wait()
        assert folder.checkpoints() == [seen]
        assert len(names(folder)) == 3 + 1 + 1  # parts, the file that counts, what is known of it
    assert read_facts(folder)[128] == {"well": True}
    writers[0].drop_after(64)
    assert names(folder) == ["index.json"]


def test_parts_of_another_attempt_or_of_another_state_are_none_of_a_checkpoint(folder):
    rank0, rank1 = (Checkpoints(folder, Keep(), rank) for rank in range(2))
    wider = state(64) | {"objective": state(64, 999)["objective"]}
    for token, other in (("1dea", state(64)), ("5eed", wider)):
        rank1.save(64, other, shared(other, 64, 1, 2, token))
    rank0.save(64, state(64), shared(state(64), 64, 0, 2))
    rank0.wait()
    rank1.wait()
    assert "2-of-2.part does not appear; do all nodes share the run's folder?" in rank0.trouble
    assert folder.checkpoints() == []
    write(folder, 128, state(128), 2)
    assert len(names(folder)) == 2 + 1 + 1  # nor do they stay


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["MARK"],))


def damage(folder: RunFolder, part: str, fault: str) -> None:
    content = bytearray(folder.read(part))
    if fault == "missing":
        folder.remove(part)
    elif fault == "cut":
        folder.write(part, bytes(content[: len(content) // 2]))
    elif fault == "bit":
        content[len(content) // 2] ^= 4
        folder.write(part, bytes(content))
    else:
        folder.write(part, pickle.dumps(Evil()))


@pytest.mark.parametrize("fault", ["missing", "cut", "bit", "evil"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_part_is_named_and_the_checkpoint_before_is_taken(folder, fault, rank, tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "executed"))
    for seen in (64, 128):
        write(folder, seen, state(seen), 2)
    part = shared(state(128), 128, rank, 2).file
    damage(folder, f"checkpoints/{part}", fault)
    seen, found, said = newest(folder)
    assert seen == 64
    assert_identical(found, state(64))
    assert len(said) == 1
    assert f"checkpoint 128: cannot be read (its part {part}" in said[0]
    assert folder.checkpoints() == [64]
    folder.tidy()
    assert sum(name.endswith(".damaged") for name in names(folder)) == (2 if fault == "missing" else 3)
    assert not (tmp_path / "executed").exists()
    folder.remove(f"checkpoints/{shared(state(64), 64, rank, 2).file}")
    with pytest.raises(UserError, match=r"every checkpoint is damaged.*its part \S+ is missing"):
        newest(folder)


def test_parts_at_a_remote_address_are_written_checked_and_removed():
    with s3("runs") as files:
        folder = RunFolder("s3://runs/one")
        for seen in (64, 128):
            write(folder, seen, state(seen), 3)
        assert_identical(folder.load_checkpoint(128), state(128))
        assert_identical(folder.load_state(f"checkpoints/{128:012d}.pt"), state(128))
        damage(folder, f"checkpoints/{shared(state(128), 128, 2, 3).file}", "bit")
        seen, found, said = newest(folder)
        assert (seen, len(said)) == (64, 1)
        assert "3-of-3.part: the checksum of " in said[0]
        assert_identical(found, state(64))
        folder.remove_checkpoint(64)
        files.invalidate_cache()
        assert [path for path in files.ls("runs/one/checkpoints", detail=False) if not path.endswith(".damaged")] == [
            "runs/one/checkpoints/index.json"
        ]
