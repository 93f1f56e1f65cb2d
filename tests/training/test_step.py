"""An optimiser step: a batch in parts is the batch, and half precision is what the configuration says."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline import asked, config
from pipeline.data.loader import Batch
from pipeline.training.health import Care
from pipeline.training.step import Stepper

CPU = torch.device("cpu")


def stepper(*argv: str, folder: Path, classes: int = 4) -> Stepper:
    words = ("--objective", "supervised", "--data", str(folder), "--image-size", "32", "--batch-size", "16")
    wanted = asked.parse([*words, "--precision", "fp32", *argv])
    return Stepper(config.resolve(wanted, images=640, side=32, classes=classes), CPU)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
    views = views.contiguous(memory_format=torch.channels_last)
    return Batch([views], torch.arange(16), torch.arange(16) % 4, 0)


@pytest.mark.parametrize("count", [2, 4])
def test_a_batch_in_accumulated_parts_takes_the_step_of_the_whole(tmp_path, count):
    words = ("--backbone", "vit_ti8", "--optimiser", "sgd", "--lr", "0.5", "--warmup", "0.0")  # no batch norm
    whole, parts = (stepper(*words, "--accumulate", n, folder=tmp_path) for n in ("1", str(count)))
    before = [p.clone() for p in whole.objective.parameters()]
    (told, _), (expected, _) = (one(batch(), 0, 640, Care([])) for one in (parts, whole))
    assert told["grad_norm"].item() == pytest.approx(expected["grad_norm"].item(), rel=1e-4)
    moved = 0
    for p, q, was in zip(parts.objective.parameters(), whole.objective.parameters(), before):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        moved += not torch.equal(q, was)
    assert moved > 100


@pytest.mark.parametrize("backbone", ["lenet5", "vit_ti8"])
def test_a_step_in_bf16_is_near_that_in_fp32_and_its_weights_stay_fp32(tmp_path, backbone):
    full, half = (
        stepper("--backbone", backbone, "--precision", precision, folder=tmp_path) for precision in ("fp32", "bf16")
    )
    (values, _), (expected, _) = (one(batch(), 0, 640, Care([])) for one in (half, full))
    assert values["loss"].dtype == torch.float32
    assert values["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.02)
    assert values["loss"].item() != expected["loss"].item()
    assert {p.dtype for p in half.objective.parameters()} == {torch.float32}


def test_a_compiled_backbone_takes_the_same_step(tmp_path):
    words = ("--backbone", "lenet5", "--optimiser", "sgd", "--warmup", "0.0")
    plain = stepper(*words, folder=tmp_path)
    compiled = Stepper(dataclasses.replace(plain.config, compile=True), CPU)
    (values, _), (expected, _) = (one(batch(), 0, 640, Care([])) for one in (compiled, plain))
    assert values["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    for p, q in zip(compiled.objective.parameters(), plain.objective.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
