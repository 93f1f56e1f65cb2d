"""What a process computes with."""

import pytest

from pipeline.device import threads_on


@pytest.mark.parametrize(
    ("asked", "threads"), [("", 4), ("2", 2), ("64", 4), ("0", 4), ("many", 4)], ids=lambda value: str(value) or "unset"
)
def test_as_many_threads_as_are_asked_for_on_the_cores_there_are(asked, threads, monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads_on(4) == threads


def test_what_ray_sets_for_a_jobs_driver_is_not_what_the_user_asks_for(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_on(4) == 4
