"""The packed images fail under a run that trains on them."""

import os
import time
from pathlib import Path

from tests.chaos.runs import Place, Row
from tests.chaos.tracking_faults import FOREVER, Run, Server, until

SLOW = """
import time
from pipeline.data.opencv_loader import OpenCVCutter
cut = OpenCVCutter.cut
def slowly(*step):
    time.sleep(float(open({path!r}).read()))
    return cut(*step)
OpenCVCutter.cut = slowly
"""


def _training(place: Place, *words: str, first: str = "") -> tuple[Run, Path]:
    """A run that trains, with a checkpoint and without an MLflow server, and its .beton."""
    run = Run(place, Server(place.folder / "server"))
    run.server.uri = run.server.store
    run.begin(*FOREVER, "--checkpoint-every", "0.02", *words, first=first)
    until(lambda: list(run.folder.glob("checkpoints/*.pt")) and run.trained(20), "a checkpoint and 20 steps")
    (beton,) = run.cache.glob("*/train.beton")
    return run, beton


def cut_short(place: Place) -> Row:
    """The packed file is truncated to half while it is trained on, then the run is continued."""
    run, beton = _training(place)
    try:
        os.truncate(beton, beton.stat().st_size // 2)
        begun = time.monotonic()
        status = run.end()
        said = run.said("error:|failed:|Fatal")
        assert status in (1, 2), run.said()
        assert "was cut short while it was read" in said, run.said()
        lost = run.rows()[-1]["images"] - max(int(path.stem) for path in run.folder.glob("checkpoints/*.pt"))
        before = len(run.rows())
        run.begin("--resume", str(run.folder))
        done = until(lambda: run.trained(before + 1), "training beyond where it stopped")
        assert run.stop() == 143, run.said()
    finally:
        run.process and run.process.kill()
    return Row("The packed images are cut short", "truncate to half while training", lost, done - begun, said)


def removed(place: Place) -> Row:
    """The packed file is deleted while it is trained on: what is open stays readable."""
    run, beton = _training(place)
    try:
        beton.unlink()
        before = len(run.rows())
        until(lambda: run.trained(before + 20), "20 more steps")
        assert run.stop() == 143, run.said()
        run.begin("--resume", str(run.folder))
        until(lambda: run.trained(before + 60), "steps of the continued run")
        assert run.stop() == 143, run.said()
        assert beton.exists()
    finally:
        run.process and run.process.kill()
    return Row("The packed images are deleted", "rm while training", 0, None, run.said("error") or "nothing")


def slow(place: Place) -> Row:
    """Reading a batch takes a tenth of a second, then a quarter of a minute, then nothing again: training goes on."""
    seconds = place.folder / "seconds"
    seconds.write_text("0")
    run, beton = _training(place, "--timeout", "0.1", first=SLOW.format(path=str(seconds)))
    try:
        seconds.write_text("0.1")
        until(lambda: run.said(r"waiting for data (6|7|8|9|10)\d%"), "the wait shown")
        seconds.write_text("15")
        until(lambda: run.said("no batch has come from"), "the file named")
        assert str(beton) in run.said("no batch has come from"), run.said()
        seconds.write_text("0")
        before = len(run.rows())
        until(lambda: run.trained(before + 50), "50 more steps")
        assert run.stop() == 143, run.said()
    finally:
        run.process and run.process.kill()
    said = run.said(r"waiting for data (6|7|8|9|10)\d%|no batch has come").splitlines()
    injected = "0.1 s for each batch, then 15 s for one, with --timeout 0.1"
    return Row("The data disk is slow, then stuck for a while", injected, 0, None, "\n".join(said[:2]))


FAULTS = (cut_short, removed, slow)
