"""Several labels an image, and quantities: against scikit-learn, from a table to numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from sklearn.linear_model import LogisticRegression, Ridge

from pipeline import compare, evaluate
from pipeline.data import pack as packing
from pipeline.errors import UserError
from pipeline.evaluation import evaluate_backbone, examine, paired, table, targets
from pipeline.evaluation.feature_set import FeatureSet
from tests.evaluation.test_evaluate import SIDE, MeanColour, pack


def drawn(n: int, seed: int, noise: float = 1.0) -> FeatureSet:
    """12 features; of the three columns of numbers two follow from them, the third is chance."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 12))
    weight = np.random.default_rng(7).normal(size=(12, 3)) * [1, 1, 0]
    values = x @ weight + noise * rng.normal(size=(n, 3))
    return FeatureSet(torch.from_numpy(x).float(), torch.full((n,), -1), targets=torch.from_numpy(values))


def signs(of: FeatureSet) -> FeatureSet:
    assert of.targets is not None
    return of._replace(targets=(of.targets > 0).double())


def test_both_models_are_scikit_learns() -> None:
    of = drawn(200, 0)
    assert of.targets is not None
    x, y = of.features.double(), of.targets[:, 0]
    for penalty, theta in zip((0.1, 10.0), targets._ridge(x, y, (0.1, 10.0))):
        theirs = Ridge(alpha=penalty).fit(x, y)
        np.testing.assert_allclose(theta, [*theirs.coef_, theirs.intercept_], rtol=1e-8, atol=1e-10)
    for penalty, theta in zip((0.1, 10.0), targets._logistic(x, (y > 0).double(), (0.1, 10.0))):
        theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=5000).fit(x, y > 0)
        np.testing.assert_allclose(theta, [*theirs.coef_[0], theirs.intercept_[0]], rtol=2e-3, atol=2e-4)


def test_scores_are_scikit_learns_of_weighted_images_too() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((2, 60)) < 0.4).astype(float)
    score = np.round(rng.normal(size=(2, 60)) + truth, 1)  # with ties
    weights = rng.integers(0, 3, 60).astype(float)
    for w in (np.ones(60), weights):
        theirs = [metrics.average_precision_score(t, s, sample_weight=w) for t, s in zip(truth, score)]
        assert targets._mean_precision(score, truth, w) == pytest.approx(np.mean(theirs))
        theirs = [metrics.r2_score(t, s, sample_weight=w) for t, s in zip(truth, score)]
        assert targets._explained(score, truth, w) == pytest.approx(np.mean(theirs))
        theirs = [metrics.roc_auc_score(t, s, sample_weight=w) for t, s in zip(truth, score)]
        assert targets._mean_area(score, truth, w) == pytest.approx(np.mean(theirs))
        times = w.astype(int)
        guess = score + rng.normal(size=score.shape).round(1)
        theirs = [stats.spearmanr(np.repeat(g, times), np.repeat(s, times)).statistic for g, s in zip(guess, score)]
        assert targets._mean_rank(guess, score, w) == pytest.approx(np.mean(theirs))
    assert targets._mean_rank(np.zeros((1, 60)), score[:1], np.ones(60)) == 0
    unknown = truth.copy()
    unknown[:, :20] = np.nan
    for of in (targets._mean_precision, targets._mean_area, targets._mean_rank):
        assert of(score, unknown, np.ones(60)) == of(score[:, 20:], truth[:, 20:], np.ones(40))


def test_what_is_there_is_found_and_permuted_it_is_chance() -> None:
    train, val = drawn(600, 0, 0.3), drawn(400, 1, 0.3)
    found = targets.regression(train, val, seed=0)
    assert found is not None
    assert 0.6 < found["r2"] < 2 / 3 + 0.01  # of three quantities one is chance
    assert found["low"] < found["r2"] < found["high"]
    assert found["rank_low"] < found["rank"] < found["rank_high"]
    several = targets.multilabel(signs(train), signs(val), seed=0)
    assert several is not None
    assert several["auc"] > 0.8
    assert several["low"] < several["map"] < several["high"]
    assert several["auc_low"] < several["auc"] < several["auc_high"]
    assert train.targets is not None
    permuted = train._replace(targets=train.targets[torch.randperm(600, generator=torch.Generator().manual_seed(0))])
    found = targets.regression(permuted, val, seed=0)
    several = targets.multilabel(signs(permuted), signs(val), seed=0)
    assert found is not None
    assert several is not None
    assert abs(found["r2"]) < 0.05
    assert several["auc"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("protocol", "key"), [("regression", "r2"), ("multilabel", "map")])
def test_what_samples_of_images_say_tells_whether_two_backbones_differ(protocol: str, key: str) -> None:
    def found(noise: float, own: int) -> dict:
        """Of features in noise of their own that are, below it, the same for all."""
        sets = (drawn(400, 0, 0.3), drawn(300, 1, 0.3))
        generator = torch.Generator().manual_seed(own)
        train, val = (
            of._replace(features=of.features + noise * torch.randn(of.features.shape, generator=generator))
            for of in (map(signs, sets) if protocol == "multilabel" else sets)
        )
        scores = getattr(targets, protocol)(train, val, seed=0)
        assert scores["drawn"][0] == scores[key]
        low, high = np.percentile(scores["drawn"][1:], [2.5, 97.5])
        assert (low, high) == (scores["low"], scores["high"])
        return scores

    good, equal, poor = found(0.5, 1), found(0.5, 2), found(1.5, 3)
    lead = paired.of_statistics(good["drawn"].numpy(), poor["drawn"].numpy(), 300)
    assert lead.mean == good[key] - poor[key]
    assert 0 < lead.low < lead.mean < lead.high
    assert lead.p < 1e-3
    assert paired.of_statistics(good["drawn"].numpy(), equal["drawn"].numpy(), 300).p > 0.05
    assert paired.of_statistics(good["drawn"].numpy(), good["drawn"].numpy(), 300).p == 1


def test_what_is_unknown_is_left_out() -> None:
    train, val = drawn(300, 0), drawn(200, 1)
    assert train.targets is not None
    assert val.targets is not None
    train.targets[::2, 0] = val.targets[50:, 1] = math.nan
    train.targets[:, 2] = 5.0  # does not vary
    found = targets.regression(train, val, seed=0)
    assert found is not None
    assert found["quantities"] == 2
    first, of_val = (one._replace(targets=one.targets[:, :1]) for one in (train, val))
    alone = targets.regression(first.chosen(~first.targets[:, 0].isnan()), of_val, seed=0)
    both = targets.regression(first, of_val, seed=0)
    assert alone is not None
    assert both is not None
    assert torch.equal(alone.pop("drawn"), both.pop("drawn"))
    assert alone == both
    assert targets.regression(FeatureSet(train.features, train.labels), val, seed=0) is None


def written(path: Path, *rows: str) -> str:
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


def test_a_table_gives_classes_and_numbers_by_name(tmp_path: Path) -> None:
    packed = pack(tmp_path, "photos", 4, 0)  # images named 0 to 3
    found = table.read(written(tmp_path / "a.csv", "path,age", "2,10", "0,9", "7,11", "3,"))
    assert found.classes == ("9", "10", "11")
    classes, numbers = found.of(packed)
    assert classes.tolist() == [0, -1, 1, -1]
    assert numbers[:, 0].nan_to_num(-1).tolist() == [9, -1, 10, -1]
    words = table.read(written(tmp_path / "b.tsv", "image\tkind", "1\tbig dog", "3\tcat, old"))
    assert words.of(packed)[0].tolist() == [-1, 0, -1, 1]
    assert not words.numbers


@pytest.mark.parametrize(
    ("rows", "protocol", "said"),
    [
        (("path,a",), "knn", "needs a first row"),
        (("path,a", "x"), "knn", "row 2 has 1 cells, the first row 2"),
        (("path,a,b", "x,1,0"), "knn", "has 2 columns beside the path"),
        (("path,a,b", "x,1,0"), "robustness", "has 2 columns beside the path"),
        (("path,a,b", "x,1,cat"), "regression", "regression needs numbers in every column"),
        (("path,a,b", "x,1,2"), "multilabel", "multilabel needs 0 and 1, not 2"),
    ],
)
def test_a_table_that_cannot_be_is_refused(rows: tuple[str, ...], protocol: str, said: str, tmp_path: Path) -> None:
    address = written(tmp_path / "labels.csv", *rows)
    with pytest.raises(UserError, match=said):
        table.refuse(table.read(address), [protocol])


def test_what_needs_a_table_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path), "--protocols", "regression"]) == 2
    assert "--protocols regression: needs --labels" in capsys.readouterr().err
    assert compare.main([str(tmp_path), str(tmp_path), "--protocols", "multilabel"]) == 2
    assert "--protocols multilabel: needs --labels" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        table.read(str(tmp_path / "none.csv"))
    with pytest.raises(UserError) as refused:
        table.read("http://me:hunter2@127.0.0.1:1/labels.csv")
    assert "hunter2" not in str(refused.value)


def test_labels_of_a_table_take_the_place_of_those_packed(tmp_path: Path) -> None:
    train, val = pack(tmp_path, "train", 120, 0), pack(tmp_path, "val", 60, 1)
    with pytest.raises(UserError, match=r"knows none of the 120 images; it says 'x' where they are called like '0'"):
        examine(
            {"": MeanColour()}, train, val, image_size=SIDE, table=table.read(written(tmp_path / "x", "p,a", "x,1"))
        )
    warm = [f"{i},{'warm' if i % 4 == 1 else 'cold'}" for i in range(120)]
    own = table.read(written(tmp_path / "warm.csv", "path,kind", *warm))
    found = examine({"": MeanColour()}, train, val, image_size=SIDE, protocols=("knn", "linear"), table=own)[""]
    assert found.numbers["knn_top1"] > 0.95
    assert found.labels.tolist() == [1 if i % 4 == 1 else 0 for i in range(60)]
    bare = pack(tmp_path, "bare", 120, 0, classes=())
    again = examine({"": MeanColour()}, bare, val, image_size=SIDE, protocols=("knn", "linear"), table=own)[""]
    assert again.numbers == found.numbers
    flags = [f"{i},{int(i % 4 == 1)},{int(i % 4 in (1, 2))},{(i % 4 == 3) - 0.5}" for i in range(120)]
    several = table.read(written(tmp_path / "several.csv", "path,red,warm,blue", *flags))
    numbers = examine(
        {"": MeanColour()}, train, val, image_size=SIDE, protocols=("regression",), table=several
    )[""].numbers  # fmt: skip
    assert numbers["regression_quantities"] == 3
    assert (numbers["train_images"], numbers["val_images"]) == (120, 60)
    assert numbers["regression_r2"] > 0.6
    assert evaluate_backbone(MeanColour(), train, val, image_size=SIDE, protocols=("multilabel",)) == {
        "multilabel_map": None, "train_images": 120, "val_images": 60,
    }  # fmt: skip


def test_images_without_folders_of_classes_are_held_out_for_a_table(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(60):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    plain = packing.open_split(str(tmp_path / "photos"), None, tmp_path / "cache")
    held = packing.open_split(str(tmp_path / "photos"), None, tmp_path / "cache", hold_out=True)
    assert (plain.train.images, plain.val) == (60, None)
    assert held.val is not None
    assert held.val.images + held.train.images == 60
    assert json.loads(held.val.path.with_suffix(".json").read_text())["classes"] == []
