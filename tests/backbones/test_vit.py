import copy
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones import Backbone, create
from backbones.contract import gather_cells

SMALL = {"image_size": 64}


def lively(backbone: Backbone) -> Backbone:
    """With weights as after training: at first attention is nearly uniform and layer scales nearly zero, which would
    hide a position that went missing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if p.ndim == 1 and p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
            elif "attn" in name or "pos_embed" in name:
                p.mul_(5)
    return backbone.eval()


def flops(run: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch16_dinov3"]
)
def test_it_is_timms_own_forward(name: str) -> None:
    """The same weights in timm's model give the same tokens, at its own size and (dynamic positions) at another."""
    backbone = lively(create(name, image_size=64))
    reference = timm.create_model(name, num_classes=0, img_size=64, dynamic_img_size=True).eval()
    ours = backbone.state_dict()
    theirs = {k: ours.get(f"network.{k}", ours.get(f"norm.{k.split('.')[-1]}")) for k in reference.state_dict()}
    reference.load_state_dict(theirs)
    for size in ((64, 64), (32, 96)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected, got = reference.forward_features(images), backbone(images)
        torch.testing.assert_close(got.cells, expected[:, reference.num_prefix_tokens :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.pooled, expected[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["vit_ti16", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"]
)
def test_visible_is_attention_over_the_gathered_tokens_alone(name: str) -> None:
    """With all cells visible in any order it is the plain forward, so position and content travel together; and with
    some visible, the pixels of the others do not matter."""
    backbone = lively(create(name, image_size=112))
    size = 6 * backbone.stride
    images = torch.randn(2, 3, size, size)
    order = torch.stack([torch.randperm(36) for _ in range(2)])
    with torch.no_grad():
        plain, shuffled = backbone(images), backbone(images, visible=order)
    torch.testing.assert_close(shuffled.cells, gather_cells(plain.cells, order), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shuffled.pooled, plain.pooled, rtol=1e-4, atol=1e-4)

    some = order[:, :16]
    seen = torch.zeros(2, 36).scatter(1, some, 1).view(2, 1, 6, 6)
    seen = torch.nn.functional.interpolate(seen, size=(size, size)) > 0
    with torch.no_grad():
        one = backbone(images, visible=some)
        other = backbone(torch.where(seen, images, torch.nan), visible=some)
    assert one.cells.shape == (2, 16, backbone.width)
    assert torch.equal(one.cells, other.cells)
    assert not torch.allclose(one.cells, gather_cells(plain.cells, some), atol=0.1)
    with torch.no_grad():  # the same content at other places is something else: positions do matter here
        elsewhere = backbone(images.roll(backbone.stride, -1)).pooled
    assert not torch.allclose(elsewhere, plain.pooled, atol=0.01)


def test_visible_equals_the_blocks_on_gathered_tokens() -> None:
    backbone = create("vit_ti16", **SMALL).eval()
    net: Any = backbone.network
    images, visible = torch.randn(2, 3, 64, 64), torch.tensor([[3, 9, 0], [15, 1, 7]])
    with torch.no_grad():
        tokens = net.patch_embed.proj(images).flatten(2).transpose(1, 2) + net.pos_embed[:, 1:]
        rows = torch.stack([t[i] for t, i in zip(tokens, visible)])
        first = (net.cls_token + net.pos_embed[:, :1]).expand(2, -1, -1)
        expected = backbone.norm(net.blocks(torch.cat([first, rows], 1)))  # type: ignore[operator]
        got = backbone(images, visible=visible)
    torch.testing.assert_close(got.cells, expected[:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.pooled, expected[:, 0], rtol=1e-5, atol=1e-5)


def test_dropped_tokens_cost_nothing() -> None:
    """A quarter of 64 cells costs exactly what an image of a quarter the size costs."""
    backbone = create("vit_ti8", **SMALL).eval()
    visible = torch.randperm(64)[:16].view(1, -1)
    dropped = flops(lambda: backbone(torch.randn(1, 3, 64, 64), visible=visible))
    assert dropped == flops(lambda: backbone(torch.randn(1, 3, 32, 32)))
    assert dropped < 0.27 * flops(lambda: backbone(torch.randn(1, 3, 64, 64)))


def test_replaced_cells_show_the_mask_token_and_keep_their_position() -> None:
    backbone = create("vit_ti16", **SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    replaced = torch.rand(2, 16) > 0.5
    pixels = torch.nn.functional.interpolate(replaced.float().view(2, 1, 4, 4), size=(64, 64)) > 0
    with torch.no_grad():
        one = backbone(images, replaced=replaced)
        other = backbone(torch.where(pixels, 9.0, images), replaced=replaced)
    assert one.cells.shape == (2, 16, backbone.width)
    assert torch.equal(one.cells, other.cells)
    assert torch.equal(backbone(images, replaced=torch.zeros_like(replaced)).cells, backbone(images).cells)
    everything = backbone(images, replaced=torch.ones_like(replaced)).cells
    assert torch.equal(everything[0], everything[1])  # no content left …
    assert not torch.allclose(everything[0, 0], everything[0, 1])  # … but positions


def test_replaced_and_visible_go_together() -> None:
    backbone = create("vit_ti16", **SMALL).eval()
    images, replaced = torch.randn(2, 3, 64, 64), torch.rand(2, 16) > 0.5
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    a = backbone(images, replaced=replaced).cells
    b = backbone(images, visible=order, replaced=replaced).cells
    torch.testing.assert_close(b, gather_cells(a, order), rtol=1e-4, atol=1e-5)


def test_positions_are_resampled_for_other_sizes_and_shapes() -> None:
    backbone = create("vit_ti8", image_size=(64, 32)).eval()
    assert backbone.grid(64, 32) == (8, 4)
    for size in ((64, 32), (32, 64), (48, 48), (24, 96)):
        assert backbone(torch.randn(1, 3, *size)).cells.shape == (1, size[0] * size[1] // 64, 192)
    square = create("vit_ti8", image_size=64)
    table = square.network.pos_embed  # type: ignore[union-attr]
    assert table.shape == (1, 65, 192)
    _, positions = square._positions(8, 8)  # type: ignore[operator]
    assert torch.equal(positions, table[:, 1:])  # untouched at its own size


def test_a_convolutional_stem_in_front_runs_masked() -> None:
    backbone = create("vit_tiny_r_s16_p8_224", image_size=128).eval()
    images, visible = torch.randn(1, 3, 128, 128), torch.tensor([[0, 5, 10]])
    seen = torch.zeros(1, 16).scatter(1, visible, 1).view(1, 1, 4, 4)
    seen = torch.nn.functional.interpolate(seen, size=(128, 128)) > 0
    with torch.no_grad():
        one = backbone(images, visible=visible).cells
        other = backbone(torch.where(seen, images, torch.nan), visible=visible).cells
    assert torch.equal(one, other)


def test_layers_are_the_blocks() -> None:
    backbone = create("vit_ti16", **SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    features = backbone(images, layers=True)
    assert [tuple(layer.shape) for layer in features.layers] == [(2, 16, 192)] * 12
    torch.testing.assert_close(backbone.norm(features.layers[-1]), features.cells)  # type: ignore[operator]
    few = backbone(images, visible=torch.tensor([[1, 2], [3, 4]]), layers=True)
    assert {tuple(layer.shape) for layer in few.layers} == {(2, 2, 192)}


def test_compiles_and_runs_in_bfloat16() -> None:
    backbone = create("vit_ti16", **SMALL).eval()
    images, visible = torch.randn(2, 3, 64, 64), torch.tensor([[1, 2], [3, 4]])
    compiled = torch.compile(copy.deepcopy(backbone), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        exact = backbone(images, visible=visible).cells
        torch.testing.assert_close(compiled(images, visible=visible).cells, exact)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = backbone(images, visible=visible, replaced=torch.zeros(2, 16, dtype=torch.bool)).cells
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()
