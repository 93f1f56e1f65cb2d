"""MSN against the paper's equations in float64, against LightlySSL, and its behaviour around the loss."""

import copy
import math

import numpy as np
import pytest
import torch
from masked_toy import MaskedToy
from objective_checks import random_views, relative, softmax
from objective_toys import knn, sick, toy_images, train

import backbones
import objectives
from objectives.contrast import cosines
from objectives.msn import MSN, msn_loss, sharpened

SMALL = {
    "n_prototypes": 16,
    "hidden_dim": 64,
    "embedding_dim": 32,
    "focal_views": 2,
    "scale": (0.5, 1.0),
    "focal_scale": (0.25, 0.5),
}
# With batch norm in the head the toy images are told apart by their light for longer than a test may last.
HEALTHY = {
    **SMALL,
    "focal_views": 0,
    "n_prototypes": 64,
    "head_norm": "none",
    "sharpening": 0.1,
    "ema_start": 0.95,
    "ema_end": 0.95,
}


def small(image_size: object = 32, in_channels: int = 3, **options: object) -> MSN:
    torch.manual_seed(0)
    return MSN(MaskedToy(in_channels=in_channels), image_size=image_size, **{**SMALL, **options})


def paper_targets(scores: np.ndarray, temp: float, sharpening: float, sinkhorn: int) -> np.ndarray:
    """losses.py: softmax, power 1 / T, normalised; then each prototype gets 1 / K and each image 1 / B, in turns."""
    p = np.stack([softmax(row / temp) for row in scores]) ** (1 / sharpening)
    p /= p.sum(1, keepdims=True)
    if sinkhorn:
        q = p.T / p.sum()
        for _ in range(sinkhorn):
            q = q / q.sum(1, keepdims=True) / q.shape[0]
            q = q / q.sum(0, keepdims=True) / q.shape[1]
        p = (q * q.shape[1]).T
    return p


def paper(scores: np.ndarray, targets: np.ndarray, temp: float):
    """Both terms of eq. 1 of the anchors' similarities [V, B, K], and the gradient of their sum."""
    views, batch, k = scores.shape
    p = np.stack([[softmax(row / temp) for row in view] for view in scores])
    cross_entropy = -sum((targets[b] * np.log(p[v, b])).sum() for v in range(views) for b in range(batch))
    mean = p.mean((0, 1))
    me_max = math.log(k) + (mean * np.log(mean)).sum()
    gradient = np.zeros_like(scores)
    for v in range(views):
        for b in range(batch):
            slope = np.log(mean) + 1  # of me-max to the mean prediction
            through_softmax = p[v, b] * (slope - (slope * p[v, b]).sum())
            gradient[v, b] = (p[v, b] - targets[b] + through_softmax) / temp / (views * batch)
    return cross_entropy / (views * batch), me_max, gradient


@pytest.mark.parametrize(("views", "batch", "k"), [(1, 3, 8), (3, 6, 32), (11, 4, 128)])
def test_loss_and_gradient_equal_the_papers_in_float64(views: int, batch: int, k: int) -> None:
    rng = np.random.default_rng(k)
    anchors, target = rng.uniform(-1, 1, (views, batch, k)), rng.uniform(-1, 1, (batch, k))
    targets = paper_targets(target, 0.1, 0.25, 3)
    cross_entropy, me_max, gradient = paper(anchors, targets, 0.1)
    ours_targets = sharpened(torch.tensor(target, dtype=torch.float32), 0.1, 0.25, 3)
    assert relative(ours_targets, targets) <= 1e-5
    s = torch.tensor(anchors, dtype=torch.float32, requires_grad=True)
    terms = msn_loss((s / 0.1).log_softmax(-1), ours_targets)
    sum(terms).backward()
    assert relative(terms[0].detach(), cross_entropy, loss_of="the paper") <= 1e-5
    assert abs(terms[1].item() - me_max) <= 1e-5 * math.log(k)
    assert relative(s.grad, gradient, gradient_of="the paper") <= 1e-5


@pytest.mark.parametrize("sinkhorn", [0, 3])
def test_it_equals_lightlys(sinkhorn: int) -> None:
    lightly = pytest.importorskip("lightly.loss").MSNLoss(sinkhorn_iterations=sinkhorn, regularization_weight=0.7)
    torch.manual_seed(0)
    ours_in = [torch.randn(n, 16, requires_grad=True) for n in (15, 12)]
    theirs_in = [x.detach().clone().requires_grad_() for x in ours_in]
    target = torch.randn(5, 16)
    theirs = lightly(theirs_in[0], target, theirs_in[1], target_sharpen_temperature=0.25)
    targets = sharpened(cosines(target, ours_in[1].detach()), 0.1, 0.25, sinkhorn)
    log_p = (cosines(ours_in[0].view(3, 5, 16), ours_in[1]) / 0.1).log_softmax(-1)
    cross_entropy, me_max = msn_loss(log_p, targets)
    ours = cross_entropy + 0.7 * me_max
    ours.backward()
    theirs.backward()
    assert relative(ours.detach(), theirs.detach(), loss_of="LightlySSL") <= 1e-5
    for a, b in zip(ours_in, theirs_in):
        assert relative(a.grad, b.grad, gradient_of="LightlySSL") <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    p = torch.randn(3, 5, dtype=torch.float64).softmax(-1)
    z, prototypes = (torch.randn(*s, 4, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (5,)))
    terms = lambda z, w: sum(msn_loss((cosines(z, w) / 0.1).log_softmax(-1), p))  # noqa: E731
    assert torch.autograd.gradcheck(terms, (z, prototypes))


def test_a_whole_step_equals_the_papers() -> None:
    """Which view goes where, what is dropped, prototypes and temperatures, against the equations in float64."""
    objective = small(me_max=0.5, head_norm="none").double()
    views = [view.double() for view in random_views(objective, 4)]
    with torch.no_grad():
        for weight in objective.teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        torch.manual_seed(5)
        visible = torch.rand(4, 16).argsort(1)[:, :13]
        student, teacher = objective.student, objective.teacher.network
        pooled = [student.backbone(views[1], visible=visible).pooled, *(student.backbone(v).pooled for v in views[2:])]
        z, z_target = torch.stack([student.head(x) for x in pooled]), teacher.head(teacher.backbone(views[0]).pooled)
    unit = lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True))  # noqa: E731
    prototypes = unit(objective.prototypes.detach().numpy())
    targets = paper_targets(unit(z_target.numpy()) @ prototypes.T, 0.1, 0.25, 3)
    cross_entropy, me_max, _ = paper(unit(z.numpy()) @ prototypes.T, targets, 0.1)
    torch.manual_seed(5)
    loss, scalars = objective(views, 0.3)
    assert relative(loss.detach(), cross_entropy + 0.5 * me_max, loss_of="the paper") <= 1e-10
    entropy = -(targets * np.log(targets)).sum(1).mean() / math.log(16)
    assert relative(scalars["target_entropy"], entropy) <= 1e-10
    assert relative(scalars["mean_entropy"], 1 - me_max / math.log(16)) <= 1e-10
    weights = [(t.clone(), s.clone()) for t, s in zip(teacher.parameters(), student.parameters())]
    objective.after_step(0.5)
    momentum = 0.996 + 0.5 * (0.9992 - 0.996)
    for new, (old, trained) in zip(teacher.parameters(), weights):
        assert torch.allclose(new, momentum * old + (1 - momentum) * trained, rtol=1e-12, atol=0)


def test_the_anchor_has_batch_statistics_of_its_own_in_the_head_as_published() -> None:
    objective = small()
    _, anchor, *focal = random_views(objective, 4)
    visible = torch.arange(13).expand(4, -1)
    alone, _ = objective.student([anchor], visible=visible)
    together, _ = objective.student([anchor, *focal], visible=visible)
    assert relative(together[0], alone[0]) <= 1e-5
    assert relative(together[1:], objective.student(focal)[0]) > 0.1, "focal views share theirs"


def test_published_settings() -> None:
    objective = MSN(MaskedToy(), image_size=224)
    assert [v.size for v in objective.views] == [(224, 224)] * 2 + [(96, 96)] * 10
    assert [v.scale for v in objective.views] == [(0.3, 1.0)] * 2 + [(0.05, 0.3)] * 10
    for p in (v.photometric for v in objective.views):
        assert (p.brightness, p.contrast, p.saturation, p.hue, p.jitter_p, p.gray_p) == (0.4, 0.4, 0.4, 0.1, 0.8, 0.2)
        assert (p.blur_p, p.solarize_p) == (0.5, 0.0)
    assert (objective.visible, objective.cells) == (int(784 * 0.85), 784)
    assert tuple(objective.prototypes.shape) == (1024, 256)
    kinds = [type(m).__name__ for m in objective.student.head]
    assert kinds == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]


def test_dropped_pixels_reach_nothing() -> None:
    objective = small()
    views = random_views(objective, 4)
    torch.manual_seed(5)
    kept = torch.zeros(4, 16, dtype=torch.bool).scatter(1, torch.rand(4, 16).argsort(1)[:, :13], True)
    pixels = kept.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = [views[0], torch.where(pixels, views[1], torch.randn_like(views[1])), *views[2:]]
    losses = []
    for given in (views, other):
        torch.manual_seed(5)
        losses.append(objective(given, 0.0)[0])
    assert torch.equal(*losses)


def test_every_trainable_parameter_gets_a_gradient_and_prototypes_do_not_decay() -> None:
    objective = small()
    objective(random_views(objective), 0.5)[0].backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    assert id(objective.prototypes) in trainable
    groups = objective.parameter_groups()
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(trainable)
    (of_prototypes,) = [g for g in groups if any(p is objective.prototypes for p in g["params"])]
    assert of_prototypes["wd_scale"] == 0


@pytest.mark.parametrize(("image_size", "channels", "batch"), [((16, 40), 3, 2), (32, 1, 2), (32, 12, 3)])
def test_sizes_and_channels(image_size: object, channels: int, batch: int) -> None:
    objective = small(image_size, channels)
    loss, scalars = objective(random_views(objective, batch), 0.0)
    assert loss.isfinite()
    assert all(s.isfinite() and not s.requires_grad for s in scalars.values())


def test_what_cannot_be_gets_a_sentence() -> None:
    objective = small()
    with pytest.raises(ValueError, match="at least 2 images"):
        objective(random_views(objective, batch=1), 0.0)
    for size, ratio in ((8, 0.9), (8, 1.0)):
        with pytest.raises(ValueError, match=r"MSN cannot drop .* toy has a grid of 1x1 at 8x8 pixels"):
            small(size, mask_ratio=ratio)


@pytest.mark.parametrize("options", [{"mask_ratio": 0.0}, {"focal_views": 0}, {"sinkhorn": 0}])
def test_parts_that_can_be_left_out(options: dict) -> None:
    objective = small(**options)
    assert objective(random_views(objective), 0.0)[0].isfinite()


def test_bf16_autocast_gives_a_finite_float32_loss_near_the_exact_one() -> None:
    objective = small()
    losses = []
    for half in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses.append(objective(random_views(objective), 0.5)[0])
    assert losses[1].dtype == torch.float32
    assert abs(losses[1] - losses[0]) < 0.05 * losses[0]


def test_state_dict_gives_the_same_loss_in_a_fresh_objective() -> None:
    objective = small()
    optimiser = torch.optim.AdamW(objective.parameter_groups(), lr=1e-2)
    for i in range(3):
        optimiser.zero_grad()
        objective(random_views(objective, seed=i), 0.1)[0].backward()
        optimiser.step()
        objective.after_step(0.1)
    again = small()
    again.load_state_dict(copy.deepcopy(objective.state_dict()))
    losses = []
    for one in (objective, again):
        torch.manual_seed(9)
        losses.append(one(random_views(one, seed=9), 0.2)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("options", "signs"),
    [
        pytest.param({}, set(), id="healthy"),
        pytest.param({"me_max": 0.0, "sinkhorn": 0}, {"mean_entropy"}, id="neither me-max nor Sinkhorn"),
        pytest.param({"sharpening": 4.0}, {"target_entropy"}, id="no sharpening"),
    ],
)
def test_vital_signs_trip_on_forced_collapse_and_only_then(options: dict, signs: set[str]) -> None:
    objective = small(**{**HEALTHY, **options})
    history = train(objective, toy_images(512)[0], steps=100, lr=2e-3)
    tripped = sick(objective, history)
    assert tripped == signs if not signs else signs <= tripped


@pytest.mark.slow
def test_it_lifts_neighbours_above_those_of_an_untrained_backbone() -> None:
    images, kinds = toy_images(512)
    torch.manual_seed(0)
    backbone = MaskedToy()
    floor = knn(backbone, images, kinds)
    objective = objectives.create("msn", backbone, image_size=32, **HEALTHY)
    train(objective, images, steps=300, lr=1e-3)
    assert knn(objective.backbone, images, kinds) > floor + 0.05


@pytest.mark.slow
def test_it_lifts_neighbours_on_a_cnn_too() -> None:
    images, kinds = toy_images(512)
    torch.manual_seed(0)
    backbone = backbones.create("resnet20", image_size=32)
    floor = knn(backbone, images, kinds)
    objective = objectives.create("msn", backbone, image_size=32, **HEALTHY)
    train(objective, images, steps=80, lr=2e-3)
    assert knn(objective.backbone, images, kinds) > floor + 0.05


def test_created_by_name() -> None:
    objective = objectives.create("msn", MaskedToy(), image_size=32, **SMALL)
    assert isinstance(objective, MSN)
    assert objective.backbone is objective.teacher.network.backbone
