"""DINOv2's own parts against float64 and LightlySSL, how they are wired on top of iBOT, and its collapses."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from masked_toy import MaskedToy
from objective_checks import random_views, relative
from objective_toys import knn, sick, toy_images, train
from torch import Tensor

import backbones
import objectives
from objectives.dinov2 import DINOv2
from objectives.ibot import IBOT
from objectives.koleo import koleo_loss
from objectives.layer_decay import decay_by_depth

SMALL = {
    "out_dim": 64,
    "hidden_dim": 64,
    "bottleneck_dim": 32,
    "local_views": 2,
    "global_scale": (0.5, 1.0),
    "local_scale": (0.25, 0.5),
}
HEALTHY = {
    **SMALL,
    "head_norm": "batch",
    "teacher_temp": 0.02,
    "teacher_temp_start": 0.02,
    "ema_start": 0.99,
    "layer_decay": 1.0,
    "stem_lr": 1.0,
}
VARIANTS = [{}, {"separate_heads": True, "centring": "sinkhorn"}]


def small(image_size: object = 32, in_channels: int = 3, **options: object) -> DINOv2:
    torch.manual_seed(0)
    return DINOv2(MaskedToy(in_channels=in_channels), image_size=image_size, **{**SMALL, **options})


def paper_koleo(features: np.ndarray, eps: float = 1e-8) -> tuple[float, np.ndarray]:
    """-1/n sum_i log(d_i), d_i = min_j |x_i - x_j| on the unit sphere (DINOv2, sec. 4), and its gradient."""
    n = len(features)
    lengths = np.sqrt((features**2).sum(1))
    x = features / lengths[:, None]
    loss, sphere = 0.0, np.zeros_like(x)
    for i in range(n):
        distances = [np.inf if j == i else np.sqrt(((x[i] - x[j]) ** 2).sum()) for j in range(n)]
        j = int(np.argmin(distances))
        loss -= np.log(distances[j] + eps) / n
        slope = (x[i] - x[j]) / distances[j] / (distances[j] + eps) / n
        sphere[i] -= slope
        sphere[j] += slope
    gradient = (sphere - x * (sphere * x).sum(1, keepdims=True)) / lengths[:, None]
    return loss, gradient


@pytest.mark.parametrize("shape", [(2, 3), (16, 8), (64, 32)])
def test_koleo_and_its_gradient_equal_the_papers_in_float64(shape: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(size=shape)
    loss, gradient = paper_koleo(features)
    x = torch.tensor(features, dtype=torch.float32, requires_grad=True)
    ours = koleo_loss(x)
    ours.backward()
    assert relative(ours.detach(), loss, loss_of="the paper: KoLeo") <= 1e-5
    assert relative(x.grad, gradient, gradient_of="the paper: KoLeo") <= 1e-5


def test_koleo_equals_lightlys() -> None:
    lightly = pytest.importorskip("lightly.loss").KoLeoLoss()
    x = torch.randn(32, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = koleo_loss(x), lightly(y)
    ours.backward()
    theirs.backward()
    assert relative(ours.detach(), theirs.detach(), loss_of="LightlySSL: KoLeo") <= 1e-5
    assert relative(x.grad, y.grad, gradient_of="LightlySSL: KoLeo") <= 1e-5


def test_koleos_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(koleo_loss, (torch.randn(6, 4, dtype=torch.float64, requires_grad=True),))


def test_koleo_of_copies_is_finite_and_of_one_image_a_sentence() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    koleo_loss(x).backward()
    assert x.grad.isfinite().all()
    with pytest.raises(ValueError, match="at least 2 images"):
        koleo_loss(torch.ones(1, 3))
    objective = small()
    with pytest.raises(ValueError, match="at least 2 images"):
        objective(random_views(objective, batch=1), 0.0)


def balanced(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Three iterations of Sinkhorn-Knopp as ibot_patch_loss.py counts them, on [B, K]."""
    q = np.exp(scores / temperature).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_a_whole_step_equals_the_papers(centring: str, separate: bool) -> None:
    """Which head scores what, which targets, KoLeo on which features and weighted how, in float64."""
    objective = small(centring=centring, separate_heads=separate, teacher_temp_warmup=0.5).double()
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
        assert (student.cell_head is not None) == separate
        seen = student.backbone(torch.cat(views[:2]), replaced=masks)
        whole = teacher.backbone(torch.cat(views[:2]))
        heads = [(n.head, n.cell_head if separate else n.head) for n in (student, teacher)]
        images = [heads[0][0](seen.pooled).unflatten(0, (2, -1))]
        images += [heads[0][0](student.backbone(view).pooled)[None] for view in views[2:]]
        log_p = (torch.cat(images) / 0.1).log_softmax(-1).numpy()
        log_q = (heads[0][1](seen.cells[masks]) / 0.1).log_softmax(-1).numpy()
        image_scores, cell_scores = heads[1][0](whole.pooled).numpy(), heads[1][1](whole.cells[masks]).numpy()
    temperature = 0.055
    if centring == "centre":
        p, q = (
            torch.tensor((s - c.value.numpy()) / temperature).softmax(-1).numpy()
            for s, c in ((image_scores, objective.centre), (cell_scores, objective.cell_centre))
        )
    else:
        p, q = balanced(image_scores, temperature), balanced(cell_scores, temperature)
    p = p.reshape(2, 4, -1)
    image_term = np.mean([-(p[x] * log_p[y]).sum(-1).mean() for x in range(2) for y in range(4) if x != y])
    owner = np.nonzero(masks.numpy())[0]
    cell_term = sum(-(q[i] * log_q[i]).sum() / (owner == owner[i]).sum() / 8 for i in range(len(q)))
    koleo = sum(paper_koleo(part.numpy())[0] for part in seen.pooled.chunk(2))
    loss, scalars = objective(views, 0.25)
    assert relative(loss.detach(), image_term + cell_term + 0.1 * koleo, loss_of="the paper") <= 1e-9
    assert relative(scalars["koleo"], koleo) <= 1e-9


def test_without_its_own_parts_it_is_ibot() -> None:
    ours = small(koleo_weight=0.0)
    torch.manual_seed(0)
    shared = {**SMALL, "teacher_temp_warmup": 0.3, "freeze_last_layer": 0.01}
    theirs = IBOT(MaskedToy(), image_size=32, **shared)
    masks = torch.rand(8, 16) < 0.3
    ours.masks = theirs.masks = lambda images: masks
    assert torch.equal(ours(random_views(ours, 4), 0.1)[0], theirs(random_views(theirs, 4), 0.1)[0])


def test_exactly_half_of_the_images_are_masked_with_ratios_spread_evenly() -> None:
    torch.manual_seed(0)
    objective = DINOv2(MaskedToy(), image_size=112, out_dim=8, hidden_dim=8, bottleneck_dim=8)
    share = objective.masks(64).double().mean(1)
    masked = share[share > 0].sort().values
    assert len(masked) == 32
    wanted = 0.1 + 0.4 * torch.arange(33).double() / 32
    assert (masked <= wanted[1:]).all()
    assert (wanted[:-1] - masked).max() < 0.05
    assert objective.masks(1).sum() == 0


def test_published_settings() -> None:
    objective = DINOv2(MaskedToy(), image_size=224, out_dim=512)
    assert [v.size for v in objective.views] == [(224, 224)] * 2 + [(96, 96)] * 8
    assert [v.scale for v in objective.views] == [(0.32, 1.0)] * 2 + [(0.05, 0.32)] * 8
    assert [v.photometric.blur_p for v in objective.views] == [0.0, 0.9] + [0.5] * 8
    assert [v.photometric.solarize_p for v in objective.views] == [0.0, 0.2] + [0.0] * 8
    with pytest.raises(ValueError, match="centring 'center' is not known; choose one of centre, sinkhorn"):
        small(centring="center")


@pytest.mark.parametrize("name", ["vit_ti8", "resnet20"])
def test_layers_slow_down_towards_the_pixels(name: str) -> None:
    """Factors of every parameter, on real backbones: .9 a block, the layers of the stem .2 besides, heads and last norm
    untouched. The authors' code gives .2 to what has patch_embed in its name, not to tokens and positions."""
    backbone = backbones.create(name, image_size=32)
    objective = DINOv2(backbone, image_size=32, **SMALL)
    scale = {id(p): g["lr_scale"] for g in objective.parameter_groups() for p in g["params"]}
    assert sorted(scale) == sorted(id(p) for p in objective.parameters() if p.requires_grad)
    depths = backbone.depths()
    last = max(depths.values())
    for parameter_name, parameter in backbone.named_parameters():
        depth = depths[parameter_name]
        plain = parameter_name.split(".")[-1] in ("mask_token", "cls_token", "pos_embed")
        expected = 0.9 ** (last - depth) * (0.2 if depth == 0 and not plain else 1)
        assert scale[id(parameter)] == pytest.approx(expected), parameter_name
    assert scale[id(backbone.mask_token)] == pytest.approx(0.9**last)
    if name == "vit_ti8":
        assert scale[id(backbone.network.cls_token)] == scale[id(backbone.network.pos_embed)] == pytest.approx(0.9**13)
        assert scale[id(backbone.network.patch_embed.proj.weight)] == pytest.approx(0.2 * 0.9**13)
        assert scale[id(backbone.network.blocks[11].mlp.fc1.weight)] == pytest.approx(0.9)
        assert scale[id(backbone.norm.weight)] == 1
    assert {scale[id(p)] for p in objective.student.head.parameters()} == {1.0}
    assert all((p.ndim > 1) or not g["wd_scale"] for g in objective.parameter_groups() for p in g["params"])


def test_decay_keeps_what_a_group_says_besides() -> None:
    backbone = MaskedToy()
    groups = [{"params": list(backbone.parameters()), "lr_scale": 2.0, "wd_scale": 0.0, "constant_lr": True}]
    split = decay_by_depth(groups, backbone, decay=0.5, stem=1.0)
    assert sorted(g["lr_scale"] for g in split) == [0.5, 1.0, 2.0]
    assert all(g["constant_lr"] and g["wd_scale"] == 0.0 for g in split)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("masked_share", [0.0, 0.5])
def test_every_trainable_parameter_gets_a_gradient_in_every_step(options: dict, masked_share: float) -> None:
    objective = small(masked_share=masked_share, **options)
    loss, scalars = objective(random_views(objective), 0.005)
    loss.backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    assert all(s.isfinite() and not s.requires_grad for s in scalars.values())
    objective.after_backward(0.005)
    heads = [objective.student.head, *([objective.student.cell_head] if options else [])]
    assert all(head.last_layer.direction.grad is None for head in heads)


@pytest.mark.parametrize(("image_size", "channels", "batch"), [((16, 40), 3, 2), (32, 1, 2), (32, 12, 3)])
@pytest.mark.parametrize("options", VARIANTS)
def test_sizes_and_channels(image_size: object, channels: int, batch: int, options: dict) -> None:
    objective = small(image_size, channels, **options)
    assert objective(random_views(objective, batch), 0.0)[0].isfinite()


def test_one_image_is_enough_without_koleo() -> None:
    objective = small(koleo_weight=0.0)
    assert objective(random_views(objective, batch=1), 0.0)[0].isfinite()


def test_state_dict_gives_the_same_loss_in_a_fresh_objective() -> None:
    objective = small(separate_heads=True)
    optimiser = torch.optim.AdamW(objective.parameter_groups(), lr=1e-2)
    for i in range(3):
        optimiser.zero_grad()
        objective(random_views(objective, seed=i), 0.1)[0].backward()
        optimiser.step()
        objective.after_step(0.1)
    again = small(separate_heads=True)
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
        pytest.param({"centring": "sinkhorn"}, set(), id="healthy with Sinkhorn"),
        pytest.param(
            {"centre_momentum": 1.0, "head_norm": "none", "koleo_weight": 0.0},
            {"largest_prototype", "largest_cell_prototype"},
            id="no centring",
        ),
    ],
)
def test_vital_signs_trip_on_forced_collapse_and_only_then(options: dict, signs: set[str]) -> None:
    objective = small(**{**HEALTHY, **options})
    history = train(objective, toy_images(512)[0], steps=100, lr=2e-3)
    assert sick(objective, history) == signs


def test_koleo_spreads_features() -> None:
    torch.manual_seed(0)
    x = (torch.randn(32, 8) * 0.05 + 1).requires_grad_()

    def nearest() -> Tensor:
        y = F.normalize(x.detach(), dim=1)
        return (torch.cdist(y, y) + 9 * torch.eye(32)).min(1).values.mean()

    before, optimiser = nearest(), torch.optim.SGD([x], lr=0.5)
    for _ in range(50):
        optimiser.zero_grad()
        koleo_loss(x).backward()
        optimiser.step()
    assert nearest() > 5 * before


@pytest.mark.slow
def test_it_lifts_neighbours_above_those_of_an_untrained_backbone() -> None:
    images, kinds = toy_images(512)
    torch.manual_seed(0)
    backbone = MaskedToy()
    floor = knn(backbone, images, kinds)
    objective = objectives.create("dinov2", backbone, image_size=32, **HEALTHY | {"local_views": 0, "ema_start": 0.95})
    train(objective, images, steps=200, lr=2e-3)
    assert knn(objective.backbone, images, kinds) > floor + 0.05


@pytest.mark.slow
def test_it_lifts_neighbours_on_a_cnn_too() -> None:
    images, kinds = toy_images(512)
    torch.manual_seed(0)
    backbone = backbones.create("resnet20", image_size=32)
    floor = knn(backbone, images, kinds)
    objective = objectives.create("dinov2", backbone, image_size=32, **HEALTHY | {"local_views": 0, "ema_start": 0.95})
    train(objective, images, steps=80, lr=2e-3)
    assert knn(objective.backbone, images, kinds) > floor + 0.05


def test_created_by_name() -> None:
    objective = objectives.create("dinov2", MaskedToy(), image_size=32, **SMALL)
    assert isinstance(objective, DINOv2)
    assert objective.backbone is objective.teacher.network.backbone
