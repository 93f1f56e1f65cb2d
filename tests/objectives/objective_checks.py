"""What the tests of several objectives ask of each."""

import copy
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from objective_toys import Features, ToyBackbone, knn, sick, toy_images, train
from torch import Tensor, nn

import backbones
from objectives.contract import Objective


class ToyCNN(nn.Module):
    """Three strided convolutions with batch norm, mean pooling: quick enough to train within a test."""

    name, width, stride, in_channels, pool = "toy_cnn", 48, 8, 3, "mean"

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 32, self.width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in pairwise(widths)
            )
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def depths(self) -> dict[str, int]:
        return {name: int(name.split(".")[1]) for name, _ in self.named_parameters()}

    def forward(self, images: Tensor) -> Features:
        cells = self.stages(images).flatten(2).transpose(1, 2)
        return Features(cells.mean(1), cells)


def toy(kind: str) -> nn.Module:
    """The toy of a kind, "vit" or "cnn"."""
    torch.manual_seed(0)
    return ToyBackbone() if kind == "vit" else ToyCNN()


PARITY: list[tuple[str, str, float]] = []
"""What the running test compared: "loss" or "gradient", with whose, and the error."""


def relative(ours: Tensor, theirs: np.ndarray | Tensor | float, *, loss_of: str = "", gradient_of: str = "") -> float:
    """The largest error, as a share of the largest value.

    Args:
        loss_of, gradient_of: whose `theirs` is, for the table that is printed at the end of the test run.
    """
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    error = ((ours.detach().double() - theirs).abs().max() / theirs.abs().max()).item()
    PARITY.extend((what, oracle, error) for what, oracle in (("loss", loss_of), ("gradient", gradient_of)) if oracle)
    return error


def softmax(scores: np.ndarray) -> np.ndarray:
    """Of a vector, in its own precision."""
    e = np.exp(scores - scores.max())
    return e / e.sum()


def random_views(objective: Objective, batch: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = objective.backbone.in_channels
    return [torch.randn(batch, channels, *view.size, generator=generator) for view in objective.views]


def step(objective: Objective, optimiser: torch.optim.Optimizer, i: int) -> float:
    torch.manual_seed(i)
    loss, _ = objective(random_views(objective, seed=i), i / 10)
    optimiser.zero_grad()
    loss.backward()
    objective.after_backward(i / 10)
    optimiser.step()
    objective.after_step(i / 10)
    return loss.item()


def continues_exactly(make: Callable[[], Objective]) -> None:
    """After three steps, `state_dict` into a fresh objective gives the same next losses to the last bit."""

    def fresh() -> tuple[Objective, torch.optim.Optimizer]:
        objective = make()
        return objective, torch.optim.AdamW(objective.parameter_groups(), lr=1e-3)

    objective, optimiser = fresh()
    for i in range(3):
        step(objective, optimiser, i)
    saved = copy.deepcopy((objective.state_dict(), optimiser.state_dict()))
    losses = [step(objective, optimiser, i) for i in range(3, 6)]
    again, optimiser = fresh()
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.zero_()
    again.load_state_dict(saved[0])
    optimiser.load_state_dict(saved[1])
    assert [step(again, optimiser, i) for i in range(3, 6)] == losses
    assert len(set(losses)) == 3


def learns_with_every_parameter(objective: Objective) -> None:
    """Each trainable parameter gets a gradient and stands in one group; norms and biases do not decay."""
    loss, scalars = objective(random_views(objective), 0.5)
    loss.backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    groups = objective.parameter_groups()
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(trainable)
    assert all((p.ndim > 1) == bool(g["wd_scale"]) for g in groups for p in g["params"])
    assert all(not s.requires_grad and s.shape == () and s.isfinite() for s in scalars.values())
    assert {sign.name for sign in objective.vital_signs} <= set(scalars)


def is_near_itself_in_bf16(objective: Objective, share: float = 0.05) -> None:
    """Under autocast the loss is float32 and off by less than a `share` of itself, gradients are finite."""
    views = random_views(objective)
    torch.manual_seed(0)
    exact, _ = objective(views, 0.5)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, scalars = objective(views, 0.5)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < share * max(1, abs(exact))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
    assert all(s.isfinite() for s in scalars.values())


def takes_any_images(make: Callable[..., Objective]) -> None:
    """One and twelve channels, oblong images, a CNN and a ViT; `make(backbone, image_size=...)`."""
    for name, channels, size in (("lenet5", 1, (32, 48)), ("vit_ti8", 12, (24, 40))):
        backbone = backbones.create(name, image_size=size, in_channels=channels)
        objective = make(backbone, image_size=size)
        assert objective.views[0].size == size
        loss, _ = objective(random_views(objective, batch=3), 0.0)
        loss.backward()
        assert loss.isfinite()


def takes_a_shape(objective: Objective, batch: int) -> None:
    """The channels and the size that it was made for, and a batch of one."""
    loss, scalars = objective(random_views(objective, batch), 0.0)
    assert loss.isfinite()
    assert all(s.isfinite() and not s.requires_grad for s in scalars.values())


def keeps_what_all_keep(make: Callable[..., Objective]) -> None:
    """What holds for every objective that compares the images of a batch."""
    learns_with_every_parameter(make())
    continues_exactly(make)
    is_near_itself_in_bf16(make())
    evaluation_moves_nothing(make())
    takes_any_images(make)
    refuses_a_single_image(make())


def evaluation_moves_nothing(objective: Objective) -> None:
    """Neither buffers nor parameters, but for the rounding of a teacher that follows by nothing."""
    objective.eval()
    before = copy.deepcopy(objective.state_dict())
    objective(random_views(objective), 0.5)
    objective.after_step(1.0)
    changed = {k for k, v in objective.state_dict().items() if not torch.allclose(v, before[k], rtol=1e-6, atol=1e-6)}
    assert not changed


def refuses_a_single_image(objective: Objective) -> None:
    with pytest.raises(ValueError, match=f"{type(objective).__name__} compares the images of a batch and got a single"):
        objective(random_views(objective, batch=1), 0.0)
    assert objective.eval()(random_views(objective, batch=1), 0.0)[0].isfinite()


def lifts_knn(make: Callable[..., Objective], kind: str, *, steps: int, lr: float = 2e-3) -> tuple[float, float]:
    """k-NN accuracy of a toy before and after training on gratings; the vital signs stay quiet."""
    objective = make(toy(kind), image_size=32)
    images = toy_images(512)[0]
    test, test_kinds = toy_images(200, seed=1)
    before = knn(objective.backbone, test, test_kinds)
    history = train(objective, images, steps=steps, lr=lr)
    assert sick(objective, history) == set()
    return before, knn(objective.backbone, test, test_kinds)


def collapsed(objective: Objective, *, steps: int, lr: float = 2e-3) -> set[str]:
    """Vital signs that trip when the objective is trained on gratings."""
    return sick(objective, train(objective, toy_images(512)[0], steps=steps, lr=lr))
