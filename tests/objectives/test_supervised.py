"""The supervised yardstick against the paper's equation in float64, and its behaviour around labels."""

import math

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import random_views, relative
from objective_toys import ToyBackbone, crop, knn, sick, toy_images, window
from torch import Tensor, nn

import objectives
from objectives.supervised import Supervised, classification_loss

SMALL = {"classes": 5}


def small(backbone: nn.Module | None = None, image_size: object = 32, **options: object) -> Supervised:
    torch.manual_seed(0)
    return Supervised(backbone or ToyBackbone(), image_size=image_size, **{**SMALL, **options})


class WithLabels(Supervised):
    """Fed labels of its own, so that what every objective is asked can be asked of it."""

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> tuple:
        return super().forward(views, progress, torch.arange(len(views[0])) % 5)


def labelled(backbone: nn.Module | None = None, image_size: object = 32) -> WithLabels:
    torch.manual_seed(0)
    return WithLabels(backbone or ToyBackbone(), image_size=image_size, **SMALL)


def paper(scores: np.ndarray, labels: list[int], epsilon: float) -> tuple[float, np.ndarray]:
    """Cross-entropy with smoothed targets over the labelled images, and its gradient to the scores."""
    known = [b for b, label in enumerate(labels) if label >= 0]
    loss, gradient = 0.0, np.zeros_like(scores)
    for b in known:
        p = np.exp(scores[b] - scores[b].max())
        p /= p.sum()
        target = np.full(len(p), epsilon / len(p))
        target[labels[b]] += 1 - epsilon
        loss -= sum(q * math.log(r) for q, r in zip(target, p)) / len(known)
        gradient[b] = (p - target) / len(known)
    return loss, gradient


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_loss_and_gradient_equal_the_papers_and_skip_the_unlabelled(epsilon: float) -> None:
    scores, labels = np.random.default_rng(0).normal(size=(6, 5)), [3, -1, 0, 4, -1, 3]
    loss, gradient = paper(scores, labels, epsilon)
    x = torch.tensor(scores, dtype=torch.float32, requires_grad=True)
    ours = classification_loss(x, torch.tensor(labels), epsilon)
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(x.grad, gradient, gradient_of="the paper") <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: classification_loss(x, torch.tensor([2, -1, 0, 1]), 0.1), (scores,))


def test_a_whole_step_equals_the_papers() -> None:
    objective = small().double()
    views, labels = [view.double() for view in random_views(objective)], torch.tensor([0, 1, -1, 4, 2, 2])
    scores = objective.classifier(objective.encoder(views[0]).pooled).detach()
    loss, scalars = objective(views, 0.5, labels)
    assert relative(loss, paper(scores.numpy(), labels.tolist(), 0.1)[0], loss_of="the paper") <= 1e-12
    right = [int(row.argmax()) == int(label) for row, label in zip(scores, labels) if label >= 0]
    assert scalars["accuracy"].item() == pytest.approx(sum(right) / 5)
    assert scalars["labelled"].item() == pytest.approx(5 / 6)


def test_a_batch_without_labels_teaches_nothing_and_breaks_nothing() -> None:
    objective = small()
    loss, scalars = objective(random_views(objective), 0.0, torch.full((6,), -1))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in objective.parameters() if p.requires_grad)
    assert scalars["labelled"].item() < objective.vital_signs[0].low


def test_labels_and_classes_are_asked_for() -> None:
    with pytest.raises(ValueError, match="labels of at least 2 classes, not None; give it classes="):
        Supervised(ToyBackbone(), image_size=32)
    with pytest.raises(ValueError, match="was given no labels"):
        small()(random_views(small()), 0.0)
    assert Supervised.labelled


def test_the_view_is_a_crop_with_jitter_or_without() -> None:
    (view,) = Supervised(ToyBackbone(), image_size=224, classes=2).views
    assert (view.size, view.scale, view.flip_p) == ((224, 224), (0.08, 1.0), 0.5)
    assert (view.photometric.brightness, view.photometric.jitter_p, view.photometric.gray_p) == (0.4, 1.0, 0.0)
    assert small(jitter=(0.0, 0.0, 0.0, 0.0)).views[0].photometric is None


def test_what_every_objective_keeps() -> None:
    check.learns_with_every_parameter(labelled())
    check.continues_exactly(labelled)
    check.is_near_itself_in_bf16(labelled())
    check.evaluation_moves_nothing(labelled())
    check.takes_any_images(labelled)
    assert labelled()(random_views(labelled(), batch=1), 0.0)[0].isfinite()
    assert isinstance(objectives.create("supervised", ToyBackbone(), image_size=32, **SMALL), Supervised)


def learn(objective: Supervised, steps: int) -> list[dict[str, float]]:
    """The scalars of each step on labelled gratings."""
    images, kinds = toy_images(512)
    (view,) = objective.views
    optimiser = torch.optim.AdamW(objective.parameter_groups(), lr=2e-3)
    objective.train()
    history = []
    for i in range(steps):
        chosen = torch.randint(len(images), (32,))
        loss, scalars = objective([crop(images[chosen], view, window(len(chosen), view))], i / steps, kinds[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append({name: value.item() for name, value in scalars.items()})
    return history


def test_vital_signs_stay_quiet_while_it_learns_and_trip_where_it_cannot() -> None:
    objective = small(check.toy("vit"), classes=6, scale=(0.5, 1.0))
    assert sick(objective, learn(objective, steps=40)) == set()
    with torch.no_grad():
        objective.encoder.norm3.weight.zero_()
    _, scalars = objective([toy_images(8)[0]], 0.5, torch.full((8,), -1))
    assert sick(objective, [{name: value.item() for name, value in scalars.items()}]) == {"feature_spread", "labelled"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_learns_the_labels(kind: str) -> None:
    backbone = check.toy(kind)
    objective = Supervised(backbone, image_size=32, classes=6, scale=(0.5, 1.0))
    test, test_kinds = toy_images(300, seed=1)
    before = knn(backbone, test, test_kinds)
    history = learn(objective, steps=150)
    assert history[-1]["accuracy"] > 0.8
    assert sick(objective, history) == set()
    assert 1 - knn(backbone, test, test_kinds) < (1 - before) / 2
