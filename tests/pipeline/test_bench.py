"""The bench: contenders measured each on its own under a time limit, a table, and the block of a file that takes it."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.bench import contender, measuring
from pipeline.bench.__main__ import BENCHES, main
from pipeline.bench.contender import Arguments, Bench, Contender, rate
from pipeline.bench.measuring import describe, draw_photographs, measured, table
from pipeline.blocks import around
from pipeline.data.beton import JPEG, BetonReader
from pipeline.errors import UserError

pytestmark = pytest.mark.timeout(150)
TWO = Bench("the job", {"a": Contender("the yardstick", None), "b": Contender("the other", None)})  # type: ignore[arg-type]
TEXT = "# Title\n<!-- bench:loader -->\nold\n<!-- /bench:loader -->\nthe end\n"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "photographs.beton"
    draw_photographs(path, images=12)
    return path


def test_a_rate_counts_what_is_done_after_the_first_batch():
    def batches():
        for _ in itertools.count():
            contender.time.sleep(0.01)
            yield 5

    assert 250 < rate(batches(), 0.2) <= 500


def test_the_table_gives_ratios_to_the_first_contender_and_reasons_for_gaps():
    text = table(TWO, {"a": [200.0, 150.0], "b": [1400.0, 1500.0]}, "here")
    assert "| the other | 1,500 | 7.50 |" in text
    assert text.endswith("here")
    assert "| the other | – (did not end) | – |" in table(TWO, {"a": [200.0], "b": "did not end"}, "")
    assert "| the other | 1,500 | – |" in table(TWO, {"a": "no module", "b": [1500.0]}, "")


def test_turns_are_compared_one_by_one():
    """The machine was twice as slow in the second: nothing of that is in the ratio."""
    turns = TWO._replace(by_turns=lambda _: {})
    text = table(turns, {"a": [200.0, 100.0, 300.0], "b": [199.0, 99.0, 300.0]}, "")
    assert "| the yardstick | 200 | 1.00 |" in text
    # The ratios are 0.995, 0.99 and 1, whose deviation is 0.005; t(0.975, 2) = 4.303
    assert "| the other | 199 | 0.995 (0.983 to 1.007) |" in text
    assert "| the other | 99 | 0.990 |" in table(turns, {"a": [100.0], "b": [99.0]}, "")


def test_of_seconds_the_fewest_are_the_best():
    text = table(TWO._replace(unit="s"), {"a": [2.0, 1.6], "b": [0.4, 0.5]}, "")
    assert "| the job | s | ratio |" in text
    assert "| the other | 0.40 | 0.25 |" in text


@pytest.mark.parametrize("name", BENCHES["start"].contenders)
def test_each_answer_has_its_status(name, tmp_path):
    contender = BENCHES["start"].contenders[name]
    assert 0 < contender.figure(tmp_path, Arguments("start")) < 100
    with pytest.raises(RuntimeError, match=f"status {contender.status}"):
        contender._replace(status=contender.status + 1).figure(tmp_path, Arguments("start"))


def test_rounds_go_forwards_and_backwards_by_turns_without_those_that_failed(monkeypatch):
    asked = []

    def measured(name, path, arguments, limit):
        asked.append((name, limit))
        return "did not end" if asked.count(("b", 9.0)) == 3 and name == "b" else float(len(asked))

    monkeypatch.setattr(measuring, "measured", measured)
    figures = measuring.rounds(TWO._replace(limit=9.0), Path(), Arguments("two", rounds=4))
    assert "".join(name for name, _ in asked) == "abbaaba"
    assert figures == {"a": [1.0, 4.0, 5.0, 7.0], "b": "did not end"}
    assert {limit for _, limit in asked} == {9.0}


def test_drawn_photographs_are_jpegs_of_usual_size(photographs):
    reader = BetonReader(photographs)
    assert len(reader) == 12
    assert (reader.metadata["mode"] == JPEG).all()
    assert 30_000 < reader.metadata["size"].mean() < 300_000
    assert "12 images" in describe(photographs)


@pytest.mark.parametrize("name", BENCHES["loader"].contenders)
def test_each_way_to_load_works(photographs, name):
    if name == "ffcv":
        pytest.importorskip("ffcv")
    batches = BENCHES["loader"].contenders[name].batches(photographs, Arguments("loader", batch_size=4, threads=1))
    assert [next(batches) for _ in range(5)] == [4] * 5
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BENCHES["photometric"].contenders)
def test_each_way_to_change_colours_works(photographs, name):
    if name == "kornia":
        pytest.importorskip("kornia")
    contender = BENCHES["photometric"].contenders[name]
    batches = contender.batches(photographs, Arguments("photometric", batch_size=1, threads=2))
    assert [next(batches) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("name", BENCHES["step"].contenders)
def test_each_training_step_works(photographs, name):
    if "lightly" in name:
        pytest.importorskip("lightly")
    batches = BENCHES["step"].contenders[name].batches(photographs, Arguments("step", batch_size=2, threads=1))
    assert [next(batches) for _ in range(2)] == [2, 2]


def test_the_block_of_a_file_is_replaced_and_nothing_else(photographs, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(TEXT)
    monkeypatch.setattr(measuring, "measured", lambda *_: 100.0)
    options = ["--data", str(photographs), "--rounds", "2", "--write", str(readme)]
    for _ in range(2):  # the second time over its own table
        assert main(["loader", *options]) == 0
        text = readme.read_text()
        assert text.startswith("# Title\n<!-- bench:loader -->\n| JPEG files")
        assert text.endswith("\n<!-- /bench:loader -->\nthe end\n")
        assert text.count("this loader with FFCV") == 1
        assert "old" not in text
        assert "cores" in text or "1 core" in text
    assert str(photographs.parent) not in text
    assert "1.00" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "<!-- bench:loader -->", "<!-- /bench:loader --> <!-- bench:loader -->"])
def test_a_file_without_markers_is_refused_before_measuring(tmp_path, text, monkeypatch, capsys):
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(measuring, "measured", lambda *_: pytest.fail("measured first"))
    assert main(["loader", "--write", str(tmp_path / "README.md")]) == 2
    assert "needs one line <!-- bench:loader -->" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be read"):
        around(tmp_path / "absent.md", "bench:loader")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["loadr"], "choose one of loader, photometric, step, engine, watcher, start"),
        (["loader", "--only", "dali"], "torchvision"),
    ],
)
def test_a_wrong_name_is_one_line(options, words, capsys):
    assert main(options) == 2
    assert words in capsys.readouterr().err


def test_a_contender_that_hangs_or_fails_leaves_a_gap(photographs, monkeypatch):
    arguments = Arguments("loader", seconds=0.1, batch_size=4)

    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(measuring.subprocess, "run", hangs)
    assert measured("ffcv", photographs, arguments) == "did not end"
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="error: FFCV is not here\n")
    monkeypatch.setattr(measuring.subprocess, "run", lambda *_, **__: failed)
    assert measured("ffcv", photographs, arguments) == "error: FFCV is not here"


def test_a_contender_in_a_process_of_its_own(photographs):
    figure = measured("opencv", photographs, Arguments("loader", seconds=0.3, batch_size=4, threads=1))
    assert isinstance(figure, float)
    assert figure > 0


def test_help_needs_no_torch():
    program = (
        "import sys; from pipeline.bench.__main__ import main\n"
        "try: main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "False" in done.stdout
