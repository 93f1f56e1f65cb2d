"""Does fine-tuning do what its recipe says, and find labels that a frozen backbone does not show?"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import backbones
from pipeline.data.packed import Packed
from pipeline.evaluation import attentive, examine, finetune, interval
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.feature_set import FeatureSet
from pipeline.evaluation.finetune import RECIPES, groups, mix
from pipeline.evaluation.images import Images
from pipeline.evaluation.protocols import PROTOCOLS
from tests.evaluation.test_evaluate import pack

SIDE = 16
PLAIN = replace(RECIPES["cnn"], mixup=0, cutmix=0, smoothing=0.1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, Packed]:
    folder = tmp_path_factory.mktemp("finetune")
    return pack(folder, "train", 64, 0), pack(folder, "val", 40, 1)


def test_the_learning_rate_falls_from_the_head_to_the_stem_and_norms_do_not_decay() -> None:
    backbone = backbones.create("vit_ti8", image_size=SIDE)
    model = Classifier(backbone, nn.Linear(backbone.width, 4), tuple("abcd"), SIDE)
    recipe = RECIPES["vit"]
    found = {id(p): group for group in groups(model, recipe, 0.1) for p in group["params"]}
    own = dict(model.named_parameters())
    assert found[id(own["head.weight"])]["scale"] == 1
    assert found[id(own["backbone.network.blocks.11.mlp.fc1.weight"])]["scale"] == pytest.approx(0.65**2)
    assert found[id(own["backbone.network.blocks.0.mlp.fc1.weight"])]["scale"] == pytest.approx(0.65**13)
    assert found[id(own["backbone.network.patch_embed.proj.weight"])]["scale"] == pytest.approx(0.65**14)
    assert found[id(own["backbone.network.blocks.3.norm1.weight"])]["weight_decay"] == 0
    assert found[id(own["backbone.network.pos_embed"])]["weight_decay"] == 0
    assert found[id(own["backbone.network.blocks.3.mlp.fc1.weight"])]["weight_decay"] == 0.05
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(found) == len(trained)


def test_plain_and_residual_nets_learn_from_scratch_as_they_were_published(sets: tuple[Packed, Packed]) -> None:
    recipe = finetune.fresh_recipe_of("plain56")
    assert recipe is finetune.fresh_recipe_of("resnet110") is finetune.CIFAR_NETS
    for other in ("resnet18", "vit_ti16"):
        assert finetune.fresh_recipe_of(other).optimiser == "adamw"
        assert finetune.fresh_recipe_of(other).layer_decay == 1
    batch, steps = finetune.length(recipe, 50_000)
    assert (batch, steps) == (128, 64_062)
    assert recipe.lr * batch / 256 == pytest.approx(0.1)
    rates = [finetune.falling(recipe, step / 64_000) for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])

    numbers, evidence, *_ = examine(
        {"": backbones.create("resnet20", image_size=SIDE)}, *sets, image_size=SIDE, protocols=("scratch",), epochs=40
    )[""]
    assert numbers["scratch_epochs"] == 40
    assert evidence["scratch_train_right"].shape == (64,)
    assert numbers["scratch_train_error"] == pytest.approx(1 - evidence["scratch_train_right"].double().mean().item())
    assert numbers["scratch_train_error"] < 0.5
    bounds = numbers["scratch_train_error_low"], numbers["scratch_train_error_high"]
    assert bounds == interval.of_share(~evidence["scratch_train_right"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet20", "cnn"),
        ("vgg11_bn", "cnn"),
        ("lenet5", "cnn without batch norm"),
        ("convnext_atto", "cnn without batch norm"),
        ("vit_ti8", "vit"),
    ],
)
def test_without_batch_norms_no_rate_is_taken_that_needs_them(name: str, kind: str) -> None:
    assert finetune.recipe_of(backbones.create(name, image_size=32)) is RECIPES[kind]


def test_moved_images_are_padded_by_an_eighth_and_cut_again() -> None:
    x = torch.arange(1.0, 1 + 32 * 32).view(1, 1, 32, 32).expand(200, 3, 32, 32)
    places = set()
    for one in finetune.moved(x, np.random.default_rng(0)):
        rows, columns = (int((one[0].sum(side) == 0).sum()) for side in (1, 0))
        y, z = (int(v) for v in (one[0] == 16 * 32 + 17).nonzero()[0])  # the pixel at (16, 16) is at (y, z) now
        assert (rows, columns) == (abs(y - 16), abs(z - 16))
        places.add((y - 16, z - 16))
    assert {y for y, _ in places} == {z for _, z in places} == set(range(-4, 5))


def test_mixed_targets_are_the_shares_of_the_pixels() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    labels = torch.tensor([0, 1, 2, 0])
    plain, targets = mix(x, labels, 3, PLAIN, np.random.default_rng(0))
    assert torch.equal(plain, x)
    assert targets[1].tolist() == pytest.approx([0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3])
    for kind in ("mixup", "cutmix"):
        recipe = replace(PLAIN, smoothing=0, **{kind: 1.0})
        for seed in range(5):
            mixed, targets = mix(x, labels, 3, recipe, np.random.default_rng(seed))
            # Image 1 of brightness 1 and class 1 meets image 2 of brightness 2 and class 2.
            share = 2 - mixed[1].mean().item()
            assert targets[1].tolist() == pytest.approx([0, share, 1 - share], abs=1e-5)
            assert len(mixed[1].unique()) <= (1 if kind == "mixup" else 2)


def test_finetuning_and_attention_learn_the_labels_and_leave_the_backbone_alone(sets: tuple[Packed, Packed]) -> None:
    torch.manual_seed(0)
    backbone = backbones.create("lenet5", image_size=SIDE)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attentive, "STEPS", 60)
        quick = replace(
            RECIPES["cnn without batch norm"], lr=2e-2, epochs=1, least_steps=60, batch=32, layer_decay=1.0, ema=0.9
        )
        patch.setattr(finetune, "RECIPES", {"cnn without batch norm": quick})
        patch.setattr(finetune, "FRESH", {"cnn": quick})
        found = examine({"": backbone}, *sets, image_size=SIDE, protocols=("attentive", "finetune", "scratch"))[""]
    numbers = found.numbers
    assert found.choices == {"finetune_recipe": quick.source, "scratch_recipe": quick.source}
    assert numbers["attentive_top1"] > 0.7
    assert numbers["finetune_top1"] > 0.7
    assert numbers["finetune_train_error"] < 0.3
    assert numbers["scratch_top1"] > 0.5
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert backbone.training


@pytest.mark.parametrize("name", ["attentive", "finetune", "scratch"])
def test_labels_that_nothing_shows_give_chance(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels permuted so that each is as frequent among the images of every kind."""
    monkeypatch.setattr(attentive, "STEPS", 60)
    quick = replace(
        RECIPES["cnn without batch norm"], lr=2e-2, epochs=1, least_steps=60, batch=32, layer_decay=1.0, ema=0.9
    )
    monkeypatch.setattr(finetune, "RECIPES", {"cnn without batch norm": quick})
    monkeypatch.setattr(finetune, "FRESH", {"cnn": quick})
    torch.manual_seed(0)
    backbone = backbones.create("lenet5", image_size=SIDE).eval()

    def shown(part: str, n: int, seed: int, labels: torch.Tensor) -> FeatureSet:
        packed = pack(tmp_path, part, n, seed)
        images = Images(backbone, packed.path, labels, SIDE, torch.device("cpu"))
        return FeatureSet(torch.empty(n, 0), labels, packed.classes, images=images, which=torch.arange(n))

    train, val = shown("train", 128, 0, torch.arange(128) // 4 % 4), shown("val", 200, 1, torch.arange(200) % 4)
    found = PROTOCOLS[name](train, val, seed=0)
    assert found is not None
    assert found["top1"] == pytest.approx(0.25, abs=0.1)


def test_more_cells_than_may_be_held_are_drawn_from_every_class_and_all_of_val_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are packed class by class, so that the beginning of a file is one class."""
    train, val = (pack(tmp_path, part, 200, seed, by_class=True) for seed, part in enumerate(("train", "val")))
    monkeypatch.setattr(attentive, "STEPS", 60)
    monkeypatch.setattr(attentive, "HELD", 1)
    torch.manual_seed(0)
    backbone = backbones.create("lenet5", image_size=SIDE)
    found = examine({"": backbone}, train, val, image_size=SIDE, protocols=("attentive",), batch_size=64)[""]
    assert found.numbers["attentive_images"] == 64  # one batch
    assert len(found.evidence["attentive_predicted"]) == len(found.labels) == 200
    assert found.classifiers["attentive"].classes == train.classes
    assert found.numbers["attentive_top1"] > 0.7
