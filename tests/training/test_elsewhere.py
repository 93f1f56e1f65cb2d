"""Training and evaluation on a device that is not the CPU, as far as a machine without one can tell."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline import classify, device, evaluate, pretrain
from pipeline.evaluation import BY_TABLE, NAMES
from pipeline.training import launch
from tests.elsewhere import NAME, Elsewhere, register
from tests.jobs.job_toys import photographs
from tests.objectives.every_objective import OPTIONS, step_in_bf16

PROTOCOLS = sorted(set(NAMES) - set(BY_TABLE) - {"factors", "scratch"})


@pytest.fixture(scope="module", autouse=True)
def elsewhere() -> Iterator[None]:
    kept = register()
    torch.__future__.set_swap_module_params_on_conversion(True)
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
        patch.setattr(device, "kind", lambda: NAME)
        patch.setattr(launch, "kind", lambda: NAME)
        yield
    torch.__future__.set_swap_module_params_on_conversion(False)
    del kept


def placed() -> torch.Tensor:
    return torch.ones(2, 3, device=NAME)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: placed() + torch.ones(2, 3),
        lambda: torch.cat([placed(), torch.ones(2, 3)]),
        lambda: torch.nn.Linear(3, 2).to(NAME)(torch.ones(2, 3)),
        lambda: placed().gather(1, torch.zeros(2, 1, dtype=torch.int64)),
        lambda: torch.ones(2, 3)[torch.zeros(2, dtype=torch.int64, device=NAME)],
        lambda: torch.rand(2, device=NAME, generator=torch.Generator()),
        lambda: placed().numpy(),
    ],
)  # fmt: skip
def test_what_a_gpu_refuses_is_refused(mistake: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, TypeError), match=NAME):
        mistake()


def test_what_the_cpu_waits_for_is_counted() -> None:
    Elsewhere.waits.clear()
    x = placed()
    for waits in (x.sum().item, x.cpu, x.tolist, lambda: bool((x > 0).any()), lambda: x[x > 0], lambda: x.nonzero()):
        waits()
    assert len(Elsewhere.waits) == 6


def test_numbers_and_indices_of_the_cpu_are_taken() -> None:
    taken = (placed() * torch.tensor(2.0))[torch.tensor([1]), 0]
    assert (taken.device.type, taken.tolist(), taken.sum().item()) == (NAME, [2.0], 2.0)


@pytest.mark.parametrize(("backbone", "size"), [("resnet18", 32), ("vit_ti16", 64)])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_objective_takes_a_step_there_alone(name: str, backbone: str, size: int, tmp_path: Path) -> None:
    """And lets the CPU run ahead of it: nothing in a step is waited for, but whether Gram's teacher is due."""
    Elsewhere.waits.clear()
    objective, scalars = step_in_bf16(name, backbone, size, NAME, tmp_path)
    assert len(Elsewhere.waits) == (name == "gram"), Elsewhere.waits
    assert {tensor.device.type for tensor in [*objective.state_dict().values(), *scalars.values()]} == {NAME}
    assert all(value.isfinite() for value in scalars.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that was continued after the first."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run, cache = folder / "run", ["--cache", str(folder / "cache"), "--debug"]
    words = ["--backbone", "vit_ti8", "--objective", "dino", "--image-size", "32", "--batch-size", "8", "--epochs", "2"]
    small = ["--options.out-dim", "32", "--options.hidden-dim", "32", "--options.bottleneck-dim", "16"]
    places = ["--data", str(photographs(folder / "photos", range(40))), "--engine", "local", "--run", str(run)]
    assert pretrain.main([*words, *small, *places, *cache, "--knn-every", "1", "--storage", str(folder)]) == 0
    (run / "summary.json").unlink()
    _, last = sorted((run / "checkpoints").glob("*.pt"))
    last.unlink()
    assert pretrain.main(["--resume", str(run), *cache]) == 0
    return run


@pytest.mark.slow
def test_a_run_trains_and_goes_on_there(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images_seen"] == 2 * 32
    assert summary["knn_top1"] is not None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_protocol_measures_there_and_a_classifier_names_images(run: Path, tmp_path: Path) -> None:
    photos = run.parent / "photos"
    places = ["--data", str(photos), "--cache", str(run.parent / "cache"), "--debug"]
    assert evaluate.main([str(run), *places, "--engine", "local", "--protocols", *PROTOCOLS]) == 0
    for learned in (run / "classifiers").glob("*.safetensors"):
        named = tmp_path / f"{learned.stem}.csv"
        assert classify.main([str(learned), str(photos), "--output", str(named), *places[2:]]) == 0
        assert len(named.read_text().splitlines()) == 41
