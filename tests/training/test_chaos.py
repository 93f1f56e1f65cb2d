"""Every fault of one process and its disk; `python -m tests.chaos` does the same and prints what each cost."""

import os
from collections.abc import Iterator

import pytest

from tests.chaos import local_faults as faults
from tests.chaos.runs import Place, Row


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Place]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Place(tmp_path) as place:
        yield place


@pytest.mark.parametrize(
    "fault",
    [
        faults.not_a_number, faults.infinite, faults.gradient_not_a_number, faults.never_a_number, faults.loss_spike,
        faults.collapse, faults.collapse_already_begun,
    ],
)  # fmt: skip
def test_a_run_that_falls_ill_heals_or_stops_with_all_kept(fault, place):
    assert isinstance(fault(place), Row)


def test_a_loader_that_dies_is_begun_anew_and_it_is_said(place):
    assert "warning: the loader failed (ThreadKilled)" in faults.loader_dies(place).said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "fault",
    [
        faults.torn, faults.bit, faults.object_store, faults.object_store_away,
        faults.killed_while_writing, faults.killed_at_random,
    ],
)  # fmt: skip
def test_it_is_survived_to_the_last_bit(fault, place):
    assert fault(place).lost >= 0


@pytest.mark.slow
def test_a_full_disk_is_survived(place):
    if os.geteuid() != 0:
        pytest.skip("a small disk to fill takes root")
    assert faults.full_disk(place).lost == 0
