"""I-JEPA against the paper in float64, its predictor against LightlySSL's, its masks, and its behaviour around them."""

import copy

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import relative
from objective_toys import knn, sick, toy_images, train
from tiny_backbones import TINY, tiny_vit
from torch import Tensor

import objectives
from objectives.ijepa import IJEPA, Predictor
from objectives.latents import signs
from objectives.masks import multi_block

SMALL: dict = {"min_keep": 4, "predictor_width": 16, "predictor_depth": 1, "predictor_heads": 2}
PUBLISHED: dict = {
    "targets": 4,
    "target_scale": (0.15, 0.2),
    "target_aspect": (0.75, 1.5),
    "context_scale": (0.85, 1.0),
    "min_keep": 10,
}


def small(kind: str = "vit", image_size: object = 32, in_channels: int = 3, **options: object) -> IJEPA:
    torch.manual_seed(0)
    return IJEPA(TINY[kind](in_channels), image_size=image_size, **{**SMALL, **options})


def paper(predicted: np.ndarray, teacher: np.ndarray, blocks: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss of the authors' code and its gradient to the predictions [B, M, T, D], from the teacher's cells."""
    loss, gradient = 0.0, np.zeros_like(predicted)
    for b, m, t in np.ndindex(blocks.shape):
        cell = teacher[b, blocks[b, m, t]]
        target = (cell - cell.mean()) / np.sqrt(cell.var() + 1e-5)
        for d in range(len(target)):
            difference = predicted[b, m, t, d] - target[d]
            near = abs(difference) < 1
            loss += (difference**2 / 2 if near else abs(difference) - 0.5) / predicted.size
            gradient[b, m, t, d] = (difference if near else np.sign(difference)) / predicted.size
    return loss, gradient


@pytest.mark.parametrize("kind", TINY)
def test_a_whole_step_equals_the_papers_in_float64(kind: str) -> None:
    """Who sees what, which targets, the loss and its gradient, and the momentum."""
    objective = small(kind)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for weight in objective.teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    calls: list = []

    def watch(_: object, args: tuple, out: Tensor) -> None:
        out.retain_grad()
        calls.append((*args, out))

    objective.predictor.register_forward_hook(watch)
    teacher = copy.deepcopy(objective.teacher)(images).cells.double().numpy()
    loss, _ = objective([images], 0.25)
    loss.backward()
    cells, context, blocks, out = calls[0]
    seen = copy.deepcopy(objective.student)(images, visible=context).cells
    assert relative(cells.detach(), seen.detach()) <= 1e-5
    expected, gradient = paper(out.detach().double().numpy(), teacher, blocks.numpy())
    assert relative(loss.detach(), expected, loss_of="the paper") <= 1e-5
    assert relative(out.grad, gradient, gradient_of="the paper") <= 1e-5
    pairs = [(t.clone(), s.clone()) for t, s in zip(objective.teacher.parameters(), objective.student.parameters())]
    objective.after_step(0.25)
    for new, (t, s) in zip(objective.teacher.parameters(), pairs):
        assert torch.allclose(new, 0.997 * t + 0.003 * s, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_the_predictor_equals_lightlys_with_the_same_weights() -> None:
    modules = pytest.importorskip("lightly.models.modules.ijepa_timm")
    torch.manual_seed(0)
    ours = Predictor(32, 32, (4, 4), 64, 2, 4).double()
    theirs = modules.IJEPAPredictorTIMM(16, 2, 32, 64, 4).double()

    def their_name(name: str) -> str:
        first, *rest = name.split(".")
        renamed = {"embed": "predictor_embed", "predict": "predictor_proj"}
        return ".".join([renamed.get(first, f"decoder.{first}"), *rest])

    state = {their_name(name): value for name, value in ours.state_dict().items()}
    left_out = theirs.load_state_dict(state, strict=False)
    assert (left_out.missing_keys, left_out.unexpected_keys) == (["decoder.pos_embed"], [])
    assert torch.allclose(theirs.decoder.pos_embed[0], ours.positions, atol=1e-6)
    ours.positions = theirs.decoder.pos_embed[0].detach().clone()

    context = torch.rand(2, 16).argsort(1)[:, :7]
    blocks = torch.rand(2, 3, 16).argsort(2)[..., :4]
    cells = torch.randn(2, 7, 32, dtype=torch.float64)
    weights = torch.randn(2, 3, 4, 32, dtype=torch.float64)
    outputs, gradients = [], []
    for ours_or_theirs in (True, False):
        x = cells.clone().requires_grad_()
        if ours_or_theirs:
            out = ours(x, context, blocks)
        else:
            out = theirs(x, [context], list(blocks.unbind(1))).unflatten(0, (3, 2)).transpose(0, 1)
        (weights * out).sum().backward()
        outputs.append(out.detach())
        gradients.append(x.grad)
    assert relative(outputs[0], outputs[1]) <= 1e-10
    assert relative(gradients[0], gradients[1], gradient_of="LightlySSL: predictor") <= 1e-10
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, theirs.get_parameter(their_name(name)).grad, rtol=1e-8, atol=1e-12), name


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    predictor = Predictor(4, 4, (2, 3), 8, 1, 2).double()
    context, blocks = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[[1, 4], [3, 5]], [[0, 2], [4, 5]]])
    cells = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: predictor(x, context, blocks), (cells,), fast_mode=True)


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (16, 16), (8, 20)])
def test_masks_are_blocks_and_a_context_without_them(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shapes = set()
    for _ in range(20):
        context, blocks = multi_block(16, grid, **PUBLISHED)
        assert context.shape[1] >= 10
        for seen, targets in zip(context, blocks):
            assert len(set(seen.tolist())) == len(seen)
            assert not set(seen.tolist()) & set(targets.flatten().tolist())
        rows, columns = blocks // grid[1], blocks % grid[1]
        h, w = (x.amax(-1) - x.amin(-1) + 1 for x in (rows, columns))
        assert (h * w == blocks.shape[-1]).all(), "each target is a full rectangle"
        assert len(h.unique()) == len(w.unique()) == 1, "all targets of a batch are of one size"
        shapes.add((h[0, 0].item(), w[0, 0].item()))
    cells = grid[0] * grid[1]
    # A side is rounded by half a cell at most.
    for h, w in shapes:
        assert (h - 0.5) * (w - 0.5) <= 0.2 * cells
        assert (h + 0.5) * (w + 0.5) >= 0.15 * cells
        assert (h - 0.5) / (w + 0.5) <= 1.5 * grid[0] / grid[1]
        assert (h + 0.5) / (w - 0.5) >= 0.75 * grid[0] / grid[1]
    assert len(shapes) > 1


@pytest.mark.parametrize(("grid", "most"), [((14, 14), (13, 13)), ((8, 20), (7, 19)), ((4, 4), (4, 4))])
def test_the_context_is_smaller_than_the_grid_where_its_scale_allows(grid: tuple[int, int], most: object) -> None:
    torch.manual_seed(0)
    scales = {**PUBLISHED, "target_scale": (0.05, 0.05), "targets": 1}
    widest = (0, 0)
    for _ in range(10):
        context, _ = multi_block(8, grid, **scales)
        spans = [(len((seen // grid[1]).unique()), len((seen % grid[1]).unique())) for seen in context]
        widest = max(widest, *spans)
    assert widest == most


def test_places_are_uniform_and_no_row_is_preferred() -> None:
    """Each place of a target is as likely; the context's share of a row is that of its mirror image."""
    torch.manual_seed(0)
    seen, first = torch.zeros(14, 14), torch.zeros(14)
    for _ in range(100):
        context, blocks = multi_block(64, (14, 14), **{**PUBLISHED, "target_aspect": (1.0, 1.0)})
        seen += torch.zeros(64, 196).scatter(1, context, 1.0).sum(0).view(14, 14)
        first += torch.bincount((blocks[..., 0] // 14).flatten(), minlength=14)
    seen /= seen.mean()
    assert (seen - seen.flip(0)).abs().mean() < 0.05
    assert (seen - seen.flip(1)).abs().mean() < 0.05
    tops = first[:8] / first[:8].mean()
    assert (tops - 1).abs().max() < 0.1


def test_images_that_cannot_keep_enough_context_get_targets_on_two_places() -> None:
    torch.manual_seed(0)
    context, blocks = multi_block(256, (4, 4), **{**PUBLISHED, "target_scale": (0.25, 0.25), "min_keep": 8})
    assert context.shape[1] == 8
    assert max(len(set(targets.flatten().tolist())) for targets in blocks) <= 8


def test_the_view_the_predictor_and_the_targets_are_the_published_ones() -> None:
    objective = IJEPA(tiny_vit(image_size=112), image_size=112)
    (view,) = objective.views
    assert (view.size, view.scale, view.flip_p, view.photometric) == ((112, 112), (0.3, 1.0), 0.5, None)
    assert objective.masks.keywords == PUBLISHED
    assert len(objective.predictor.blocks) == 12
    assert objective.predictor.blocks[0].attn.num_heads == 16
    assert objective.predictor.embed.weight.shape == (384, 32)
    assert objective.ema == (0.996, 1.0)
    assert IJEPA.pool == "mean"


@pytest.mark.parametrize("kind", TINY)
def test_every_trainable_parameter_gets_a_gradient_and_is_optimised_once(kind: str) -> None:
    objective = small(kind)
    objective([torch.randn(2, 3, 32, 32)], 0.5)[0].backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    assert not trainable & {id(p) for p in objective.teacher.parameters()}
    grouped = [p for g in objective.parameter_groups() for p in g["params"]]
    assert sorted(id(p) for p in grouped) == sorted(trainable)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("channels", "size", "batch"), [(1, 32, 1), (12, (24, 48), 2)])
def test_channels_shapes_and_a_single_image(kind: str, channels: int, size: object, batch: int) -> None:
    check.takes_a_shape(small(kind, size, channels), batch)


@pytest.mark.parametrize(("size", "options"), [(8, {}), (16, {}), (32, {"min_keep": 10})])
def test_a_grid_too_small_for_context_and_targets_gets_a_sentence(size: int, options: dict) -> None:
    with pytest.raises(ValueError, match=r"I-JEPA cannot keep \d+ cell.* tiny_vit has a grid of"):
        small(image_size=size, **options)


def test_a_width_that_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="predictor_width 16 is no multiple of predictor_heads 3"):
        small(predictor_heads=3)


def test_bf16_autocast_gives_a_float32_loss_near_the_exact_one() -> None:
    check.is_near_itself_in_bf16(small(), share=0.02)


@pytest.mark.parametrize("kind", TINY)
def test_a_state_dict_is_the_whole_state(kind: str) -> None:
    check.continues_exactly(lambda: small(kind))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps", "lr"), [("vit", 800, 5e-3), ("cnn", 300, 2e-3)])
def test_it_learns_what_it_never_saw_a_label_of_and_stays_well(kind: str, steps: int, lr: float) -> None:
    objective = small(kind, ema_start=0.99, scale=(0.8, 1.0), predictor_width=32, predictor_depth=2)
    images, kinds = toy_images(384)
    images = images - images.mean((2, 3), keepdim=True)  # light tells no kind, and would be learnt first
    floor = knn(objective.backbone, images, kinds)
    history = train(objective, images, steps=steps, lr=lr)
    assert sick(objective, history) == set()
    assert knn(objective.backbone, images, kinds) > floor + 0.03


def test_signs_of_health_and_of_three_collapses() -> None:
    torch.manual_seed(0)
    features, blocks = torch.nn.functional.layer_norm(torch.randn(8, 16, 12), (12,)), torch.ones(8, 16)
    ranges = {sign.name: (sign.low, sign.high) for sign in small().vital_signs}

    def tripped(predictions: Tensor, everywhere: Tensor, pooled: Tensor) -> set[str]:
        values = signs(predictions, everywhere, blocks, everywhere, pooled)
        return {name for name, (low, high) in ranges.items() if not low <= values[name] <= high}

    pooled = torch.randn(8, 12)
    assert tripped(0.8 * features, features, pooled) == set()
    assert tripped(torch.zeros_like(features), features, pooled) <= {"explained", "prediction_spread"}
    assert "prediction_spread" in tripped(torch.zeros_like(features), features, pooled)
    places_only = features[:1].expand_as(features)
    assert tripped(0.8 * places_only, places_only, pooled) == {"target_spread"}
    assert "feature_spread" in tripped(0.8 * features, features, pooled[:1].expand(8, -1))


def test_vital_signs_trip_when_the_teacher_is_the_student_and_both_collapse() -> None:
    objective = small(ema_start=0.0, ema_end=0.0)
    history = train(objective, toy_images(256)[0], steps=200, lr=1e-1)
    assert {"explained", "prediction_spread"} <= sick(objective, history)


def test_created_by_name() -> None:
    objective = objectives.create("ijepa", TINY["vit"](), image_size=32, **SMALL)
    assert isinstance(objective, IJEPA)
    assert objective.backbone is objective.teacher.network
