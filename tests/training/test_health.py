"""What counts as ill, when, and what is tried in turns."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives.views import VitalSign
from pipeline.training.health import COLLAPSED, LADDERS, PATIENCE, SPIKE_STEPS, Care, Health, Unwell
from pipeline.training.run_folder import RunFolder

SIGN = VitalSign("spread", 0.1, 1.0, "all images look the same to it")


def judged(losses, *, heal=True, **more) -> Health:
    health = Health((SIGN,), 8, heal=heal, **more)
    for i, loss in enumerate(losses):
        health.check({"loss": loss, "grad_norm": 1.0, "spread": 0.5}, 8 * (i + 1))
    return health


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_ill_at_once(name, value):
    health = judged([1.0] * 3, heal=False)
    with pytest.raises(Unwell) as found:
        health.check({"loss": 1.0, "grad_norm": 1.0, name: value}, 32)
    assert (found.value.cause, found.value.first, found.value.until) == ("nonfinite", 24, 32)
    assert f"is {value} at 32 images" in found.value.sentence


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 30.0]), noise=st.floats(0, 0.3))
def test_noise_a_slow_climb_and_single_bad_batches_are_healthy(seed, scale, noise):
    draw = random.Random(seed)
    losses = [scale * (1 + 0.002 * i + noise * draw.gauss(0, 1)) for i in range(300)]
    for i in range(70, 300, 40):
        losses[i] = 1000 * scale
    assert judged(losses).well or losses[-1] > 100 * scale


def test_a_loss_that_leaps_and_stays_is_ill_from_the_step_before():
    steady = [2.0 + 0.01 * (-1) ** i for i in range(120)]
    with pytest.raises(Unwell) as found:
        judged([*steady, *[5.0] * SPIKE_STEPS])
    assert found.value.cause == "spike"
    assert (found.value.first, found.value.until) == (8 * 119, 8 * (120 + SPIKE_STEPS))
    judged([*steady, *[5.0] * (SPIKE_STEPS - 1), 2.0, *[5.0] * (SPIKE_STEPS - 1)])
    judged([*steady, *[5.0] * 50], heal=False)


def test_a_vital_sign_is_spoken_of_and_later_means_collapse_but_not_in_the_warm_up():
    health = Health((SIGN,), 8, settled=8 * 100)
    row = {"loss": 1.0, "grad_norm": 1.0, "spread": 0.5}
    for step in range(1, 51):
        health.check(row, 8 * step)
    row["spread"] = 0.05
    for step in range(51, 100 + COLLAPSED):
        health.check(row, 8 * step)
        assert health.alarms == (["spread"] if step >= 50 + PATIENCE else [])
    with pytest.raises(Unwell) as found:
        health.check(row, 8 * (100 + COLLAPSED))
    assert (found.value.cause, found.value.first) == ("collapse", 8 * 100)
    assert found.value.until == 8 * (100 + COLLAPSED)
    assert SIGN.meaning in found.value.sentence
    assert health.messages == [f"warning: spread is 0.05, healthy is 0.1 to 1: {SIGN.meaning}"]
    assert not health.well


def test_a_sign_that_was_never_inside_is_spoken_of_only():
    health = Health((SIGN,), 8)
    for step in range(1, 500):
        health.check({"loss": 1.0, "grad_norm": 1.0, "spread": 0.05}, 8 * step)
    assert health.alarms == ["spread"]


def test_what_was_recorded_brings_a_judge_into_the_same_mind():
    rows = [{"images": 8 * i, "loss": 1.0 + 0.01 * (i % 5), "grad_norm": 1.0, "spread": 0.05 if i > 180 else 0.5}
            for i in range(1, 230)]  # fmt: skip
    straight, again = Health((SIGN,), 8), Health((SIGN,), 8)
    for row in rows:
        straight.check(row, row["images"])
    again.recall(rows)
    again.messages, straight.messages = [], []
    assert again == straight


def test_each_cause_has_its_ladder_which_begins_anew_after_a_healthy_checkpoint(tmp_path):
    care, folder = Care([]), RunFolder(str(tmp_path))
    ill = Unwell("nonfinite", 72, 80, "the loss is nan at 80 images")
    tried = [care.treat(ill, 64, half=True) for _ in range(4)]
    assert [one and one.change for one in tried] == [*LADDERS["nonfinite"], None]
    assert [one.begins for one in tried[:3]] == [72, 64, 64]
    assert care.skips(72)
    assert not care.skips(64)
    assert not care.skips(80)
    assert care.fp32_head(64)
    assert not care.fp32_head(56)
    assert (care.lr_scale(56), care.lr_scale(64)) == (1.0, 0.5)
    later = Unwell("nonfinite", 192, 200, "the loss is nan at 200 images")
    assert care.treat(later, 128, half=True).change == "skip"
    assert [one.change for one in (Care([]).treat(ill, 64, half=False),)] == ["skip"]
    care.write(folder)
    assert Care.read(folder).done == care.done
    assert "the batches of images 192 to 200 are skipped" in care.done[-1].line()


def test_interventions_are_bounded_over_a_whole_run():
    care, given_up = Care([]), False
    for i in range(100):
        given_up = care.treat(Unwell("spike", 100 * i + 50, 100 * i + 58, "…"), 100 * i + 8, half=False) is None
        if given_up:
            break
    assert given_up
    assert i == 10
