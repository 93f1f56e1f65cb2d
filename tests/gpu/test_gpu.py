"""On a CUDA device: what a CPU computes it computes, too, and what it costs there is told."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import backbones
from objectives.views import Photometric, View
from pipeline import pretrain
from pipeline.data.photometric import Photometrics
from pipeline.report.cost import infer
from tests.objectives.every_objective import OPTIONS, step_in_bf16

pytestmark = pytest.mark.gpu
BACKBONES = {"resnet18": 32, "vit_ti16": 64}


@pytest.fixture(scope="module", autouse=True)
def cuda() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    exact = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = exact


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_objective_takes_a_step_in_bf16(name: str, backbone: str, cuda: torch.device, tmp_path: Path) -> None:
    objective, scalars = step_in_bf16(name, backbone, BACKBONES[backbone], cuda.type, tmp_path)
    assert all(value.isfinite() for value in scalars.values())
    assert all(p.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_masked_or_not_are_those_of_a_cpu(backbone: str, cuda: torch.device) -> None:
    torch.manual_seed(0)
    size = BACKBONES[backbone]
    here = backbones.create(backbone, image_size=size).train()
    there = copy.deepcopy(here).to(cuda)
    images = torch.randn(4, 3, size, size)
    cells = torch.rand(4, np.prod(here.grid(size, size))).argsort(1)[:, :5]
    for hidden in ({}, {"visible": cells}):
        there_hidden = {key: value.to(cuda) for key, value in hidden.items()}
        ours, theirs = here(images, **hidden), there(images.to(cuda), **there_hidden)
        torch.testing.assert_close(theirs.cells.cpu(), ours.cells, rtol=1e-3, atol=1e-3)


def test_photometric_changes_are_those_of_a_cpu(cuda: torch.device) -> None:
    colours = Photometric(0.4, 0.4, 0.2, 0.1, gray_p=0.2, blur_p=0.5, solarize_p=0.2)
    change = Photometrics([View("global", (64, 64), (0.25, 1.0), photometric=colours)], 0)
    images = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    index = torch.arange(32)
    (ours,), (theirs,) = change([images], index, 0), change([images.to(cuda)], index, 0)
    torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-3, atol=2e-3)


def test_a_run_uses_the_device_and_tells_what_it_held(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--backbone", "resnet20", "--objective", "dino", "--image-size", "32", "--limit", "256", "--epochs", "2"]
    places = ["--cache", str(tmp_path / "cache"), "--storage", str(tmp_path), "--run", str(run)]
    assert pretrain.main([*words, *places, "--engine", "local"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert torch.cuda.get_device_name() in summary["device"]
    assert 1 << 20 < summary["peak_memory"] < torch.cuda.get_device_properties(0).total_memory


def test_peak_memory_of_inference_is_counted(cuda: torch.device) -> None:
    backbone = backbones.create("resnet18", image_size=96).to(cuda).eval()
    rate, memory = infer(backbone, 96, cuda, "bf16")
    assert rate > 100
    assert memory is not None
    assert memory > sum(t.nbytes for t in backbone.state_dict().values())
