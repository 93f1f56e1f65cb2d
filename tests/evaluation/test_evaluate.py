"""From packed sets to numbers: order, floors, missing labels, and no way for validation images to leak."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from backbones.contract import Features
from pipeline.data.beton import BetonWriter
from pipeline.data.packed import Packed, write_facts
from pipeline.evaluation import NAMES, evaluate_backbone, examine, with_floors
from pipeline.evaluation.changes import CORRUPTIONS, GEOMETRY
from pipeline.evaluation.feature_set import FeatureSet, in_classes_of
from pipeline.evaluation.features import extract, extract_all
from pipeline.evaluation.floors import pixels, untrained
from pipeline.evaluation.images import evaluation_view
from pipeline.evaluation.interval import of_share
from pipeline.evaluation.measures import MEASURES, Measure
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.training.conclusion import table

SIDE = 16


class MeanColour(nn.Module):
    """A backbone whose features are known: mean red, green, blue. Counts its calls in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.trained = 0

    def forward(self, images: Tensor, summaries: bool = False) -> Features:
        self.trained += self.training or torch.is_grad_enabled()
        cells = images.flatten(2).transpose(1, 2)
        mean = cells.mean(1)
        return Features(mean, cells, (), (mean[:, None], 2 * mean[:, None, :1]) if summaries else ())


def pack(
    folder: Path,
    name: str,
    images: int,
    seed: int,
    classes: tuple[str, ...] = ("dark", "red", "green", "blue"),
    by_class: bool = False,
) -> Packed:
    """Noise images of four kinds, labelled by kind; image i has label i % 4; `by_class`, each kind lies together."""
    rng = np.random.default_rng(seed)
    path = folder / f"{name}.beton"
    tint = np.array([[0, 0, 0], [80, 0, 0], [0, 80, 0], [0, 0, 80]])
    with BetonWriter(path, n_max=images) as writer:
        for i in range(images):
            kind = 4 * i // images if by_class else i % 4
            noise = rng.integers(0, 120, (SIDE, SIDE, 3)) + tint[kind]
            writer.write(noise.astype(np.uint8), kind if classes else -1)
    packed = Packed(path, images, classes, f"{name} {seed}")
    write_facts(packed, (str(i) for i in range(images)))
    return packed


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, Packed]:
    folder = tmp_path_factory.mktemp("sets")
    return pack(folder, "train", 240, 0), pack(folder, "val", 80, 1)


def test_features_come_in_the_order_of_the_file(sets: tuple[Packed, Packed]) -> None:
    x, y = extract(MeanColour(), sets[0].path, image_size=SIDE, batch_size=32)
    assert (x.shape, x.dtype, y.dtype, x.device.type) == ((240, 3), torch.float32, torch.int64, "cpu")
    assert y.tolist() == [i % 4 for i in range(240)]
    assert x[:, 0].view(-1, 4).argmax(1).tolist() == [1] * 60  # red is reddest in every round of four
    again, _ = extract(MeanColour(), sets[0].path, image_size=SIDE, batch_size=7)
    torch.testing.assert_close(x, again)


def test_a_limit_draws_the_same_images_every_time_and_keeps_their_order(sets: tuple[Packed, Packed]) -> None:
    whole, _ = extract(MeanColour(), sets[0].path, image_size=SIDE)
    few, labels = extract(MeanColour(), sets[0].path, image_size=SIDE, limit=50, batch_size=32)
    again, _ = extract(MeanColour(), sets[0].path, image_size=SIDE, limit=50, batch_size=50)
    torch.testing.assert_close(few, again)
    where = torch.cdist(few, whole).argmin(1)
    torch.testing.assert_close(few, whole[where])
    assert where.tolist() == sorted(set(where.tolist()))
    assert labels.tolist() == (where % 4).tolist()
    assert where.max() > 200  # not merely the first of the file


def test_several_backbones_see_the_same_images(sets: tuple[Packed, Packed]) -> None:
    both, _ = extract_all({"a": MeanColour(), "b": pixels()}, sets[1].path, image_size=SIDE)
    assert both["b"].shape == (80, 432)
    cells = both["b"].view(80, 144, 3)
    torch.testing.assert_close(cells.mean(1), both["a"], atol=0.1, rtol=0.1)


def test_what_is_no_number_is_none(sets: tuple[Packed, Packed]) -> None:
    found = examine({"": MeanColour()}, *sets, image_size=SIDE, protocols=("label_free",))[""]
    assert found.numbers["label_free_alpha_req"] is None  # three features have no power law
    assert found.numbers["label_free_rankme"]


def test_the_backbone_is_evaluated_without_gradients_and_put_back(sets: tuple[Packed, Packed]) -> None:
    backbone = MeanColour().train()
    backbone.norm.eval()
    extract(backbone, sets[1].path, image_size=SIDE)
    assert backbone.trained == 0
    assert backbone.training
    assert not backbone.norm.training


def test_features_that_are_not_finite_are_no_ground_for_an_accuracy(sets: tuple[Packed, Packed]) -> None:
    class Broken(MeanColour):
        def forward(self, images: Tensor, summaries: bool = False) -> Features:
            pooled, cells, *_ = super().forward(images)
            return Features(torch.where(pooled == pooled.max(), torch.nan, pooled), cells)

    with pytest.raises(FloatingPointError, match=r"[1-9]\d* images .* NaN or infinite"):
        evaluate_backbone(Broken(), *sets, image_size=SIDE)


def test_the_crop_of_an_evaluation() -> None:
    assert evaluation_view(224).crop_pct == 0.875
    assert evaluation_view((128, 160)) == replace(evaluation_view(128), size=(128, 160))
    small = evaluation_view(64)
    assert (small.size, small.scale, small.flip_p, small.crop_pct, small.photometric) == (
        (64, 64),
        None,
        0.0,
        1.0,
        None,
    )


def test_numbers_floors_and_their_names(sets: tuple[Packed, Packed]) -> None:
    results, found = with_floors(MeanColour(), MeanColour(), *sets, image_size=SIDE)
    assert results["knn_top1"] == results["knn_k20"] > 0.95
    assert results["linear_top1"] > 0.95
    assert results["knn_low"] <= results["knn_top1"] <= results["knn_high"]
    assert {"knn_k10", "knn_k100", "knn_k200", "linear_lr", "linear_low", "linear_high"} <= set(results)
    assert (results["train_images"], results["val_images"]) == (240, 80)
    assert results["untrained"]["knn_top1"] == results["knn_top1"]
    assert results["pixels"]["knn_top1"] > 0.5
    assert all(
        0 <= value <= 1 for floor in ("untrained", "pixels") for key, value in results[floor].items() if "top1" in key
    )
    json.dumps(results)
    assert not found.classifiers  # of what is no backbone of ours


def test_copies_across_the_split_are_counted_and_told(
    tmp_path: Path, sets: tuple[Packed, Packed], capsys: pytest.CaptureFixture[str]
) -> None:
    same = pack(tmp_path, "same", 12, 0)  # the same seed: its images are the first of the training set
    for val, copies, said in ((sets[1], 0, ""), (same, 12, "12 validation images are also training images")):
        scores, _ = with_floors(MeanColour(), MeanColour(), sets[0], val, image_size=SIDE, protocols=("knn",))
        assert scores["duplicates"] == copies
        table({"backbone": "a", "objective": "b", **scores})
        assert said in capsys.readouterr().out.split("raw pixels")[1]
    assert with_floors(MeanColour(), MeanColour(), sets[0], None, image_size=SIDE)[0]["duplicates"] == 0


def test_without_labels_there_are_no_accuracies(tmp_path: Path, sets: tuple[Packed, Packed]) -> None:
    bare = pack(tmp_path, "bare", 12, 2, classes=())
    for train, val in ((bare, sets[1]), (sets[0], bare), (sets[0], None)):
        results = evaluate_backbone(MeanColour(), train, val, image_size=SIDE)
        assert (results["knn_top1"], results["linear_top1"]) == (None, None)


def test_images_without_a_label_are_left_out() -> None:
    features = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    train = FeatureSet(features, torch.tensor([0, 1, -1, -1]), ("a", "b"))
    val = FeatureSet(features, torch.tensor([-1, -1, 0, 0]), ("a", "b"))
    for name, expected in {"knn": 0.5, "linear": 0.5, "logistic": 0.5, "retrieval": 0.75}.items():
        protocol = PROTOCOLS[name]
        found = protocol(train, val, seed=0)
        assert found is not None
        assert found[protocol.headline] == expected
        assert protocol(train, FeatureSet(features, torch.full((4,), -1), ()), seed=0) is None


def test_classes_meet_by_name() -> None:
    labels = torch.tensor([0, 1, 2, -1])
    assert in_classes_of(("cat", "dog"), labels, ("dog", "cat", "eel")).tolist() == [1, 0, 4, -1]
    assert in_classes_of(("cat", "dog"), labels, ("cat", "dog")) is labels


def test_an_unknown_class_counts_as_wrong(sets: tuple[Packed, Packed]) -> None:
    renamed = replace(sets[1], classes=("dark", "red", "green", "ultraviolet"))
    results = evaluate_backbone(MeanColour(), sets[0], renamed, image_size=SIDE)
    assert results["knn_top1"] == pytest.approx(0.75, abs=0.03)
    assert results["val_images"] == 80


def test_the_training_images_are_refused_as_validation_set(sets: tuple[Packed, Packed]) -> None:
    with pytest.raises(ValueError, match="holds the training images"):
        evaluate_backbone(MeanColour(), sets[0], sets[0], image_size=SIDE)
    with pytest.raises(ValueError, match="holds the training images"):
        evaluate_backbone(MeanColour(), sets[0], replace(sets[1], fingerprint=sets[0].fingerprint), image_size=SIDE)


def test_an_unknown_protocol_is_named(sets: tuple[Packed, Packed]) -> None:
    with pytest.raises(ValueError, match="unknown protocol fourier; there are knn, linear, "):
        evaluate_backbone(MeanColour(), *sets, image_size=SIDE, protocols=("fourier",))
    assert tuple(PROTOCOLS) == NAMES


def test_what_stands_for_a_protocol_is_shown() -> None:
    headlines = {f"{name}_{protocol.headline}" for name, protocol in PROTOCOLS.items()}
    assert headlines <= {measure.key for measure in MEASURES}
    percent, number = Measure("k-NN", "a", "b"), Measure("RankMe", "a", factor=1)
    scores = {"a": 0.314, "b_low": 0.29, "b_high": 0.336}
    assert (percent.text(scores), percent.interval(scores)) == ("31.4", "29.0 – 33.6")
    assert (number.text({"a": -1.5}), number.interval(scores)) == ("−1.50", "")
    assert percent.interval({"b_low": math.nan, "b_high": math.nan}) == percent.interval({"b_low": None}) == "–"
    assert (percent.text({}), percent.text({"a": None}), percent.text({"a": math.nan})) == ("–", "–", "–")


def test_every_protocol_finds_in_known_features_what_is_there(sets: tuple[Packed, Packed]) -> None:
    found = examine({"": MeanColour()}, *sets, image_size=SIDE, protocols=NAMES[:8])[""]
    assert all(found.numbers[f"{name}_top1"] > 0.95 for name in ("knn", "linear", "logistic"))
    assert found.numbers["low_shot_n10"] > 0.95
    assert found.numbers["retrieval_map"] > 0.9
    assert "factors_shape" in found.numbers  # None: these images were not drawn from factors
    assert found.numbers["factors_shape"] is None
    # Layer 1 is the colour itself, layer 2 its red alone, which tells one kind of four.
    assert found.numbers["layerwise_knn_1"] == found.numbers["knn_top1"] > found.numbers["layerwise_knn_2"] + 0.2
    last = found.numbers["layerwise_knn_2"]
    assert found.numbers["layerwise_last"] == last
    answers = torch.arange(80) < round(80 * last)
    assert (found.numbers["layerwise_last_low"], found.numbers["layerwise_last_high"]) == of_share(answers)
    assert 1 < found.numbers["label_free_rankme"] < 3
    assert len(found.labels) == len(found.evidence["knn_predicted"]) == 80
    right = (found.evidence["knn_predicted"] == found.labels).double().mean().item()
    assert right == found.numbers["knn_top1"]


def test_a_protocol_that_measures_nothing_says_what_it_takes(
    tmp_path: Path, sets: tuple[Packed, Packed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.logistic.MOST", 200)
    asked = ("knn", "logistic", "factors")
    scores, _ = with_floors(MeanColour(), MeanColour(), *sets, image_size=SIDE, protocols=asked)
    assert scores["lacking"] == {
        "logistic": "2 to 20,000 labelled images to learn from; linear takes more",
        "factors": "images of which it is known what was drawn: --data embedded",
    }
    one_each = pack(tmp_path, "one each", 4, 2)
    found = examine({"": MeanColour()}, one_each, sets[1], image_size=SIDE, protocols=("knn", "low_shot"))[""]
    assert found.lacking == {"low_shot": "a class with more than 1 labelled image to learn from"}


def test_robustness_is_what_neighbours_say_of_changed_images(sets: tuple[Packed, Packed]) -> None:
    found = examine({"": MeanColour()}, *sets, image_size=SIDE, protocols=("knn", "robustness"))[""]
    clean = found.evidence["robustness_clean_right"]
    assert found.numbers["robustness_clean"] == found.numbers["knn_top1"] == clean.double().mean().item()
    shuffled = found.evidence["robustness_patch_shuffle_right"]
    assert shuffled.shape == (5, 80)
    assert torch.equal(shuffled[[0, 2, 4]], clean.expand(3, 80))  # all patches are kept, and with them the mean colour
    assert found.numbers["robustness_patch_shuffle"] == shuffled.double().mean().item()
    assert found.numbers["robustness_contrast"] == 1  # the mean stays
    assert found.numbers["robustness_snow"] < 0.9
    each = {
        kind: torch.stack([found.evidence[f"robustness_{name}_right"].double() for name in names]).mean((0, 1))
        for kind, names in (("geometry", GEOMETRY), ("corruptions", CORRUPTIONS))
    }
    assert all(found.numbers[f"robustness_{kind}"] == pytest.approx(of.mean().item()) for kind, of in each.items())
    low, high = stats.t.interval(0.95, 79, loc=each["corruptions"].mean(), scale=stats.sem(each["corruptions"]))
    bounds = found.numbers["robustness_corruptions_low"], found.numbers["robustness_corruptions_high"]
    assert bounds == pytest.approx((low, min(1, high)))


def test_label_free_scores_need_no_labels(tmp_path: Path, sets: tuple[Packed, Packed]) -> None:
    bare, other = pack(tmp_path, "bare", 40, 2, classes=()), pack(tmp_path, "other", 12, 5, classes=())
    results = evaluate_backbone(MeanColour(), bare, other, image_size=SIDE, protocols=("label_free", "knn"))
    assert results["knn_top1"] is None
    assert results["label_free_rankme"] > 1


def test_the_untrained_floor_is_fresh_reproducible_and_leaves_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    config = {"name": "lenet5", "image_size": 32}
    one, two, other = untrained(config, 1), untrained(config, 1), untrained(config, 2)
    assert torch.equal(torch.get_rng_state(), state)
    first = next(iter(one.state_dict()))
    assert torch.equal(one.state_dict()[first], two.state_dict()[first])
    assert any(not torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
