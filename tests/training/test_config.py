"""What recipes fill in, and what is kept."""

import dataclasses
import inspect

import fsspec
import pytest

import objectives
from pipeline import asked, config, recipes
from pipeline.config import Config
from pipeline.errors import UserError


def resolved(*argv: str, images: int = 5000, side: int = 160, classes: int = 0) -> Config:
    return config.resolve(asked.parse(list(argv)), images=images, side=side, classes=classes)


def test_the_bare_command_is_complete():
    filled = resolved()
    left_open = {"val_data", "limit", "knn_every", "keep_every", "run", "storage", "cache", "resume", "init", "config"}
    open_now = {f.name for f in dataclasses.fields(filled) if getattr(filled, f.name) is None}
    assert open_now == left_open
    assert filled.backbone == "vit_s16"


@pytest.mark.parametrize("key", recipes.RECIPES)
def test_a_recipe_names_every_option_of_its_objective(key):
    kind = objectives.objective(key[0])
    keywords = {
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "image_size"
    }
    assert set(recipes.RECIPES[key].options) == keywords
    assert len(recipes.RECIPES[key].source) > 20


@pytest.mark.parametrize("objective", recipes.OBJECTIVES)
def test_the_published_options_are_the_defaults_of_the_objective(objective):
    parameters = inspect.signature(objectives.objective(objective)).parameters
    assert {name: parameters[name].default for name in recipes.options_of(objective)} == recipes.options_of(objective)


@pytest.mark.parametrize("key", [
    *((name, "vit", scale) for name in ("dino", "ibot", "dinov2") for scale in ("large", "small", "thumbnails")),
    ("swav", "vit", "large"), ("msn", "vit", "small"), ("msn", "vit", "thumbnails"),
])  # fmt: skip
def test_rates_end_at_a_millionth_where_their_authors_say_so(key):
    recipe = recipes.RECIPES[key]
    assert recipe.base_lr * recipe.batch_size / 256 * recipe.lr_end == pytest.approx(1e-6, rel=0.03)


@pytest.mark.parametrize("objective", recipes.OBJECTIVES)
@pytest.mark.parametrize("backbone", ["resnet18", "vit_ti16"])
@pytest.mark.parametrize(("images", "side"), [(500, 32), (2000, 300), (1_300_000, 400)])
def test_every_objective_has_a_recipe_for_any_data(objective, backbone, images, side, tmp_path):
    asked = ["--objective", objective, "--backbone", backbone, "--data", str(tmp_path)]
    if objective == "distillation":
        asked += ["--options.teacher", "vit_s16"]
    if "checkpoint" in recipes.options_of(objective):
        with pytest.raises(UserError, match="goes on from a trained run"):
            resolved(*asked)
        asked += ["--options.checkpoint", str(tmp_path)]
    filled = resolved(*asked, images=images, side=side, classes=7)
    assert filled.recipe
    assert 1 <= filled.batch_size <= images
    assert filled.options.get("classes", 7) == 7


@pytest.mark.parametrize(
    ("backbone", "side", "size"),
    [("vit_h14", 160, 154), ("vit_s16", 160, 160), ("vit_small_patch14_dinov2", 32, 28), ("resnet18", 160, 128)],
)
def test_a_recipes_image_size_is_brought_to_the_backbones_patch(backbone, side, size, tmp_path):
    filled = resolved("--backbone", backbone, "--objective", "dino", "--data", str(tmp_path), images=9000, side=side)
    assert filled.image_size == size
    assert not [line for line in config.departures(filled) if "image-size" in line]


def test_an_objective_that_learns_from_labels_is_refused_without(tmp_path):
    with pytest.raises(UserError, match="has no labels, which --objective supervised learns from"):
        resolved("--objective", "supervised", "--data", str(tmp_path))


def test_the_learning_rate_scales_with_the_batch_unless_given(tmp_path):
    one = resolved("--data", str(tmp_path), "--batch-size", "128")
    two = resolved("--data", str(tmp_path), "--batch-size", "256")
    assert two.lr == pytest.approx(2 * one.lr)
    assert resolved("--lr", "0.5", "--batch-size", "256").lr == 0.5


def test_a_batch_larger_than_the_data_is_made_to_fit(tmp_path):
    filled = resolved("--data", str(tmp_path), "--batch-size", "512", "--workers", "2", images=101)
    assert filled.batch_size == 100


def test_the_length_of_a_run_does_not_depend_on_who_trains_it():
    filled = resolved("--batch-size", "32", "--workers", "2..4", "--epochs", "3", images=107)
    assert filled.group == (2, 4)
    assert [filled.batch_of(workers) for workers in (1, 2, 3, 4)] == [32, 32, 30, 32]
    assert filled.planned(107) == 3 * 96
    parts = dataclasses.replace(filled, accumulate=4)
    assert [parts.batch_of(workers) for workers in (1, 2, 3, 4)] == [32, 32, 24, 32]


def test_a_saved_configuration_comes_back(tmp_path):
    filled = resolved("--seed", "3", "--options.out-dim", "77")
    path = tmp_path / "config.yaml"
    for workers in (filled.workers, 2, "2..8"):
        filled = dataclasses.replace(filled, workers=workers)
        path.write_text(config.dump(filled))
        assert config.load(path) == filled
    again = asked.parse(["--config", str(path), "--lr", "0.125"])
    assert config.differences(filled, again) == [f"--lr {filled.lr} → 0.125"]


def test_a_saved_configuration_is_read_at_any_address_and_begins_a_run_of_its_own():
    filled = dataclasses.replace(resolved("--seed", "3"), run="memory://runs/one", storage="memory://runs")
    with fsspec.open("memory://runs/one/config.yaml", "w") as file:
        file.write(config.dump(filled))
    fresh = asked.parse(["--config", "memory://runs/one/config.yaml"])
    assert (fresh.run, fresh.storage, fresh.seed) == (None, None, 3)
    assert config.differences(filled, fresh) == []
    resumed = asked.parse(["--resume", "memory://runs/one/"])
    assert (resumed.run, resumed.storage, resumed.seed) == (filled.run, filled.storage, 3)
    with pytest.raises(UserError, match=r"runs/two/config\.yaml: no such file"):
        asked.parse(["--resume", "memory://runs/two"])
