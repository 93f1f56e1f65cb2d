"""Is every backbone of a contest called by a name of its own, and set against floors of its own?"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import backbones
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluation import judge
from pipeline.evaluation.judge import Judged
from pipeline.report import contest, page, pictures, verdict
from pipeline.training.run_folder import RunFolder


def run(address: str, seen: int = 64, seed: int = 0, size: int = 16, objective: str = "mae") -> Judged:
    config = Config(backbone="lenet5", objective=objective, data="photos", seed=seed, image_size=size)
    return Judged(RunFolder(address), config, backbones.create("lenet5", image_size=size), seen, ())


def test_no_two_runs_are_called_alike(tmp_path: Path) -> None:
    twins = [run(f"{tmp_path}/seed{seed}/lenet5-mae", seed=seed) for seed in (0, 1)]
    names = contest.titles([*twins, run(f"{tmp_path}/seed0/lenet5-dino", objective="dino")])
    assert names == [
        f"lenet5 + mae at 64 images ({tmp_path}/seed0/lenet5-mae)",
        f"lenet5 + mae at 64 images ({tmp_path}/seed1/lenet5-mae)",
        "lenet5 + dino",
    ]
    assert contest.titles([run("a"), run("a", seen=128)]) == [f"lenet5 + mae at {n} images" for n in (64, 128)]
    assert contest.titles([run("a"), run("b")]) == [f"lenet5 + mae at 64 images ({name})" for name in "ab"]
    first, second = contest.titles([run("/runs/a.1"), run("/runs/a-1")])  # whose files would be called the same
    assert first == "lenet5 + mae at 64 images (/runs/a.1), number 1"
    assert second.endswith("number 2")
    fresh = run("a")._replace(folder=None, seen=0)
    assert contest.titles([fresh, run("a")]) == ["lenet5", "lenet5 + mae"]


def test_floors_are_shared_where_they_are_the_same() -> None:
    def floors(*runs: Judged) -> list[tuple[str, str]]:
        return contest.floors_of(runs, ["A", "B"])

    assert floors(run("a"), run("b", objective="dino")) == [("lenet5 untrained", "raw pixels")] * 2
    assert floors(run("a"), run("b", seed=1)) == [("A untrained", "raw pixels"), ("B untrained", "raw pixels")]
    assert floors(run("a"), run("b", size=32)) == [
        ("A untrained", "raw pixels at 16 px"), ("B untrained", "raw pixels at 32 px"),
    ]  # fmt: skip


def test_a_run_that_is_named_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"runs/a": 64, "./runs/a": 64, "runs/a/checkpoints/000000000032.pt": 32}
    monkeypatch.setattr(judge, "find", lambda name: run("runs/a", seen[name]))
    with pytest.raises(UserError, match=r"^runs/a and \./runs/a: one run, named twice"):
        contest.hold(list(seen), protocols=("knn",))


def test_images_without_labels_are_compared_as_far_as_no_protocol_needs_labels(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(60):
        Image.fromarray(drawn.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    one = Config(backbone="lenet5", objective="supervised", data=str(tmp_path / "photos"), image_size=16)
    fresh, cache = [one, replace(one, seed=1)], str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"has no labels, which --protocols knn retrieval cannot do without"):
        contest.hold([], fresh=fresh, protocols=("knn", "label_free", "retrieval"), cache=cache)
    elsewhere = [replace(config, data="elsewhere") for config in fresh]
    held = contest.hold([], fresh=elsewhere, data=one.data, protocols=("label_free",), cache=cache)
    assert held.address == one.data
    assert held.train_images + held.val_images == 60
    assert held.val_images
    for entry in held.entries:
        assert entry.trained.numbers["label_free_rankme"] > 1
    assert verdict.sentences(held, verdict.claims(held)) == []
    text = page.render(held, list(pictures.pictures(held)), ["compare"])
    assert f"{held.train_images} images to learn from" in text
    assert "<td>RankMe</td>" in text
    assert "<p>Nothing was tested: no protocol asked here compares backbones image by image.</p>" in text
    assert "All comparisons" not in text
    assert "is called one where" not in text


def test_each_backbone_meets_floors_of_its_own_seed_and_size(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    for i in range(48):
        folder = tmp_path / "photos" / ("train", "val")[i % 3 == 0] / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
    one = Config(backbone="lenet5", objective="supervised", data=str(tmp_path / "photos"), image_size=16)
    configs = [one, replace(one, seed=1), replace(one, image_size=32)]
    held = contest.hold([], fresh=configs, protocols=("knn",), cache=str(tmp_path / "cache"))
    assert len({entry.name for entry in held.entries}) == 3
    first, other_seed, larger = (entry.untrained.numbers["knn_top1"] for entry in held.entries)
    pixels = [entry.pixels.evidence["knn_predicted"].tolist() for entry in held.entries]
    assert pixels[0] == pixels[1] != pixels[2]
    text = page.render(held, [], ["compare"])
    heads = text[text.index("<h2>Numbers") :]
    for entry, untrained in zip(held.entries, (first, other_seed, larger)):
        assert f"{entry.floors[0]}</th>" in heads
        assert f'<td class="floor">{100 * untrained:.1f}<small>' in heads
    assert heads.count("raw pixels at 16 px</th>") == heads.count("raw pixels at 32 px</th>") == 1
    for claim in verdict.claims(held):
        by = next(entry for entry in held.entries if entry.name == claim.first)
        assert not claim.floor or claim.second in by.floors
