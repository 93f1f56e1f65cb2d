"""What a run shows: one line with all that a person asks, live on a terminal, now and then in a log."""

import io
import re
import sys

import pytest

from pipeline.data.preparation import progress_bar
from pipeline.training import display
from pipeline.training.display import Display, Status

STATUS = Status(
    seen=500, planned=2000, epochs=4, images_per_second=60.0, data_wait=0.034, loss=5.4321,
    signs={"teacher_entropy": 0.88, "feature_spread": 0.012}, alarms=["feature_spread"], knn=(0.4567, 400),
)  # fmt: skip
LINE = (
    "epoch 1.0/4 · 60 images/s · 0:00:25 left · loss 5.4321 · k-NN 45.7% · waiting for data 3% · "
    "teacher_entropy 0.88 · feature_spread 0.01!"
)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_the_line_holds_speed_wait_loss_signs_accuracy_and_time_left():
    assert STATUS.line() == LINE
    assert Status(planned=2000, epochs=4).line() == "epoch 0.0/4"  # no step was taken yet


def test_a_log_gets_a_line_now_and_then_and_at_the_end(clock, capsys):
    shown = Display(every=20.0)
    for _ in range(100):
        shown.show(STATUS)
        clock[0] += 1.0
    shown.close(STATUS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[ 25%] {LINE}"
    assert len(lines) == len([0, 10, 30, 50, 70, 90]) + 1  # seconds, and the end


def test_a_log_gets_no_line_before_there_is_something_to_say(clock, capsys):
    Display().show(Status(planned=2000))
    assert capsys.readouterr().out == ""


def test_messages_are_said_once(capsys):
    shown, status = Display(), Status(messages=["warning: feature_spread"])
    shown.show(status)
    shown.show(status)
    assert capsys.readouterr().out == "warning: feature_spread\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())


def terminal_of(monkeypatch, columns: int) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    return terminal


def test_a_terminal_gets_one_live_line_and_messages_above_it(monkeypatch):
    terminal = terminal_of(monkeypatch, 200)
    monkeypatch.setattr(sys, "stdout", log := io.StringIO())
    shown = Display()
    shown.show(STATUS)
    shown.say("a checkpoint is damaged")
    shown.show(STATUS)
    shown.close(STATUS)
    assert "25% " + LINE in terminal.plain()
    assert terminal.plain().count("a checkpoint is damaged\n") == 1
    assert log.getvalue() == ""


def test_a_narrow_terminal_shows_the_foremost(monkeypatch):
    terminal = terminal_of(monkeypatch, 108)
    shown = Display()
    shown.show(STATUS)
    shown.close(STATUS)
    assert f" 25% {LINE[:81]}…" in terminal.plain()


def test_packing_has_a_bar_on_a_terminal_and_a_line_now_and_then_in_a_log(monkeypatch):
    terminal = terminal_of(monkeypatch, 200)
    for stream in (terminal, log := io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("packing", "files", every=0) as progress:
            progress(1_000, 4_000)
    assert "packing" in terminal.plain()
    assert "1000/4000 files" in terminal.plain()
    assert log.getvalue() == "packing: 1,000 of 4,000 files\n"
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with progress_bar("packing", "files") as progress:
        progress(1_000, 4_000)
    assert log.getvalue() == ""  # what is soon done needs no line
