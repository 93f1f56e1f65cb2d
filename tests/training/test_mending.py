"""Small files of a run folder that were damaged: made again, or named; a run goes on from them to the same weights."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import config as configuration
from pipeline import pretrain
from pipeline.errors import UserError
from pipeline.training import health
from pipeline.training.checkpoints import read_facts
from pipeline.training.health import Care
from pipeline.training.mending import mend
from pipeline.training.recorder import Recorder
from pipeline.training.run_folder import MetricsFile, RunFolder
from tests.chaos.local_faults import poisoned
from tests.chaos.runs import BATCH, Place, assert_identical, final

WORDS = ("--epochs", "4", "--checkpoint-every", "0.00001")
FILES = ("config.yaml", "checkpoints/index.json", "interventions.json", "metrics.jsonl", "mlflow_run_id",
         "summary.json", "mlflow.spool", "mlflow.evaluations")  # fmt: skip
DAMAGES = {
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "cut to a quarter": lambda content: content[: len(content) // 4],
    "cut to three quarters": lambda content: content[: 3 * len(content) // 4],
    "without its last bytes": lambda content: content[:-3],
    "with a bit turned": lambda content: _turned(content, 8 * (len(content) // 2) + 3),
}


def _turned(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def once():
    """One loss that is NaN, in the middle of a run and the first time only."""
    met = []
    return poisoned(lambda progress: progress >= 0.5 and not met and not met.append(progress))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A place with the run `whole`, and a copy of one like it that was stopped after its learning rate was halved."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, Place(folder) as place:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setitem(health.LADDERS, "nonfinite", ("lr",))
        with once():
            assert pretrain.main(place.words("whole", *WORDS)) == 0
        patch.setattr(Recorder, "asked_to_stop", lambda self: self.status.seen >= 18 * BATCH)
        with once():
            assert pretrain.main(place.words("one", *WORDS)) == 0
    run = folder / "runs" / "one"
    (run / "summary.json").write_text(json.dumps({"seconds": 1.0, "training_seconds": 2.0}))
    (run / "mlflow.spool").write_text(json.dumps({"metric": "loss", "value": 1.0, "time": 1, "step": 8}) + "\n")
    (run / "mlflow.evaluations").write_text("")
    return place, shutil.copytree(run, folder / "copy")


@pytest.fixture
def run(stopped):
    """That run's folder, as it was."""
    place, copy = stopped
    shutil.rmtree(place.folder / "runs" / "one", ignore_errors=True)
    return shutil.copytree(copy, place.folder / "runs" / "one")


def goes_on(stopped, run: Path, capfd) -> str:
    """Continue a run; its last weights are those of the one that was not stopped. What was said."""
    whole = final(stopped[0].folder / "runs" / "whole")
    capfd.readouterr()
    status = pretrain.main(["--resume", str(run), "--cache", str(stopped[0].folder / "cache")])
    said = capfd.readouterr()
    assert status == 0, said.err
    assert "Traceback" not in said.out + said.err
    for key in ("objective", "optimiser", "loader", "images_seen"):
        assert_identical(final(run)[key], whole[key])
    return said.out


def test_a_run_all_of_whose_small_files_were_zeroed_goes_on_to_the_same_weights(stopped, run, capfd):
    before = {name: (run / name).read_bytes() for name in FILES}
    for name, content in before.items():
        (run / name).write_bytes(bytes(len(content)))
    said = goes_on(stopped, run, capfd)
    for name in FILES[:6]:
        assert sum(line.startswith("warning: ") and str(run / name) in line for line in said.splitlines()) == 1, name
    for name in ("config.yaml", "checkpoints/index.json", "interventions.json"):
        assert (run / f"{name}.damaged").exists()
    assert (run / "interventions.json").read_bytes() == before["interventions.json"]
    assert configuration.of_run(str(run)) == configuration.read(before["config.yaml"].decode(), "before")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES[:7])
def test_a_run_with_a_damaged_small_file_goes_on_to_the_same_weights(stopped, run, capfd, name, damage):
    content = (run / name).read_bytes()
    (run / name).write_bytes(DAMAGES[damage](content))
    goes_on(stopped, run, capfd)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_wherever_a_small_file_is_damaged_what_matters_is_as_it_was(stopped, run, name, place, cut):
    shutil.rmtree(run)
    shutil.copytree(stopped[1], run)
    folder, path = RunFolder(str(run)), run / name
    facts, care, rows = read_facts(folder), Care.read(folder).done, MetricsFile.read(folder, until=10**9)
    config = configuration.of_run(str(run))
    content = path.read_bytes()
    if content:
        size = int(place * len(content))
        path.write_bytes(content[:size] if cut else _turned(content, int(place * 8 * len(content))))
    again = configuration.of_run(str(run))
    state, said = mend(folder)
    assert state["images_seen"] == 19 * BATCH
    assert all(line.startswith("warning: ") and str(run) in line for line in said)
    assert configuration.differences(config, again) == []
    assert Care.read(folder).done == care
    told = read_facts(folder)
    assert all(told[n]["well"] == facts[n]["well"] for n in folder.checkpoints())
    kept = MetricsFile.read(folder, until=10**9)
    if name != "metrics.jsonl":
        assert kept == rows
    elif cut and len(kept) < len(rows):
        assert kept == rows[: len(kept)]
        assert any(f"has no row between {kept[-1]['images'] if kept else 0:,} images" in line for line in said)


def test_what_cannot_be_made_again_is_named_with_the_way_out(tmp_path, capfd):
    with Place(tmp_path) as place:
        run = tmp_path / "runs" / "one"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(configuration.dump(configuration.Config(backbone="lenet5"))[:200])
        assert pretrain.main(["--resume", str(run)]) == 2
        assert pretrain.main(place.words("one")) == 2
        lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert f"{run}/config.yaml: has lost its end" in line
        assert "there is no checkpoint to take it from: begin anew with another --run" in line
    with pytest.raises(UserError):
        configuration.of_run(str(run))
