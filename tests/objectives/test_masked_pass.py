"""What is trained on parts of images is measured on whole ones: running statistics of batch norms, on real networks."""

import copy

import pytest
import torch
from tiny_backbones import tiny_cnn, tiny_vit
from torch import nn

import backbones
import objectives
from objectives.masked_pass import WHOLE, encode

ON_A_STUDENT = ("mae", "simmim", "spark", "data2vec")
"""Objectives that give away an encoder which only ever sees masked images."""
OPTIONS = {
    "mae": {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
    "simmim": {"mask_unit": 8},
    "spark": {"decoder_width": 32},
}


def batch_statistics(backbone: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in backbone.named_buffers() if "running" in name}


@pytest.mark.parametrize("name", ON_A_STUDENT)
def test_whole_images_are_normalised_in_evaluation_as_by_a_batch_of_them(name: str) -> None:
    torch.manual_seed(0)
    backbone = backbones.create("resnet20", image_size=32)
    objective = objectives.objective(name)(backbone, image_size=32, **OPTIONS.get(name, {})).train()
    optimiser = torch.optim.AdamW(objective.parameters(), 1e-3)
    images = torch.nn.functional.interpolate(torch.randn(64, 3, 8, 8), size=32, mode="bicubic")
    for first in (0, 32) * 30:
        loss, _ = objective([images[first : first + 32]], 0.5)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(0.5)
    trained = objective.backbone
    by_batch = copy.deepcopy(trained)
    with torch.no_grad():
        evaluated, expected = trained.eval()(images).pooled, by_batch.train()(images).pooled
    off = (evaluated - expected).norm() / expected.norm()
    assert off < 0.5, f"{off:.2f} of the features' length"


def test_the_masked_pass_is_the_backbones_own_and_moves_running_statistics_by_whole_images() -> None:
    torch.manual_seed(0)
    backbone = tiny_cnn().train()
    other, plain = copy.deepcopy(backbone), copy.deepcopy(backbone)
    images, visible = torch.randn(20, 3, 32, 32), torch.rand(20, 16).argsort(1)[:, :5]
    ours, expected = encode(backbone, images, visible=visible), other(images, visible=visible)
    assert torch.equal(ours.cells, expected.cells)
    ours.cells.square().sum().backward()
    expected.cells.square().sum().backward()
    for one, two in zip(backbone.parameters(), other.parameters()):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)
    plain(images[:WHOLE])
    for name, value in batch_statistics(plain).items():
        assert torch.equal(batch_statistics(backbone)[name], value)


@pytest.mark.parametrize("backbone", [tiny_vit(), tiny_cnn().eval()], ids=["without batch norm", "in evaluation"])
def test_there_is_one_pass_where_nothing_is_to_be_moved(backbone: nn.Module) -> None:
    calls: list[object] = []
    backbone.register_forward_hook(lambda *_: calls.append(1))
    before = batch_statistics(backbone)
    encode(backbone, torch.randn(4, 3, 32, 32), visible=torch.rand(4, 16).argsort(1)[:, :5])
    assert len(calls) == 1
    assert all(torch.equal(before[name], value) for name, value in batch_statistics(backbone).items())


def test_a_failed_pass_leaves_batch_norms_as_they_were() -> None:
    backbone = tiny_cnn().train()
    with pytest.raises(ValueError, match="visible"):
        encode(backbone, torch.randn(4, 3, 32, 32), visible=torch.rand(4, 5))
    assert all(m.track_running_stats for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
