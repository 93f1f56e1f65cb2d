"""The whole command on runs that were really trained, a CNN and a ViT, on images whose kinds are plain to see."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import compare, evaluate, pretrain
from pipeline.evaluation.evaluate import Findings
from pipeline.report import write
from pipeline.tracking.__main__ import main as deliver
from pipeline.training import launch
from tests.report.contests import contest, entry

SMALL = (
    "--loader opencv --image-size 16 --batch-size 8 --epochs 1 --knn-every 0 --limit 24 "
    "--precision fp32 "
    "--options.decoder-width 16 --options.decoder-depth 1 --options.decoder-heads 2"
)
TRAIN = (
    "--backbones",
    "lenet5",
    "vit_ti8",
    "--objectives",
    "mae",
    "--data",
    "photos",
    "--cache",
    "cache",
    "--engine",
    "local",
    "--pretrain",
)
LENET, VIT = "runs/lenet5-mae-photos", "runs/vit_ti8-mae-photos"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos/`, `cache/` and `runs/`, where a comparison trained a CNN and a ViT and wrote `first/`."""
    folder = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 24)):
        for i in range(count):
            pixels = rng.integers(0, 120, (20, 20, 3), np.uint8)
            pixels[..., 2 * (i % 2)] += 120
            (folder / "photos" / part / "rb"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "photos" / part / "rb"[i % 2] / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert compare.main([*TRAIN, SMALL, "--protocols", "knn", "--output", "first"]) == 0
    return folder


def test_two_runs_become_a_report_and_a_parent_with_children(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    wanted = ["knn", "low_shot", "retrieval", "factors", "seeing", "depth", "similarity"]
    words = [LENET, VIT, "--engine", "local", "--cache", "cache", "--output", "out", "--protocols", *wanted]
    assert compare.main(words) == 0
    said = capsys.readouterr().out
    assert "On these 24 images" in said
    page = Path("out/report.html").read_text()
    nothing = "othing by factors: it takes images of which it is known what was drawn: --data embedded"
    assert nothing in said
    assert f"{nothing}.</p>" in page
    for words_shown in (
        "lenet5 + mae",
        "vit_ti8 + mae",
        "untrained",
        "How far a cell sees",
        "How alike the layers are",
    ):
        assert words_shown in page
    assert f"python -m pipeline.compare {LENET} {VIT}" in page
    numbers = json.loads(Path("out/numbers.json").read_text())
    assert (numbers["train_images"], numbers["val_images"]) == (24, 24)
    lenet, vit = numbers["entries"]
    assert (lenet["family"], vit["family"]) == ("cnn", "vit")
    assert lenet["cost"]["images_seen"] == vit["cost"]["images_seen"] == 24
    summary = json.loads(Path(LENET, "summary.json").read_text())
    assert lenet["cost"]["training"] == summary["images_per_second"]
    assert lenet["cost"]["seconds"] == pytest.approx(summary["training_seconds"])
    assert lenet["cost"]["training_memory"] == summary["peak_memory"] > 50_000_000  # torch alone is larger
    assert min(lenet["cost"]["inference"], lenet["cost"]["training"], vit["cost"]["inference"]) > 0
    assert lenet["cost"]["workers"] == 1
    assert lenet["trained"]["knn_top1"] > 0.8  # red from blue, which any network sees
    assert lenet["trained"]["seeing_field_radius"] > 0

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{trained / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("photos")
    parent, first = client.search_runs([experiment.experiment_id], "tags.kind = 'comparison'")
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.info.run_name for child in children} == {"lenet5 + mae", "vit_ti8 + mae"}
    metrics = [set(child.data.metrics) for child in children]
    shared = {"knn_top1", "low_shot_n1", "untrained_knn_top1", "pixels_knn_top1", "pixels_retrieval_map", "parameters"}
    shared |= {"images_seen", "images_per_second", "pretraining_hours", "pretraining_multiply_adds"}
    assert shared <= metrics[0] & metrics[1]
    (child,) = (child for child in children if child.info.run_name == "lenet5 + mae")
    assert child.data.metrics["images_per_second"] == pytest.approx(summary["images_per_second"])
    assert child.data.metrics["pretraining_hours"] == pytest.approx(summary["training_seconds"] / 3600)
    assert child.data.metrics["images_seen"] == 24
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"report.html", "numbers.json", "pictures"}
    seen = {file.path for file in client.list_artifacts(parent.info.run_id, "pictures")}
    assert {"pictures/accuracy.svg", "pictures/how-far-a-cell-sees.png"} <= seen
    assert seen == {f"pictures/{file.name}" for file in Path("out/pictures").iterdir()}
    assert parent.info.status == "FINISHED"

    assert first.info.run_id != parent.info.run_id

    # Another comparison finds every feature on disk, and says the same; of a checkpoint without its run, too.
    kept = {file: file.stat().st_mtime_ns for file in Path("cache/features").iterdir()}
    (checkpoint,) = Path(VIT, "checkpoints").glob("*.pt")
    shutil.copy(checkpoint, "lone.pt")
    words = [LENET, "lone.pt", "--engine", "local", "--cache", "cache", "--output", "again", "--protocols", "knn"]
    assert compare.main(words) == 0
    assert {file: file.stat().st_mtime_ns for file in Path("cache/features").iterdir()} == kept
    again = json.loads(Path("again/numbers.json").read_text())
    assert again["entries"][1]["trained"]["knn_top1"] == vit["trained"]["knn_top1"]
    page = Path("again/report.html").read_text()
    assert f"--config {trained / LENET}/config.yaml" in page
    assert "--config vit_ti8-mae.yaml" in page
    assert "<pre>backbone: vit_ti8\nobjective: mae\ndata: photos\n" in page


def test_what_waits_of_a_comparison_is_delivered_where_its_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = Findings({}, {}, torch.zeros(0))
    held = contest([entry("lenet5", "mae", nothing, nothing), entry("vit_ti8", "mae", nothing, nothing)], nothing, ())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(write.contests, "hold", lambda *runs, **options: held)
    monkeypatch.setattr(write.numbers, "as_json", lambda held: {})
    monkeypatch.setattr(write.page, "render", lambda held, drawn, command: "the report")
    for name in ("claims", "sentences", "unfair"):
        monkeypatch.setattr(write.verdict, name, lambda *held: [])

    def away(*request: object) -> None:
        raise ConnectionError("nobody answers")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.tracking.runs.create_evaluation", away)
        write.compare(
            [], fresh=[], storage="runs", data=None, val_data=None, table=None, protocols=(), limit=None, epochs=None,
            seed=0, cache=None, engine="local", workers=None, output="elsewhere", command=[],
        )  # fmt: skip
    assert {path.name for path in Path("elsewhere").iterdir()} == {"report.html", "numbers.json", "pictures"}
    assert deliver(["runs"]) == 0
    assert "2 of 2 entries delivered" in capsys.readouterr().out

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'photos'")
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {
        "comparison of 2", "lenet5 + mae", "vit_ti8 + mae",
    }  # fmt: skip
    (parent,) = client.search_runs([experiment.experiment_id], "tags.kind = 'comparison'")
    assert json.loads(parent.inputs.dataset_inputs[0].dataset.source) == {"uri": held.address}


def test_the_command_that_the_report_gives_trains_the_backbone_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(launch, "fresh_name", lambda config: "again")
    page = Path("first/report.html").read_text().splitlines()
    (line,) = (text for text in page if "lenet5-mae-photos/config" in text)
    words = shlex.split(line.removeprefix("<pre>"), comments=True)
    assert words[:3] == ["python", "-m", "pipeline.pretrain"]
    before = {file: file.stat().st_mtime_ns for file in Path(LENET).rglob("*")}
    assert pretrain.main(words[3:]) == 0
    assert {file: file.stat().st_mtime_ns for file in Path(LENET).rglob("*")} == before
    assert Path("runs/again/backbone.safetensors").read_bytes() == Path(LENET, "backbone.safetensors").read_bytes()
    assert json.loads(Path("runs/again/summary.json").read_text())["images_per_second"] > 0  # it was trained


def test_degradation_is_measured_without_pretraining(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = ["--backbones", "plain20", "plain56", "resnet20", "--data", "photos", "--protocols", "scratch"]
    words += ["--pretrain", "--image-size 16 --limit 24", "--epochs", "1", "--cache", "cache", "--storage", "bare"]
    assert compare.main([*words, "--output", "bare/out"]) == 0
    said = capsys.readouterr().out
    assert "plain20 and plain56 was found in accuracy from scratch" in said or "beats" in said
    assert "From scratch each network learnt for 1 epoch of 24 images." in said
    assert "He et al. 2016, section 4.2, show their plain and residual nets 8.2 million images, 341,333 times" in said
    assert not list(Path("bare").rglob("config.yaml"))  # no run
    page = Path("bare/out/report.html").read_text()
    for shown in ("Training error by depth", "<th>", "– (not pretrained)", "from scratch: He et al. 2016, section 4.2"):
        assert shown in page
    assert "untrained</th>" not in page
    assert "pipeline.pretrain" not in page
    numbers = json.loads(Path("bare/out/numbers.json").read_text())
    assert [one["name"] for one in numbers["entries"]] == ["plain20", "plain56", "resnet20"]
    assert all(0 <= one["trained"]["scratch_train_error"] <= 1 for one in numbers["entries"])


def test_mistakes_are_one_sentence(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)

    def refused(*words: str, command=compare) -> str:
        assert command.main([*words, "--cache", "cache"]) == 2
        return capsys.readouterr().err

    assert "needs at least two runs, not 1" in refused(LENET)
    assert "runs/nothing: no such run folder" in refused(LENET, "runs/nothing")
    assert "--protocols fourier: unknown; there are knn" in refused(LENET, VIT, "--protocols", "fourier")
    assert "--backbones and --objectives go together" in refused("--backbones", "lenet5", "--data", "photos")
    fresh = ("--backbones", "plain20", "resnet20", "--data", "photos", "--protocols", "scratch")
    assert "go together" in refused(*fresh, "knn")
    assert "--epochs 0: must be at least 1" in refused(*fresh, "--epochs", "0")
    for limit in ("0", "-3"):
        for command, runs in ((compare, (LENET, VIT)), (evaluate, (LENET,))):
            said = refused(*runs, "--limit", limit, "--protocols", "knn", command=command)
            assert f"--limit {limit}: must be at least 1" in said
    assert "resnet19" in refused("--backbones", "lenet5", "resnet19", "--objectives", "mae", "--data", "photos")
    (whole,) = Path(LENET, "checkpoints").glob("*.pt")
    torn = Path("torn.pt")
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "torn.pt: cannot be read" in refused("torn.pt", command=evaluate)
    assert "torn.pt: cannot be read" in refused(LENET, "torn.pt")
    nothing, gaps = (written(name, "path,a,b", row) for name, row in (("x.csv", "x,1,0"), ("gaps.csv", "x,1")))
    assert "--protocols regression: needs --labels" in refused(LENET, VIT, "--protocols", "regression")
    assert "none.csv: cannot be read" in refused(LENET, VIT, "--labels", "none.csv")
    assert "gaps.csv: row 2 has 2 cells" in refused(LENET, VIT, "--labels", gaps)
    assert "has 2 columns beside the path" in refused(LENET, VIT, "--labels", nothing)
    words = ("--labels", nothing, "--protocols", "regression")
    assert "x.csv: knows none of the 24 images" in refused(LENET, VIT, *words)
    # Before anything is trained.
    pair = ("--backbones", "lenet5", "vit_ti8", "--objectives", "mae", "--data", "photos")
    pair = (*pair, "--engine", "local", "--storage", "later", "--pretrain", SMALL.replace("--limit 24", ""))
    assert "has 2 columns beside the path" in refused(*pair, "--labels", nothing)

    def other_data(data: str) -> list[str]:
        return [data if word == "photos" else word for word in pair]

    assert "x.csv: knows none of the 40 images" in refused(*pair, *words)
    assert "has no labels, which --protocols knn cannot do" in refused(
        *other_data("photos/train/r"), "--protocols", "knn"
    )
    same = other_data("photos/train")
    assert "photos/train: holds the training images" in refused(*same, "--val-data", "photos/train")
    (image, *_) = Path("photos", "val", "r").iterdir()
    assert f"{image}/report: cannot be written (Not a directory)" in refused(*pair, "--output", f"{image}/report")
    assert f"{image}: cannot be written (" in refused(*pair, "--storage", str(image))
    assert "torn.pt: cannot be read" in refused("torn.pt", *pair)
    assert not list(Path("later").rglob("*"))


def written(name: str, *rows: str) -> str:
    Path(name).write_text("".join(f"{row}\n" for row in rows))
    return name


def test_a_table_of_ones_own_says_what_counts(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    files = sorted(file.relative_to("photos") for file in Path("photos").rglob("*.png"))
    kinds = written("kinds.csv", "path,kind", *(f"{file},{'warm' if 'r' in file.parts else 'cold'}" for file in files))
    chance = np.random.default_rng(0)
    facts = [f"{file},{int(file.parts[1] == 'r')},{int(chance.integers(2))}" for file in files]
    several = written("several.csv", "path,warm,lucky", *facts)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{trained / 'runs' / 'mlflow.db'}")

    def compared(table: str, *protocols: str) -> tuple[dict, str, list]:
        words = [LENET, VIT, "--engine", "local", "--cache", "cache", "--output", table[:-4]]
        words += ["--labels", table, "--protocols", *protocols]
        assert compare.main(words) == 0
        experiment = client.get_experiment_by_name(f"photos by {table[:-4]}")
        runs = client.search_runs([experiment.experiment_id], "tags.`mlflow.parentRunId` != ''")
        return json.loads(Path(table[:-4], "numbers.json").read_text()), capsys.readouterr().out, runs

    by_class, said, _ = compared(kinds, "knn")
    assert by_class["classes"] == ["cold", "warm"]
    assert by_class["labels"] == kinds
    assert "in k-NN accuracy" in said or "of k-NN accuracy" in said
    by_folder = json.loads(Path("first/numbers.json").read_text())
    for one, other in zip(by_class["entries"], by_folder["entries"], strict=True):
        assert one["trained"]["knn_top1"] == other["trained"]["knn_top1"]  # the folders in other words

    found, said, children = compared(several, "multilabel", "regression")
    assert "On these 24 images" in said
    assert "mAP over several labels" in said
    assert "explained variance" in said
    page = Path("several/report.html").read_text()
    assert "photos by several" in page
    assert "labelled by the columns warm, lucky of several.csv" in page
    assert " classes" not in page[: page.index("Numbers")]
    assert {child.info.run_name for child in children} == {"lenet5 + mae", "vit_ti8 + mae"}
    for child in children:
        metrics = child.data.metrics
        scores = {"multilabel_map", "regression_r2"}
        assert scores | {f"untrained_{score}" for score in scores} <= set(metrics)
        (entry,) = (one for one in found["entries"] if one["name"] == child.info.run_name)
        assert metrics["multilabel_map"] == pytest.approx(entry["trained"]["multilabel_map"])
        assert metrics["multilabel_map"] > 0.6  # of two labels one is plain to see


def test_two_evaluations_of_the_same_data_stand_together(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def evaluations() -> dict:
        return json.loads(Path(LENET, "summary.json").read_text()).get("evaluations", {})

    def kept(*words: str) -> dict:
        assert evaluate.main([LENET, "--engine", "local", "--cache", "cache", *words]) == 0
        return list(evaluations().values())[-1]

    before = set(evaluations())
    first = kept("--protocols", "knn", "retrieval")
    told = json.loads(Path(LENET, "confusions", "photos.json").read_text())
    assert {of: sum(row.values()) for of, row in told["knn"].items()} == {"b": 12, "r": 12}
    assert sum(row.get(of, 0) for of, row in told["knn"].items()) == pytest.approx(24 * first["knn_top1"])
    both = kept("--protocols", "low_shot", "retrieval")
    for one, other in ((first, both), (first["untrained"], both["untrained"]), (first["pixels"], both["pixels"])):
        assert other["knn_top1"] == one["knn_top1"]
        assert other["retrieval_map"] == one["retrieval_map"]
        assert "low_shot_n1" in set(other) - set(one)
    # With other images to learn from, those numbers would say something else.
    fewer = kept("--protocols", "retrieval", "--limit", "16")
    assert fewer["train_images"] == 16
    assert all("knn_top1" not in one for one in (fewer, fewer["untrained"], fewer["pixels"]))
    seeded = kept("--protocols", "retrieval", "--seed", "1")
    assert "knn_top1" not in seeded
    # Other images of the same name and number.
    for file in Path("photos").rglob("*.png"):
        Path("again", file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(file))).save(Path("again", file))
    limit = json.loads(Path("first/numbers.json").read_text())["train_images"]
    others = kept("--data", "again/photos", "--protocols", "retrieval", "--limit", str(limit))
    assert "knn_top1" not in others
    assert [name.rsplit(" (")[0] for name in evaluations() if name not in before] == [
        "photos at 24 images, seed 0", "photos at 24 images, seed 0, limit 16", "photos at 24 images, seed 1",
        "photos at 24 images, seed 0, limit 24",
    ]  # fmt: skip
    assert kept("--protocols", "retrieval")["knn_top1"] == first["knn_top1"]
    # They outlast the run's command, given once more.
    kept_now = evaluations()
    words = ["--backbone", "lenet5", "--objective", "mae", "--data", "photos", *shlex.split(SMALL), "--run", LENET]
    assert pretrain.main([*words, "--engine", "local", "--cache", "cache"]) == 0
    assert evaluations() == kept_now


def test_an_evaluation_says_where_it_is_kept(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (checkpoint,) = Path(LENET, "checkpoints").glob("*.pt")
    places = {"runs/begun": " as children of the run in MLflow", "alone": ""}
    for place in places:
        Path(place, "checkpoints").mkdir(parents=True)
        shutil.copy(checkpoint, Path(place, "checkpoints"))
    shutil.copy(Path(LENET, "mlflow_run_id"), "runs/begun")
    for place, said in {
        LENET: f" in {trained}/{LENET}/summary.json and as children of the run in MLflow",
        **places,
    }.items():
        assert evaluate.main([place, "--engine", "local", "--cache", "cache", "--protocols", "factors"]) == 0
        expected = f"kept{said}\n" if said else "not kept: the run has no summary.json before its end\n"
        out = capsys.readouterr().out
        assert expected in out
        assert "nothing by factors: it takes images of which it is known what was drawn: --data embedded\n" in out


def test_a_run_is_measured_on_images_without_labels(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("plain").mkdir()
    for file in Path("photos/train").rglob("*.png"):
        Path("plain", file.name).write_bytes(file.read_bytes())
    words = [LENET, "--engine", "local", "--cache", "cache", "--data", "plain", "--protocols"]
    assert evaluate.main([*words, "label_free"]) == 0
    assert "RankMe" in capsys.readouterr().out
    *_, scores = json.loads(Path(LENET, "summary.json").read_text())["evaluations"].values()
    assert scores["data"] == "plain"
    assert scores["label_free_rankme"] > 1
    assert scores["train_images"] + scores["val_images"] == 40
    assert evaluate.main([*words, "label_free", "knn"]) == 2
    assert "plain: has no labels, which --protocols knn cannot do without" in capsys.readouterr().err


def test_what_was_trained_is_not_trained_again_and_other_options_are_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = {file: file.stat().st_mtime_ns for file in Path("runs").rglob("*.pt")}
    assert compare.main([*TRAIN, SMALL, "--protocols", "knn", "--output", "twice"]) == 0
    assert capsys.readouterr().out.count("trained already") == 2
    assert {file: file.stat().st_mtime_ns for file in Path("runs").rglob("*.pt")} == before
    assert compare.main([*TRAIN, SMALL.replace("--epochs 1", "--epochs 2"), "--protocols", "knn"]) == 2
    assert "trained with other options (--epochs 1 → 2)" in capsys.readouterr().err
