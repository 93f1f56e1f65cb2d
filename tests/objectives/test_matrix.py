"""Every objective on every kind of backbone: one optimiser step, all gradients, a checkpoint's round trip, bf16.

The outcome is printed as a grid at the end of the test run.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_objective import make, save_run, some_labels, some_views
from torch import Tensor

import backbones
import objectives
from objectives.contract import Objective

BACKBONES = {
    "lenet5": 32, "vgg11_bn": 32, "googlenet": 32, "resnet18": 32, "efficientnet_b0": 32, "convnext_atto": 32,
    "vit_ti16": 64, "swin_tiny_patch4_window7_224": 64,
}  # fmt: skip
"""Image size of each, in pixels: the smallest at which it has several cells."""

QUICK = ("lenet5", "vit_ti16")
"""Those on which bf16 is tested every time: without hardware for it, convolutions take seconds each."""


@pytest.fixture(scope="module")
def fresh() -> Callable[[str, str | None], backbones.Backbone]:
    """Backbones are made once and copied."""
    made: dict[tuple[str, str | None], backbones.Backbone] = {}

    def backbone(name: str, pool: str | None) -> backbones.Backbone:
        pool = pool if pool != "cls" or name.startswith("vit") else None
        if (name, pool) not in made:
            torch.manual_seed(0)
            made[name, pool] = backbones.create(name, image_size=BACKBONES[name], pool=pool)
        return copy.deepcopy(made[name, pool])

    return backbone


def loss_of(objective: Objective, progress: float) -> Tensor:
    torch.manual_seed(1)
    loss, scalars = objective(some_views(objective, 4), progress, *some_labels(objective, 4))
    assert loss.isfinite()
    assert all(value.isfinite() for value in scalars.values())
    return loss


def objective_on(name: str, backbone: str, fresh, folder: Path) -> Callable[[], Objective]:
    """Makes the same objective again and again; what goes on from a run gets one of DINO."""
    kind, size, options = objectives.objective(name), BACKBONES[backbone], {}
    if kind.continues:
        base = make("dino", fresh(backbone, None), size)
        options["checkpoint"] = save_run(folder / "run", base, "dino", size)

    def objective() -> Objective:
        torch.manual_seed(0)
        return make(name, fresh(backbone, kind.pool), size, **options)

    return objective


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", objectives.NAMES)
def test_one_step_on(name: str, backbone: str, fresh, tmp_path: Path, record_property) -> None:
    record_property("cell", (name, backbone, "step"))  # of the grid that is printed at the end
    objective = objective_on(name, backbone, fresh, tmp_path)
    trained = objective()
    optimiser = torch.optim.SGD(trained.parameter_groups(), lr=1e-3)
    loss_of(trained, 0.5).backward()
    without = [key for key, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient reaches {without[:5]}"
    trained.after_backward(0.5)
    optimiser.step()
    optimiser.zero_grad()
    trained.after_step(0.5)

    again = objective()
    again.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(loss_of(again, 0.75), loss_of(trained, 0.75))


@pytest.mark.parametrize("backbone", [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in BACKBONES])
@pytest.mark.parametrize("name", objectives.NAMES)
def test_bf16_on(name: str, backbone: str, fresh, tmp_path: Path, record_property) -> None:
    record_property("cell", (name, backbone, "bf16"))
    objective = objective_on(name, backbone, fresh, tmp_path)()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(objective, 0.5).backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
