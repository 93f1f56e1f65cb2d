"""What is handed over to be judged: checkpoints inside of runs and out, and files that are none."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from backbones import exported
from pipeline import config as configuration
from pipeline import evaluate
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluation import judge
from pipeline.training import step

CONFIG = Config(
    backbone="lenet5", objective="mae", data="photos", image_size=16,
    options={"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
)  # fmt: skip


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """What a checkpoint of a run holds, as far as an evaluation needs it."""
    objective = step.build(CONFIG)
    return {"objective": objective.state_dict(), "config": configuration.dump(CONFIG), "images_seen": 24}


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


Change = Callable[[dict[str, Any]], bytes]
FOREIGN: dict[str, tuple[str, Change, str]] = {
    "weights of others": ("model.pth", lambda state: saved({"model": {}}), "model.pth: is none of ours"),
    "Lightning's": ("x.ckpt", lambda state: saved({"state_dict": {}}), "x.ckpt: is none of ours"),
    "no archive": ("x.bin", lambda state: b"GIF89a", "x.bin: cannot be read (File is not a zip file)"),
    "torn": ("torn.pt", lambda state: saved(state)[:9000], "torn.pt: cannot be read"),
    "a run's weights": (
        "backbone.safetensors", lambda state: exported.dump(step.build(CONFIG).backbone), "holds weights alone",
    ),
    "no count": ("x.pt", lambda state: saved({k: v for k, v in state.items() if k != "images_seen"}), "no images_seen"),
    "a dict": ("x.pt", lambda state: saved({**state, "config": {"lr": 1}}), "is no checkpoint of a run"),
    "a list": ("x.pt", lambda state: saved({**state, "objective": [1]}), "does not fit its own configuration"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["runs/one/checkpoints", "memory://foreign"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_checkpoint_of_ours_is_one_clear_sentence(
    kind: str, place: str, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    name, change, said = FOREIGN[kind]
    with fsspec.open(f"{place}/{name}", "wb", auto_mkdir=True) as file:
        file.write(change(state))
    assert evaluate.main([f"{place}/{name}"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("root", ["runs", "memory://kept"])
def test_a_checkpoint_of_any_name_is_of_the_run_around_it_or_stands_alone(
    root: str, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    of = str(tmp_path / root) if root == "runs" else root
    for name in ("one/checkpoints/000000000024.pt", "one/checkpoints/best.pth", "alone.pt"):
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(saved(state))
    for given, folder in (
        ("one", "one"),
        ("one/checkpoints/000000000024.pt", "one"),
        ("one/checkpoints/best.pth", "one"),
        ("alone.pt", "alone.pt.run"),
    ):
        found = judge.find(f"{root}/{given}")
        assert found.folder is not None
        assert (found.folder.address, found.seen, found.config) == (f"{of}/{folder}", 24, CONFIG)
    with pytest.raises(UserError, match=r"holds no checkpoint \(looked for .*two/checkpoints/\*\.pt\)"):
        judge.find(f"{root}/two")
