"""Pretraining's command line: what it asks for, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import asked, config
from pipeline.errors import UserError


def test_options_of_the_objective_are_set_on_the_command_line():
    filled = asked.parse(["--options.out-dim", "77", "--options.global-scale", "0.3", "0.9"])
    assert filled.options["out_dim"] == 77
    assert filled.options["global_scale"] == (0.3, 0.9)


def test_the_objective_left_open_is_dino_and_lejepa_on_generated_images(tmp_path):
    kept = tmp_path / "config.yaml"
    kept.write_text(config.dump(asked.parse(["--objective", "mae"])))
    for words, objective in (
        ([], "lejepa"),
        (["--data", "embedded"], "lejepa"),
        ([f"--data={tmp_path}"], "dino"),
        (["--objective", "dino"], "dino"),
        (["--config", str(kept)], "mae"),
    ):
        assert asked.parse(words).objective == objective


def test_a_teachers_address_holds_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for given, kept in (("run", str(tmp_path / "run")), ("s3://runs/a", "s3://runs/a"), ("random:lenet5",) * 2):
        parsed = asked.parse(["--objective", "distillation", "--options.teacher", given])
        assert parsed.options["teacher"] == kept


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--epoch", "3"], "did you mean --epochs"),
        (["--backbone", "vit_x16"], "vit_"),
        (["--objective", "dinno"], "did you mean dino"),
        (["--options.outdim", "5"], "did you mean --options.out-dim"),
        (["--data", "/nowhere/photos"], "/nowhere/photos"),
        (["--data", "embedded:hue"], "--data embedded:hue: the generated images are labelled by one of shape, texture"),
        (["--epochs", "0"], "at least 1"),
        (
            ["--image-size", "100"],
            "--image-size 100: is no multiple of the patch of vit_s16, 16 pixels; the nearest is 96",
        ),
        (["--backbone", "vit_small_patch14_dinov2.lvd142m", "--image-size", "3"], "14 pixels; the nearest is 14"),
        (["--lr", "-1"], "above 0"),
        (["--warmup", "5"], "share of the run"),
        (["--batch-size", "9", "--workers", "2"], "must divide"),
        (["--batch-size", "12", "--workers", "2..8"], "must divide by --workers 8"),
        (["--workers", "0"], "at least 1"),
        (["--workers", "8..2"], "the fewest come first, as in 2..8"),
        (["--workers", "2..many"], "the fewest and the most, as in 2..8"),
        (["--timeout", "0"], "above 0"),
        (["--workers", "2", "--engine", "local"], "use --engine ray"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: No such file"),
        (["--resume", "runs/nowhere"], "--resume runs/nowhere/config.yaml: No such file"),
        (["--objective", "distillation"], "--options.teacher: left open; name a run folder"),
        (["--objective", "distillation", "--options.teacher", "vit_x"], "vit_x: no such run folder or file, and"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_way_out(argv, sentence):
    with pytest.raises(UserError) as caught:
        asked.parse(argv)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_ends_with_status_2_before_torch_is_imported(tmp_path):
    program = (
        "import sys; from pipeline.pretrain import main; status = main(['--data', 'nowhere']); "
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"]
    assert done.stderr == "error: --data nowhere: no such file or folder\n"


def test_help_names_every_option_and_an_example_without_torch():
    program = (
        "import sys, contextlib\n"
        "from pipeline.pretrain import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("--backbone", "--objective", "--data", "--val-data", "--resume", "--options.sigreg-weight"):
        assert name in done.stdout
    assert "python -m pipeline.pretrain --backbone vit_s16" in done.stdout
    assert str(Path.home()) not in done.stdout
