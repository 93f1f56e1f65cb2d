"""Nightly pretraining on a folder that grows."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_toys import ROOT, TINY, photographs, python

from jobs import arrivals
from pipeline import asked, config
from pipeline.data.source import open_source
from pipeline.errors import UserError
from pipeline.training.run_folder import RunFolder


def firing(day: int) -> str:
    return f"2026010{day}T000000Z"


def prepared(tmp_path, day: int):
    argv = ["--data", str(tmp_path / "photos"), "--run", str(tmp_path / "runs" / f"night-{firing(day)}")]
    return arrivals.prepare(asked.parse(argv))


def finish(tmp_path, day: int) -> None:
    (tmp_path / "runs" / f"night-{firing(day)}" / "summary.json").write_text("{}")


def listed(configuration) -> list[tuple[str, str]]:
    text = Path(configuration.data).read_text().splitlines()[1:]
    return [tuple(line.split(",")[:2]) for line in text]


def test_each_firing_takes_what_no_finished_one_had(tmp_path, capsys):
    photographs(tmp_path / "photos", range(20))
    first = prepared(tmp_path, 1)
    assert len(listed(first)) == 20
    assert first.init is None
    assert {label for _, label in listed(first)} == {"r", "b"}

    photographs(tmp_path / "photos", range(20, 50))
    assert len(listed(prepared(tmp_path, 1))) == 20, "a second attempt at a firing takes the same images"
    assert len(listed(prepared(tmp_path, 2))) == 50, "the first one failed, so its images are still to come"
    finish(tmp_path, 2)

    assert prepared(tmp_path, 3) is None
    assert "0 images have arrived since night-20260102T000000Z, 50 were there" in capsys.readouterr().out
    photographs(tmp_path / "photos", range(50, 50 + arrivals.LEAST - 1))
    assert prepared(tmp_path, 4) is None, "too few wait"
    photographs(tmp_path / "photos", range(80, 90))
    fifth = prepared(tmp_path, 5)
    assert len(listed(fifth)) == arrivals.LEAST - 1 + 10
    assert fifth.init.endswith(f"night-{firing(2)}")


def cut_off(tmp_path, day: int, **facts: bool) -> None:
    state = {"objective": {}, "config": "", "facts": facts}
    RunFolder(f"{tmp_path}/runs/night-{firing(day)}").save_checkpoint(32, state)


def test_a_night_that_is_cut_off_is_begun_with_and_its_images_are_still_to_come(tmp_path, capsys):
    photographs(tmp_path / "photos", range(20))
    prepared(tmp_path, 1)
    cut_off(tmp_path, 1, well=True)
    photographs(tmp_path / "photos", range(20, 40))
    second = prepared(tmp_path, 2)
    assert second.init.endswith(f"night-{firing(1)}")
    assert len(listed(second)) == 40
    assert f"it begins with what night-{firing(1)} had learnt when it was cut off" in capsys.readouterr().out
    finish(tmp_path, 2)

    photographs(tmp_path / "photos", range(40, 60))
    third = prepared(tmp_path, 3)
    cut_off(tmp_path, 3, well=True)
    fourth = prepared(tmp_path, 4)
    assert (third.init[-16:], fourth.init[-16:]) == (firing(2), firing(3))
    assert len(listed(third)) == len(listed(fourth)) == 20
    cut_off(tmp_path, 4, well=False)
    fifth = prepared(tmp_path, 5)
    assert fifth.init.endswith(firing(3)), "the fourth had fallen ill"
    (tmp_path / "runs" / f"night-{firing(3)}" / "checkpoints" / "000000000032.pt").write_bytes(b"torn")
    assert prepared(tmp_path, 6).init.endswith(firing(2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_night_after_one_that_was_cut_off_goes_further(tmp_path):
    photographs(tmp_path / "photos", range(40))
    small = [f"--{word.replace('_', '-')}" for word in TINY if not word.startswith(("limit", "epochs"))]
    runs = [tmp_path / "runs" / f"night-{firing(day)}" for day in (1, 2)]
    words = ["-m", "jobs.arrivals", "--data", "photos", "--cache", "cache", *small]
    long = [*words, "--run", str(runs[0]), "--epochs", "100000", "--checkpoint-every", "0.02"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}"}
    with subprocess.Popen([sys.executable, *long], cwd=tmp_path, env=environment) as night:
        while not list(runs[0].glob("checkpoints/*.pt")):
            assert night.poll() is None
            time.sleep(0.2)
        night.terminate()
    done = python(*words, "--run", str(runs[1]), "--epochs", "1", cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 images have arrived" in done.stdout
    first, second = (json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"] for run in runs)
    assert second < first, "it begins where the first one was cut off"


def test_a_file_that_was_half_copied_arrives_whole_and_one_that_is_copied_again_does_not(tmp_path):
    photographs(tmp_path / "photos", range(20))
    whole = {path: path.read_bytes() for path in sorted((tmp_path / "photos").rglob("*.png"))}
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])
    photographs(tmp_path / "photos", range(20, 40))
    assert len(listed(prepared(tmp_path, 1))) == 40
    finish(tmp_path, 1)
    for path, content in whole.items():
        path.write_bytes(content)
    second = prepared(tmp_path, 2)
    assert {path for path, _ in listed(second)} == set(map(str, whole))
    finish(tmp_path, 2)
    for path, content in whole.items():
        path.write_bytes(content)
    assert prepared(tmp_path, 3) is None


def test_names_that_are_no_utf_8_arrive_too(tmp_path):
    photographs(tmp_path / "photos", range(20))
    odd = os.fsencode(tmp_path / "photos") + b"/caf\xe9.png"
    shutil.copy(next((tmp_path / "photos").rglob("*.png")), odd)
    first = prepared(tmp_path, 1)
    assert os.fsdecode(odd) in {item.key for item in open_source(first.data).items}
    finish(tmp_path, 1)
    assert prepared(tmp_path, 2) is None


def test_an_attempt_at_a_firing_begins_with_the_run_that_the_one_before_began_with(tmp_path):
    photographs(tmp_path / "photos", range(20))
    prepared(tmp_path, 1)
    finish(tmp_path, 1)
    photographs(tmp_path / "photos", range(20, 40))
    prepared(tmp_path, 2)
    photographs(tmp_path / "photos", range(40, 60))
    third = prepared(tmp_path, 3)
    (Path(third.data).parent.parent / "config.yaml").write_text(config.sealed(third))
    finish(tmp_path, 2)
    assert prepared(tmp_path, 3) == third
    assert third.init.endswith(f"night-{firing(1)}")


def test_other_jobs_and_cells_are_not_its_own(tmp_path):
    photographs(tmp_path / "photos", range(20))
    for name in (f"night-{firing(1)}-lenet5", f"tonight-{firing(1)}", f"night-{firing(3)}"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text("{}")
    assert prepared(tmp_path, 2).init is None


def test_what_it_cannot_do_is_said(tmp_path):
    with pytest.raises(UserError, match="must hold the firing"):
        arrivals.prepare(asked.parse(["--run", "runs/mine"]))
    (tmp_path / "a.csv").write_text("path\nx.png\n")
    argv = ["--data", str(tmp_path / "a.csv"), "--run", str(tmp_path / f"n-{firing(1)}")]
    with pytest.raises(UserError, match="is no folder of images"):
        arrivals.prepare(asked.parse(argv))


@pytest.mark.slow
def test_three_nights_on_a_folder_that_grows(tmp_path):
    job = f"run: arrivals\narguments: {{data: photos, storage: {tmp_path}/runs}}\n"
    (tmp_path / "night.yaml").write_text(job)
    said = []
    for day in (1, 2, 3):
        photographs(tmp_path / "photos", range(40 * day))
        words = [
            "night.yaml",
            "--firing",
            firing(day),
            "--set",
            *(word for word in TINY if not word.startswith("limit")),
        ]
        done = python("-m", "jobs.run", *words, cwd=tmp_path, timeout=280, HOME=str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(json.loads((tmp_path / "runs" / f"night-{firing(day)}" / "summary.json").read_text()))
        assert f"{40:,} images have arrived" in done.stdout
    rows = [(tmp_path / "runs" / f"night-{firing(day)}" / "metrics.jsonl").read_text().splitlines() for day in (1, 2)]
    first = [json.loads(lines[0])["loss"] for lines in rows]
    assert first[1] < first[0], "the second night begins where the first one ended"
    (tmp_path / "night.yaml").write_text(job + 'after: [{run: evaluate, arguments: {run: "{run}"}}]\n')
    words = ["night.yaml", "--firing", firing(4), "--in-place", "--set", *TINY]
    quiet = python("-m", "jobs.run", *words, cwd=tmp_path, timeout=280, HOME=str(tmp_path))
    assert quiet.returncode == 0
    assert "they wait for the next firing" in quiet.stdout
    assert "pipeline.evaluate" not in quiet.stdout, "there is nothing to evaluate"
    assert all(0 <= summary["knn_top1"] <= 1 for summary in said)
