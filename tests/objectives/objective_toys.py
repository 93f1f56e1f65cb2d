"""A small backbone of the contract, images of a few separable kinds, and a bare training loop, for the tests."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.contract import Objective
from objectives.views import View


class Features(NamedTuple):
    pooled: Tensor
    cells: Tensor
    layers: tuple[Tensor, ...] = ()


class ToyBackbone(nn.Module):
    """Cells of 8 pixels: patches, `mix` over the visible ones, mean pooling."""

    name, stride, in_channels, pool = "toy", 8, 3, "mean"

    def __init__(self, width: int = 32, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.width = width
        self.patch = nn.Linear(8 * 8 * 3, width)
        self.position = nn.Linear(2, width)
        self.norm1 = norm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm2 = norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm3 = norm(width)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height % 8 or width % 8 or min(height, width) < 8:
            raise ValueError(f"toy needs multiples of 8 pixels, not {height}x{width}")
        return height // 8, width // 8

    def depths(self) -> dict[str, int]:
        return {name: int(not name.startswith(("patch", "position"))) for name, _ in self.named_parameters()}

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Features:
        h, w = self.grid(*images.shape[-2:])
        x = F.unfold(images, 8, stride=8).transpose(1, 2)
        rows, columns = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij")
        position = torch.stack([rows, columns], -1).view(-1, 2).to(x)
        x = self.patch(x) + self.position(position)
        if visible is not None:
            x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
        y = self._norm(self.norm1, x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = self._norm(self.norm3, x + self.mlp(self._norm(self.norm2, x)))
        return Features(x.mean(1), x)

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.flatten(0, 1)).view_as(x) if isinstance(norm, nn.BatchNorm1d) else norm(x)


def toy_images(n: int, size: int = 32, kinds: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n images [n, 3, size, size] and their kind [n]: gratings of `kinds` orientations, any phase, in some light.

    Orientation is the only thing that tells a kind; raw pixels of a kind are hardly correlated.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(kinds, (n,), generator=generator)
    angle = kind * torch.pi / kinds + 0.08 * torch.randn(n, generator=generator)
    phase = 2 * torch.pi * torch.rand(n, generator=generator)
    wavelength = 5 + 2 * torch.rand(n, generator=generator)
    y, x = torch.meshgrid(torch.arange(size) * 1.0, torch.arange(size) * 1.0, indexing="ij")
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    wave = (2 * torch.pi * along / wavelength[:, None, None] + phase[:, None, None]).sin()
    light = 0.2 * torch.randn(n, 3, 1, 1, generator=generator)
    noise = 0.3 * torch.randn(n, 3, size, size, generator=generator)
    return wave[:, None] + light + noise, kind


def window(n: int, view: View) -> Tensor:
    """Where the crops of n images are: affine maps [n, 2, 3]."""
    low, high = view.scale or (1.0, 1.0)
    side = (low + (high - low) * torch.rand(n)).sqrt()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = (1 - side)[:, None] * (2 * torch.rand(n, 2) - 1)
    return theta


def crop(images: Tensor, view: View, theta: Tensor) -> Tensor:
    """A random resized crop for each image, mirrored never (a mirror would change the orientation), with new light."""
    n = len(images)
    grid = F.affine_grid(theta, [n, images.shape[1], *view.size], align_corners=False)
    out = F.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    if view.photometric:
        out = out * (0.7 + 0.6 * torch.rand(n, images.shape[1], 1, 1)) + 0.5 * torch.randn(n, images.shape[1], 1, 1)
    return out


def batches(images: Tensor, views: Sequence[View], batch_size: int, steps: int) -> Iterator[list[Tensor]]:
    for _ in range(steps):
        chosen = images[torch.randint(len(images), (batch_size,))]
        windows: dict[str, Tensor] = {}
        cut = []
        for view in views:
            windows[view.name] = windows[view.crop_of] if view.crop_of else window(batch_size, view)
            cut.append(crop(chosen, view, windows[view.name]))
        yield cut


def train(
    objective: Objective, images: Tensor, *, steps: int, batch_size: int = 32, lr: float = 1e-3, planned: int = 0
) -> list[dict[str, float]]:
    """Train as the contract says and return each step's scalars, with the loss among them."""
    groups = [
        {"params": g["params"], "lr": lr * g["lr_scale"], "weight_decay": 0.05 * g["wd_scale"]}
        for g in objective.parameter_groups()
    ]
    optimiser = torch.optim.AdamW(groups)
    objective.train()
    history = []
    for step, views in enumerate(batches(images, objective.views, batch_size, steps)):
        progress = step / (planned or steps)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (0.1 * (planned or steps)))
        loss, scalars = objective(views, progress)
        optimiser.zero_grad()
        loss.backward()
        objective.after_backward(progress)
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 3.0)
        optimiser.step()
        objective.after_step(progress)
        history.append({"loss": loss.item(), **{k: v.item() for k, v in scalars.items()}})
    return history


@torch.no_grad()
def knn(backbone: nn.Module, images: Tensor, kinds: Tensor, k: int = 10) -> float:
    """Leave-one-out accuracy of the k nearest neighbours by cosine."""
    backbone.eval()
    x = F.normalize(torch.cat([backbone(part).pooled for part in images.split(128)]), dim=-1)
    near = (x @ x.T).fill_diagonal_(-1).topk(k, dim=1).indices
    return (kinds[near].mode(dim=1).values == kinds).float().mean().item()


def sick(objective: Objective, history: list[dict[str, float]], last: int = 20) -> set[str]:
    """Names of the vital signs whose mean over the last steps is outside of its healthy range."""
    mean = {k: sum(h[k] for h in history[-last:]) / len(history[-last:]) for k in history[-1]}
    return {s.name for s in objective.vital_signs if not s.low <= mean[s.name] <= s.high}
