"""SparK's decoder and loss against the paper in float64, and its behaviour around them, on a CNN and a ViT."""

import numpy as np
import objective_checks as check
import pytest
import torch
from objective_checks import relative
from objective_toys import knn, sick, toy_images, train
from tiny_backbones import TINY, tiny_cnn, tiny_vit
from torch import Tensor

import backbones
import objectives
from backbones.contract import Features
from objectives.spark import Decoder, SparK

SMALL: dict = {"decoder_width": 32}


def small(kind: str = "cnn", image_size: object = 32, in_channels: int = 3, **options: object) -> SparK:
    torch.manual_seed(0)
    return SparK(TINY[kind](in_channels), image_size=image_size, **{**SMALL, **options})


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """Zero-padded convolution of a map [C, H, W], pixel by pixel."""
    k = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.empty((len(weight), *x.shape[1:]))
    for row, column in np.ndindex(x.shape[1:]):
        out[:, row, column] = (weight * padded[:, row : row + k, column : column + k]).sum((1, 2, 3)) + bias
    return out


def upsample(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Transposed convolution, 4 x 4, stride 2, padding 1: every pixel stamps its kernel."""
    _, height, width = x.shape
    canvas = np.zeros((weight.shape[1], 2 * height + 2, 2 * width + 2))
    for row, column in np.ndindex(height, width):
        canvas[:, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += np.tensordot(x[:, row, column], weight, 1)
    return canvas[:, 1:-1, 1:-1] + bias[:, None, None]


def standardise(rows: np.ndarray, norm: torch.nn.Module) -> np.ndarray:
    """Batch norm of rows [N, C]."""
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * weight + bias


def paper_decoder(decoder: Decoder, scales: dict[int, np.ndarray], hidden: np.ndarray) -> np.ndarray:
    """Sec. 3.2 from the encoder's full maps S_i [B, C, H_i, W_i] by level, whose hidden positions are never read."""

    def everywhere(maps: np.ndarray, norm: torch.nn.Module) -> np.ndarray:
        rows = standardise(maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1]), norm)
        return rows.reshape(len(maps), *maps.shape[2:], -1).transpose(0, 3, 1, 2)

    def weights(module: torch.nn.Module) -> list[np.ndarray]:
        return [p.detach().numpy() for p in module.parameters()]

    d: np.ndarray | float = 0.0
    for level in range(len(decoder.blocks) + 1):
        if level in scales:
            s, phi = scales[level], decoder.densify[str(level)]
            seen = ~hidden.repeat(2**level, 1).repeat(2**level, 2)
            dense = np.empty_like(s)
            dense.transpose(0, 2, 3, 1)[:] = phi.mask_token.detach().numpy()
            dense.transpose(0, 2, 3, 1)[seen] = standardise(s.transpose(0, 2, 3, 1)[seen], phi.norm)
            d = d + np.stack([convolve(one, *weights(phi.project)) for one in dense])
        if level < len(decoder.blocks):
            up, conv1, norm1, _, conv2, norm2 = decoder.blocks[level]
            d = np.stack([convolve(upsample(one, *weights(up)), *weights(conv1)) for one in d])
            d = everywhere(d, norm1).clip(0, 6)
            d = everywhere(np.stack([convolve(one, *weights(conv2)) for one in d]), norm2)
    return np.stack([convolve(one, *weights(decoder.predict)) for one in d])


def test_the_decoder_equals_the_papers_in_float64() -> None:
    torch.manual_seed(0)
    decoder = Decoder(tiny_cnn(), (16, 24), 16, 4).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.3)
    visible = torch.stack([torch.randperm(6)[:3] for _ in range(2)])
    hidden = np.ones((2, 6), bool)
    np.put_along_axis(hidden, visible.numpy(), False, 1)
    rng = np.random.default_rng(0)
    shapes = [(8, 8, 12), (16, 4, 6), (32, 2, 3), (32, 2, 3)]
    layers = [rng.normal(size=(2, *shape)) for shape in shapes]
    rows = [torch.tensor(m.reshape(2, m.shape[1], -1).transpose(0, 2, 1)) for m in layers]
    cells = rows[3].gather(1, visible[..., None].expand(-1, -1, 32))
    ours = decoder(Features(cells.mean(1), cells, tuple(rows)), visible).detach()
    theirs = paper_decoder(decoder, {0: layers[3], 1: layers[1], 2: layers[0]}, hidden.reshape(2, 2, 3))
    assert ours.shape == (2, 3, 16, 24)
    assert relative(ours, theirs) <= 1e-10


def test_loss_and_gradient_equal_the_papers_in_float64() -> None:
    """Sec. 3.3, with a painting that we know in place of the decoder's."""
    objective = small()
    images, painted = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32, requires_grad=True)
    chosen: list[Tensor] = []

    def decode(seen: Features, visible: Tensor) -> Tensor:
        chosen.append(visible)
        return painted

    objective.decoder.forward = decode
    loss, _ = objective([images], 0.0)
    loss.backward()
    expected, gradient, count = 0.0, np.zeros((3, 3, 32, 32)), 0
    for b in range(3):
        assert len(set(chosen[0][b].tolist())) == round(16 * 0.4)
        for cell in set(range(16)) - set(chosen[0][b].tolist()):
            at = (b, slice(None), slice(cell // 4 * 8, cell // 4 * 8 + 8), slice(cell % 4 * 8, cell % 4 * 8 + 8))
            pixels = images.double().numpy()[at]
            target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            difference = painted.detach().double().numpy()[at] - target
            expected, count = expected + (difference**2).mean(), count + 1
            gradient[at] = 2 * difference / difference.size
    assert count == 30
    assert relative(loss.detach(), expected / count, loss_of="the paper") <= 1e-5
    assert relative(painted.grad, gradient / count, gradient_of="the paper") <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    decoder = Decoder(tiny_cnn(1), (16, 16), 8, 2).double()
    visible = torch.tensor([[2, 0], [1, 3]])
    cells, layer = (torch.randn(2, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((2, 32), (16, 16)))
    weights = torch.randn(2, 1, 16, 16, dtype=torch.float64)

    def loss(cells: Tensor, layer: Tensor) -> Tensor:
        return (weights * decoder(Features(cells[:, 0], cells, (layer, layer)), visible)).sum()

    assert torch.autograd.gradcheck(loss, (cells, layer), fast_mode=True)


def test_the_published_run() -> None:
    """ResNet-50 at 224 pixels: 20 of 49 cells of 32 pixels are kept, layers 1 to 4 reach a decoder 768 wide."""
    objective = SparK(backbones.create("resnet50"), image_size=224)
    (view,) = objective.views
    assert (view.size, view.scale, view.flip_p, view.photometric) == ((224, 224), (0.67, 1.0), 0.5, None)
    assert objective.visible == 20
    decoder = objective.decoder
    shapes = {level: tuple(phi.project.weight.shape) for level, phi in decoder.densify.items()}
    assert shapes == {
        "0": (768, 2048, 1, 1),
        "1": (384, 1024, 3, 3),
        "2": (192, 512, 3, 3),
        "3": (96, 256, 3, 3),
    }
    assert [tuple(block[0].weight.shape[:2]) for block in decoder.blocks] == [(w, w) for w in (768, 384, 192, 96, 48)]
    assert tuple(decoder.predict.weight.shape) == (3, 24, 1, 1)


def test_scales_follow_the_backbone() -> None:
    def levels(backbone: backbones.Backbone, size: int, **options: int) -> list[str]:
        return list(SparK(backbone, image_size=size, **{**SMALL, **options}).decoder.densify)

    assert levels(tiny_cnn(), 32) == ["0", "1", "2"]
    assert levels(tiny_cnn(), 32, scales=2) == ["0", "1"]
    assert levels(tiny_vit(), 32) == ["0"]
    assert levels(backbones.create("lenet5", image_size=16), 16) == ["0", "1"]


def test_a_patch_that_is_no_power_of_two_is_painted_whole() -> None:
    objective = SparK(tiny_vit(patch=14, image_size=28), image_size=28, decoder_width=16)
    assert (len(objective.decoder.blocks), objective.decoder.rest) == (1, 7)
    assert objective([torch.randn(2, 3, 28, 28)], 0.0)[0].isfinite()


@pytest.mark.parametrize("kind", TINY)
def test_hidden_pixels_reach_the_loss_only_as_targets(kind: str) -> None:
    objective = small(kind)
    images = torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []
    objective.decoder.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[1], out.detach()]))
    torch.manual_seed(1)
    objective([images], 0.0)
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, seen[0], False)
    pixels = hidden.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    others = torch.where(pixels, torch.randn_like(images), images)
    torch.manual_seed(1)
    objective([others], 0.0)
    assert torch.equal(seen[0], seen[2])
    assert torch.allclose(seen[1], seen[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", TINY)
def test_every_trainable_parameter_gets_a_gradient_and_is_optimised_once(kind: str) -> None:
    objective = small(kind)
    objective([torch.randn(2, 3, 32, 32)], 0.5)[0].backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    grouped = [p for g in objective.parameter_groups() for p in g["params"]]
    assert sorted(id(p) for p in grouped) == sorted(trainable)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("channels", "size", "batch"), [(1, 32, 1), (12, (16, 40), 2)])
def test_channels_shapes_and_a_single_image(kind: str, channels: int, size: object, batch: int) -> None:
    check.takes_a_shape(small(kind, size, channels), batch)


@pytest.mark.parametrize(("size", "ratio"), [(8, 0.6), (16, 0.9), (16, 0.0)])
def test_a_grid_with_nothing_to_see_or_to_predict_gets_a_sentence(size: int, ratio: float) -> None:
    with pytest.raises(ValueError, match=r"SparK cannot mask .* tiny_cnn has a grid of"):
        small(image_size=size, mask_ratio=ratio)


def test_a_width_that_cannot_be_halved_is_named() -> None:
    with pytest.raises(ValueError, match="decoder_width 20 cannot be halved 3 times"):
        small(decoder_width=20)


def test_bf16_autocast_gives_a_float32_loss_near_the_exact_one() -> None:
    check.is_near_itself_in_bf16(small(), share=0.02)


@pytest.mark.parametrize("kind", TINY)
def test_a_state_dict_is_the_whole_state(kind: str) -> None:
    check.continues_exactly(lambda: small(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_it_learns_what_it_never_saw_a_label_of_and_stays_well(kind: str) -> None:
    objective = small(kind)
    images, kinds = toy_images(384)
    floor = knn(objective.backbone, images, kinds)
    history = train(objective, images, steps=150, lr=3e-3)
    assert history[-1]["loss"] < 0.95 * history[15]["loss"]
    assert sick(objective, history) == set()
    assert knn(objective.backbone, images, kinds) > floor + 0.03


def test_vital_signs_trip_on_each_way_to_learn_nothing() -> None:
    objective = small("vit")
    images = toy_images(32)[0]

    def tripped(images: Tensor) -> set[str]:
        return sick(objective, [{k: v.item() for k, v in objective([images], 0.5)[1].items()}])

    assert {"target_spread", "explained"} <= tripped(torch.ones_like(images))
    with torch.no_grad():
        objective.encoder.norm.weight.zero_()
        objective.encoder.norm.bias.fill_(1.0)
    assert "feature_spread" in tripped(images)
    with torch.no_grad():
        objective.decoder.predict.weight.zero_()
    assert "prediction_spread" in tripped(images)


def test_created_by_name() -> None:
    objective = objectives.create("spark", TINY["cnn"](), image_size=32, **SMALL)
    assert isinstance(objective, SparK)
    assert objective.backbone is objective.encoder
