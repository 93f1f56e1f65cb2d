"""SimMIM against the paper in float64, and its behaviour around the loss, on a ViT and a CNN."""

import math

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import relative
from objective_toys import knn, sick, toy_images, train
from tiny_backbones import TINY, tiny_vit
from torch import Tensor

import objectives
from objectives.masks import finer
from objectives.simmim import SimMIM

SMALL: dict = {"mask_unit": 8}


def small(kind: str = "vit", image_size: object = 32, in_channels: int = 3, **options: object) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(TINY[kind](in_channels), image_size=image_size, **{**SMALL, **options})


def paper(images: np.ndarray, painted: np.ndarray, hidden: np.ndarray) -> tuple[float, np.ndarray]:
    """Sec. 3.4: the L1 distance over hidden pixels, over their number; its gradient to what was painted.

    images, painted: [B, C, H, W]. hidden: [B, H, W] bool.
    """
    loss, gradient = 0.0, np.zeros_like(painted)
    number = hidden.sum() * images.shape[1]
    for b, c, y, x in np.ndindex(images.shape):
        if hidden[b, y, x]:
            difference = painted[b, c, y, x] - images[b, c, y, x]
            loss += abs(difference) / number
            gradient[b, c, y, x] = np.sign(difference) / number
    return loss, gradient


def shuffle(cells: np.ndarray, rows: int, columns: int, side: int) -> np.ndarray:
    """Pixel shuffle: [B, N, side * side * C], channels last within a cell -> images [B, C, H, W]."""
    out = np.empty((len(cells), cells.shape[-1] // side**2, rows * side, columns * side))
    for n in range(rows * columns):
        top, left = n // columns * side, n % columns * side
        out[:, :, top : top + side, left : left + side] = (
            cells[:, n].reshape(len(cells), side, side, -1).transpose(0, 3, 1, 2)
        )
    return out


@pytest.mark.parametrize("kind", TINY)
def test_a_whole_step_equals_the_papers_in_float64(kind: str) -> None:
    """What is masked, painted and compared, and the gradient that reaches the head, on 32x48 pixels."""
    objective = small(kind, (32, 48), mask_unit=16)
    images = torch.randn(3, 3, 32, 48)
    replaced, cells = [], []

    def watch(_: object, args: object, given: dict, out: object) -> None:
        replaced.extend(given.values())
        cells.append(out.cells)

    objective.encoder.register_forward_hook(watch, with_kwargs=True)
    loss, _ = objective([images], 0.0)
    loss.backward()
    hidden = replaced[0].view(3, 4, 6).numpy().repeat(8, 1).repeat(8, 2)
    squares = hidden[:, ::16, ::16]
    assert (squares.repeat(16, 1).repeat(16, 2) == hidden).all(), "masked in squares of 16 pixels"
    assert (squares.sum((1, 2)) == math.ceil(0.6 * 6)).all()
    seen = cells[0].detach().double().numpy()
    weight, bias = (p.detach().double().numpy() for p in objective.head.parameters())
    expected, gradient = paper(images.double().numpy(), shuffle(seen @ weight.T + bias, 4, 6, 8), hidden)
    assert relative(loss.detach(), expected, loss_of="the paper") <= 1e-5
    by_cell = np.zeros((3, 24, 192))
    for n in range(24):
        top, left = n // 6 * 8, n % 6 * 8
        by_cell[:, n] = gradient[:, :, top : top + 8, left : left + 8].transpose(0, 2, 3, 1).reshape(3, -1)
    assert relative(objective.head.bias.grad, by_cell.sum((0, 1)), gradient_of="the paper") <= 1e-5
    assert (
        relative(objective.head.weight.grad, np.einsum("bnp,bnd->pd", by_cell, seen), gradient_of="the paper") <= 1e-5
    )


def test_gradient_equals_finite_differences() -> None:
    objective = small(image_size=16, in_channels=1).double()
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)

    def loss(bias: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.func.functional_call(objective, {"head.bias": bias}, ([images], 0.0))[0]

    assert torch.autograd.gradcheck(loss, (objective.head.bias.detach().clone().requires_grad_(),))


def test_the_view_and_the_mask_are_the_published_ones() -> None:
    objective = SimMIM(TINY["vit"](), image_size=224)
    (view,) = objective.views
    assert (view.size, view.scale, view.flip_p, view.photometric) == ((224, 224), (0.67, 1.0), 0.5, None)
    assert (objective.units, 49 - objective.visible) == ((7, 7), 30)
    assert objective.head.weight.shape == (192, 32)
    assert SimMIM.pool == "mean"


@pytest.mark.parametrize(
    ("size", "unit", "side"), [(64, 32, 4), (48, 32, 3), (56, 32, 1), (40, 16, 1), (32, 4, 1), ((32, 96), 32, 4)]
)
def test_squares_are_the_largest_that_fit_and_tile_the_grid(size: object, unit: int, side: int) -> None:
    assert small(image_size=size, mask_unit=unit).unit == side


@pytest.mark.parametrize(("size", "options"), [(32, {"mask_unit": 32}), (16, {"mask_ratio": 0.0})])
def test_a_grid_with_nothing_to_see_or_to_predict_gets_a_sentence(size: int, options: dict) -> None:
    with pytest.raises(ValueError, match=r"SimMIM cannot mask \d+% of \d+ square.* tiny_vit has a grid of"):
        small(image_size=size, **options)


def test_the_positions_of_a_finer_grid() -> None:
    """Cells 0 and 5 of a 2x3 grid, each split into 2x2, on the 4x6 grid."""
    assert finer(torch.tensor([[0, 5]]), 3, 2).tolist() == [[0, 1, 6, 7, 16, 17, 22, 23]]


@pytest.mark.parametrize("kind", TINY)
def test_hidden_pixels_reach_the_loss_only_as_targets(kind: str) -> None:
    objective = small(kind)
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    masked = objective.masked(2, images.device)
    hidden = torch.zeros(2, 16, dtype=torch.bool).scatter(1, masked, True)
    pixels = hidden.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    painted: list[Tensor] = []
    objective.head.register_forward_hook(lambda _, args, out: painted.append(out))
    for shown in (images, torch.where(pixels, torch.randn_like(images), images)):
        torch.manual_seed(1)
        objective([shown], 0.0)
    assert torch.equal(*painted)


@pytest.mark.parametrize("kind", TINY)
def test_every_trainable_parameter_gets_a_gradient_and_is_optimised_once(kind: str) -> None:
    objective = small(kind)
    objective([torch.randn(2, 3, 32, 32)], 0.5)[0].backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    assert id(objective.encoder.mask_token) in trainable
    grouped = [p for g in objective.parameter_groups() for p in g["params"]]
    assert sorted(id(p) for p in grouped) == sorted(trainable)


def test_class_token_and_positions_do_not_decay_as_published() -> None:
    objective = small("vit")
    plain = {id(p) for g in objective.parameter_groups() for p in g["params"] if not g["wd_scale"]}
    several = {name for name, p in objective.named_parameters() if id(p) in plain and p.ndim > 1}
    assert several == {"encoder.network.cls_token", "encoder.network.pos_embed"}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("channels", "size", "batch"), [(1, 32, 1), (12, (16, 40), 2)])
def test_channels_shapes_and_a_single_image(kind: str, channels: int, size: object, batch: int) -> None:
    check.takes_a_shape(small(kind, size, channels), batch)


def test_bf16_autocast_gives_a_float32_loss_near_the_exact_one() -> None:
    check.is_near_itself_in_bf16(small(), share=0.02)


@pytest.mark.parametrize("kind", TINY)
def test_a_state_dict_is_the_whole_state(kind: str) -> None:
    check.continues_exactly(lambda: small(kind))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps", "lr"), [("vit", 1200, 1e-3), ("cnn", 150, 3e-3)])
def test_it_learns_what_it_never_saw_a_label_of_and_stays_well(kind: str, steps: int, lr: float) -> None:
    torch.manual_seed(0)
    backbone = tiny_vit(width=64, depth=3) if kind == "vit" else TINY[kind]()
    objective = SimMIM(backbone, image_size=32, mask_unit=8, mask_ratio=0.5)
    images, kinds = toy_images(384)
    floor = knn(objective.backbone, images, kinds)
    history = train(objective, images, steps=steps, lr=lr)
    assert history[-1]["loss"] < 0.95 * history[20]["loss"]
    assert sick(objective, history) == set()
    assert knn(objective.backbone, images, kinds) > floor + 0.05


def test_vital_signs_trip_on_each_way_to_learn_nothing() -> None:
    objective = small()
    images = toy_images(32)[0]

    def tripped(images: Tensor) -> set[str]:
        return sick(objective, [{k: v.item() for k, v in objective([images], 0.5)[1].items()}])

    assert {"target_spread", "explained"} <= tripped(torch.ones_like(images))
    with torch.no_grad():
        objective.encoder.norm.weight.zero_()
        objective.encoder.norm.bias.fill_(1.0)
    assert {"feature_spread", "prediction_spread"} <= tripped(images)


def test_created_by_name() -> None:
    objective = objectives.create("simmim", TINY["vit"](), image_size=32, **SMALL)
    assert isinstance(objective, SimMIM)
    assert objective.backbone is objective.encoder
