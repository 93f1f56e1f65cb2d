"""What a comparison lacks is trained side by side on a cluster: how many at once, and what of those that fail."""

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline import cluster
from pipeline.data import preparation
from pipeline.report import candidates
from tests.chaos.cluster_faults import ROOT, Machines
from tests.pipeline.small_runs import draw

BACKBONES = ("lenet5", "resnet20", "vit_ti8", "alexnet")

TRAINER = """#!/bin/sh
# In place of Python: -m pipeline.pretrain --backbone NAME ...; lenet5 fails, two others wait for each other.
cd {folder}
echo "$RAY_ADDRESS" > "$4.begun"
trap 'echo > "$4.stopped"; exit 143' TERM
if [ "$4" = lenet5 ]; then echo "error: no lens" >&2; exit 2; fi
while [ -e hold ] || [ ! -e resnet20.begun ] || [ ! -e vit_ti8.begun ]; do sleep 0.1; done
"""


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pretended trainers leave their marks, on a pretended cluster with room for two."""
    (tmp_path / "photos").mkdir()
    script = tmp_path / "trainer"
    script.write_text(TRAINER.format(folder=tmp_path))
    script.chmod(0o755)
    monkeypatch.setattr(candidates.sys, "executable", str(script))
    monkeypatch.setattr(preparation, "prepare", lambda config: None)
    for name, value in (("join", True), ("side_by_side", 2), ("address", "head:1")):
        monkeypatch.setattr(cluster, name, lambda *words, value=value: value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(backbones: Sequence[str]) -> list[candidates.Candidate]:
    return candidates.asked(backbones, ["mae"], data="photos", storage="runs")


def test_as_many_train_at_once_as_there_is_room_for_and_one_that_fails_stops_no_other(
    trainer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match=r"^1 of 4 runs failed: runs/lenet5-mae-photos \(their logs are in runs/\)"):
        candidates.train_missing(asked(BACKBONES), storage="runs")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in said if "training begins" in line] == [
        f"runs/{name}-mae-photos:" for name in BACKBONES
    ]
    assert "runs/lenet5-mae-photos: ended with status 2: error: no lens" in said
    assert sum("trained in" in line for line in said) == 3
    begun = [i for i, line in enumerate(said) if "training begins" in line]
    over = [i for i, line in enumerate(said) if "training begins" not in line]
    assert begun[1] < over[0] < begun[2]
    assert over[1] < begun[3]  # never more than two
    assert (trainer / "alexnet.begun").read_text() == "head:1\n"


def test_ctrl_c_stops_those_that_train_and_begins_no_other(trainer: Path) -> None:
    (trainer / "hold").touch()

    def interrupt() -> None:
        while not all((trainer / f"{name}.begun").exists() for name in BACKBONES[1:3]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(RuntimeError, match=r"^runs/resnet20-\S+, runs/vit_ti8-\S+, runs/alexnet-\S+: was stopped; "):
        candidates.train_missing(asked(BACKBONES[1:]), storage="runs")
    assert sorted(path.name for path in trainer.glob("*.stopped")) == ["resnet20.stopped", "vit_ti8.stopped"]
    assert not (trainer / "alexnet.begun").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_missing_runs_are_trained_on_both_machines_of_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, storage = draw(tmp_path / "photos", 24), str(tmp_path / "runs")
    options = (
        f"--loader opencv --image-size 16 --batch-size 8 --epochs 1 --knn-every 0 --precision fp32 --cache {tmp_path} "
        "--options.decoder-width 16 --options.decoder-depth 1 --options.decoder-heads 2"
    )
    torn = tmp_path / "runs" / "lenet5-mae-photos" / "config.yaml"
    torn.parent.mkdir(parents=True)
    torn.write_text("backbone: [")
    machines = Machines(2, PYTHONPATH=f"{ROOT}:{ROOT / 'ssl'}")
    monkeypatch.setenv("RAY_ADDRESS", machines.cluster.address)
    backbones = ["lenet5", "resnet20", "vit_ti8"]
    wanted = candidates.asked(backbones, ["mae"], data=str(photos), storage=storage, options=options)
    try:
        with pytest.raises(RuntimeError, match=r"1 of 3 runs failed: \S+lenet5-mae-photos "):
            candidates.train_missing(wanted, storage=storage)
        said = capsys.readouterr().out
        assert said.index("vit_ti8-mae-photos: training begins") < said.index("trained in")
        for name in backbones[1:]:
            run = Path(storage, f"{name}-mae-photos")
            assert json.loads((run / "summary.json").read_text())["images_seen"] > 0
            assert "Ray Train, 1 worker on cpu, 1 core each" in run.with_suffix(".log").read_text()
        torn.unlink()
        candidates.train_missing(wanted, storage=storage)
        assert capsys.readouterr().out.count("trained already") == 2
        assert torn.with_name("summary.json").exists()
    finally:
        import ray

        ray.shutdown()
        machines.close()
