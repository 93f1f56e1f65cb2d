"""A run folder that stops answering while a run trains: training goes on, and what waits is written later."""

import json

from pipeline.training.run_folder import MetricsFile, RunFolder
from tests.chaos.runs import BATCH, Place


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
    assert sum("metrics.jsonl could not be written (Could not connect" in line for line in said) == 1
    assert any("no checkpoint could be written" in line for line in said)
    assert "checkpoints can be written again" in said


def test_training_that_waits_for_its_metrics_to_be_written_says_how_long(tmp_path, monkeypatch):
    import time

    from pipeline.training.recorder import Recorder

    held, flush, complain = [], MetricsFile.flush, Recorder.complain
    monkeypatch.setattr(MetricsFile, "flush", lambda self: time.sleep(0.2) or flush(self))
    monkeypatch.setattr(Recorder, "complain", lambda self: held.append(self.checkpoints.held) or complain(self))
    Place(tmp_path).train("slow", "--epochs", "1")
    assert held[-1] >= 0.2
