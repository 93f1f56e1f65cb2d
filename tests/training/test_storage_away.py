"""A run folder that takes nothing for a while: training goes on, and what waits is written later."""

import errno
import json
import os
import time

from pipeline.training.recorder import Recorder
from pipeline.training.run_folder import MetricsFile, RunFolder
from pipeline.training.worker import Training
from tests.chaos.local_faults import poisoned
from tests.chaos.runs import BATCH, Place, assert_same_run


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
