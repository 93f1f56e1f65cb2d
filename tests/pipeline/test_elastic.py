"""A run whose workers and machines come, go, hang and break: nothing is trained twice, nothing is left out."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import asked
from pipeline import config as configuration
from pipeline.data import crops, preparation
from pipeline.training import worker
from pipeline.training.links import Links
from pipeline.training.run_folder import RunFolder
from tests.chaos import cluster_faults as faults

ROOT = Path(__file__).resolve().parents[2]
IMAGES, BATCH, EPOCHS = 101, 8, 4  # of the groups below; 8 does not divide by 3


def parts_of_a_run(rank: int, world: int, folder: Path, steps: int | None) -> None:
    """One rank of a group that trains until the end, or for so many steps, and writes down the images it is shown."""
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(str(folder / f"meet-{world}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    arguments = ["--data", str(folder / "photos"), "--cache", str(folder / "cache"), *faults.SMALL]
    arguments += ["--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--workers", "1..2", "--keep", "9"]
    config = asked.parse(arguments)
    train, _, _ = preparation.prepare(config)
    config = configuration.resolve(config, images=train.images, side=preparation.median_side(train))
    run = RunFolder(str(folder / "run"))
    if rank == 0:
        run.write("config.yaml", configuration.dump(config))
    shown = open(folder / f"shown-{world}-{rank}", "a")  # noqa: SIM115
    loader_of = worker.make_loader

    def watched(*words: Any, **options: Any) -> Any:
        loader = loader_of(*words, **options)
        inner = loader.__class__.__iter__

        class Watched(loader.__class__):
            def __iter__(self) -> Iterator[Any]:
                for batch in inner(self):
                    print(json.dumps([batch.epoch, batch.index.tolist()]), file=shown, flush=True)
                    yield batch

        loader.__class__ = Watched
        return loader

    worker.make_loader = watched
    statuses = iter(range(10**9))
    links = Links(lambda status: steps is not None and next(statuses) + 1 >= steps)
    worker.work(worker.Job(config, run.address, train, None, "cpu", 1), links)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.slow
def test_groups_of_any_size_share_out_each_epoch_once(tmp_path):
    faults.photos(tmp_path / "photos", IMAGES)
    groups = ((2, 5, 8), (3, 10, 6), (1, None, 8))  # workers, steps, images of a step: 3 do not divide 8
    last = 0
    for world, steps, size in groups:
        mp.spawn(parts_of_a_run, (world, tmp_path, steps), nprocs=world)
        rows = [json.loads(line)["images"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        own = [row for row in rows if row > last]
        assert own[:-1] == list(range(last + size, own[-1], size))
        assert steps is None or own[-1] == last + steps * size
        last = own[-1]
    assert last == EPOCHS * (IMAGES // BATCH) * BATCH  # whoever trains, a run is as long
    shown: dict[int, list[int]] = {}
    for path in tmp_path.glob("shown-*"):
        for epoch, indices in map(json.loads, path.read_text().splitlines()):
            shown.setdefault(epoch, []).extend(indices)
    for epoch, indices in shown.items():
        assert sorted(indices) == sorted(crops.epoch_order(IMAGES, 0, epoch)[: len(indices)].tolist())
        assert len(indices) > IMAGES - BATCH or epoch == max(shown)


@pytest.fixture(scope="module")
def survivor(tmp_path_factory) -> Iterator[tuple[faults.Run, dict[str, dict[str, Any]]]]:
    """A run that got over one fault after the other and was then stopped, and the row of each fault."""
    folder = tmp_path_factory.mktemp("survivor")
    with faults.running(folder, 2, "--workers", "1..2", "--timeout", "0.5") as (machines, run):
        rows = {fault.__name__: fault(machines, run) for fault in faults.ONE_AFTER_THE_OTHER}
        yield run, rows | {"stopped": faults.stopped(machines, run)}


WORDS = {
    "worker_killed": r"worker \d \(process \d+ on \S+\) was killed.*; training goes back",
    "out_of_memory": r"worker \d .* (ran out of memory|was killed|failed: ).*; training goes back",
    "machine_lost": r"worker \d .* (was lost with its machine|is gone: .*); training goes back",
    "machine_joins": "there is room for 2 workers: a checkpoint, and they go on",
    "worker_hangs": r"waited 0.5 minutes \(--timeout\) for one another: worker \d .* has given no sign of life",
    "machine_taken_away": r"the machine of worker \d will be taken away in \d+ s: a checkpoint, and others go on",
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", [fault.__name__ for fault in faults.ONE_AFTER_THE_OTHER])
def test_a_fault_is_named_and_got_over(survivor, fault):
    row = survivor[1][fault]
    assert re.search(WORDS[fault], row["said"])
    on = re.search(r"(\d) workers? go(?:es)? on from ([\d,]+) images after [\d.]+ s; (.*)", row["said"])
    assert int(on[1]) == (1 if fault in ("machine_lost", "machine_taken_away") else 2)
    lost = row["lost_images"]
    assert on[3] == (f"{lost:,} images are trained again" if lost else "nothing is lost")
    assert int(on[2].replace(",", "")) >= row["kept_images"]
    assert not lost or fault not in ("machine_joins", "machine_taken_away")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sigterm_leaves_a_checkpoint_of_the_last_step(survivor):
    row = survivor[1]["stopped"]
    assert (row["status"], row["lost_images"]) == (143, 0)
    assert f"python -m pipeline.pretrain --resume {survivor[0].folder}" in row["said"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_got_over_faults_learnt_what_an_undisturbed_one_does(survivor, tmp_path):
    run = survivor[0]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == list(range(faults.BATCH, rows[-1]["images"] + 1, faults.BATCH))
    state = RunFolder(str(run.folder)).load_checkpoint(run.checkpoints()[-1])
    assert state["loader"]["epoch"] * faults.IMAGES + state["loader"]["position"] == state["images_seen"]
    undisturbed = tmp_path / "undisturbed"
    alone = subprocess.Popen(
        [sys.executable, "-m", "pipeline.pretrain", "--data", str(run.folder.parent / "photos"), *faults.SMALL,
         "--cache", str(run.folder.parent / "cache"), "--storage", str(tmp_path), "--run", str(undisturbed),
         "--engine", "local"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}"}, stdout=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip
    path = undisturbed / "metrics.jsonl"
    try:
        while not path.exists() or len(path.read_text().splitlines()) < len(rows):
            assert alone.poll() is None
            time.sleep(0.2)
    finally:
        alone.kill()
        alone.wait()
    expected = [json.loads(line)["loss"] for line in path.read_text().splitlines()[: len(rows)]]
    losses = [row["loss"] for row in rows]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert not np.allclose(losses[1:], expected[:-1], rtol=1e-3)  # one step aside would show


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_of_fixed_size_leaves_a_checkpoint_in_time_and_the_same_command_goes_on(tmp_path):
    with faults.running(tmp_path, 2, "--workers", "2") as (machines, run):
        row = faults.too_few_left(machines, run)
        assert (row["status"], row["lost_images"]) == (75, 0)
        said = r"worker \d will be taken away in \d+ s: a checkpoint, and the run ends, whose 2 workers have room for 1"
        assert re.search(said, row["said"])
        kept = run.checkpoints()[-1]
        assert f"stopped with a checkpoint at {kept:,} images; this continues it:" in row["said"]
        machines.remove(machines.nodes[-1])
        machines.add()
        again = faults.Run(machines, run.folder, run.folder.parent / "photos", "--workers", "2")
        try:
            again.until("a step", lambda: run.images()[-1] > kept)
        finally:
            again.close()
    images = run.images()
    assert images == list(range(faults.BATCH, images[-1] + 1, faults.BATCH))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (faults.head_lost, "failed: the Ray cluster is gone: Ray no longer answers on the driver's machine"),
        (faults.head_silent, r"failed: the Ray cluster is gone: its head at \S+ has not answered for 30 s"),
        (
            faults.data_lost,
            r"(failed: .*train\.beton: the packed data set has changed since the run began; is its disk well\?"
            r"|error: .*train\.beton: was cut short while it was read .*)",
        ),
    ],
)
def test_what_no_group_gets_over_ends_with_the_way_to_go_on(tmp_path, fault, words):
    with faults.running(tmp_path, 2, "--workers", "2") as (machines, run):
        row = fault(machines, run)
    assert row["status"] == (2 if "error: " in row["said"] else 1)
    goes_on = re.escape(f" images is kept; this continues it: python -m pipeline.pretrain --resume {run.folder}")
    said = re.search(rf"{words}; the checkpoint at ([\d,]+){goes_on}", row["said"])
    assert said, row["said"]
    kept = int(said.groups()[-1].replace(",", ""))
    assert 0 < kept <= run.checkpoints()[-1], "workers without a head may get to the next one before they are gone"
