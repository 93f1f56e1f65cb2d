"""MoCo v3 against the paper's algorithm in float64, against LightlySSL, and its behaviour around the loss."""

from functools import partial

import numpy as np
import objective_checks as check
import pytest
import torch
import torch.nn.functional as F
from objective_checks import random_views, relative
from objective_toys import ToyBackbone, sick
from torch import nn

import backbones
import objectives
from objectives.moco_v3 import MoCoV3, contrast
from pipeline import recipes

SMALL = {"hidden_dim": 32, "out_dim": 16, "scale": (0.5, 1.0), "freeze_stem": False}


def small(backbone: nn.Module | None = None, **options: object) -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3(backbone or ToyBackbone(), image_size=32, **{**SMALL, **options})


def ctr(q: np.ndarray, k: np.ndarray, tau: float) -> tuple[float, np.ndarray]:
    """ctr(q, k) of algorithm 1, times 2 tau, and its gradient to q [B, D]; keys are constants."""
    length = np.linalg.norm(q, axis=1)
    k = k / np.linalg.norm(k, axis=1, keepdims=True)
    loss, gradient = 0.0, np.zeros_like(q)
    for i in range(len(q)):
        unit = q[i] / length[i]
        p = np.array([np.exp(unit @ k[j] / tau) for j in range(len(k))])
        p /= p.sum()
        loss -= 2 * tau * np.log(p[i]) / len(q)
        to_unit = 2 * (sum(p[j] * k[j] for j in range(len(k))) - k[i]) / len(q)
        gradient[i] = (to_unit - (to_unit @ unit) * unit) / length[i]
    return loss, gradient


@pytest.mark.parametrize(("batch", "width", "tau"), [(2, 3, 1.0), (24, 16, 0.2)])
def test_loss_and_gradient_equal_the_papers_in_float64(batch: int, width: int, tau: float) -> None:
    q_data, k_data = np.random.default_rng(batch).normal(size=(2, batch, width))
    loss, gradient = ctr(q_data, k_data, tau)
    q = torch.tensor(q_data, dtype=torch.float32, requires_grad=True)
    ours = 2 * tau * F.cross_entropy(*contrast(q, torch.tensor(k_data, dtype=torch.float32), tau))
    ours.backward()
    assert relative(ours, loss, loss_of="the paper") <= 1e-5
    assert relative(q.grad, gradient, gradient_of="the paper") <= 1e-5


def test_loss_and_gradient_equal_lightlys() -> None:
    """Theirs with a memory bank that holds the other images' keys, query by query."""
    lightly = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2, memory_bank_size=(6, 16))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(7, 16, generator=generator).requires_grad_(), torch.randn(7, 16, generator=generator)
    theirs_in, theirs = q.detach().clone().requires_grad_(), torch.zeros(())
    for i in range(7):
        lightly.memory_bank.bank = F.normalize(torch.cat([k[:i], k[i + 1 :]]), dim=1)
        theirs = theirs + lightly(theirs_in[i : i + 1], k[i : i + 1]) / 7
    ours = F.cross_entropy(*contrast(q, k, 0.2))
    ours.backward()
    theirs.backward()
    assert relative(ours, theirs.detach(), loss_of="LightlySSL") <= 1e-5
    assert relative(q.grad, theirs_in.grad, gradient_of="LightlySSL") <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: F.cross_entropy(*contrast(q, k, 0.3)), (q.requires_grad_(),))


def test_a_whole_step_equals_the_papers() -> None:
    """Networks, temperature, momentum, and which view asks for which, as the objective wires them."""
    objective = small(temperature=0.3, momentum_start=0.9).double()
    views = [view.double() for view in random_views(objective, batch=4)]
    with torch.no_grad():
        for weight in objective.momentum_encoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        q = objective.predictor(objective.encoder(views)[0].flatten(0, 1)).view(2, 4, -1).numpy()
        k = objective.momentum_encoder(views)[0].numpy()
    ours, scalars = objective(views, 0.25)
    expected = ctr(q[0], k[1], 0.3)[0] + ctr(q[1], k[0], 0.3)[0]
    assert relative(ours, expected, loss_of="the paper") <= 1e-12
    assert relative(scalars["loss_over_chance"], expected / 2 / 0.6 / np.log(4)) <= 1e-12
    ours.backward()
    assert all(p.grad is None for p in objective.momentum_encoder.parameters())
    keys, queries = list(objective.momentum_encoder.parameters()), list(objective.encoder.parameters())
    old = [(key.clone(), query.clone()) for key, query in zip(keys, queries)]
    objective.after_step(0.25)
    m = 1 - (1 - 0.9) * (np.cos(np.pi * 0.25) + 1) / 2
    for new, (key, query) in zip(keys, old):
        assert torch.allclose(new, m * key + (1 - m) * query, rtol=1e-12, atol=1e-14)


def test_views_are_the_published_ones() -> None:
    one, two = MoCoV3(ToyBackbone(), image_size=224, hidden_dim=8).views
    assert (one.size, one.scale) == (two.size, two.scale) == ((224, 224), (0.08, 1.0))
    assert (one.photometric.blur_p, one.photometric.solarize_p) == (1.0, 0.0)
    assert (two.photometric.blur_p, two.photometric.solarize_p) == (0.1, 0.2)
    others = small(blur=(0.5, 0.4), solarize=(0.3, 0.1)).views
    assert [(v.photometric.blur_p, v.photometric.solarize_p) for v in others] == [(0.5, 0.3), (0.4, 0.1)]
    for p in (one.photometric, two.photometric):
        assert (p.brightness, p.contrast, p.saturation, p.hue, p.jitter_p, p.gray_p) == (0.4, 0.4, 0.2, 0.1, 0.8, 0.2)


@pytest.mark.parametrize("family", ["cnn", "vit"])
def test_thumbnails_are_not_blurred_as_solo_learns_are_not(family: str) -> None:
    options = recipes.find("moco_v3", family, "thumbnails").options
    one, two = MoCoV3(ToyBackbone(), image_size=32, **{**options, "hidden_dim": 8, "freeze_stem": False}).views
    assert (one.photometric.blur_p, two.photometric.blur_p) == (0.0, 0.0)
    assert (one.photometric.solarize_p, two.photometric.solarize_p) == (0.0, 0.2)


def test_heads_are_the_published_ones() -> None:
    vit, resnet = small(projector_layers=3), small(projector_layers=2, predictor_norm=False)
    block = ["Linear", "BatchNorm1d", "ReLU"]
    heads = [vit.encoder.projector, vit.predictor, resnet.encoder.projector, resnet.predictor]
    assert [[type(layer).__name__ for layer in head] for head in heads] == [
        [*block, *block, *block[:2]],
        [*block, *block[:2]],
        [*block, *block[:2]],
        [*block, "Linear"],
    ]
    assert all(layer.bias is None for head in heads for layer in head if isinstance(layer, nn.Linear))
    assert not vit.predictor[-1].affine
    assert not vit.encoder.projector[-1].affine
    assert vit.predictor[1].affine


def test_every_trainable_parameter_learns() -> None:
    check.learns_with_every_parameter(small())


@pytest.mark.parametrize(
    ("backbone", "frozen"),
    [
        ("vit_ti16", {"network.patch_embed.proj.weight", "network.patch_embed.proj.bias"}),
        ("resnet20", {"network.stages.0.0.weight"}),
    ],
)
def test_the_first_layer_stays_as_it_is(backbone: str, frozen: set[str]) -> None:
    net = backbones.create(backbone, image_size=32)
    learned = {name for name, p in net.named_parameters() if p.requires_grad}
    objective = small(net, freeze_stem=True)
    still = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learned - still == frozen
    check.learns_with_every_parameter(objective)


def test_a_backbone_that_is_all_stem_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match="set freeze_stem False"):
        small(backbones.create("fc", image_size=32), freeze_stem=True)


def test_one_image_has_nothing_to_be_told_apart_from() -> None:
    with pytest.raises(ValueError, match="batch of 1 has no other"):
        small()(random_views(small(), batch=1), 0.0)
    assert small()(random_views(small(), batch=2), 0.0)[0].isfinite()


def test_exact_continuation_from_a_state_dict() -> None:
    check.continues_exactly(small)


def test_bf16_autocast_gives_a_finite_float32_loss_near_the_exact_one() -> None:
    check.is_near_itself_in_bf16(small())


def test_evaluation_moves_nothing() -> None:
    check.evaluation_moves_nothing(small())


def test_channels_and_shapes() -> None:
    check.takes_any_images(partial(objectives.create, "moco_v3", **SMALL))


def test_vital_signs_trip_on_features_that_are_all_the_same() -> None:
    objective = small()
    with torch.no_grad():
        objective.encoder.backbone.patch.weight.zero_()
        objective.momentum_encoder.update(objective.encoder, 0.0)
    scalars = objective(random_views(objective, batch=8), 0.5)[1]
    assert sick(objective, [{k: v.item() for k, v in scalars.items()}]) == {"loss_over_chance", "feature_spread"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_it_learns_and_stays_healthy(kind: str) -> None:
    def make(backbone: nn.Module, image_size: int) -> MoCoV3:
        return small(backbone, hidden_dim=64, momentum_start=0.9, freeze_stem=True)

    before, after = check.lifts_knn(make, kind, steps=200, lr=4e-3)
    assert 1 - after < (1 - before) / 2


def test_created_by_name() -> None:
    objective = objectives.create("moco_v3", ToyBackbone(), image_size=32, **SMALL)
    assert isinstance(objective, MoCoV3)
    assert objective.backbone is objective.encoder.backbone
