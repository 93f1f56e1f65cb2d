"""The words of a command line: what can be written, what help shows, and one sentence on every mistake."""

import subprocess
import sys
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal

import pytest
from tyro.conf import Positional

from jobs.entry_points import entry_points
from pipeline.arguments import option, read
from pipeline.errors import UserError
from tests.jobs.job_toys import ROOT, python

Group: Any = make_dataclass("Group", [("width", option(int | None, "How wide."), None)])


@dataclass(frozen=True)
class Arguments:
    """Do it."""

    run: Positional[str]
    """The run,
    in two lines."""
    data: str
    also: Positional[tuple[str, ...]] = ()
    """Others."""
    limit: int | None = None
    seeds: int = 1
    engine: Literal["ray", "local"] = "ray"
    names: tuple[str, ...] = ("a", "b")
    betas: tuple[float, float] | None = None
    debug: bool = False
    more: Any = field(default_factory=Group)


def given(*words: str) -> Arguments:
    got: Arguments = read(Arguments, [*words], "python -m it", instead={"more": Group})
    return got


def test_what_is_written_is_read() -> None:
    words = ("r", "x", "y", "--data=d", "--limit", "3", "--betas", "0.5", "1", "--no-debug", "--more.width", "7")
    expected = Arguments("r", "d", ("x", "y"), limit=3, betas=(0.5, 1.0), more=Group(7))
    assert given(*words, "--names", "a", "b") == expected
    assert given("r", "--data", "d") == Arguments("r", "d")


def test_a_word_that_may_be_left_out_stands_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    kind = make_dataclass("Kind", [("job", Positional[str | None], None)])
    assert (read(kind, [], "it").job, read(kind, ["a"], "it").job) == (None, "a")
    with pytest.raises(SystemExit):
        read(kind, ["--help"], "it")
    assert "it [-h] [JOB]" in capsys.readouterr().out


def test_help_shows_what_may_be_written_and_no_line_that_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        given("--help")
    assert not end.value.code
    shown = capsys.readouterr().out
    for words in ("RUN ", "ALSO ...", "The run, in two lines. (required)", "--limit INT", "--betas FLOAT FLOAT",
                  "--engine {ray,local}", "--more.width INT", "(default: a b)", "--debug, --no-debug"):  # fmt: skip
        assert words in shown
    assert "None" not in shown
    assert "(default: )" not in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("r --data d --limt 3", "--limt: no such option; did you mean --limit?"),
        ("r --data d --more.wdth=3", "--more.wdth: no such option; did you mean --more.width?"),
        ("r --data d --zzz", "--zzz: no such option; --help lists all options"),
        ("r --data d --limit three", "--limit three: is no value for it; python -m it --help says what there is"),
        ("r --data d --seeds x", "--seeds x: is no value for it"),
        ("r --data d --betas 1", "--betas 1: is no value for it"),
        ("r --data d --limit", "--limit: needs a value"),
        ("r --data d --engine rya", "--engine rya: is none of ray, local"),
        ("r", "--data: has to be given"),
        ("--data d", "RUN: has to be given"),
        ("r --data d -x", "-x: is not understood"),
    ],
)
def test_a_mistake_is_one_sentence(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        given(*words.split())
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


JOBS = [f"jobs.{name}" for name in ("submit", "list", "logs", "stop", "scheduler", "render", "run")]


@pytest.mark.parametrize("name", [*entry_points().values(), *JOBS])
def test_every_entry_point_says_a_mistake_in_one_line_and_ends_with_status_2(name: str) -> None:
    done = python("-m", name, "--debgu", cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "error: --debgu: no such option; did you mean --debug?\n"), name


def test_a_reader_that_has_enough_is_no_failure() -> None:
    words = [sys.executable, "-m", "jobs.list", "--help"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as listing:
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.close()
        assert listing.stderr.read() == b""
    assert listing.returncode == 141
