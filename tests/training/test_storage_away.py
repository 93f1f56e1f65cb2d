"""A run folder that takes nothing for a while: training goes on, and what waits is written later."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import fsspec
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import pretrain
from pipeline.errors import UserError
from pipeline.training import storage
from pipeline.training.health import Health
from pipeline.training.recorder import Recorder
from pipeline.training.run_folder import MetricsFile, RunFolder
from pipeline.training.worker import Training
from tests.chaos.local_faults import poisoned
from tests.chaos.runs import BATCH, Place, assert_same_run
from tests.s3 import Server, s3


class Away(Exception):
    """What a client of some storage raises: no `OSError`."""


def test_metrics_wait_for_storage_that_does_not_answer(tmp_path, monkeypatch):
    flush, write, said = MetricsFile.flush, RunFolder.save_checkpoint, []
    seen = {"now": 0}

    def away() -> bool:
        return 4 * BATCH <= seen["now"] < 8 * BATCH

    def flush_or_fail(self):
        if away():
            raise Away("Could not connect to the endpoint URL")
        flush(self)

    def write_or_fail(self, images, state):
        if away():
            raise Away("Could not connect to the endpoint URL")
        return write(self, images, state)

    def exchange(status):
        seen["now"] = status.seen
        said.extend(status.messages)
        status.messages.clear()
        return False

    monkeypatch.setattr(MetricsFile, "flush", flush_or_fail)
    monkeypatch.setattr(RunFolder, "save_checkpoint", write_or_fail)
    run = Place(tmp_path).train("away", "--epochs", "2", "--checkpoint-every", "0.00001", exchange=exchange)
    rows = [json.loads(line)["images"] for line in run.read("metrics.jsonl").decode().splitlines()]
    assert rows == list(range(BATCH, 12 * BATCH + 1, BATCH))
    assert run.checkpoints()[-1] == 12 * BATCH
    assert sum("what was recorded could not be written (Could not connect" in line for line in said) == 1
    assert any("no checkpoint could be written" in line for line in said)
    assert "checkpoints can be written again" in said


def test_training_that_waits_for_its_metrics_to_be_written_says_how_long(tmp_path, monkeypatch):
    held, flush, complain = [], MetricsFile.flush, Recorder.complain
    monkeypatch.setattr(MetricsFile, "flush", lambda self: time.sleep(0.2) or flush(self))
    monkeypatch.setattr(Recorder, "complain", lambda self: held.append(self.checkpoints.held) or complain(self))
    Place(tmp_path).train("slow", "--epochs", "1")
    assert held[-1] >= 0.2


def test_a_run_falls_ill_on_a_full_disk_and_heals_there(tmp_path, monkeypatch):
    heal, replacing, said, full = Training.heal, RunFolder._replacing, [], []
    words = ("--epochs", "4", "--checkpoint-every", "0.00001")

    def ill(progress):
        return abs(progress - 0.5) < 1e-9

    with poisoned(ill):
        whole = Place(tmp_path).train("roomy", *words)

    def heal_on_a_full_disk(self, unwell):
        full.append(unwell)
        heal(self, unwell)

    def replace(target):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replacing(target)

    def exchange(status):
        said.extend(status.messages)
        status.messages.clear()
        if status.seen >= 18 * BATCH:
            full.clear()
        return False

    monkeypatch.setattr(Training, "heal", heal_on_a_full_disk)
    monkeypatch.setattr(RunFolder, "_replacing", staticmethod(replace))
    with poisoned(ill):
        run = Place(tmp_path).train("full", *words, exchange=exchange)
    assert_same_run(whole, run)
    assert run.read("interventions.json") == whole.read("interventions.json")
    assert sum("what was recorded could not be written ([Errno 28]" in line for line in said) == 1
    assert any("the batches of images 96 to 104 are skipped" in line for line in said)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """S3 on this machine, which gives up on it soon; what is kept here goes below the test's folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"max_attempts": 1}}})
    server = Server()
    with s3("runs", server=server):
        yield server


def hearing(server, said):
    """What a run calls every step: it notes what is said, and starts the server again once it is waited for."""

    def exchange(status):
        said.extend(status.messages)
        waited_for = any("does not answer" in line for line in status.messages)
        status.messages.clear()
        if waited_for:
            server.start()
        return False

    return exchange


def test_a_run_that_falls_ill_waits_for_storage_that_is_away_and_heals_from_there(tmp_path, monkeypatch, server):
    heal, said = Training.heal, []
    words = ("--epochs", "4", "--checkpoint-every", "0.00001")

    def ill(progress):
        return abs(progress - 0.5) < 1e-9

    with poisoned(ill):
        whole = Place(tmp_path).train("here", *words)

    def heal_without(self, unwell):
        self.checkpoints.settle()
        server.stop()
        heal(self, unwell)

    monkeypatch.setattr(Training, "heal", heal_without)
    with poisoned(ill):
        run = Place(tmp_path).train("s3://runs/away", *words, exchange=hearing(server, said))
    assert_same_run(whole, run)
    assert run.read("interventions.json") == whole.read("interventions.json")
    assert sum("s3://runs/away does not answer (" in line and "10 minutes at most" in line for line in said) == 1
    assert "s3://runs/away answers again" in said


def trying(rank: int, folder: str) -> None:
    """A rank of two; what only the second reads fails three times, then for ever, then for good reason."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meeting", 2), rank=rank, world_size=2)
    storage.PAUSE, calls, told = 0.01, [], []

    def read():
        calls.append(rank)
        if rank and len(calls) <= 3:
            raise Away("no route to host")
        return len(calls)

    def never():
        raise Away("gone")

    def mistaken():
        if rank:
            raise UserError("no run")

    tell = lambda *lines: told.extend(lines) if rank == 0 else None  # noqa: E731
    assert storage.patiently(read, RunFolder(folder), tell) == 4
    if rank == 0:
        first, last = told
        assert "does not answer (no route to host)" in first
        assert last.endswith("answers again")
    storage.PATIENCE = 0.05
    with pytest.raises(storage.StorageAway, match=r"does not answer \(.*--resume"):
        storage.patiently(never, RunFolder(folder), tell)
    with pytest.raises(UserError, match="no run"):
        storage.patiently(mistaken, RunFolder(folder), tell)
    Path(folder, f"through-{rank}").touch()
    dist.destroy_process_group()


def test_ranks_wait_together_for_what_only_one_of_them_cannot_read(tmp_path):
    mp.spawn(trying, (str(tmp_path),), nprocs=2)
    assert len(list(tmp_path.glob("through-*"))) == 2


def test_a_run_waits_for_storage_at_its_end(tmp_path, monkeypatch, server):
    finish, said = Training.finish, []
    whole = Place(tmp_path).train("here", "--epochs", "2")

    def finish_without(self):
        server.stop()
        return finish(self)

    monkeypatch.setattr(Training, "finish", finish_without)
    run = Place(tmp_path).train("s3://runs/end", "--epochs", "2", exchange=hearing(server, said))
    assert_same_run(whole, run)
    assert run.exists("backbone.safetensors")
    assert "s3://runs/end answers again" in said


@pytest.mark.parametrize("asked", [False, True], ids=["at the end", "asked to stop"])
def test_a_run_whose_storage_never_returns_is_kept_here_and_goes_on(tmp_path, monkeypatch, server, capsys, asked):
    monkeypatch.setattr(storage, "PATIENCE", 3600.0 if asked else 0.05)
    place, words = Place(tmp_path), ("--epochs", "3", "--workers", "1")
    whole = place.folder / "runs" / "whole"
    assert pretrain.main(place.words("whole", *words)) == 0
    check = Health.check

    def stop_then_check(self, row, seen):
        if seen == 10 * BATCH and server.port:
            server.stop()
            if asked:
                os.kill(os.getpid(), signal.SIGTERM)
        check(self, row, seen)

    monkeypatch.setattr(Health, "check", stop_then_check)
    capsys.readouterr()
    assert pretrain.main(place.words("s3://runs/gone", *words)) == (143 if asked else 1)
    said = capsys.readouterr()
    assert "s3://runs/gone does not answer (" in said.err
    seen = (11 if asked else 18) * BATCH
    kept = tmp_path / "home" / "ssl-runs" / f"gone-kept-at-{seen}"
    assert f"the run is kept in {kept} on " in said.out
    assert f"stopped with a checkpoint at {seen:,} images; this continues it:" in said.out
    assert f"--resume {kept}" in said.out
    monkeypatch.undo()
    assert pretrain.main(["--resume", str(kept), "--cache", str(place.folder / "cache")]) == 0
    assert_same_run(whole, kept)
    assert (kept / "summary.json").exists()
