"""data2vec against the paper in float64, and its behaviour around the loss, on a ViT and a CNN."""

import copy

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import relative
from objective_toys import knn, sick, toy_images, train
from tiny_backbones import TINY, tiny_vit
from torch import Tensor, nn

import backbones
import objectives
from objectives.data2vec import Data2Vec

SMALL: dict = {"mask_ratio": 0.5, "ema_start": 0.98, "ema_end": 0.99}


def small(kind: str = "vit", image_size: object = 32, in_channels: int = 3, **options: object) -> Data2Vec:
    torch.manual_seed(0)
    return Data2Vec(TINY[kind](in_channels), image_size=image_size, **{**SMALL, **options})


def standardise(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def paper(predicted: np.ndarray, layers: list[np.ndarray], masked: np.ndarray, beta: float) -> tuple[float, np.ndarray]:
    """Targets from the teacher's layers [B, N, D], the loss over masked cells, and its gradient to predictions."""
    loss, gradient, count = 0.0, np.zeros_like(predicted), masked.sum() * predicted.shape[-1]
    for b, n in zip(*masked.nonzero()):
        y = standardise(sum(standardise(layer[b, n]) for layer in layers) / len(layers))
        for d, f in enumerate(predicted[b, n]):
            difference = f - y[d]
            near = abs(difference) <= beta
            loss += (difference**2 / beta / 2 if near else abs(difference) - beta / 2) / count
            gradient[b, n, d] = (difference / beta if near else np.sign(difference)) / count
    return loss, gradient


@pytest.mark.parametrize(("kind", "beta", "taken"), [("vit", 2.0, [2, 3]), ("vit", 0.3, [2, 3]), ("cnn", 2.0, [2, 3])])
def test_a_whole_step_equals_the_papers_in_float64(kind: str, beta: float, taken: list[int]) -> None:
    """Who sees what, which layers make the targets, the loss and its gradient, and the momentum."""
    torch.manual_seed(0)
    backbone = tiny_vit(depth=4) if kind == "vit" else TINY[kind]()
    options = {**SMALL, "target_layers": 2, "beta": beta, "ema_start": 0.9, "ema_end": 0.99, "ema_warmup": 0.5}
    objective = Data2Vec(backbone, image_size=32, **options)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for weight in objective.teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    calls: dict = {}

    def watch(_: object, args: tuple, given: dict, out: object) -> None:
        calls.update(given)

    def watch_head(_: object, args: tuple, out: Tensor) -> None:
        out.retain_grad()
        calls["cells"], calls["out"] = args[0], out

    objective.student.register_forward_hook(watch, with_kwargs=True)
    objective.head.register_forward_hook(watch_head)
    layers = copy.deepcopy(objective.teacher)(images, layers=True).layers
    loss, _ = objective([images], 0.25)
    loss.backward()
    masked, out = calls["replaced"], calls["out"]
    assert (masked.sum(1) <= 8).all()
    assert masked.any()
    assert relative(calls["cells"].detach(), copy.deepcopy(objective.student)(images, replaced=masked).cells) <= 1e-5
    expected, gradient = paper(
        out.detach().double().numpy(), [layers[i].double().numpy() for i in taken], masked.numpy(), beta
    )
    assert relative(loss.detach(), expected, loss_of="the paper") <= 1e-5
    assert relative(out.grad, gradient, gradient_of="the paper") <= 1e-5
    pairs = [(t.clone(), s.clone()) for t, s in zip(objective.teacher.parameters(), objective.student.parameters())]
    objective.after_step(0.25)
    for new, (t, s) in zip(objective.teacher.parameters(), pairs):
        assert torch.allclose(new, 0.945 * t + 0.055 * s, rtol=1e-5, atol=1e-7)


def test_gradient_equals_finite_differences() -> None:
    objective = small(image_size=16, beta=0.5).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def loss(bias: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.func.functional_call(objective, {"head.bias": bias}, ([images], 0.0))[0]

    assert torch.autograd.gradcheck(loss, (objective.head.bias.detach().clone().requires_grad_(),), fast_mode=True)


def test_layers_are_those_that_can_be_averaged_cell_by_cell() -> None:
    def layers(backbone: backbones.Backbone, size: int, k: int) -> list[int]:
        return Data2Vec(backbone, image_size=size, target_layers=k).layers

    assert layers(tiny_vit(depth=8), 32, 6) == [2, 3, 4, 5, 6, 7]
    assert layers(tiny_vit(depth=2), 32, 6) == [0, 1]
    assert layers(TINY["cnn"](), 32, 6) == [2, 3]
    assert layers(TINY["cnn"](), 32, 1) == [3]
    assert layers(backbones.create("resnet20", image_size=32), 32, 6) == [3]


def test_a_head_as_wide_as_the_last_layer() -> None:
    """EfficientNet's cells are wider than its last stage."""
    objective = Data2Vec(backbones.create("efficientnet_b0", image_size=32), image_size=32)
    assert tuple(objective.head.weight.shape) == (320, 1280)


def test_the_view_the_masks_and_the_teacher_are_the_published_ones() -> None:
    objective = Data2Vec(tiny_vit(patch=16, image_size=224), image_size=224)
    (view,) = objective.views
    assert (view.size, view.scale, view.flip_p) == ((224, 224), (0.08, 1.0), 0.5)
    p = view.photometric
    assert (p.brightness, p.contrast, p.saturation, p.hue, p.jitter_p, p.gray_p) == (0.4, 0.4, 0.4, 0.0, 1.0, 0.0)
    assert (objective.masked, objective.min_block) == (120, 16)
    assert (objective.beta, objective.ema) == (2.0, (0.9998, 0.9998, 0.0))
    assert Data2Vec.pool == "mean"


@pytest.mark.parametrize("kind", TINY)
def test_every_trainable_parameter_gets_a_gradient_and_is_optimised_once(kind: str) -> None:
    objective = small(kind)
    objective([torch.randn(2, 3, 32, 32)], 0.5)[0].backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    assert id(objective.student.mask_token) in trainable
    assert not trainable & {id(p) for p in objective.teacher.parameters()}
    grouped = [p for g in objective.parameter_groups() for p in g["params"]]
    assert sorted(id(p) for p in grouped) == sorted(trainable)


def test_class_token_and_positions_do_not_decay_as_published() -> None:
    objective = small("vit")
    plain = {id(p) for g in objective.parameter_groups() for p in g["params"] if not g["wd_scale"]}
    several = {name for name, p in objective.named_parameters() if id(p) in plain and p.ndim > 1}
    assert several == {"student.network.cls_token", "student.network.pos_embed"}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("channels", "size", "batch"), [(1, 32, 1), (12, (16, 40), 2)])
def test_channels_shapes_and_a_single_image(kind: str, channels: int, size: object, batch: int) -> None:
    check.takes_a_shape(small(kind, size, channels), batch)


@pytest.mark.parametrize(("size", "ratio"), [(8, 0.6), (16, 0.9), (16, 0.1)])
def test_a_grid_with_nothing_to_see_or_to_predict_gets_a_sentence(size: int, ratio: float) -> None:
    with pytest.raises(ValueError, match=r"data2vec cannot mask .* tiny_vit has a grid of"):
        small(image_size=size, mask_ratio=ratio)


def test_no_target_layers_at_all_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="target_layers 0 must be at least 1"):
        small(target_layers=0)


def test_bf16_autocast_gives_a_float32_loss_near_the_exact_one() -> None:
    check.is_near_itself_in_bf16(small(), share=0.02)


@pytest.mark.parametrize("kind", TINY)
def test_a_state_dict_is_the_whole_state(kind: str) -> None:
    check.continues_exactly(lambda: small(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_it_learns_what_it_never_saw_a_label_of_and_stays_well(kind: str) -> None:
    objective = small(kind, ema_end=0.998)
    images, kinds = toy_images(384)
    images = images - images.mean((2, 3), keepdim=True)  # light tells no kind, and would be learnt first
    floor = knn(objective.backbone, images, kinds)
    history = train(objective, images, steps=300, lr=2e-3)
    assert sick(objective, history) == set()
    assert knn(objective.backbone, images, kinds) > floor + 0.03


def test_vital_signs_trip_when_targets_have_a_gradient_and_hold_the_place_alone() -> None:
    """The teacher is the student and learns to be predicted: what an average without gradient guards against."""
    objective = small("cnn", mask_ratio=0.8, target_layers=1)
    objective.teacher.forward = objective.student.forward  # type: ignore[method-assign]
    history = train(objective, toy_images(256)[0], steps=150, lr=3e-2)
    assert {"target_spread", "feature_spread"} <= sick(objective, history, last=10)


def test_vital_signs_trip_when_the_same_is_predicted_for_every_cell() -> None:
    objective = small("cnn")
    nn.init.zeros_(objective.head.weight)
    _, scalars = objective([toy_images(16)[0]], 0.0)
    assert sick(objective, [{name: value.item() for name, value in scalars.items()}]) == {
        "explained",
        "prediction_spread",
    }


def test_created_by_name() -> None:
    objective = objectives.create("data2vec", TINY["vit"](), image_size=32, **SMALL)
    assert isinstance(objective, Data2Vec)
    assert objective.backbone is objective.student
