"""The worked example of CONTRIBUTING.md keeps the contract."""

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from objective_checks import (
    continues_exactly,
    learns_with_every_parameter,
    lifts_knn,
    random_views,
    relative,
    takes_any_images,
    toy,
)
from torch import Tensor
from two_ranks import on_two_ranks

from objectives.contract import Objective
from objectives.distributed import mean_over_ranks
from pipeline.recipes import SCALES, Recipe

ROOT = Path(__file__).resolve().parents[2]
BATCH = 32
"""Above 25, where `torch.cdist` multiplies matrices and finds a row a little away from itself."""


def example() -> list[dict[str, Any]]:
    """The names that the objective and the recipe define."""
    modules = []
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL):
        modules.append({})
        exec(compile(code, "CONTRIBUTING.md", "exec"), modules[-1])
    return modules


OBJECTIVE, RECIPE = example()
AlignUniform = OBJECTIVE["AlignUniform"]


def make() -> Objective:
    torch.manual_seed(0)
    return AlignUniform(toy("vit"), image_size=32, out_dim=16)


def paper(z: np.ndarray, weight: float) -> tuple[float, np.ndarray]:
    """Alignment and uniformity (sec. 4.1) of embeddings z [2, B, K], and the gradient to them."""
    length = np.linalg.norm(z, axis=2, keepdims=True)
    sphere = z / length
    x, y = sphere
    loss = ((x - y) ** 2).sum() / len(x)
    gradient = np.stack([2 * (x - y), 2 * (y - x)]) / len(x)
    for view, f in enumerate(sphere):
        total, slope = 0.0, np.zeros_like(f)
        for i in range(len(f)):
            for j in range(len(f)):
                if i != j:
                    potential = np.exp(-2 * ((f[i] - f[j]) ** 2).sum())
                    total += potential
                    slope[i] -= 8 * potential * (f[i] - f[j])
        loss += weight / 2 * np.log(total / (len(f) * (len(f) - 1)))
        gradient[view] += weight / 2 * slope / total
    tangent = gradient - sphere * (sphere * gradient).sum(2, keepdims=True)
    return loss, tangent / length


def test_loss_and_gradient_of_the_example_equal_the_papers() -> None:
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(2, BATCH, 16))).float().requires_grad_()
    x, y = torch.nn.functional.normalize(z, dim=-1)
    ours = OBJECTIVE["alignment"](x, y) + 0.5 * (OBJECTIVE["uniformity"](x) + OBJECTIVE["uniformity"](y)) / 2
    ours.backward()
    loss, gradient = paper(z.detach().double().numpy(), 0.5)
    assert relative(ours, loss) <= 1e-5
    assert relative(z.grad, gradient) <= 1e-5


def test_a_whole_step_of_the_example_equals_the_papers() -> None:
    objective = make()
    views = random_views(objective, batch=BATCH)
    with torch.no_grad():
        z = torch.stack([objective.encoder(view)[0] for view in views])
    assert relative(objective(views, 0.5)[0], paper(z.double().numpy(), 1.0)[0]) <= 1e-5


def train(rank: int, world: int) -> dict[str, Tensor]:
    objective = make().double()
    views = [view.double().chunk(world)[rank] for view in random_views(objective, batch=BATCH)]
    loss, _ = objective(views, 0.5)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in objective.parameters()])
    return {"loss": mean_over_ranks(loss), "gradient": mean_over_ranks(gradient)}


def of_two(rank: int) -> dict[str, Tensor]:
    return train(rank, 2)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list:
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), of_two)


def test_the_example_on_two_ranks_equals_one_with_the_joined_batch(two_ranks: list) -> None:
    alone = train(0, 1)
    for what, value in alone.items():
        assert all(relative(together[what], value) <= 1e-9 for together in two_ranks), what


def test_the_example_keeps_the_contract() -> None:
    continues_exactly(make)
    learns_with_every_parameter(make())
    takes_any_images(lambda backbone, image_size: AlignUniform(backbone, image_size=image_size, out_dim=16))


def test_the_example_learns() -> None:
    before, after = lifts_knn(AlignUniform, "cnn", steps=40)
    assert after > before + 0.03


def test_the_examples_recipe_is_one_of_the_example() -> None:
    parameters = inspect.signature(AlignUniform).parameters
    published = RECIPE["options"]()
    assert published == {name: p.default for name, p in parameters.items() if name not in ("backbone", "image_size")}
    assert {("cnn", "small"), ("vit", "small"), ("cnn", "embedded"), ("vit", "embedded")} == set(RECIPE["RECIPES"])
    for (_, scale), recipe in RECIPE["RECIPES"].items():
        assert scale in SCALES
        assert isinstance(recipe, Recipe)
        made = AlignUniform(toy("cnn"), image_size=recipe.image_size, **recipe.options)
        assert made(random_views(made, batch=2), 0.0)[0].isfinite()
