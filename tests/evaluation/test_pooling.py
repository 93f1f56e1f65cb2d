"""Does a linear classifier read a network as DINOv2's does, where that shows its labels, and say what it reads?"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import backbones
from pipeline.data.packed import Packed
from pipeline.evaluation import classifier, examine, judge, linear, pooling, with_floors
from pipeline.evaluation.feature_set import FeatureSet
from pipeline.evaluation.floors import untrained
from pipeline.evaluation.protocols import PROTOCOLS
from tests.evaluation.test_evaluate import SIDE, pack

OF_VIT = ["class_1", "mean_1", "both_1", "class_4", "mean_4", "both_4"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, Packed]:
    folder = tmp_path_factory.mktemp("pooling")
    return pack(folder, "train", 160, 0), pack(folder, "val", 60, 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good the numbers are is not what is tested with them."""
    monkeypatch.setattr(linear, "LEAST_STEPS", 100)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_read_of_a_transformer_is_what_dinov2_reads() -> None:
    backbone = backbones.create("vit_ti8", image_size=16).eval()
    tokens: list[Tensor] = []
    network = backbone.network
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        summaries = backbone(normal(3, 3, 16, 16), summaries=True).summaries
        normed = [backbone.norm(one) for one in tokens]
    assert pooling.names(summaries) == OF_VIT
    of_class, mean = [one[:, 0] for one in normed], [one[:, 1:].mean(1) for one in normed]
    for name, parts in {
        "class_1": of_class[-1:], "class_4": of_class[-4:], "mean_1": mean[-1:], "mean_4": mean[-4:],
        "both_1": [of_class[-1], mean[-1]], "both_4": [*of_class[-4:], mean[-1]],
    }.items():  # fmt: skip
        torch.testing.assert_close(pooling.pool(name, summaries), torch.cat(parts, dim=1))


@pytest.mark.parametrize("name", ["resnet20", "efficientnet_b0", "convnext_atto", "fc", "vit_ti8"])
@pytest.mark.parametrize("pool", [None, "mean"])
def test_the_last_summary_holds_the_pooled_features(name: str, pool: str | None) -> None:
    backbone = backbones.create(name, image_size=32, pool=pool).eval()
    with torch.no_grad():
        features = backbone(normal(2, 3, 32, 32), layers=True, summaries=True)
    read = pooling.pool("class_1" if name == "vit_ti8" and pool is None else "mean_1", features.summaries)
    torch.testing.assert_close(read, features.pooled)
    assert len(features.summaries) == len(features.layers)
    if name not in ("vit_ti8", "fc"):
        assert pooling.names(features.summaries) == ["mean_1", "mean_4"]
        stages = [layer.mean(1) for layer in features.layers[-4:-1]]
        torch.testing.assert_close(pooling.pool("mean_4", features.summaries), torch.cat([*stages, read], dim=1))


def shown(where: str | None, n: int, seed: int) -> FeatureSet:
    """Summaries of six layers whose labels show in one place alone, and pooled features that are the class token."""
    y = torch.arange(n) % 4
    noise = normal(6, n, 2, 8, seed=seed)
    if where:
        layer, token = {"class": (5, 0), "mean": (5, 1), "early": (2, 0)}[where]
        noise[layer, :, token, :4] += 4 * torch.eye(4)[y]
    return FeatureSet(noise[5, :, 0], y, tuple("abcd"), tuple(one.half() for one in noise))


@pytest.mark.parametrize("protocol", ["linear", "logistic"])
@pytest.mark.parametrize(
    ("where", "reads"),
    [("class", {"class", "both"}), ("mean", {"mean", "both"}), ("early", {"class_4", "both_4"})],
)
def test_the_pooling_that_shows_the_labels_is_chosen(protocol: str, where: str, reads: set[str]) -> None:
    found = PROTOCOLS[protocol](shown(where, 400, 0), shown(where, 200, 1), seed=0)
    assert found is not None
    assert {found["pooling"], str(found["pooling"]).split("_")[0]} & reads
    assert found["top1"] > 0.9
    held_out = {name: found[f"held_out_{name}"] for name in OF_VIT}
    assert held_out[str(found["pooling"])] == max(held_out.values())
    blind = "mean_1" if where == "class" else "class_1"
    assert held_out[blind] < 0.5


@pytest.mark.parametrize("protocol", ["linear", "logistic"])
def test_the_validation_set_chooses_no_pooling(protocol: str) -> None:
    train = shown("mean", 400, 0)
    one, other = (PROTOCOLS[protocol](train, shown(where, 100, 1), seed=0) for where in ("mean", "class"))
    assert one is not None
    assert other is not None
    assert one["pooling"] == other["pooling"]
    assert torch.equal(one["head"].weight, other["head"].weight)  # type: ignore[union-attr]


def test_permuted_labels_give_chance_however_many_poolings_there_are() -> None:
    train = shown("class", 800, 0)
    permuted = train._replace(labels=train.labels[torch.randperm(800, generator=torch.Generator().manual_seed(0))])
    found = PROTOCOLS["linear"](permuted, shown("class", 400, 1), seed=0)
    assert found is not None
    assert found["top1"] == pytest.approx(0.25, abs=0.08)


def test_a_classifier_reads_what_was_chosen_when_it_comes_back(sets: tuple[Packed, Packed], tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = backbones.create("vit_ti8", image_size=SIDE)
    found = examine({"": backbone}, *sets, image_size=SIDE, protocols=("linear", "logistic"))[""]
    images = normal(4, 3, SIDE, SIDE)
    for protocol, trained in found.classifiers.items():
        assert trained.pooling == found.choices[f"{protocol}_pooling"] in OF_VIT
        trained.pooling, trained.head = "both_4", nn.Linear(5 * backbone.width, 4)  # the widest
        (tmp_path / "kept.safetensors").write_bytes(classifier.save(trained.eval()))
        again = classifier.load(tmp_path / "kept.safetensors")
        assert again.pooling == "both_4"
        with torch.no_grad():
            read = pooling.pool("both_4", backbone.eval()(images, summaries=True).summaries)
            torch.testing.assert_close(again(images), trained.head(read))


def test_the_choice_and_every_poolings_accuracy_are_kept_and_each_image_is_seen_once(
    sets: tuple[Packed, Packed], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    backbone = backbones.create("vit_ti8", image_size=SIDE)
    seen: list[int] = []
    backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    options = {"image_size": SIDE, "cache": tmp_path, "protocols": ("knn", "linear")}
    scores, found = with_floors(backbone, untrained(backbone.config), *sets, **options)
    assert sum(seen) == 220
    assert scores["choices"] == {"linear_pooling": found.classifiers["linear"].pooling}
    for numbers in (scores, scores["untrained"]):
        assert {key for key in numbers if "held_out" in key} == {f"linear_held_out_{name}" for name in OF_VIT}
    assert {key for key in scores["pixels"] if "held_out" in key} == {"linear_held_out_pooled"}
    again, _ = with_floors(backbone, untrained(backbone.config), *sets, **options)
    assert sum(seen) == 220
    assert again == scores


def test_what_one_protocol_chose_stays_when_another_is_measured_later() -> None:
    both = {"train_images": 8, "val_images": 4, "untrained": {}, "pixels": {}, "lacking": {}}
    first = {**both, "choices": {"linear_pooling": "class_4"}}
    later = judge.merged(first, {**both, "choices": {"logistic_pooling": "mean_1"}})
    assert later["choices"] == {"linear_pooling": "class_4", "logistic_pooling": "mean_1"}
    del first["choices"]  # of an earlier version
    assert judge.merged(first, later)["choices"] == later["choices"]


def test_a_pooling_is_said_in_words() -> None:
    assert [pooling.in_words(name) for name in ("pooled", "class_1", "mean_4", "both_1", "both_4")] == [
        "the pooled features",
        "the class token",
        "the mean of the cells of the last 4 layers",
        "the class token and the mean of the cells",
        "the class tokens of the last 4 layers and the mean of the cells",
    ]
