"""Whole runs through the command line, in this process: what they leave, how they end, and that they resume exactly."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import backbones
from backbones import exported
from pipeline import evaluate, pretrain
from pipeline.data.beton import BetonReader, BetonWriter
from pipeline.evaluation.images import batches, evaluation_view
from pipeline.training.conclusion import few_cells, usage
from pipeline.training.run_folder import HELD, WRITING, RunFolder

SMALL = [
    *("--engine", "local", "--loader", "opencv", "--image-size", "16", "--batch-size", "8", "--knn-every", "0"),
    *("--precision", "fp32"),
]
DINO = [
    "--options.local-views",
    "1",
    "--options.local-size",
    "8",
    "--options.out-dim",
    "16",
    "--options.hidden-dim",
    "16",
]
MAE = [
    "--objective",
    "mae",
    "--options.decoder-width",
    "16",
    "--options.decoder-depth",
    "1",
    "--options.decoder-heads",
    "2",
]


MOCO = [
    *("--objective", "moco_v2", "--options.hidden-dim", "16", "--options.out-dim", "8", "--options.queue-size", "24"),
]
SWAV = [
    *("--objective", "swav", "--options.local-views", "1", "--options.local-size", "8", "--options.hidden-dim", "16"),
    *("--options.out-dim", "8", "--options.prototypes", "4", "--options.queue-size", "24"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of 24 small images each, one reddish and one bluish, and a broken file."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(48):
        pixels = generator.integers(0, 120, (20, 24, 3), np.uint8)
        pixels[..., 2 * (i % 2)] += 120
        (folder / "rb"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "rb"[i % 2] / f"{i}.png")
    (folder / "r" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    return folder


@pytest.fixture
def command(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    common = [
        "--data",
        str(photos),
        "--cache",
        str(photos.parent / "cache"),
        "--storage",
        str(tmp_path / "runs"),
        *SMALL,
    ]
    return lambda *words: [*common, *words]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["images"], row["loss"]) for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


@pytest.mark.parametrize(
    ("backbone", "objective"), [("lenet5", DINO), ("vit_ti8", DINO), ("resnet20", MAE), ("vit_ti4", MAE)]
)
def test_a_run_leaves_all_that_is_promised(command, tmp_path, capsys, backbone, objective):
    run = tmp_path / "runs" / "one"
    assert pretrain.main(command("--backbone", backbone, "--epochs", "2", "--run", str(run), *objective)) == 0
    summary = json.loads((run / "summary.json").read_text())
    promised = {
        *("backbone", "objective", "images_seen", "images_per_second", "data_wait", "loss_first", "loss_last"),
        *("knn_top1", "linear_top1", "untrained", "pixels", "rejected", "mlflow_run_id", "checkpoint", "config"),
        *("versions", "device", "seconds", "duplicates"),
    }
    assert promised <= set(summary)
    assert summary["backbone"] == backbone
    assert summary["images_seen"] == losses(run)[-1][0] == 2 * (summary["images_seen"] // 2)
    assert summary["rejected"] == 1
    assert "broken.jpg" in (run / "rejected.csv").read_text()
    assert Path(summary["checkpoint"]).exists()
    assert 0 <= summary["knn_top1"] <= 1
    assert 0 <= summary["untrained"]["linear_top1"] <= 1
    assert 0.9 <= summary["pixels"]["knn_top1"] <= 1
    said = capsys.readouterr().out
    for word in ("raw pixels", "images/s", str(run), "mlflow ui", "python -m pipeline.evaluate"):
        assert word in said

    import mlflow

    store = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    kept = store.get_run(summary["mlflow_run_id"])
    assert kept.info.status == "FINISHED"
    assert kept.data.metrics["knn_top1"] == pytest.approx(summary["knn_top1"])
    assert [m.step for m in store.get_metric_history(kept.info.run_id, "loss")] == [i for i, _ in losses(run)]
    assert kept.data.metrics["rejected"] == 1
    assert kept.data.metrics["peak_memory"] == summary["peak_memory"] > 50_000_000  # torch alone is larger
    assert {"config.yaml", "rejected.csv", "summary.json"} <= {f.path for f in store.list_artifacts(kept.info.run_id)}
    assert kept.inputs.dataset_inputs[0].dataset.digest

    asked, local = ("knn", "linear", "retrieval", "label_free"), ("--engine", "local")
    assert evaluate.main([str(run), "--cache", str(tmp_path / "cache"), *local, "--protocols", *asked]) == 0
    said = capsys.readouterr().out
    assert all(row in said for row in ("k-NN ", "linear ", "retrieval mAP", "RankMe")), said
    again = json.loads((run / "summary.json").read_text())["evaluations"]
    assert next(iter(again.values()))["knn_top1"] == pytest.approx(summary["knn_top1"])
    children = store.search_runs([kept.info.experiment_id], f"tags.mlflow.parentRunId = '{kept.info.run_id}'")
    assert {child.data.tags["protocol"] for child in children} == set(asked)


def test_a_run_begins_with_ten_lines_and_the_lines_that_it_ends_with_work(command, tmp_path, capsys):
    run = tmp_path / "runs" / "one"
    assert pretrain.main(command("--backbone", "vit_ti8", "--epochs", "1", "--run", str(run), *DINO)) == 0
    said = capsys.readouterr().out
    assert len(said[: said.index("[")].splitlines()) <= 10  # to the first line of progress
    line = next(line for line in said.splitlines() if line.startswith("evaluate "))
    assert shlex.split(line)[1:4] == ["python", "-m", "pipeline.evaluate"]
    assert evaluate.main([*shlex.split(line)[4:], "--engine", "local", "--cache", str(tmp_path / "cache")]) == 0
    line = next(line for line in said.splitlines() if line.startswith("load "))
    names: dict = {}
    exec(line.removeprefix("load").strip(), names)
    import torch

    state = RunFolder(str(run)).load_checkpoint(RunFolder(str(run)).checkpoints()[-1])["objective"]
    trained = {k.removeprefix("teacher.network.backbone."): v for k, v in state.items()}
    for name, value in names["backbone"].state_dict().items():
        torch.testing.assert_close(value, trained[name])


@pytest.mark.parametrize("objective", [DINO, MAE, MOCO, SWAV], ids=["dino", "mae", "moco_v2", "swav"])
def test_a_killed_run_resumes_to_the_last_bit(command, tmp_path, objective):
    words = ["--backbone", "resnet20", "--epochs", "4", *objective]
    assert pretrain.main(command(*words, "--run", str(tmp_path / "runs" / "whole"))) == 0
    whole = losses(tmp_path / "runs" / "whole")

    broken = tmp_path / "runs" / "broken"
    program = [sys.executable, "-m", "pipeline.pretrain", *command(*words, "--run", str(broken))]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'ssl'}"}
    process = subprocess.Popen(
        [*program, "--checkpoint-every", "0.005"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(RunFolder(str(broken)).checkpoints()) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert pretrain.main(["--resume", broken.as_uri()]) == 0  # an address, and all else by its config.yaml
    assert losses(broken) == whole
    final = [RunFolder(str(tmp_path / "runs" / name)) for name in ("whole", "broken")]
    import torch

    one, two = (folder.load_checkpoint(folder.checkpoints()[-1])["objective"] for folder in final)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_saves_and_says_how_to_go_on(command, tmp_path, number, status):
    run = tmp_path / "runs" / "stopped"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'ssl'}"}
    words = command("--backbone", "lenet5", "--epochs", "100000", "--run", str(run), *DINO)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.pretrain", *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == status
    assert f"python -m pipeline.pretrain --resume {run}" in said
    assert len(RunFolder(str(run)).checkpoints()) == 1

    import mlflow

    store = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    assert store.get_run((run / "mlflow_run_id").read_text()).info.status == "KILLED"


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(command, tmp_path, capsys):
    run = str(tmp_path / "runs" / "one")
    assert pretrain.main(command("--backbone", "lenet5", "--epochs", "1", "--run", run, *DINO)) == 0
    assert pretrain.main(command("--backbone", "lenet5", "--epochs", "2", "--run", run, *DINO)) == 2
    assert "--epochs 1 → 2" in capsys.readouterr().err


def test_a_finished_run_stays_as_it_is_when_it_is_continued(command, tmp_path, capsys):
    run = tmp_path / "runs" / "one"
    words = command("--backbone", "lenet5", "--epochs", "1", "--run", str(run), *MAE)
    assert pretrain.main(words) == 0
    before, lines = json.loads((run / "summary.json").read_text()), losses(run)
    assert pretrain.main(words) == 0
    assert json.loads((run / "summary.json").read_text()) == before
    assert losses(run) == lines
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("backbone", "size", "said"),
    [
        ("vit_s16", 32, " (2 x 2 cells of 16 pixels; vit_s4 sees 8 x 8)"),
        ("vit_ti14", 28, " (2 x 2 cells of 14 pixels; vit_ti2 sees 14 x 14)"),
        ("vit_s16", 64, ""),
        ("resnet18", 32, ""),
    ],
)
def test_a_vit_that_sees_few_cells_is_told_which_one_sees_more(backbone, size, said):
    assert few_cells(backbone, size) == said


def test_a_run_that_somebody_trains_is_left_alone(command, tmp_path, capsys):
    """As where a connexion was lost, and with it the sight of a run that goes on."""
    run = tmp_path / "runs" / "one"
    words = command("--backbone", "lenet5", "--epochs", "1", "--run", str(run), *MAE)
    half = run / "checkpoints" / f"{WRITING}half"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"a checkpoint, as far as it is written")
    with RunFolder(str(run)).held():
        assert pretrain.main(words) == 2
    assert f"{run}: process {os.getpid()} on " in capsys.readouterr().err
    assert [file.name for file in run.rglob("*") if file.is_file()] == [HELD, half.name]
    assert pretrain.main(words) == 0
    assert not half.exists()


def test_a_failed_start_stands_in_the_way_of_nothing(command, tmp_path, capsys):
    run = tmp_path / "runs" / "one"
    words = command("--backbone", "lenet5", "--epochs", "1", "--run", str(run), *MAE)
    assert pretrain.main([*words, "--options.mask-ratio", "0.999"]) == 2
    assert "MAE cannot mask 100% of 16 cell(s)" in capsys.readouterr().err
    failed = (run / "mlflow_run_id").read_text()
    assert pretrain.main(words) == 0
    assert json.loads((run / "summary.json").read_text())["images_seen"] == losses(run)[-1][0]
    assert (run / "mlflow_run_id").read_text() != failed


def test_the_same_seed_gives_the_same_losses_and_another_does_not(command, tmp_path):
    found = []
    for name, seed in (("one", "3"), ("two", "3"), ("three", "4")):
        run = tmp_path / "runs" / name
        assert (
            pretrain.main(command("--backbone", "lenet5", "--epochs", "1", "--seed", seed, "--run", str(run), *MAE))
            == 0
        )
        found.append(losses(run))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_batch_larger_than_the_data_is_made_to_fit_and_said(command, tmp_path, capsys):
    words = command("--backbone", "lenet5", "--epochs", "1", "--run", str(tmp_path / "runs" / "one"), *DINO)
    words[words.index("--batch-size") + 1] = "512"
    assert pretrain.main(words) == 0
    images = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())["images_seen"]
    assert f"--batch-size 512 does not fit {images} training images: {images} is used" in capsys.readouterr().out


def test_a_batch_that_an_objective_cannot_learn_from_is_one_line(command, tmp_path, capsys):
    asked = ("--objective", "simclr", "--backbone", "lenet5", "--limit", "1", "--run", str(tmp_path / "runs" / "one"))
    assert pretrain.main(command(*asked)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == "error: --batch-size 1: SimCLR contrasts images with each other, a batch of 1 has no other; take at least 2"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--engine", "ray", "--workers", "2"), "1 image is too few for --workers 2 and --accumulate 1"),
        (("--engine", "ray", "--workers", "1..4"), "1 image is too few for --workers 1..4 and --accumulate 1"),
        (("--accumulate", "2"), "1 image is too few for --workers 1 and --accumulate 2"),
    ],
)
def test_too_few_images_are_one_line_before_anything_begins(command, tmp_path, capsys, words, sentence):
    run = tmp_path / "runs" / "one"
    assert pretrain.main(command("--backbone", "lenet5", "--limit", "1", "--run", str(run), *DINO, *words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not run.exists()


def test_images_that_cannot_be_decoded_are_told_and_counted(command, tmp_path, capsys):
    beton, generator = tmp_path / "photos.beton", np.random.default_rng(2)
    with BetonWriter(beton, 24) as writer:
        for _ in range(24):
            _, jpeg = cv2.imencode(".jpg", generator.integers(0, 255, (20, 24, 3), np.uint8))
            writer.write(jpeg.tobytes(), size=(20, 24))
    record = BetonReader(beton).metadata[5]
    with beton.open("r+b") as file:
        file.seek(int(record["data_ptr"]))
        file.write(bytes(int(record["size"])))
    words = command("--backbone", "lenet5", "--epochs", "2", *DINO, "--run", str(tmp_path / "runs" / "one"))
    words[words.index("--data") + 1] = str(beton)
    assert pretrain.main(words) == 0
    assert capsys.readouterr().out.count("cannot be decoded, and is seen black") == 1
    assert json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())["decode_errors"] == 2
    assert sum(len(batch.index) for batch in batches(beton, [evaluation_view(16)], 8)) == 24
    assert f"warning: 1 image of {beton} cannot be decoded" in capsys.readouterr().out


def test_a_run_without_labels_measures_nothing_and_says_so(command, tmp_path):
    generator = np.random.default_rng(1)
    (tmp_path / "flat").mkdir()
    for i in range(16):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    words = command("--backbone", "lenet5", "--epochs", "1", *DINO, "--run", str(tmp_path / "runs" / "flat"))
    words[words.index("--data") + 1] = str(tmp_path / "flat")
    assert pretrain.main(words) == 0
    summary = json.loads((tmp_path / "runs" / "flat" / "summary.json").read_text())
    assert summary["knn_top1"] is None
    assert summary["untrained"]["linear_top1"] is None


def test_evaluating_what_is_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    assert evaluate.main([str(tmp_path / "nothing")]) == 2
    assert evaluate.main([str(tmp_path / "foreign.pt")]) == 2
    assert evaluate.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_the_lines_that_load_a_backbone_can_be_pasted(tmp_path):
    torch.manual_seed(0)
    backbone, images = backbones.create("resnet18", image_size=96).eval(), torch.randn(2, 3, 96, 96)
    folder = RunFolder(str(tmp_path / "a run's"))
    folder.write("backbone.safetensors", exported.dump(backbone))
    lines = usage(folder, exported.in_timm(backbone)).splitlines()
    here: dict = {}
    for line in lines[1:]:
        exec(line[13:], here)  # after the column of titles
    with torch.no_grad():
        assert torch.equal(here["backbone"](images).pooled, backbone(images).pooled)
        torch.testing.assert_close(here["model"].eval()(images), backbone(images).pooled)
    assert "timm" not in usage(folder, None)
    assert "timm" not in usage(RunFolder("memory://runs/a"), exported.in_timm(backbone))
