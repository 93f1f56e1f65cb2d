"""An optimiser step: a batch in parts is the batch, and half precision is what the configuration says."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

import backbones
from pipeline import asked, config
from pipeline.data.loader import Batch
from pipeline.training.health import Care, Intervention
from pipeline.training.step import Stepper, in_bf16
from tests.objectives.every_objective import OPTIONS, make, save_run, some_views

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


IN_FP32 = Care([Intervention("nonfinite", 8, 16, "…", 0, "fp32_head")])


def test_heads_compute_in_fp32_where_care_asks_for_it_and_the_backbone_in_bf16(tmp_path):
    half = stepper("--backbone", "vit_ti8", "--objective", "dino", "--precision", "bf16", folder=tmp_path)
    made: dict[str, set[torch.dtype]] = {"backbone": set(), "head": set()}
    for name, module in half.objective.named_modules():
        if isinstance(module, torch.nn.Linear):
            place = made["backbone" if ".backbone." in name else "head"]
            module.register_forward_hook(lambda _, images, out, place=place: place.add(out.dtype))
    views = some_views(half.objective, 16)
    shown = dataclasses.replace(batch(), views=[(40 * view + 128).clamp(0, 255).to(torch.uint8) for view in views])
    half(shown, 0, 640, Care([]))
    assert made == {"backbone": {torch.bfloat16}, "head": {torch.bfloat16}}
    for place in made.values():
        place.clear()
    values, _ = half(shown, 8, 640, IN_FP32)
    assert made == {"backbone": {torch.bfloat16}, "head": {torch.float32}}
    assert torch.isfinite(values["grad_norm"])
    assert not torch.is_autocast_enabled("cpu")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in half.backbones)


@pytest.mark.parametrize("backbone", ["lenet5", "vit_ti8"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_objective_takes_features_in_fp32_from_a_backbone_in_bf16(name, backbone, tmp_path):
    options = {}
    if name == "gram":
        trained = make("dino", backbones.create(backbone, image_size=32), 32)
        options["checkpoint"] = save_run(tmp_path / "run", trained, "dino", 32)
    objective = make(name, backbones.create(backbone, image_size=32), 32, **options)
    labels = (torch.arange(8) % 3,) if objective.labelled else ()
    found = [module for module in objective.modules() if isinstance(module, backbones.Backbone)]
    objective.train()
    losses = []
    for modules in ([], found):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=False), in_bf16(modules, "cpu"):
            loss, _ = copy.deepcopy(objective)(some_views(objective, 8), 0.5, *labels)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.05)


@pytest.mark.slow
def test_a_compiled_backbone_takes_the_same_step(tmp_path):
    words = ("--backbone", "lenet5", "--optimiser", "sgd", "--warmup", "0.0")
    plain = stepper(*words, folder=tmp_path)
    compiled = Stepper(dataclasses.replace(plain.config, compile=True), CPU)
    (values, _), (expected, _) = (one(batch(), 0, 640, Care([])) for one in (compiled, plain))
    assert values["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    for p, q in zip(compiled.objective.parameters(), plain.objective.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
