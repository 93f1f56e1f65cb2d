"""Are fields, distances and gradients what a computation by hand says?"""

from pathlib import Path

import numpy as np
import pytest
import torch

import backbones
from backbones.cost import receptive_field
from pipeline.data.packed import Packed
from pipeline.evaluation import examine, seeing
from pipeline.evaluation.feature_set import FeatureSet
from pipeline.evaluation.images import Images
from pipeline.evaluation.seeing import attention_distance, effective_field, half_radius, in_colour
from tests.evaluation.test_evaluate import pack

SIDE = 32


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, Packed]:
    folder = tmp_path_factory.mktemp("seeing")
    return pack(folder, "train", 24, 0), pack(folder, "val", 16, 1)


def test_the_effective_field_lies_within_the_theoretical_one_and_is_what_moving_pixels_moves() -> None:
    torch.manual_seed(0)
    backbone = backbones.create("lenet5", image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    field = effective_field(backbone, images)
    assert field.sum().item() == pytest.approx(1, abs=1e-5)
    rows = field.sum(1).nonzero().flatten()
    side = receptive_field(backbone)
    assert side is not None
    assert len(range(int(rows.min()), int(rows.max()) + 1)) <= side
    # Pixels that no square of that side around it holds move the centre cell not at all; those inside do.
    columns = field.sum(0).nonzero().flatten()
    near = torch.zeros(64, 64, dtype=torch.bool)
    top, left = (max(0, int(of.max()) - side + 1) for of in (rows, columns))
    near[top : int(rows.min()) + side, left : int(columns.min()) + side] = True
    grid = backbone.grid(64, 64)
    centre = (grid[0] // 2) * grid[1] + grid[1] // 2
    with torch.no_grad():
        before = backbone(images).cells[:, centre]
        outside = torch.where(near, images, images + 10)
        assert torch.allclose(backbone(outside).cells[:, centre], before, atol=1e-6)
        inside = torch.where(field > 0, images + 1, images)
        assert not torch.allclose(backbone(inside).cells[:, centre], before, atol=1e-4)
    assert all(p.requires_grad for name, p in backbone.named_parameters() if name != "mask_token")


def test_the_radius_that_holds_half() -> None:
    field = torch.zeros(21, 21)
    field[10, 10] = 0.4
    field[10, [7, 13]] = 0.15  # 3 pixels away
    field[[2, 18], 10] = 0.15  # 8 pixels away
    assert half_radius(field) == pytest.approx(3)


def test_attention_distance_by_hand() -> None:
    uniform = torch.full((1, 1, 4, 4), 0.25)
    near = torch.eye(4)[None, None]
    # Four cells in a square of side 2: to itself 0, two neighbours 1, diagonally √2; half of that in image sides.
    expected = (0 + 1 + 1 + 2**0.5) / 4 / 2
    found = attention_distance(torch.cat([uniform, near], dim=1), (2, 2))
    assert found.tolist() == pytest.approx([expected, 0])


def test_colours_are_the_first_three_principal_components() -> None:
    cells = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 25, 8)) * [9, 4, 2, 0.1, 0.1, 0.1, 0.1, 0.1])
    colours = in_colour(cells.float()).flatten(0, 1).double().numpy()
    flat = cells.flatten(0, 1).numpy()
    for component in range(3):
        assert abs(np.corrcoef(colours[:, component], flat[:, component])[0, 1]) > 0.97


@pytest.mark.parametrize("name", ["vit_ti8", "resnet20"])
def test_what_is_seen_of_a_transformer_and_of_a_cnn(sets: tuple[Packed, Packed], name: str, tmp_path: Path) -> None:
    backbone = backbones.create(name, image_size=SIDE)
    found = examine({"": backbone}, *sets, image_size=SIDE, protocols=("seeing", "depth", "similarity"))[""]
    evidence, grid = found.evidence, backbone.grid(SIDE, SIDE)
    n = seeing.IMAGES
    assert evidence["seeing_images"].shape == (n, 3, SIDE, SIDE)
    assert evidence["seeing_cells"].shape == (n, *grid, 3)
    assert evidence["seeing_neighbours"].shape == (n, seeing.NEIGHBOURS, 3, SIDE, SIDE)
    if name == "vit_ti8":
        assert evidence["seeing_attention"].shape == (n, 3, *grid)
        assert evidence["seeing_distance"].shape == (12, 3)
        assert 0 < found.numbers["seeing_attention_distance"] < 1
        assert all(block.attn.fused_attn for block in backbone.network.blocks)
    else:
        assert "seeing_attention" not in evidence
    depths = len(set(backbone.depths().values()) - ({0} if name == "none" else set()))
    assert len(evidence["depth_gradient"]) <= depths
    assert (evidence["depth_gradient"] > 0).all()
    assert len(evidence["depth_activation"]) == len(evidence["similarity_grams"])
    assert backbone.training  # put back
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "cait_xxs24_224"])
def test_attention_that_is_not_among_all_cells_is_left_out(sets: tuple[Packed, Packed], name: str) -> None:
    """Swin attends in windows; of CaiT only the class token's attention, [B, heads, 1, T], can be seen."""
    backbone = backbones.create(name, image_size=SIDE)
    images = Images(backbone.eval(), sets[1].path, torch.zeros(16), SIDE, torch.device("cpu"))
    which = torch.arange(16)
    shown = FeatureSet(torch.randn(16, backbone.width), torch.zeros(16), (), images=images, which=which)
    found = seeing.seeing(shown, shown, seed=0)
    assert found is not None
    assert found["cells"].shape == (seeing.IMAGES, *backbone.grid(SIDE, SIDE), 3)
    assert not {"attention", "distance", "attention_distance"} & set(found)


def test_the_gradient_at_a_depth_is_autograds(sets: tuple[Packed, Packed]) -> None:
    torch.manual_seed(0)
    backbone = backbones.create("lenet5", image_size=SIDE)
    found = examine({"": backbone}, *sets, image_size=SIDE, protocols=("depth",))[""].evidence["depth_gradient"]
    images = Images(backbone.eval(), sets[1].path, torch.zeros(16), SIDE, torch.device("cpu"))
    pooled = backbone(images.normalised(next(iter(images.batches(64))).images)).pooled
    (pooled * torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0))).sum().div(16).backward()
    depths, own = backbone.depths(), dict(backbone.named_parameters())
    first = torch.cat([p.grad.flatten() for name, p in own.items() if depths[name] == 0 and p.grad is not None])
    assert found[0].item() == pytest.approx(first.square().mean().sqrt().item(), rel=1e-4)
