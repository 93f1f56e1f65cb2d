"""iBOT against the paper's equations in float64, against LightlySSL, and its behaviour around the loss."""

import copy

import numpy as np
import pytest
import torch
from masked_toy import MaskedToy
from objective_checks import random_views, relative, softmax
from objective_toys import knn, sick, toy_images, train

import backbones
import objectives
from objectives.heads import WeightNormLinear
from objectives.ibot import IBOT, cell_loss, cell_weights

SMALL = {
    "out_dim": 64,
    "hidden_dim": 64,
    "bottleneck_dim": 32,
    "local_views": 2,
    "global_scale": (0.5, 1.0),
    "local_scale": (0.25, 0.5),
}
HEALTHY = {**SMALL, "head_norm": "batch", "teacher_temp": 0.02, "teacher_temp_start": 0.02, "ema_start": 0.99}


def small(image_size: object = 32, in_channels: int = 3, **options: object) -> IBOT:
    torch.manual_seed(0)
    return IBOT(MaskedToy(in_channels=in_channels), image_size=image_size, **{**SMALL, **options})


def paper_cells(student: np.ndarray, teacher: np.ndarray, masks: np.ndarray, centre: np.ndarray, ts: float, tt: float):
    """L_MIM (eq. 2) of scores [I, N, K] under masks [I, N], as main_ibot.py averages it, and the student's gradient."""
    loss, gradient = 0.0, np.zeros_like(student)
    for image in range(len(masks)):
        hidden = np.flatnonzero(masks[image])
        for cell in hidden:
            p_t = softmax((teacher[image, cell] - centre) / tt)
            p_s = softmax(student[image, cell] / ts)
            loss -= (p_t * np.log(p_s)).sum() / len(hidden) / len(masks)
            gradient[image, cell] += (p_s - p_t) / ts / len(hidden) / len(masks)
    return loss, gradient


def paper_images(student: np.ndarray, teacher: np.ndarray, centre: np.ndarray, ts: float, tt: float) -> float:
    """L_[CLS]: each global of the teacher [2, B, K] against every other view of the student [V, B, K]."""
    terms = [
        -(softmax((teacher[x, b] - centre) / tt) * np.log(softmax(student[y, b] / ts))).sum()
        for x in range(2)
        for y in range(len(student))
        for b in range(student.shape[1])
        if x != y
    ]
    return float(np.mean(terms))


@pytest.mark.parametrize(("images", "cells", "k"), [(4, 9, 16), (6, 16, 256)])
def test_loss_and_gradient_equal_the_papers_in_float64(images: int, cells: int, k: int) -> None:
    rng = np.random.default_rng(k)
    student, teacher = rng.uniform(-1, 1, (images, cells, k)), rng.uniform(-1, 1, (images, cells, k))
    centre, masks = rng.uniform(-0.3, 0.3, k), rng.random((images, cells)) < 0.4
    masks[1] = False
    loss, gradient = paper_cells(student, teacher, masks, centre, 0.1, 0.05)
    z = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    chosen = torch.tensor(masks).flatten().nonzero()[:, 0]
    p = ((torch.tensor(teacher - centre, dtype=torch.float32).flatten(0, 1)[chosen]) / 0.05).softmax(-1)
    ours = cell_loss(z.flatten(0, 1)[chosen], p, cell_weights(torch.tensor(masks), chosen), 0.1)
    ours.backward()
    assert relative(ours.detach(), loss, loss_of="the paper") <= 1e-5
    assert relative(z.grad, gradient, gradient_of="the paper") <= 1e-5


def test_three_steps_equal_lightlys_with_the_centre_moving() -> None:
    lightly = pytest.importorskip("lightly.loss").IBOTPatchLoss(output_dim=64, teacher_temp=0.04)
    objective = small()
    for step in range(3):
        torch.manual_seed(step)
        masks = torch.rand(6, 4, 4) < 0.3
        chosen = masks.flatten().nonzero()[:, 0]
        student, teacher = torch.randn(len(chosen), 64, requires_grad=True), torch.randn(len(chosen), 64)
        theirs_in = student.detach().clone().requires_grad_()
        theirs = lightly(teacher, theirs_in, masks)
        p = objective.targets(teacher, objective.cell_centre, 0.0)
        ours = cell_loss(student, p, cell_weights(masks.flatten(1), chosen), 0.1)
        objective.cell_centre.update(0.9)
        ours.backward()
        theirs.backward()
        assert relative(ours.detach(), theirs.detach(), loss_of="LightlySSL") <= 1e-5
        assert relative(student.grad, theirs_in.grad, gradient_of="LightlySSL") <= 1e-5
        assert relative(objective.cell_centre.value, lightly.center.value.flatten()) <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    p, weights = torch.randn(5, 7, dtype=torch.float64).softmax(-1), torch.rand(5, dtype=torch.float64)
    z = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: cell_loss(z, p, weights, 0.1), (z,))


def test_a_whole_step_equals_the_papers() -> None:
    """What is masked for whom, one head for both, temperatures, weights and two centres, against the equations."""
    objective = small(teacher_temp_start=0.04, teacher_temp_warmup=0.5, cell_weight=0.7).double()
    views = [view.double() for view in random_views(objective, 4)]
    masks = torch.rand(8, 16) < 0.4
    masks[2] = False
    objective.masks = lambda images: masks
    with torch.no_grad():
        for weight in objective.teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        objective.centre.value.normal_(std=0.1)
        objective.cell_centre.value.normal_(std=0.1)
        student, teacher = objective.student, objective.teacher.network
        globals_ = torch.cat(views[:2])
        seen, whole = student.backbone(globals_, replaced=masks), teacher.backbone(globals_)
        images = [student.head(seen.pooled).unflatten(0, (2, -1))]
        images += [student.head(student.backbone(view).pooled)[None] for view in views[2:]]
        student_images, teacher_images = torch.cat(images), teacher.head(whole.pooled).unflatten(0, (2, -1))
        student_cells, teacher_cells = (
            n.head(f.cells.flatten(0, 1)).unflatten(0, (8, 16)) for n, f in ((student, seen), (teacher, whole))
        )
    centre, cell_centre = objective.centre.value.numpy().copy(), objective.cell_centre.value.numpy().copy()
    image_term = paper_images(student_images.numpy(), teacher_images.numpy(), centre, 0.1, 0.055)
    cell_term, _ = paper_cells(student_cells.numpy(), teacher_cells.numpy(), masks.numpy(), cell_centre, 0.1, 0.055)
    loss, scalars = objective(views, 0.25)
    assert relative(loss.detach(), image_term + 0.7 * cell_term, loss_of="the paper") <= 1e-12
    assert relative(scalars["image_loss"], image_term) <= 1e-12
    assert relative(scalars["cell_loss"], cell_term) <= 1e-12
    objective.after_step(0.25)
    assert relative(objective.centre.value, 0.9 * centre + 0.1 * teacher_images.mean((0, 1)).numpy()) <= 1e-12
    assert (
        relative(objective.cell_centre.value, 0.9 * cell_centre + 0.1 * teacher_cells[masks].mean(0).numpy()) <= 1e-12
    )


def test_masks_are_the_published_ones() -> None:
    """Half of the images none; the others blocks over 10 to 50 % of the cells, uniformly, a cell or two short."""
    torch.manual_seed(0)
    objective = IBOT(MaskedToy(), image_size=112, out_dim=8, hidden_dim=8, bottleneck_dim=8)
    share = objective.masks(4000).double().mean(1)
    masked = share[share > 0]
    assert len(masked) == pytest.approx(2000, abs=4 * 1000**0.5)
    assert 0.05 < masked.min() < 0.12
    assert 0.45 < masked.max() <= 0.5
    assert masked.mean() == pytest.approx(0.29, abs=0.015)


def test_views_and_head_are_the_published_ones() -> None:
    objective = IBOT(MaskedToy(), image_size=224)
    assert [v.size for v in objective.views] == [(224, 224)] * 2 + [(96, 96)] * 10
    assert [v.scale for v in objective.views] == [(0.25, 1.0)] * 2 + [(0.05, 0.25)] * 10
    assert [v.photometric.blur_p for v in objective.views] == [1.0, 0.1] + [0.5] * 10
    assert [v.photometric.blur_p for v in small(blur=(0.3, 0.2, 0.1)).views[:3]] == [0.3, 0.2, 0.1]
    assert objective.student.cell_head is None
    assert tuple(objective.student.head.last_layer.direction.shape) == (8192, 256)
    assert objective.student.head.last_layer.scale.requires_grad


def test_what_is_masked_reaches_the_student_only_as_a_target() -> None:
    objective = small().eval()
    torch.manual_seed(1)
    masks = objective.masks(8)
    views = random_views(objective, 4)
    pixels = masks.view(8, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(pixels, torch.randn(8, 3, 32, 32), torch.cat(views[:2]))
    chosen = masks.flatten().nonzero()[:, 0]
    before, after = (objective.student(v, chosen, replaced=masks)[0] for v in (views, [*other.chunk(2), *views[2:]]))
    assert len(chosen) > 0
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("masked_share", [0.0, 1.0])
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_every_trainable_parameter_gets_a_gradient_in_every_step(masked_share: float, norm_last_layer: bool) -> None:
    objective = small(masked_share=masked_share, norm_last_layer=norm_last_layer, head_norm="batch")
    loss, scalars = objective(random_views(objective), 0.5)
    loss.backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    assert id(objective.student.backbone.mask_token) in trainable
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    assert sorted(id(p) for g in objective.parameter_groups() for p in g["params"]) == sorted(trainable)
    assert (scalars["cell_loss"] == 0) == (masked_share == 0)
    assert all(s.isfinite() and not s.requires_grad for s in scalars.values())


def test_prototypes_wait_while_frozen() -> None:
    objective = small(freeze_last_layer=0.1)
    for progress, waits in ((0.05, True), (0.1, False)):
        objective(random_views(objective), progress)[0].backward()
        objective.after_backward(progress)
        layers = [m for m in objective.student.modules() if isinstance(m, WeightNormLinear)]
        assert all((p.grad is None) == waits for layer in layers for p in layer.parameters())


@pytest.mark.parametrize(("image_size", "channels", "batch"), [((16, 40), 3, 2), (32, 1, 2), (32, 12, 2), (32, 3, 1)])
def test_sizes_channels_and_a_batch_of_one(image_size: object, channels: int, batch: int) -> None:
    objective = small(image_size, channels)
    loss, scalars = objective(random_views(objective, batch), 0.0)
    assert loss.isfinite()
    assert all(s.isfinite() for s in scalars.values())


def test_a_grid_of_one_cell_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"IBOT cannot mask 50% of 1 cell\(s\): toy has a grid of 1x1 at 8x8 pixels"):
        small(8)


def test_bf16_autocast_gives_a_finite_float32_loss_near_the_exact_one() -> None:
    objective = small()
    losses = []
    for half in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses.append(objective(random_views(objective), 0.5)[0])
    assert losses[1].dtype == torch.float32
    assert abs(losses[1] - losses[0]) < 0.02 * losses[0]


def test_exact_continuation_from_a_state_dict() -> None:
    def run(objective: IBOT, optimiser: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for i in steps:
            torch.manual_seed(i)
            loss, _ = objective(random_views(objective, seed=i), i / 10)
            optimiser.zero_grad()
            loss.backward()
            objective.after_backward(i / 10)
            optimiser.step()
            objective.after_step(i / 10)
            losses.append(loss.item())
        return losses

    def fresh() -> tuple[IBOT, torch.optim.Optimizer]:
        objective = small(head_norm="batch")
        return objective, torch.optim.AdamW(objective.parameter_groups(), lr=1e-2)

    objective, optimiser = fresh()
    run(objective, optimiser, range(3))
    saved = copy.deepcopy((objective.state_dict(), optimiser.state_dict()))
    losses = run(objective, optimiser, range(3, 6))
    again, optimiser = fresh()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(saved[0])
    optimiser.load_state_dict(saved[1])
    assert run(again, optimiser, range(3, 6)) == losses


@pytest.mark.parametrize(
    ("options", "signs"),
    [
        pytest.param({}, set(), id="healthy"),
        pytest.param(
            {"centre_momentum": 1.0, "head_norm": "none"},
            {"largest_prototype", "largest_cell_prototype"},
            id="no centring",
        ),
        pytest.param(
            {"teacher_temp": 0.3, "teacher_temp_start": 0.3}, {"teacher_entropy", "cell_entropy"}, id="no sharpening"
        ),
    ],
)
def test_vital_signs_trip_on_forced_collapse_and_only_then(options: dict, signs: set[str]) -> None:
    objective = small(**{**HEALTHY, **options})
    history = train(objective, toy_images(512)[0], steps=100, lr=2e-3)
    assert sick(objective, history) == signs


@pytest.mark.slow
def test_it_lifts_neighbours_above_those_of_an_untrained_backbone() -> None:
    images, kinds = toy_images(512)
    torch.manual_seed(0)
    backbone = MaskedToy()
    floor = knn(backbone, images, kinds)
    objective = objectives.create("ibot", backbone, image_size=32, **HEALTHY | {"local_views": 0, "ema_start": 0.98})
    train(objective, images, steps=300, lr=1e-3)
    assert knn(objective.backbone, images, kinds) > floor + 0.05


@pytest.mark.slow
def test_it_lifts_neighbours_on_a_cnn_too() -> None:
    images, kinds = toy_images(512)
    torch.manual_seed(0)
    backbone = backbones.create("resnet20", image_size=32)
    floor = knn(backbone, images, kinds)
    objective = objectives.create("ibot", backbone, image_size=32, **HEALTHY | {"local_views": 0, "ema_start": 0.95})
    train(objective, images, steps=80, lr=2e-3)
    assert knn(objective.backbone, images, kinds) > floor + 0.05


def test_created_by_name() -> None:
    objective = objectives.create("ibot", MaskedToy(), image_size=32, **SMALL)
    assert isinstance(objective, IBOT)
    assert objective.backbone is objective.teacher.network.backbone
