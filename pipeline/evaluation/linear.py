"""Linear probe: how much of the labels can a linear classifier read off frozen features?

The classifier is trained as in the published protocols: SGD with momentum 0.9, a cosine schedule, no weight decay
(DINO's eval_linear.py, MoCo v3), on features standardised by the training set's mean and deviation (MAE's batch norm
without affine parameters, He et al. 2022, appendix A.1). No learning rate suits all backbones, so many are trained at
once in one pass over the features (DINOv2's eval/linear.py), as one wide matrix.

Nothing is chosen on the validation set. A tenth of the training set is held out to choose the learning rate and what of
a network is read (`pooling`); the classifier is then trained again on the whole training set, and meets the validation
set once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATES: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
BATCH = 256
MOMENTUM = 0.9
LEAST_STEPS = 1_000
LEAST_EPOCHS = 10
MOST_EPOCHS = 200
HELD_OUT = 0.1
MOST_HELD_OUT = 10_000
AT_ONCE = 1 << 14
"""Images whose features stand in single precision at a time where their moments are taken."""


@dataclass(frozen=True)
class Standardised:
    """A linear classifier and the standardisation in front of it.

    mean, deviation  [D], of the training features
    weight, bias     [D, C], [C]
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """The class [M] of features [M, D]."""
        return (standardise(features, self.mean, self.deviation).to(self.weight) @ self.weight + self.bias).argmax(1)

    def head(self) -> nn.Linear:
        """The same classifier as one layer, of features as they are."""
        return folded(self.mean, self.deviation, self.weight, self.bias)


@dataclass(frozen=True)
class LinearProbe(Standardised):
    """A classifier trained by descent.

    lr      the learning rate that was chosen
    by_lr   accuracy on the held-out slice of the training set for every learning rate tried
    """

    lr: float
    by_lr: dict[float, float]


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    *,
    classes: int,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train on one set, measure on another. Arguments as of `fit`, and val features [M, D] with labels [M].

    Returns:
        top1: accuracy in [0, 1]; lr: the learning rate chosen; by_lr: its competitors' held-out accuracies.
    """
    probe = fit(train_x, train_y, classes=classes, lrs=lrs, epochs=epochs, seed=seed)
    correct = probe.predict(val_x) == val_y.to(val_x.device)
    return {"top1": correct.double().mean().item(), "lr": probe.lr, "by_lr": probe.by_lr}


class Trial(NamedTuple):
    """What a classifier with one learning rate lost and got right on the held-out slice; the better, the smaller."""

    wrong: float
    loss: float

    @property
    def accuracy(self) -> float:
        return 1 - self.wrong


def fit(
    x: Tensor,
    y: Tensor,
    *,
    classes: int,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int | None = None,
    seed: int = 0,
) -> LinearProbe:
    """The probe of features [N, D] and labels [N] (0 to classes - 1), on their device.

    Args:
        lrs: learning rates to choose from, for batches of at most 256.
        epochs: passes over the features; by default 10, or more, up to 200, where those are fewer than 1,000 steps.

    Raises:
        ValueError: fewer than two images, or a label outside the classes.
    """
    by_lr = trials(x, y, classes=classes, lrs=lrs, epochs=epochs, seed=seed)
    probe = trained(x, y, classes=classes, lr=min(by_lr, key=by_lr.__getitem__), epochs=epochs, seed=seed)
    return replace(probe, by_lr={lr: trial.accuracy for lr, trial in by_lr.items()})


def trials(
    x: Tensor,
    y: Tensor,
    *,
    classes: int,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int | None = None,
    seed: int = 0,
) -> dict[float, Trial]:
    """How every learning rate does on a held-out slice, always the same of as many images; arguments as of `fit`.

    Many may tie on a small slice: the least loss then decides between them.
    """
    if len(x) < 2 or len(x) != len(y):
        raise ValueError(f"a linear probe needs at least 2 images and a label for each, not {len(x)} and {len(y)}")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"labels {int(y.min())} to {int(y.max())} do not fit {classes} classes, numbered from 0")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held = min(max(1, round(HELD_OUT * len(x))), MOST_HELD_OUT)
    aside, kept = order[:held], order[held:]
    scale = moments(x[kept])
    weight, bias = descend(x[kept], y[kept], classes, lrs, epochs, seed, scale)
    inputs = standardise(x[aside], *scale)
    found = {}
    for lr, w, b in zip(lrs, weight, bias):
        logits = inputs @ w + b
        if bool(logits.isfinite().all()):
            right = (logits.argmax(1) == y[aside]).double().mean().item()
            found[lr] = Trial(1 - right, F.cross_entropy(logits, y[aside]).item())
        else:
            found[lr] = Trial(1.0, math.inf)
    return found


def near(lr: float) -> tuple[float, ...]:
    """Of the learning rates those that other features of the same network may want, which are wider: two fifths of the
    time of the probes of a ViT-S/16 are saved by trying no others."""
    i = LEARNING_RATES.index(lr)
    return LEARNING_RATES[max(0, i - 2) : i + 2]


def trained(
    x: Tensor, y: Tensor, *, classes: int, lr: float, epochs: int | None = None, seed: int = 0
) -> LinearProbe:  # fmt: skip
    """The probe of one learning rate on all images; arguments as of `fit`."""
    scale = moments(x)
    weight, bias = descend(x, y, classes, [lr], epochs, seed, scale)
    return LinearProbe(*scale, weight[0], bias[0], lr, {})


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of features [N, D] of any precision; a feature that hardly varies keeps its
    scale."""
    parts = x.split(AT_ONCE)
    mean = torch.stack([part.float().sum(0) for part in parts]).sum(0) / len(x)
    variance = torch.stack([(part.float() - mean).square().sum(0) for part in parts]).sum(0) / len(x)
    return mean, (variance + 1e-6 * variance.mean() + 1e-12).sqrt()


def standardise(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Features [N, D] with each column's mean [D] taken off and its deviation [D] divided out."""
    return (x.float() - mean) / deviation


def folded(mean: Tensor, deviation: Tensor, weight: Tensor, bias: Tensor) -> nn.Linear:
    """standardise(x) @ weight + bias as one float32 layer; mean and deviation [D], weight [D, C], bias [C]."""
    weight = weight.double() / deviation.double()[:, None]
    layer = nn.Linear(len(weight), weight.shape[1], device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(bias.double() - mean.double() @ weight)
    return layer


def descend(
    x: Tensor,
    y: Tensor,
    classes: int,
    lrs: Sequence[float],
    epochs: int | None,
    seed: int,
    scale: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Softmax regression from zero by SGD, for L learning rates at once: weight [L, D, C] and bias [L, C].

    The gradient of the cross-entropy is written out: softmax minus one-hot, times the input.

    Args:
        x: features [N, D] of any precision, standardised by `scale`, mean and deviation [D], as they are taken: many
            images in half precision never stand in memory in another.
    """
    n, d, many = len(x), x.shape[1], len(lrs)
    batch = min(BATCH, n)
    per_epoch = n // batch
    epochs = epochs or min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / per_epoch)))
    steps = epochs * per_epoch
    peak = scale[0].new_tensor(lrs).view(1, many, 1)
    theta, velocity = peak.new_zeros(d + 1, many, classes), peak.new_zeros(d + 1, many, classes)
    target = F.one_hot(y, classes).to(peak.dtype)[:, None]
    one = peak.new_ones(batch, 1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(n, generator=generator).to(x.device)
        chosen = order[(step % per_epoch) * batch :][:batch]
        inputs = torch.cat([standardise(x[chosen], *scale), one], dim=1)
        error = (inputs @ theta.flatten(1)).view(-1, many, classes).softmax(dim=2) - target[chosen]
        gradient = (inputs.T @ error.flatten(1)).view_as(theta) / batch
        velocity.mul_(MOMENTUM).add_(gradient)
        theta.sub_(peak * (0.5 * (1 + math.cos(math.pi * step / steps))) * velocity)
    return theta[:-1].transpose(0, 1).contiguous(), theta[-1]
