"""Distillation against AM-RADIO's loss in float64, the teachers it takes, and what becomes of them."""

import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import objective_checks as check
import pytest
import safetensors.torch
import torch
import yaml
from objective_checks import random_views, relative
from objective_toys import ToyBackbone, knn, sick, toy_images, train
from torch import Tensor, nn
from torch.nn import functional as F

import backbones
import objectives
from objectives.distillation import Distillation, cosine_distance, match_loss, resample
from objectives.pretrained import Frozen, teacher
from pipeline.training.run_folder import RunFolder
from tests.parts import write

SMALL = {"teacher": "random:vit_ti16"}
SIZE = {"image_size": 32}


def small(backbone: nn.Module | None = None, image_size: object = 32, **options: object) -> Distillation:
    torch.manual_seed(0)
    return Distillation(backbone or ToyBackbone(), image_size=image_size, **{**SMALL, **options})


def paper(student: np.ndarray, taught: np.ndarray, alpha: float, beta: float) -> tuple[float, np.ndarray]:
    """alpha L_cos + beta L_smooth-l1 (threshold 1) over rows, and the gradient to the student's."""
    rows, width = student.shape
    loss, gradient = 0.0, np.zeros_like(student)
    for n in range(rows):
        x, y = student[n], taught[n]
        norm_x, norm_y = math.sqrt((x**2).sum()), math.sqrt((y**2).sum())
        cosine = (x * y).sum() / (norm_x * norm_y)
        loss += alpha * (1 - cosine) / rows
        gradient[n] -= alpha * (y / norm_y - cosine * x / norm_x) / norm_x / rows
        for d in range(width):
            error = x[d] - y[d]
            loss += beta * (error**2 / 2 if abs(error) < 1 else abs(error) - 0.5) / (rows * width)
            gradient[n, d] += beta * (error if abs(error) < 1 else math.copysign(1, error)) / (rows * width)
    return loss, gradient


def test_loss_and_gradient_equal_the_papers_in_float64() -> None:
    rng = np.random.default_rng(0)
    student, taught = rng.normal(size=(2, 7, 24))
    x, y = (torch.tensor(a, dtype=torch.float32) for a in (student, taught))
    for alpha, beta in ((0.9, 0.1), (1.0, 0.0), (0.0, 1.0)):
        loss, gradient = paper(student, taught, alpha, beta)
        x.grad = None
        ours = match_loss(x.requires_grad_(), y, alpha, beta)
        ours.backward()
        assert relative(ours, loss, loss_of="the paper") <= 1e-5
        assert relative(x.grad, gradient, gradient_of="the paper") <= 1e-5
    assert relative(cosine_distance(x, y), paper(student, taught, 1.0, 0.0)[0]) <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: match_loss(x, y, 0.9, 0.1), (x.requires_grad_(),))


def test_cells_of_another_grid_lie_where_they_were() -> None:
    """Half a grid averages, and a plane that rises along a row rises on every grid."""
    ramp = torch.arange(8.0).expand(4, 8).reshape(1, 32, 1)
    assert resample(ramp, (4, 8), (4, 8)) is ramp
    coarse = resample(ramp, (4, 8), (2, 4)).view(2, 4)
    assert torch.equal(coarse[0], coarse[1])
    assert torch.allclose(coarse[0, 1:3], torch.tensor([2.5, 4.5]))
    fine = resample(ramp, (4, 8), (8, 16)).view(8, 16)
    assert torch.allclose(fine[3, 1:15], torch.arange(0.25, 7, 0.5))
    constant = torch.randn(1, 1, 5).expand(2, 6, 5)
    assert torch.allclose(resample(constant, (2, 3), (5, 5)), constant[:, :1].expand(2, 25, 5), atol=1e-6)


def test_a_whole_step_equals_the_papers() -> None:
    objective = small(cells_weight=0.5).double()
    views = [view.double() for view in random_views(objective)]
    with torch.no_grad():
        student, taught = objective.student(views[0]), objective.teacher.backbone(views[0])
        pooled, cells = objective.pooled_map(student.pooled), objective.cells_map(student.cells)
        maps = taught.cells.transpose(1, 2).unflatten(2, (2, 2))
        targets = F.interpolate(maps, (4, 4), mode="bilinear").flatten(2).transpose(1, 2)
    ours, scalars = objective(views, 0.5)
    summary = paper(pooled.numpy(), taught.pooled.numpy(), 1.0, 0.0)[0]
    features = paper(cells.flatten(0, 1).numpy(), targets.flatten(0, 1).numpy(), 0.9, 0.1)[0]
    assert relative(ours, summary + 0.5 * features, loss_of="the paper") <= 1e-10
    assert scalars["agreement"].item() == pytest.approx(1 - summary)


def test_the_teacher_is_state_without_gradient_and_never_trains() -> None:
    objective = small()
    before = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    optimiser = torch.optim.AdamW(objective.parameter_groups(), lr=1e-2)
    for i in range(2):
        check.step(objective.train(), optimiser, i)
    assert all(torch.equal(value, before[name]) for name, value in objective.teacher.state_dict().items())
    assert not any(module.training for module in objective.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    assert {f"teacher.{name}" for name in before} <= set(objective.state_dict())


def test_batch_norms_of_a_teacher_stay_as_they_are() -> None:
    frozen = Frozen(backbones.create("resnet20", **SIZE)).train()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    frozen(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


def test_a_teacher_of_one_size_sees_views_at_that() -> None:
    frozen = Frozen(backbones.create("test_vit_relpos", **SIZE))
    for size in ((16, 48), (32, 32), (64, 64)):
        features, grid = frozen(torch.randn(1, 3, *size))
        assert grid == (2, 2)
        assert features.cells.shape[1] == 4


def test_what_every_objective_keeps() -> None:
    check.learns_with_every_parameter(small())
    check.continues_exactly(small)
    check.is_near_itself_in_bf16(small())
    check.evaluation_moves_nothing(small())
    assert small()(random_views(small(), batch=1), 0.0)[0].isfinite()
    assert isinstance(objectives.create("distillation", ToyBackbone(), **SIZE, **SMALL), Distillation)


@pytest.mark.parametrize(("name", "size"), [("lenet5", (32, 48)), ("vit_ti8", (24, 40))])
def test_any_student_learns_from_any_teacher_on_oblong_images(name: str, size: tuple[int, int]) -> None:
    objective = small(backbones.create(name, image_size=size), image_size=size)
    loss, _ = objective(random_views(objective, batch=2), 0.0)
    loss.backward()
    assert loss.isfinite()


def test_other_channels_are_taught_by_a_teacher_of_the_same(tmp_path: Path) -> None:
    student = backbones.create("lenet5", image_size=32, in_channels=12)
    with pytest.raises(ValueError, match="takes images of 3 channels and the student lenet5 of 12"):
        small(student)
    path = exported(backbones.create("lenet5", image_size=32, in_channels=12), tmp_path)
    assert small(student, teacher=str(path))(random_views(small(student, teacher=str(path))), 0.0)[0].isfinite()


def exported(backbone: backbones.Backbone, folder: Path) -> Path:
    """As the training loop exports: weights, and how to make the backbone."""
    path = folder / "backbone.safetensors"
    weights = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    safetensors.torch.save_file(weights, path, {"config": json.dumps(backbone.config)})
    return path


def checkpointed(folder: Path, name: str, images: int, **options: Any) -> backbones.Backbone:
    """As the training loop checkpoints: an objective, whose evaluated backbone is returned."""
    config = {"backbone": "resnet20", "objective": name, "image_size": 32, "drop_path": 0.0, "options": options}
    objective = objectives.create(name, backbones.create("resnet20", **SIZE), **SIZE, **options)
    (folder / "checkpoints").mkdir(exist_ok=True)
    state = {"objective": objective.state_dict(), "config": yaml.safe_dump(config), "images_seen": images}
    torch.save(state, folder / "checkpoints" / f"{images:012d}.pt")
    return objective.backbone


def same(frozen: Frozen, backbone: nn.Module) -> bool:
    images = torch.randn(2, 3, 32, 32)
    return torch.equal(frozen(images)[0].pooled, backbone.eval()(images).pooled)


def test_a_run_teaches_by_its_export_or_its_newest_checkpoint(tmp_path: Path) -> None:
    small_dino = {"out_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4, "local_views": 0}
    old = checkpointed(tmp_path, "dino", 100, **small_dino)
    new = checkpointed(tmp_path, "dino", 200, **small_dino)
    assert same(teacher(str(tmp_path)), new)
    assert same(teacher(str(tmp_path / "checkpoints" / f"{100:012d}.pt")), old)
    run = RunFolder(str(tmp_path))
    write(run, 200, run.load_checkpoint(200), workers=2)
    assert len(run.parts()) == 2
    assert same(teacher(str(tmp_path)), new)
    export = backbones.create("lenet5", **SIZE)
    path = exported(export, tmp_path)
    assert same(teacher(str(tmp_path)), export)
    assert same(teacher(path.as_uri()), export)


def test_timms_weights_arrive_and_see_images_as_they_were_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is real but the download, for which the weights of a network of our own stand in."""
    torch.manual_seed(0)
    source = backbones.create("vit_tiny_patch16_224", image_size=224)
    weights = {name: value.clone() for name, value in source.network.state_dict().items()}
    weights |= {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    import timm.models._builder as builder

    monkeypatch.setattr(builder, "load_state_dict_from_hf", lambda *_, **__: dict(weights))
    frozen = teacher("vit_tiny_patch16_224")
    views = torch.randn(2, 3, 224, 224)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    features, grid = frozen(views)
    assert grid == (14, 14)
    # This network of timm's was trained on images normalised with mean and deviation 0.5.
    expected = source.eval()((views * std + mean - 0.5) / 0.5).pooled
    assert relative(features.pooled, expected.detach()) <= 1e-4


def test_images_are_resized_to_what_the_teachers_stride_divides() -> None:
    features, grid = teacher("random:vit_ti16")(torch.randn(1, 3, 40, 56))
    assert grid == (2, 4)
    assert features.cells.shape == (1, 8, 192)


class Trap:
    def __reduce__(self) -> tuple:
        return (Path("sprung").touch, ())


@pytest.mark.parametrize("kind", ["pickle", "torn", "foreign"])
def test_what_is_no_checkpoint_of_ours_is_refused_and_never_executed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"objective": Trap(), "config": ""} if kind == "pickle" else {"model": torch.ones(2)}, buffer)
    content = buffer.getvalue()[:50] if kind == "torn" else buffer.getvalue()
    Path("weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is no checkpoint that can be taught from"):
        teacher("weights.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is no checkpoint that can be taught from"):
        teacher("plain.pt")
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("", "distillation needs a teacher"),
        ("runs/gone", "teacher runs/gone: no such run folder or file"),
        ("gone.pt", "teacher gone.pt: no such run folder or file"),
        ("vit_x", "backbone 'vit_x' is not known"),
        (".", "holds neither backbone.safetensors nor a checkpoint"),
    ],
)
def test_a_teacher_that_is_not_there_gets_a_sentence(
    address: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        teacher(address)


def test_signs_of_a_teacher_with_nothing_to_say_and_of_a_student_that_listens_not() -> None:
    objective = small()
    images = toy_images(16)[0]

    def tripped() -> set[str]:
        return sick(objective, [{name: value.item() for name, value in objective([images], 0.5)[1].items()}])

    with torch.no_grad():
        objective.student.norm3.weight.zero_()
        assert "feature_spread" in tripped()
        objective.pooled_map.weight.zero_()
        objective.pooled_map.bias.copy_(-objective.teacher(images)[0].pooled.mean(0))
        assert "agreement" in tripped()
        for parameter in objective.teacher.parameters():
            parameter.zero_()
        assert "teacher_spread" in tripped()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_a_student_learns_what_its_teacher_knows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher learned the gratings from labels; the toy is no backbone that can be loaded, so it is handed over."""
    torch.manual_seed(0)
    taught, head = check.ToyCNN(), nn.Linear(check.ToyCNN.width, 6)
    images, kinds = toy_images(512)
    optimiser = torch.optim.AdamW([*taught.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(150):
        chosen = torch.randint(len(images), (32,))
        optimiser.zero_grad()
        F.cross_entropy(head(taught(images[chosen]).pooled), kinds[chosen]).backward()
        optimiser.step()
    monkeypatch.setattr("objectives.distillation.frozen_teacher", lambda _: Frozen(taught))
    student = check.toy(kind)
    test, test_kinds = toy_images(200, seed=1)
    before, ceiling = knn(student, test, test_kinds), knn(taught, test, test_kinds)
    objective = Distillation(student, **SIZE, teacher="handed over", scale=(0.5, 1.0))
    history = train(objective, images, steps=150, lr=3e-3)
    assert sick(objective, history) == set()
    assert history[-1]["agreement"] > history[0]["agreement"] + 0.1
    assert knn(student, test, test_kinds) > (before + ceiling) / 2


def test_a_pooled_target_reaches_the_pooled_map_alone() -> None:
    objective = small(cells_weight=0.0)
    loss, _ = objective(random_views(objective), 0.0)
    loss.backward()
    gradient: Tensor = objective.cells_map.weight.grad
    assert objective.pooled_map.weight.grad.abs().max() > 0
    assert gradient.abs().max() == 0
