"""LARS against its paper in float64, and the schedules against their closed forms."""

import math

import numpy as np
import pytest
import torch

from pipeline.config import Config
from pipeline.training import optimiser


def test_lars_follows_the_paper():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    gradients = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(weight.clone())
    lars = optimiser.LARS([{"params": [parameter], "weight_decay": 0.01}], lr=0.3)
    expected, velocity = weight.numpy().copy(), np.zeros((4, 3))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        lars.step()
        update = gradient.numpy() + 0.01 * expected
        update *= 0.001 * np.linalg.norm(expected) / np.linalg.norm(update)
        velocity = 0.9 * velocity + update
        expected = expected - 0.3 * velocity
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_lars_leaves_biases_to_plain_momentum_and_survives_zero_weights():
    bias, zero = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(2, 2))
    groups = [{"params": [bias], "trust": False}, {"params": [zero]}]
    lars = optimiser.LARS(groups, lr=0.1)
    bias.grad, zero.grad = torch.full((3,), 2.0), torch.ones(2, 2)
    lars.step()
    torch.testing.assert_close(bias.detach(), torch.full((3,), 0.8))
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    config = Config(lr=2.0, warmup=0.1, lr_end=0.01)
    assert optimiser.learning_rate(config, 0.0) == 0.0
    assert optimiser.learning_rate(config, 0.05) == pytest.approx(1.0)
    assert optimiser.learning_rate(config, 0.1) == pytest.approx(2.0)
    middle = 0.02 + (2.0 - 0.02) * (1 + math.cos(math.pi / 2)) / 2
    assert optimiser.learning_rate(config, 0.55) == pytest.approx(middle)
    assert optimiser.learning_rate(config, 1.0) == pytest.approx(0.02)


def test_rates_reach_every_group_with_its_scales():
    config = Config(lr=1.0, warmup=0.0, lr_end=0.0, weight_decay=0.04, weight_decay_end=0.4, optimiser="sgd")
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr_scale": 0.5, "wd_scale": 1.0},
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr_scale": 1.0, "wd_scale": 0.0},
    ]
    opt = optimiser.build(groups, config, torch.device("cpu"))
    optimiser.set_rates(opt, config, 0.5)
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.25, 0.5])
    assert [g["weight_decay"] for g in opt.param_groups] == pytest.approx([0.22, 0.0])


def test_clipping_counts_all_gradients_together_and_zero_clips_nothing():
    layer = torch.nn.Linear(3, 2)
    for p in layer.parameters():
        p.grad = torch.full_like(p, 2.0)
    total = math.sqrt(4.0 * 8)
    assert float(optimiser.clip(layer, 0.0)) == pytest.approx(total)
    assert float(layer.bias.grad[0]) == 2.0
    assert float(optimiser.clip(layer, 1.0)) == pytest.approx(total)
    assert float(layer.bias.grad[0]) == pytest.approx(2.0 / total, rel=1e-4)
