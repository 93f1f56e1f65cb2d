"""Gram anchoring against the paper's equation in float64, and a refinement stage as it is wired and restored."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from masked_toy import MaskedToy
from objective_checks import random_views, relative, takes_a_shape, takes_any_images
from objective_toys import sick, toy_images, train
from tiny_backbones import tiny_cnn

import backbones
import objectives
from objectives.contract import Objective
from objectives.gram import GramAnchoring, gram_loss, read_checkpoint, resample
from pipeline.training.run_folder import RunFolder
from tests.chaos.runs import assert_identical
from tests.parts import write

BASE = {
    "out_dim": 32,
    "hidden_dim": 32,
    "bottleneck_dim": 16,
    "local_views": 1,
    "global_scale": (0.5, 1.0),
    "local_scale": (0.25, 0.5),
}
SMALL: dict = {"gram_resolution": 1.0}  # and a checkpoint: see `saved`


def saved(folder: Path, objective: Objective, name: str, **config: object) -> str:
    """A checkpoint as a run leaves it, of an objective made with the options `BASE`; the run folder's path."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in BASE.items()}
    plain = {"objective": name, "backbone": objective.backbone.name, "image_size": 32, "options": options} | config
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    state = {"objective": objective.state_dict(), "config": yaml.safe_dump(plain), "images_seen": 64}
    torch.save(state, folder / "checkpoints" / f"{64:012d}.pt")
    return str(folder)


def trained(name: str = "dinov2", backbone: object = None) -> Objective:
    torch.manual_seed(0)
    objective = objectives.create(name, backbone or MaskedToy(), image_size=32, **BASE)
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return objective


@pytest.fixture
def run(tmp_path: Path) -> str:
    return saved(tmp_path / "run", trained(), "dinov2")


def anchored(run: str, **options: object) -> GramAnchoring:
    torch.manual_seed(1)
    return GramAnchoring(MaskedToy(), image_size=32, checkpoint=run, **{**SMALL, **options})


def paper(student: np.ndarray, teacher: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean square of X_S X_S^T - X_G X_G^T over cell pairs and images [I, N, D], and its gradient to the student."""
    images, n, _ = student.shape
    loss, gradient = 0.0, np.zeros_like(student)
    for i in range(images):
        lengths = np.sqrt((student[i] ** 2).sum(1, keepdims=True))
        x, y = student[i] / lengths, teacher[i] / np.sqrt((teacher[i] ** 2).sum(1, keepdims=True))
        error = np.array([[x[a] @ x[b] - y[a] @ y[b] for b in range(n)] for a in range(n)])
        loss += (error**2).sum() / (images * n * n)
        sphere = 4 * error @ x / (images * n * n)
        gradient[i] = (sphere - x * (sphere * x).sum(1, keepdims=True)) / lengths
    return loss, gradient


@pytest.mark.parametrize("shape", [(1, 4, 3), (3, 9, 16)])
def test_loss_and_gradient_equal_the_papers_in_float64(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=shape), rng.normal(size=shape)
    loss, gradient = paper(student, teacher)
    x = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    ours = gram_loss(x, torch.tensor(teacher, dtype=torch.float32))
    ours.backward()
    assert relative(ours.detach(), loss, loss_of="the paper") <= 1e-5
    assert relative(x.grad, gradient, gradient_of="the paper") <= 1e-5


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: gram_loss(x, y), (x.requires_grad_(),))


def test_only_the_angles_between_cells_count() -> None:
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert gram_loss(x, 3 * x @ rotation) < 1e-20
    assert gram_loss(x, x.flip(1)) > 1e-3


def test_resampling_is_that_of_maps() -> None:
    cells = torch.randn(2, 4 * 6, 5)
    maps = cells.view(2, 4, 6, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, size=(2, 3), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(resample(cells, (4, 6), (2, 3)), expected)
    assert resample(cells, (4, 6), (4, 6)) is cells


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_it_starts_where_the_run_ended(tmp_path: Path, name: str) -> None:
    """All weights of the checkpoint, and its EMA teacher as Gram teacher, whatever the given backbone held."""
    before = trained(name)
    objective = anchored(saved(tmp_path, before, name))
    assert all(torch.equal(v, objective.base.state_dict()[k]) for k, v in before.state_dict().items())
    teacher = before.backbone.state_dict()
    assert all(torch.equal(v, teacher[k]) for k, v in objective.gram.state_dict().items())
    loss, scalars = objective(random_views(objective), 0.0)
    assert loss.isfinite()
    assert {"gram", "teacher_entropy"} <= set(scalars)
    loss.backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    assert sorted(id(p) for g in objective.parameter_groups() for p in g["params"]) == sorted(trainable)
    assert trainable == {id(p) for p in objective.base.student.parameters() if p.requires_grad}


@pytest.mark.parametrize("resolution", [1.0, 2.0])
def test_a_whole_step_equals_the_papers(run: str, resolution: float) -> None:
    """The base's loss at its final temperature, local crops counting ever less, plus the weighted Gram loss of the
    student's masked cells."""
    objective = anchored(run, gram_resolution=resolution, gram_weight=1.5).double()
    side = int(32 * resolution)
    assert objective.views[:-2] == objective.base.views
    for view, student in zip(objective.views[-2:], objective.views[:2], strict=True):
        assert (view.size, view.crop_of, view.photometric) == ((side, side), student.name, None)
    views = [v.double() for v in random_views(objective, 4)]
    masks = torch.rand(8, 16) < 0.3
    objective.base.masks = lambda images: masks
    with torch.no_grad():
        base, _ = copy.deepcopy(objective.base)(views[:-2], 1.0)
        half, _, _ = copy.deepcopy(objective.base).distil(views[:-2], 1.0, 0.5)
        scores, _ = objective.base.student(views[:-2], torch.zeros(1, dtype=torch.long), replaced=masks)
        (teacher, _), _ = objective.base.teacher(views[:2], torch.zeros(1, dtype=torch.long))
        p = objective.base.targets(teacher, objective.base.centre, 1.0)
        log_p = (scores[0][2] / objective.base.student_temp).log_softmax(-1)
        pairs = [-(p[x] * log_p).sum(-1).mean().item() for x in (0, 1)]  # of four, two with the local view
        assert relative(base - half, sum(pairs) / 4 / 2) <= 1e-10
        cells = objective.base.student.backbone(torch.cat(views[:2]), replaced=masks).cells
        anchor = objective.gram(torch.cat(views[-2:])).cells
        if resolution == 2:
            maps = anchor.view(8, 8, 8, -1).permute(0, 3, 1, 2)
            anchor = F.interpolate(maps, size=(4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    gram, _ = paper(cells.numpy(), anchor.numpy())
    for progress, part in ((0.0, 0.0), (0.01, (1 - np.cos(np.pi * 0.4)) / 2), (0.025, 1.0), (1.0, 1.0)):
        loss, scalars = objective(views, progress)
        assert relative(scalars["gram"], gram) <= 1e-10
        expected = (1 - part) * base.item() + part * half.item() + 1.5 * part * gram
        assert relative(loss.detach(), expected, loss_of="the paper") <= 1e-10


def test_its_losses_may_have_their_weights_from_the_start(run: str) -> None:
    assert anchored(run, gram_warmup=0.0).weights(0.0) == (2.0, 0.5)


def test_the_gram_teacher_is_refreshed_as_often_as_asked(run: str) -> None:
    objective = anchored(run, refresh_every=0.2, refreshes=2, ema=0.5)
    refreshed = []
    for progress in (0.1, 0.2, 0.3, 0.4, 0.6, 1.0):
        with torch.no_grad():
            for parameter in objective.base.student.parameters():
                parameter.add_(0.1)
        before = copy.deepcopy(objective.gram.state_dict())
        objective.after_step(progress)
        if any(not torch.equal(v, before[k]) for k, v in objective.gram.state_dict().items()):
            refreshed.append(progress)
            now = objective.backbone.state_dict()
            assert all(torch.equal(v, now[k]) for k, v in objective.gram.state_dict().items())
    assert refreshed == [0.2, 0.4]


def test_the_base_goes_on_as_it_ended_and_its_teacher_at_a_constant_rate(run: str) -> None:
    objective = anchored(run)
    assert objective.base.target_temp(1.0) == 0.07
    weight = objective.base.student.backbone.patch.weight
    with torch.no_grad():
        weight.add_(1.0)
    old = objective.backbone.patch.weight.clone()
    objective.after_step(0.1)
    assert torch.allclose(objective.backbone.patch.weight, 0.999 * old + 0.001 * weight, atol=1e-6)


def test_state_dict_gives_the_same_loss_in_a_fresh_objective(run: str) -> None:
    objective = anchored(run)
    optimiser = torch.optim.AdamW(objective.parameter_groups(), lr=1e-2)
    for i in range(2):
        optimiser.zero_grad()
        objective(random_views(objective, seed=i), 0.3)[0].backward()
        optimiser.step()
        objective.after_step(0.3)
    again = anchored(run)
    again.load_state_dict(copy.deepcopy(objective.state_dict()))
    losses = []
    for one in (objective, again):
        torch.manual_seed(9)
        losses.append(one(random_views(one, seed=9), 0.4)[0])
    assert torch.equal(*losses)
    assert again.refreshed == 1


def test_a_checkpoint_that_several_workers_wrote_is_read_as_one(run: str) -> None:
    whole, folder = read_checkpoint(run), RunFolder(run)
    write(folder, 64, folder.load_checkpoint(64), workers=3)
    assert len(folder.parts()) == 3
    assert_identical(read_checkpoint(run)[0], dict(whole[0]))
    folder.remove(f"checkpoints/{min(folder.parts())}")
    with pytest.raises(ValueError, match=r"its part \S+ is missing"):
        read_checkpoint(run)


def test_what_cannot_be_gets_a_sentence(tmp_path: Path, run: str) -> None:
    file = next(Path(run, "checkpoints").iterdir())
    assert anchored(str(file)).base.student.backbone.width == 32
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.ones(1)}, foreign)
    (tmp_path / "text.pt").write_text("no checkpoint")
    other = saved(tmp_path / "mae", trained(), "mae")
    elsewhere = saved(tmp_path / "elsewhere", trained(), "dinov2", backbone="vit_s16")
    (tmp_path / "empty").mkdir()
    for path, sentence in (
        ("", "goes on from a trained run"),
        (str(tmp_path / "nowhere"), "no such file"),
        (str(tmp_path / "empty"), "run folder without checkpoints"),
        (str(foreign), "was not written by this program"),
        (str(tmp_path / "text.pt"), "was not written by this program"),
        (other, "goes on from dino, ibot, dinov2, and it was trained with mae"),
        (elsewhere, "its backbone is vit_s16, not toy"),
    ):
        with pytest.raises(ValueError, match=sentence):
            anchored(path)


def test_a_vit_at_another_size_and_a_single_cell_get_a_sentence(tmp_path: Path) -> None:
    vit = trained("ibot", backbones.create("vit_ti8", image_size=32))
    run = saved(tmp_path / "vit", vit, "ibot")
    objectives.create("gram", backbones.create("vit_ti8", image_size=32), image_size=32, checkpoint=run, **SMALL)
    with pytest.raises(ValueError, match=r"does not fit at \(64, 64\) pixels; it was trained at 32"):
        objectives.create("gram", backbones.create("vit_ti8", image_size=64), image_size=64, checkpoint=run, **SMALL)
    one = objectives.create("dino", MaskedToy(), image_size=8, **BASE)
    with pytest.raises(ValueError, match="compares cells: toy has only one at 8x8"):
        GramAnchoring(MaskedToy(), image_size=8, checkpoint=saved(tmp_path / "one", one, "dino"), **SMALL)


def test_images_need_neither_be_square_nor_have_three_channels_nor_companions(tmp_path: Path) -> None:
    def stage(backbone: backbones.Backbone, *, image_size: tuple[int, int], resolution: float = 1.0) -> GramAnchoring:
        base = objectives.create("dino", copy.deepcopy(backbone), image_size=image_size, **BASE)
        run = saved(tmp_path / backbone.name, base, "dino")
        return GramAnchoring(backbone, image_size=image_size, checkpoint=run, gram_resolution=resolution)

    takes_any_images(stage)
    takes_a_shape(stage(tiny_cnn(5), image_size=(24, 40), resolution=2.0), batch=1)


def test_a_network_of_one_size_is_held_at_that(tmp_path: Path) -> None:
    """There the Gram teacher sees what the student sees."""
    name = "test_vit_relpos"
    run = saved(tmp_path, trained("dino", backbones.create(name, image_size=32)), "dino")
    objective = GramAnchoring(backbones.create(name, image_size=32), image_size=32, checkpoint=run)
    assert {view.size for view in objective.views} == {(32, 32)}
    loss, scalars = objective(random_views(objective), 0.0)
    assert loss.isfinite()
    assert scalars["gram"] >= 0


def test_it_holds_cells_that_would_drift_and_its_sign_trips_where_they_do(run: str) -> None:
    images, drift = toy_images(256)[0], {}
    for weight in (0.0, 2.0):
        objective = anchored(run, gram_weight=weight, refreshes=0)
        history = train(objective, images, steps=60, lr=5e-3)
        drift[weight] = np.mean([h["gram"] for h in history[-10:]])
        assert sick(objective, history, last=10) == ({"gram"} if weight == 0.0 else set())
    assert drift[2.0] < 0.2 * drift[0.0]
