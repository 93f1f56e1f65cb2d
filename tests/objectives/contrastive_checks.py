"""What holds for every objective, as checks that the tests of each call with its own options."""

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from objective_toys import Features, knn, toy_images, train
from torch import Tensor, nn
from torch.nn import functional as F

import backbones
import objectives
from objectives.contract import Objective


class ToyCNN(nn.Module):
    """Cells of 8 pixels: four convolutions with batch norm, mean pooling."""

    name, stride, in_channels, pool = "toy_cnn", 8, 3, "mean"

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        widths = [3, width // 2, width, width, width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2 if i < 3 else 1, 1, bias=False), nn.BatchNorm2d(n_out))
            for i, (n_in, n_out) in enumerate(pairwise(widths))
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def depths(self) -> dict[str, int]:
        return {name: int(name.split(".")[1]) for name, _ in self.named_parameters()}

    def forward(self, images: Tensor) -> Features:
        for stage in self.stages:
            images = F.relu(stage(images))
        cells = images.flatten(2).transpose(1, 2)
        return Features(cells.mean(1), cells)


def relative(ours: Tensor, theirs: object) -> float:
    """The largest error over the largest value."""
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    return ((ours.detach().double() - theirs).abs().max() / theirs.abs().max()).item()


def random_views(objective: Objective, batch: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = objective.backbone.in_channels
    return [torch.randn(batch, channels, *view.size, generator=generator) for view in objective.views]


def check_every_trainable_parameter_learns(objective: Objective, progress: float = 0.5) -> None:
    """Each gets a gradient, the frozen ones none; each is optimised once, and decays if it is a matrix."""
    objective(random_views(objective), progress)[0].backward()
    trainable = sorted(id(p) for p in objective.parameters() if p.requires_grad)
    assert trainable == sorted(id(p) for p in objective.parameters() if p.grad is not None)
    groups = objective.parameter_groups()
    assert trainable == sorted(id(p) for g in groups for p in g["params"])
    assert all((p.ndim > 1) == bool(g["wd_scale"]) for g in groups for p in g["params"])


def check_exact_continuation(make: Callable[[], Objective]) -> None:
    """A fresh objective with a checkpoint's state goes on to the last bit."""

    def step(objective: Objective, optimiser: torch.optim.Optimizer, i: int) -> float:
        loss, _ = objective(random_views(objective, seed=i), i / 6)
        optimiser.zero_grad()
        loss.backward()
        objective.after_backward(i / 6)
        optimiser.step()
        objective.after_step(i / 6)
        return loss.item()

    def fresh() -> tuple[Objective, torch.optim.Optimizer]:
        objective = make()
        return objective, torch.optim.AdamW(objective.parameter_groups(), lr=1e-2)

    objective, optimiser = fresh()
    losses = [step(objective, optimiser, i) for i in range(3)]
    saved = copy.deepcopy((objective.state_dict(), optimiser.state_dict()))
    losses += [step(objective, optimiser, i) for i in range(3, 6)]
    again, optimiser = fresh()
    with torch.no_grad():
        for state in [*again.parameters(), *again.buffers()]:
            state.zero_()
    again.load_state_dict(saved[0])
    optimiser.load_state_dict(saved[1])
    assert [step(again, optimiser, i) for i in range(3, 6)] == losses[3:]
    assert len(set(losses)) == 6


def check_half_precision(objective: Objective, tolerance: float = 0.05) -> None:
    """Under bf16 autocast the loss is float32, near the exact one, and all gradients are finite."""
    views = random_views(objective)
    exact, _ = objective(views, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, scalars = objective(views, 0.5)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < tolerance * exact.abs()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
    assert all(s.isfinite() and s.shape == () and not s.requires_grad for s in scalars.values())


def check_evaluation_moves_nothing(objective: Objective) -> None:
    """Neither buffers nor parameters change in evaluation mode."""
    objective.eval()
    before = copy.deepcopy(objective.state_dict())
    objective(random_views(objective), 0.5)
    objective.after_step(1.0)
    changed = {k for k, v in objective.state_dict().items() if not torch.allclose(v, before[k], rtol=1e-6, atol=1e-6)}
    assert not changed


def check_channels_and_shapes(name: str, options: dict, backbone: str = "lenet5") -> None:
    """1 and 12 channels, an oblong image of no usual size."""
    for channels, size in ((1, (32, 48)), (12, (96, 32))):
        torch.manual_seed(0)
        net = backbones.create(backbone, image_size=size, in_channels=channels)
        objective = objectives.create(name, net, image_size=size, **options)
        assert objective.views[0].size == size
        loss, scalars = objective(random_views(objective, batch=3), 0.5)
        loss.backward()
        assert loss.isfinite()
        assert all(s.isfinite() for s in scalars.values())


def lift(objective: Objective, steps: int, lr: float, size: int = 32) -> tuple[float, list[dict[str, float]]]:
    """k-NN accuracy on unseen toy images, less that of the untrained backbone; and the history."""
    images, kinds = toy_images(384, size, seed=1)
    floor = knn(objective.backbone, images, kinds)
    history = train(objective, toy_images(384, size)[0], steps=steps, lr=lr)
    return knn(objective.backbone, images, kinds) - floor, history
