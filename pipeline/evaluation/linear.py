"""Linear probe: how much of the labels can a linear classifier read off frozen features?

The classifier is trained as in the published protocols: SGD with momentum 0.9, a cosine schedule, no weight decay
(DINO's eval_linear.py, MoCo v3), on features standardised by the training set's mean and deviation (MAE's batch norm
without affine parameters, He et al. 2022, appendix A.1). No learning rate suits all backbones, so many are trained at
once in one pass over the features (DINOv2's eval/linear.py), as one wide matrix.

Nothing is chosen on the validation set. A tenth of the training set is held out to choose the learning rate; the
classifier is then trained again with it on the whole training set, and meets the validation set once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
BATCH = 256
MOMENTUM = 0.9
LEAST_STEPS = 1_000
LEAST_EPOCHS = 10
MOST_EPOCHS = 200
HELD_OUT = 0.1
MOST_HELD_OUT = 10_000


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
    if len(x) < 2 or len(x) != len(y):
        raise ValueError(f"a linear probe needs at least 2 images and a label for each, not {len(x)} and {len(y)}")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"labels {int(y.min())} to {int(y.max())} do not fit {classes} classes, numbered from 0")
    x = x.float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held = min(max(1, round(HELD_OUT * len(x))), MOST_HELD_OUT)
    aside, kept = order[:held], order[held:]

    mean, deviation = moments(x[kept])
    weight, bias = descend(standardise(x[kept], mean, deviation), y[kept], classes, lrs, epochs, seed)
    logits = torch.einsum("nd,ldc->lnc", standardise(x[aside], mean, deviation), weight) + bias[:, None]
    finite = logits.isfinite().all(dim=2).all(dim=1)
    accuracy = (logits.argmax(dim=2) == y[aside]).double().mean(dim=1) * finite
    loss = torch.stack([F.cross_entropy(one, y[aside]) for one in logits])
    # Many learning rates may tie on a small slice: the least loss decides between them.
    best = min(range(len(lrs)), key=lambda i: (-float(accuracy[i]), float(loss[i]) if finite[i] else math.inf))

    mean, deviation = moments(x)
    weight, bias = descend(standardise(x, mean, deviation), y, classes, [lrs[best]], epochs, seed)
    by_lr = {lr: float(a) for lr, a in zip(lrs, accuracy)}
    return LinearProbe(mean, deviation, weight[0], bias[0], lrs[best], by_lr)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of features [N, D]; a feature that hardly varies keeps its scale."""
    variance = x.var(dim=0, unbiased=False)
    return x.mean(dim=0), (variance + 1e-6 * variance.mean() + 1e-12).sqrt()


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
    x: Tensor, y: Tensor, classes: int, lrs: Sequence[float], epochs: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Softmax regression from zero by SGD, for L learning rates at once: weight [L, D, C] and bias [L, C].

    The gradient of the cross-entropy is written out: softmax minus one-hot, times the input.
    """
    n, d, many = len(x), x.shape[1], len(lrs)
    batch = min(BATCH, n)
    per_epoch = n // batch
    epochs = epochs or min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / per_epoch)))
    steps = epochs * per_epoch
    peak = x.new_tensor(lrs).view(1, many, 1)
    theta, velocity = x.new_zeros(d + 1, many, classes), x.new_zeros(d + 1, many, classes)
    x = torch.cat([x, x.new_ones(n, 1)], dim=1)
    target = F.one_hot(y, classes).to(x.dtype)[:, None]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(n, generator=generator).to(x.device)
        chosen = order[(step % per_epoch) * batch :][:batch]
        inputs = x[chosen]
        error = (inputs @ theta.flatten(1)).view(-1, many, classes).softmax(dim=2) - target[chosen]
        gradient = (inputs.T @ error.flatten(1)).view_as(theta) / batch
        velocity.mul_(MOMENTUM).add_(gradient)
        theta.sub_(peak * (0.5 * (1 + math.cos(math.pi * step / steps))) * velocity)
    return theta[:-1].transpose(0, 1).contiguous(), theta[-1]
