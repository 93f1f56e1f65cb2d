"""Running a network on its visible cells only."""

import copy
import multiprocessing
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from backbones import Backbone, create
from backbones.batch_norm import SyncBatchNorm, masked_batch_norm, synchronise
from backbones.contract import gather_cells
from backbones.masking import VisibleOnly, visible_only

# They differ in what mixes positions: LRN, plain and strided pooling, concatenation, shortcuts, squeeze-excite,
# depthwise convolutions and layer norm, global response norm, average pooling, "same" padding, unpadded convolutions.
ALWAYS = ["lenet5", "alexnet", "vgg11_bn", "googlenet", "resnet18", "resnet20", "efficientnet_b0", "convnext_atto"]
SLOWER = [
    "googlenet_bn", "plain20", "convnextv2_atto", "densenet121", "resnet50d", "tf_efficientnet_b0", "inception_v3",
    "resnetv2_50", "mobilenetv3_small_100", "regnety_004", "hrnet_w18_small", "dm_nfnet_f0",
]  # fmt: skip
AT_128 = ["resnet18", "efficientnet_b0", "convnext_atto"]
SLOWER_AT_128 = ["alexnet", "vgg11_bn", "googlenet", "densenet121", "resnet50d", "mobilenetv3_small_100"]
NETWORKS = [
    *((name, 32) for name in ALWAYS),
    *((name, 128) for name in AT_128),
    *(pytest.param(name, 32, marks=pytest.mark.slow) for name in SLOWER),
    *(pytest.param(name, 128, marks=pytest.mark.slow) for name in SLOWER_AT_128),
]
"""A network and the side in pixels that it is made for: of those at 128 the stem is another, for ImageNet."""


def made(name: str, image_size: int = 32, dtype: torch.dtype = torch.float32) -> Backbone:
    """A backbone whose norms do something, so that a mistake in them shows, and which drops nothing at random."""
    torch.manual_seed(0)
    backbone = create(name, image_size=image_size)
    for p in backbone.parameters():  # biases, norms, layer scales
        if p.ndim == 1 and p.requires_grad:
            nn.init.normal_(p.data, p.detach().mean().item(), 0.3)
    for m in backbone.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()  # type: ignore[union-attr]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        elif hasattr(m, "drop_prob"):
            m.drop_prob = 0.0  # type: ignore[assignment]
    return backbone.to(dtype)


def images_for(backbone: Backbone) -> Tensor:
    """Two images of 2 x 4 cells at least, small ones: small stems make large maps."""
    side = max(32, 2 * backbone.stride)
    return torch.randn(2, 3, side, 2 * side)


def some_cells(backbone: Backbone, images: Tensor, share: float = 0.4) -> Tensor:
    h, w = backbone.grid(*images.shape[-2:])
    keep = max(1, round(h * w * share))
    return torch.stack([torch.randperm(h * w)[:keep] for _ in images])


def pixels_of(cells: Tensor, backbone: Backbone, images: Tensor) -> Tensor:
    h, w = backbone.grid(*images.shape[-2:])
    seen = torch.zeros(len(images), h * w).scatter(1, cells, 1).view(-1, 1, h, w)
    return F.interpolate(seen, size=images.shape[-2:], mode="nearest") > 0


def statistics(backbone: Backbone) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in backbone.named_buffers() if "running" in k}


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_masked_pixels_influence_neither_features_nor_batch_statistics(name: str, size: int) -> None:
    backbone = made(name, size).train()
    images = images_for(backbone)
    visible = some_cells(backbone, images)
    changed = torch.where(pixels_of(visible, backbone, images), images, 1e4 * torch.randn_like(images))
    changed[0, 0][~pixels_of(visible, backbone, images)[0, 0]] = torch.nan
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        one, other = backbone(images, visible=visible), twin(changed, visible=visible)
    assert torch.equal(one.cells, other.cells)
    assert torch.equal(one.pooled, other.pooled)
    assert one.cells.isfinite().all()
    for before, after in zip(statistics(backbone).values(), statistics(twin).values()):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_resnet26d_224", "vitamin_small_224"])
def test_replaced_pixels_do_not_pass_a_convolutional_stem(name: str) -> None:
    """Not even into the embeddings of neighbours, nor into batch statistics; what is not replaced does matter."""
    backbone = made(name, 64).train()
    backbone.learn_mask_token()
    images = images_for(backbone)
    h, w = backbone.grid(*images.shape[-2:])
    replaced = torch.stack([torch.randperm(h * w) % 2 == 0 for _ in images])
    shown = pixels_of((~replaced).nonzero()[:, 1].view(2, -1), backbone, images)
    twin, third = copy.deepcopy(backbone), copy.deepcopy(backbone)
    with torch.no_grad():
        one = backbone(images, replaced=replaced)
        other = twin(torch.where(shown, images, torch.nan), replaced=replaced)
        moved = third(torch.where(shown, -images, images), replaced=replaced)
    assert torch.equal(one.cells, other.cells)
    assert torch.equal(one.pooled, other.pooled)
    assert not torch.allclose(one.cells, moved.cells, atol=0.1)
    for before, after in zip(statistics(backbone).values(), statistics(twin).values()):
        assert torch.equal(before, after)
    order = torch.stack([torch.randperm(h * w) for _ in images])
    backbone.eval(), twin.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        both = twin.eval()(images, visible=order, replaced=replaced).cells
        torch.testing.assert_close(both, gather_cells(backbone(images, replaced=replaced).cells, order))
        none = backbone(images, replaced=torch.zeros_like(replaced)).cells
        torch.testing.assert_close(none, backbone(images).cells, rtol=1e-4, atol=1e-4)
        everything = backbone(images, replaced=torch.ones_like(replaced)).cells
    torch.testing.assert_close(everything[0], everything[1])  # no content left


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_with_everything_visible_it_is_the_plain_network(name: str, size: int) -> None:
    for training in (False, True):
        plain = made(name, size, torch.float64).train(training)
        masked = copy.deepcopy(plain)
        images = images_for(plain)
        h, w = plain.grid(*images.shape[-2:])
        n = h * w
        order = torch.stack([torch.randperm(n) for _ in images])
        with torch.no_grad():
            a = gather_cells(plain(images.double()).cells, order)
            b = masked(images.double(), visible=order).cells
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        for x, y in zip(statistics(plain).values(), statistics(masked).values()):
            torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "vgg11_bn"])
def test_masking_is_the_sparse_network_not_only_a_masked_image(name: str) -> None:
    """With only the image masked, biases and shifts fill the masked cells and leak into their neighbours."""
    backbone = made(name).eval()
    images = torch.randn(2, 3, 32, 32)
    visible = some_cells(backbone, images)
    with torch.no_grad():
        sparse = backbone(images, visible=visible).cells
        zeroed = gather_cells(backbone(images * pixels_of(visible, backbone, images)).cells, visible)
    assert (sparse - zeroed).abs().max() > 0.01 * zeroed.abs().max()


def test_an_isolated_cell_equals_the_network_on_a_lone_padded_patch() -> None:
    """An independent computation: one visible cell of LeNet-like layers is the same layers on zeros around its patch,
    cut back to the patch after every layer."""
    net = nn.ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 5, 5, padding=2)])
    image = torch.randn(1, 1, 16, 16)
    seen = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    seen[0, 0, 1, 2] = True

    def box(x: Tensor, fill: float = 0.0) -> Tensor:
        side = x.shape[-1] // 4
        out = torch.full_like(x, fill)
        out[..., side : 2 * side, 2 * side : 3 * side] = x[..., side : 2 * side, 2 * side : 3 * side]
        return out

    expected = box(net[2](box(net[1](box(F.gelu(net[0](box(image))), -torch.inf)))))
    with VisibleOnly(seen):
        got = net[2](net[1](F.gelu(net[0](image))))
    torch.testing.assert_close(box(got), expected)


def test_batch_statistics_are_those_of_the_visible_positions() -> None:
    """Against torch's own batch norm on the visible positions gathered into one long row."""
    torch.manual_seed(0)
    bn, reference = nn.BatchNorm2d(6), nn.BatchNorm1d(6)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    reference.load_state_dict(bn.state_dict())
    x = (3 * torch.randn(4, 6, 8, 8) + 2).requires_grad_()
    y = x.detach().clone().requires_grad_()
    seen = torch.rand(4, 1, 8, 8) > 0.6
    with VisibleOnly(seen):
        out = bn(x)
    rows = seen[:, 0]
    expected = reference(y.permute(0, 2, 3, 1)[rows])
    torch.testing.assert_close(out.permute(0, 2, 3, 1)[rows], expected)
    torch.testing.assert_close(bn.running_mean, reference.running_mean)
    torch.testing.assert_close(bn.running_var, reference.running_var)
    assert bn.num_batches_tracked == reference.num_batches_tracked == 1

    weights = torch.randn_like(expected)
    (out.permute(0, 2, 3, 1)[rows] * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(bn.weight.grad, reference.weight.grad)
    torch.testing.assert_close(bn.bias.grad, reference.bias.grad)


def test_the_gradient_of_masked_batch_norm_is_right_at_every_position() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 1, 4, 4) > 0.4).double()
    weight, bias = torch.randn(2, 3, dtype=torch.float64).unbind()

    def plainly(x: Tensor) -> Tensor:
        n = mask.sum()
        mean = (x * mask).sum((0, 2, 3), keepdim=True) / n
        var = ((x - mean).square() * mask).sum((0, 2, 3), keepdim=True) / n
        return (x - mean) / (var + 1e-5).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    direction = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad((plainly(x) * direction).sum(), x)
    out = masked_batch_norm(x, mask, None, None, weight, bias, 0.1, 1e-5)
    torch.testing.assert_close(out, plainly(x))
    (got,) = torch.autograd.grad((out * direction).sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True)])
def test_group_and_instance_norm_see_visible_positions_only(norm: nn.Module) -> None:
    torch.manual_seed(0)
    nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    x, seen = torch.randn(3, 6, 5, 5), torch.rand(3, 1, 5, 5) > 0.5
    with VisibleOnly(seen):
        out = norm(x)
    for sample, mask, got in zip(x, seen[:, 0], out):
        torch.testing.assert_close(got[:, mask], norm(sample[:, mask].view(1, 6, 1, -1))[0, :, 0])


def test_squeezing_averages_over_visible_positions() -> None:
    x, seen = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 4, 4) > 0.5
    mask = seen.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = torch.stack([s[:, m[0]].mean(1) for s, m in zip(x, mask)])
    with VisibleOnly(seen):
        torch.testing.assert_close(x.mean((2, 3)), expected)
        torch.testing.assert_close(x.permute(0, 2, 3, 1).mean(dim=(1, 2)), expected)
        torch.testing.assert_close(F.adaptive_avg_pool2d(x, 1)[..., 0, 0], expected)
        torch.testing.assert_close(torch.mean(x, (-2, -1)), expected)
        assert torch.equal(x.mean(1), torch.mean(x, 1))  # over channels: nothing spatial about it
        assert torch.equal(x.amax((2, 3)), torch.stack([s[:, m[0]].amax(1) for s, m in zip(x, mask)]))


def test_average_pooling_averages_over_visible_positions() -> None:
    x = torch.randn(1, 2, 4, 4)
    seen = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    seen[0, 0, 0, 0] = seen[0, 0, 0, 1] = seen[0, 0, 3, 3] = True
    with VisibleOnly(seen):
        out = F.avg_pool2d(x, 2)
        torch.testing.assert_close(out[0, :, 0, 0], x[0, :, 0, :2].mean(1))
        torch.testing.assert_close(out[0, :, 1, 1], x[0, :, 3, 3])
        everywhere = VisibleOnly(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with everywhere:
        padded = F.avg_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(padded, F.avg_pool2d(x, 3, 2, 1))


def test_max_pooling_ignores_masked_positions_even_among_negatives() -> None:
    x = -torch.ones(1, 1, 4, 4)
    seen = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    seen[0, 0, 0, 0] = True
    with VisibleOnly(seen):
        out = F.max_pool2d(x, 3, 2, 1)
    assert out.tolist() == [[[[-1, -1], [-1, -1]]]] or out[0, 0, 0, 0] == -1
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_bfloat16_autocast_costs_a_masked_network_no_more_than_a_plain_one(name: str) -> None:
    backbone = made(name).train()
    images = torch.randn(4, 3, 32, 32)
    visible = some_cells(backbone, images)

    def error(**options: Tensor) -> tuple[float, Backbone, Backbone]:
        exact, rounded = copy.deepcopy(backbone), copy.deepcopy(backbone)
        expected = exact(images, **options).cells
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = rounded(images.to(memory_format=torch.channels_last), **options).cells.float()
        got.sum().backward()
        return ((got - expected).norm() / expected.norm()).item(), exact, rounded

    plain, _, _ = error()
    masked, exact, rounded = error(visible=visible)
    assert masked < 1.5 * plain
    for a, b in zip(statistics(exact).values(), statistics(rounded).values()):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05)


def test_channels_last_stays_channels_last() -> None:
    kept: dict[str, bool] = {}
    backbone = made("resnet18").to(memory_format=torch.channels_last)
    last = backbone.network.layer4  # type: ignore[union-attr]
    last.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda _m, _i, out: kept.update(last=out.is_contiguous(memory_format=torch.channels_last))
    )
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    backbone(images, visible=some_cells(backbone, images))
    assert kept["last"]


def test_a_copy_masks_by_itself() -> None:
    """The EMA teacher is a deepcopy: what it does must not touch the student, nor the other way round."""
    student = made("resnet18").train()
    teacher = copy.deepcopy(student)
    images = torch.randn(2, 3, 32, 32)
    visible = some_cells(student, images)
    before = statistics(student)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(0.5)
        halved = teacher(images, visible=visible).cells
    assert all(torch.equal(a, b) for a, b in zip(before.values(), statistics(student).values()))
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), statistics(teacher).values()))
    with torch.no_grad():
        assert not torch.allclose(student(images, visible=visible).cells, halved)
        teacher.load_state_dict(student.state_dict())
        teacher.eval(), student.eval()
        assert torch.equal(student(images, visible=visible).cells, teacher(images, visible=visible).cells)


def test_masking_ends_with_the_forward_even_when_that_fails() -> None:
    net = nn.SyncBatchNorm(3)
    with visible_only(net, torch.ones(1, 1, 2, 2, dtype=torch.bool)):
        assert "forward" in vars(net)
    net.weight = None  # type: ignore[assignment]
    with pytest.raises(AttributeError), visible_only(net, torch.ones(1, 1, 2, 2, dtype=torch.bool)):
        net.weight.shape  # type: ignore[union-attr] # noqa: B018
    assert "forward" not in vars(net)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(x.mean((2, 3)), x.flatten(2).mean(2))


def test_it_compiles_into_one_graph() -> None:
    backbone = made("resnet20", 32).eval()
    images = torch.randn(2, 3, 32, 32)
    visible = some_cells(backbone, images)
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, visible=visible).cells, backbone(images, visible=visible).cells)


@pytest.mark.slow
def test_it_compiles_in_training_too() -> None:
    backbone = made("resnet20", 32).train()
    twin = copy.deepcopy(backbone)
    images = torch.randn(2, 3, 32, 32)
    visible = some_cells(backbone, images)
    compiled = torch.compile(twin, backend="aot_eager")
    one, other = backbone(images, visible=visible).cells, compiled(images, visible=visible).cells
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    one.square().mean().backward()
    other.square().mean().backward()
    for (name, a), b in zip(backbone.named_parameters(), twin.parameters()):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)


def _sync_rank(rank: int, port: int, state: dict[str, Tensor], x: Tensor, seen: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    holder = nn.Sequential(nn.BatchNorm2d(x.shape[1]), nn.BatchNorm1d(x.shape[1]))
    holder[0].load_state_dict(state)
    synchronise(holder)
    bn, flat = holder
    assert isinstance(bn, SyncBatchNorm)
    mine = x[rank::2].clone().requires_grad_()
    with visible_only(bn, seen[rank::2]):
        out = bn(mine)
    (out * seen[rank::2] * torch.arange(1.0, 9).view(8, 1)).square().sum().backward()
    result = (out, mine.grad, bn.weight.grad, bn.running_mean, bn.running_var, flat(mine.mean((2, 3))))
    queue.put((rank, [t.detach().numpy().copy() for t in result if t is not None]))
    dist.destroy_process_group()


def test_synchronised_batch_norm_sees_the_visible_positions_of_all_ranks() -> None:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(3)
    nn.init.normal_(bn.weight)
    state = {k: v.clone() for k, v in bn.state_dict().items()}
    x, seen = 2 * torch.randn(6, 3, 8, 8) + 1, torch.rand(6, 1, 8, 8) > 0.5
    whole = x.clone().requires_grad_()
    with VisibleOnly(seen):
        out = bn(whole)
    (out * seen * torch.arange(1.0, 9).view(8, 1)).square().sum().backward()

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_sync_rank, args=(r, port, state, x, seen, queue)) for r in range(2)]
    for p in ranks:
        p.start()
    results = dict(queue.get(timeout=120) for _ in ranks)
    for p in ranks:
        p.join(60)
    weight_grad = torch.zeros(3)
    for rank, values in results.items():
        got_out, got_grad, got_weight, mean, var, flat = (torch.from_numpy(v) for v in values)
        torch.testing.assert_close(got_out, out[rank::2].detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got_grad, whole.grad[rank::2], rtol=1e-3, atol=1e-3)  # type: ignore[index]
        torch.testing.assert_close(mean, bn.running_mean)
        torch.testing.assert_close(var, bn.running_var)
        torch.testing.assert_close(flat, nn.BatchNorm1d(3)(x.mean((2, 3)))[rank::2].detach())
        weight_grad += got_weight
    torch.testing.assert_close(weight_grad, bn.weight.grad, rtol=1e-4, atol=1e-3)
