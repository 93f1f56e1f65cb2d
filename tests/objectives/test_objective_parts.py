"""What objectives share: schedules, the EMA teacher, centring, heads, masks, positions, measures of spread."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from objective_toys import ToyBackbone
from timm.models import Beit, SwinTransformer, SwinTransformerV2, VisionTransformer, Xcit, create_model
from torch import nn

import backbones
import objectives
from objectives.centring import Centre
from objectives.contract import Objective
from objectives.heads import WeightNormLinear, mlp
from objectives.masks import random_cells, visible_count
from objectives.multicrop import crop_size, local_crop_size, pooled_features
from objectives.positions import sincos
from objectives.precision import full_precision
from objectives.schedules import cosine, linear, warmup
from objectives.spread import effective_rank, feature_spread
from objectives.teacher import Teacher

SMALL: dict = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_classes": 0}
SWIN: dict = {**SMALL, "window_size": 4, "depths": (1,), "num_heads": (2,)}
DEEP: dict = {**SMALL, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("network", "spared", "tokens"),
    [
        (SwinTransformer(**SWIN), {"relative_position_bias_table"}, set()),
        (SwinTransformerV2(**SWIN), {"logit_scale", "cpb_mlp.0.weight", "cpb_mlp.2.weight"}, set()),
        (Beit(**DEEP, use_rel_pos_bias=True), {"relative_position_bias_table"}, {"cls_token", "pos_embed"}),
        (Xcit(**DEEP), {"temperature"}, {"cls_token"}),
        (VisionTransformer(**DEEP, reg_tokens=2), set(), {"cls_token", "pos_embed", "reg_token"}),
        (create_model("test_nfnet", num_classes=0), {"gain"}, set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_networks_want_without_decay_has_none_but_tokens(
    network: nn.Module, spared: set[str], tokens: set[str]
) -> None:
    objective = Objective()
    objective.encoder = nn.ModuleDict({"network": network})
    for tokens_decay, expected in ((True, spared), (False, spared | tokens)):
        objective.tokens_decay = tokens_decay  # type: ignore[misc]
        groups = objective.parameter_groups()
        assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))
        plain = {id(p) for g in groups for p in g["params"] if not g["wd_scale"]}
        found = {name for name, p in network.named_parameters() if id(p) in plain and p.ndim > 1}
        assert found == {name for name, _ in network.named_parameters() if name.endswith(tuple(expected))}
        assert {end for end in expected for name in found if name.endswith(end)} == expected


def test_schedules_equal_their_closed_forms() -> None:
    assert [linear(1, 3, t) for t in (-1, 0, 0.25, 1, 2)] == [1, 1, 1.5, 3, 3]
    assert [cosine(0.996, 1, t) for t in (0, 1, 7)] == [0.996, 1, 1]
    assert cosine(2, 4, 0.5) == pytest.approx(3)
    assert cosine(2, 4, 1 / 3) == pytest.approx(2.5)
    assert [warmup(0.04, 0.07, t, 0.1) for t in (0, 0.1, 1)] == [0.04, 0.07, 0.07]
    assert warmup(0.04, 0.07, 0.05, 0.1) == pytest.approx(0.055)
    assert warmup(0.04, 0.07, 0.0, 0.0) == 0.07


def test_schedules_equal_the_official_ones_step_by_step() -> None:
    """utils.cosine_scheduler of DINO over 50 steps; progress is step / steps."""
    steps = np.arange(50)
    official = 1 + 0.5 * (0.996 - 1) * (1 + np.cos(np.pi * steps / len(steps)))
    assert np.allclose([cosine(0.996, 1, i / 50) for i in steps], official, rtol=1e-12)


def test_teacher_follows_as_an_average_of_all_students() -> None:
    student = nn.Linear(3, 2)
    teacher = Teacher(student)
    expected = student.weight.detach().clone()
    for step in range(5):
        nn.init.normal_(student.weight)
        momentum = 0.9 + 0.01 * step
        teacher.update(student, momentum)
        expected = momentum * expected + (1 - momentum) * student.weight.detach()
        assert torch.allclose(teacher.network.weight, expected, rtol=1e-6)
    teacher.update(student, 0.0)
    assert torch.equal(teacher.network.weight, student.weight)


def test_teacher_is_a_copy_without_gradient() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = Teacher(student)
    out = teacher(torch.randn(4, 3))
    assert not out.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    own = {t.data_ptr() for t in teacher.state_dict().values()}
    assert not own & {t.data_ptr() for t in student.state_dict().values()}


def test_teacher_is_deterministic_but_for_its_batch_norms() -> None:
    wrapped = nn.ModuleDict({"teacher": Teacher(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.BatchNorm1d(64)))})
    x = torch.randn(8, 3)
    for mode in (True, False, True):
        wrapped.train(mode)
        teacher = wrapped["teacher"]
        _, dropout, norm = teacher.network
        assert (teacher.training, dropout.training, norm.training) == (mode, False, mode)
        before = copy.deepcopy(norm.running_mean)
        assert torch.equal(teacher(x), teacher(x))
        assert torch.equal(norm.running_mean, before) != mode


def test_teachers_running_statistics_become_those_of_its_own_features() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.1))
    teacher = Teacher(student)
    nn.init.normal_(student[0].weight, std=7)
    for _ in range(200):
        teacher.update(student, 0.9)
        teacher(torch.randn(64, 3) + 2)
    with torch.no_grad():
        features = teacher.network[0](torch.randn(20000, 3) + 2)
    norm = teacher.network[1]
    assert torch.allclose(norm.running_mean, features.mean(0), rtol=0.1, atol=0.3)
    assert torch.allclose(norm.running_var, features.var(0), rtol=0.25)
    teacher.eval()
    assert teacher(torch.randn(5000, 3) + 2).std(0).sub(1).abs().max() < 0.15


def test_centre_is_a_moving_average_of_step_means() -> None:
    centre, expected = Centre(4), torch.zeros(4)
    for step in range(4):
        outputs = torch.randn(2, 5, 4) + step
        assert torch.allclose(centre(outputs), outputs - expected)
        centre.observe(outputs[:, :2])
        centre.observe(outputs[:, 2:])
        centre.update(0.9)
        expected = 0.9 * expected + 0.1 * outputs.mean((0, 1))
        assert torch.allclose(centre.value, expected, rtol=1e-5)
    centre.update(0.9)
    assert torch.allclose(centre.value, expected, rtol=1e-5)
    assert set(centre.state_dict()) == {"value"}


def test_weight_norm_equals_torchs() -> None:
    ours = WeightNormLinear(6, 5, fixed_scale=False)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5, bias=False), dim=0)
    with torch.no_grad():
        ours.scale.uniform_(0.5, 2)
        theirs.parametrizations.weight.original0.copy_(ours.scale)
        theirs.parametrizations.weight.original1.copy_(ours.direction)
    x = torch.randn(3, 6)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    theirs_gradients = [theirs.parametrizations.weight.original0.grad, theirs.parametrizations.weight.original1.grad]
    for a, b in zip((ours.scale.grad, ours.direction.grad), theirs_gradients):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_fixed_scale_is_not_trained() -> None:
    assert not WeightNormLinear(6, 5, fixed_scale=True).scale.requires_grad


def test_mlp_layers() -> None:
    plain, normed = mlp([8, 16, 16, 4]), mlp([8, 16, 4], norm="batch", activation=nn.ReLU)
    assert [type(m).__name__ for m in plain] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert [type(m).__name__ for m in normed] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert normed[0].bias is None
    assert normed[-1].bias is not None
    with pytest.raises(ValueError, match="'layer' is not known; choose one of none, batch"):
        mlp([8, 4, 4], norm="layer")


@pytest.mark.parametrize(("cells", "ratio", "count"), [(196, 0.75, 49), (196, 0.6, 78), (16, 0.75, 4), (20, 0.9, 2)])
def test_visible_count(cells: int, ratio: float, count: int) -> None:
    assert visible_count(cells, ratio) == count


def test_random_cells_split_each_image_and_favour_none() -> None:
    torch.manual_seed(0)
    visible, masked = random_cells(4000, 16, 4, torch.device("cpu"))
    assert visible.dtype == torch.int64
    both = torch.cat([visible, masked], 1)
    assert torch.equal(both.sort(1).values, torch.arange(16).expand(4000, -1))
    counts = torch.bincount(visible.flatten(), minlength=16)
    chi2 = ((counts - 1000).square() / 1000).sum().item() / (1 - 4 / 16)
    assert chi2 < 37.7  # 99.9 % quantile at 15 degrees of freedom
    torch.manual_seed(0)
    assert torch.equal(random_cells(4000, 16, 4, torch.device("cpu"))[0], visible)


def test_positions_equal_lightlys_copy_of_maes() -> None:
    lightly = pytest.importorskip("lightly.models.utils")
    theirs = lightly.get_2d_sine_cosine_positional_embedding(64, 7, cls_token=False)
    assert np.allclose(sincos((7, 7), 64).numpy(), theirs, atol=1e-5)
    oblong = sincos((2, 3), 8)
    assert torch.allclose(oblong.view(2, 3, 8)[1, 2], sincos((3, 3), 8).view(3, 3, 8)[1, 2])
    assert math.isclose(oblong.view(2, 3, 8)[1, 2, 0], math.sin(2), rel_tol=1e-6)
    assert math.isclose(oblong.view(2, 3, 8)[1, 2, 4], math.sin(1), rel_tol=1e-6)


def test_spread_of_features() -> None:
    assert feature_spread(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-3)
    assert feature_spread(torch.zeros(5, 3)).item() == 0
    assert feature_spread(torch.tensor([[1.0, 0], [-1, 0]])).item() == 1
    x = torch.randn(10, 4)
    pairs = nn.functional.normalize(x, dim=1) @ nn.functional.normalize(x, dim=1).T
    assert feature_spread(x).item() == pytest.approx((1 - pairs.mean()).sqrt().item(), rel=1e-5)
    assert feature_spread(torch.randn(1, 4)).item() == 1


@pytest.mark.parametrize("shape", [(200, 6), (8, 40)])
def test_effective_rank_is_the_participation_ratio_of_the_covariance(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape) * torch.linspace(0.1, 3, shape[1])
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T.double()))
    expected = (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item()
    assert effective_rank(x).item() == pytest.approx(expected, rel=1e-4)
    line = torch.randn(20, 1) * torch.ones(1, 5)
    assert effective_rank(line).item() == pytest.approx(1, rel=1e-5)
    assert effective_rank(torch.ones(5, 3)).item() == 0


def test_views_of_one_size_share_a_pass_and_keep_their_order() -> None:
    backbone, sizes = ToyBackbone(), (32, 32, 16, 16, 16)
    views = [torch.randn(2, 3, s, s) for s in sizes]
    calls: list[int] = []
    backbone.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    pooled = pooled_features(backbone, views)
    assert calls == [4, 6]
    assert pooled.shape == (5, 2, 32)
    for together, view in zip(pooled, views):
        assert torch.allclose(together, backbone(view).pooled, atol=1e-6)


def test_crop_size_goes_up_to_what_the_backbone_takes() -> None:
    class Only(ToyBackbone):
        """Takes sides of 24 pixels and more, or where told one size only."""

        def __init__(self, only: tuple[int, int] | None = None) -> None:
            super().__init__()
            self.only = only

        def grid(self, height: int, width: int) -> tuple[int, int]:
            if min(height, width) < 24 if self.only is None else (height, width) != self.only:
                raise ValueError("not this size")
            return super().grid(height, width)

    assert crop_size(ToyBackbone(), (13.7, 3), (64, 64)) == (16, 8)
    assert crop_size(Only(), (13.7, 13.7), (64, 64)) == (24, 24)
    for known in ((224, 224), (40, 136), (136, 40)):  # far above what is wished, and of other proportions
        assert crop_size(Only(known), (13.7, 13.7), known) == known
        assert crop_size(Only(known), (448, 448), known) == known
        assert local_crop_size(Only(known), known, None, 96) == known
        assert local_crop_size(Only(known), known, 32, 96) == known
    assert local_crop_size(ToyBackbone(), (224, 112), None, 96) == (96, 48)
    assert local_crop_size(ToyBackbone(), (32, 32), 64, 96) == (64, 64)
    with pytest.raises(ValueError, match="not this size"):
        crop_size(Only((32, 64)), (13.7, 13.7), (64, 64))


@pytest.mark.parametrize("name", ["dino", "dinov2", "ibot", "swav", "lejepa", "msn"])
def test_local_crops_have_the_size_of_globals_where_a_network_takes_no_other(name: str) -> None:
    backbone = backbones.create("test_vit_relpos", image_size=224)
    objective = objectives.create(name, backbone, image_size=224)
    assert len(objective.views) > 2
    assert {view.size for view in objective.views} == {(224, 224)}


def test_full_precision_keeps_what_is_precise() -> None:
    pairs = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64))
    for given, kept in pairs:
        assert full_precision(torch.ones(1, dtype=given)).dtype == kept


def test_names_come_without_torch() -> None:
    code = (
        "import sys, objectives, objectives.views; assert 'torch' not in sys.modules; "
        "assert {'dino', 'mae', 'byol'} <= set(objectives.NAMES) == set(objectives._CLASSES)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=120)


def test_wrong_names_lead_to_the_right_ones() -> None:
    with pytest.raises(ValueError, match="no objective 'dinno'; did you mean dino"):
        objectives.create("dinno", ToyBackbone(), image_size=32)
    with pytest.raises(ValueError, match="dino has no option 'teacher_tmp'; did you mean teacher_temp"):
        objectives.create("dino", ToyBackbone(), image_size=32, teacher_tmp=0.1)
    with pytest.raises(AttributeError, match="no attribute 'Dino'"):
        _ = objectives.Dino
