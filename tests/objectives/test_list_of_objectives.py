"""`python -m objectives` says what is true, and soon."""

import time
from pathlib import Path

import pytest
import torch
from every_objective import make, save_run, some_labels, some_views

import backbones
import objectives
from objectives.__main__ import MASKING, main


def test_it_lists_every_objective_within_seconds(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["objectives"])
    started = time.process_time()
    main()
    assert time.process_time() - started < 10
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for name in objectives.NAMES:
        kind = objectives.objective(name)
        assert kind.family.split()[0] in rows[name]
        assert kind.paper.split(",")[0] in rows[name]
        assert ("likewise" if kind.continues else MASKING[kind.masking]) in rows[name].split()
    assert "2 of 224x224, 0.4-1" in rows["dino"]
    assert "…" not in "".join(rows.values())


@pytest.mark.parametrize("name", objectives.NAMES)
def test_a_cnn_is_masked_as_the_objective_says(name: str, tmp_path: Path) -> None:
    kind, options = objectives.objective(name), {}
    torch.manual_seed(0)
    backbone = backbones.create("lenet5", image_size=64)
    if kind.continues:
        options["checkpoint"] = save_run(
            tmp_path, make("dino", backbones.create("lenet5", image_size=64), 64), "dino", 64
        )
    asked = set()
    backbone.register_forward_pre_hook(lambda _, args, named: asked.update(named), with_kwargs=True)
    objective = make(name, backbone, 64, **options)
    objective(some_views(objective, 8), 0.5, *some_labels(objective, 8))
    assert asked - {"layers"} == ({kind.masking} if kind.masking else set())
