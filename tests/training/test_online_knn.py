"""The online k-NN of a run that is killed, stopped or healed is that of the undisturbed one, point by point."""

import json

import pytest

from pipeline.training.recorder import Recorder
from pipeline.training.run_folder import RunFolder
from tests.chaos.local_faults import poisoned
from tests.chaos.runs import BATCH, Place

EVERY_THIRD_STEP = ("--epochs", "4", "--knn-every", "0.5", "--keep", "100", "--checkpoint-every", "0.00001")


class Killed(Exception):
    """Ends the training between two steps."""


def points(run: RunFolder) -> list[tuple[int, float]]:
    rows = map(json.loads, run.read("metrics.jsonl").decode().splitlines())
    return [(row["images"], row["knn_online"]) for row in rows if "knn_online" in row]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def whole(place) -> list[tuple[int, float]]:
    found = points(place.train("whole", *EVERY_THIRD_STEP))
    assert [n for n, _ in found] == list(range(3 * BATCH, 24 * BATCH, 3 * BATCH))
    return found


@pytest.mark.parametrize("step", [8, 9])  # in between, and where a measurement was due
def test_a_run_that_is_stopped_goes_on_measuring_where_it_was_due(place, whole, step):
    place.train("stopped", *EVERY_THIRD_STEP, exchange=lambda status: status.seen >= (step - 1) * BATCH)
    assert points(place.train("stopped", *EVERY_THIRD_STEP)) == whole


def test_a_stop_ends_a_measurement_which_is_made_up_for_when_training_goes_on(place):
    stopped = place.train("stopped", *EVERY_THIRD_STEP, exchange=lambda status: status.seen >= 3 * BATCH)
    assert points(stopped) == []
    assert stopped.checkpoints()[-1] == 4 * BATCH
    again = points(place.train("stopped", *EVERY_THIRD_STEP))
    assert [n for n, _ in again] == [4 * BATCH, *range(6 * BATCH, 24 * BATCH, 3 * BATCH)]


def test_a_run_that_is_killed_measures_again_what_was_lost_and_no_more(place, whole):
    def kill(status):
        if status.seen >= 10 * BATCH:
            raise Killed
        return False

    with pytest.raises(Killed):
        place.train("killed", *EVERY_THIRD_STEP, exchange=kill)
    run = RunFolder(str(place.folder / "runs" / "killed"))
    for lost in run.checkpoints():
        if lost > 8 * BATCH:
            run.remove(f"checkpoints/{lost:012d}.pt")
    assert points(place.train("killed", *EVERY_THIRD_STEP)) == whole


def test_a_run_that_is_healed_measures_as_often(place, whole, monkeypatch):
    monkeypatch.setattr(Recorder, "checkpoint_due", lambda self: self.status.seen == 4 * BATCH)
    with poisoned(lambda progress: abs(progress - 10 / 24) < 1e-9):
        run = place.train("ill", *EVERY_THIRD_STEP)
    assert [n for n, _ in points(run)] == [n for n, _ in whole]
