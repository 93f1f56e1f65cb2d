"""MAE against the paper in float64, against LightlySSL's decoder and targets, and its behaviour around the loss."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from objective_checks import relative, takes_any_images
from objective_toys import ToyBackbone, sick, toy_images, train
from torch import Tensor

import objectives
from objectives.mae import MAE, Decoder, normalise, patchify, signs, take

SMALL = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4}


def small(image_size: object = 32, **options: object) -> MAE:
    torch.manual_seed(0)
    return MAE(ToyBackbone(), image_size=image_size, **{**SMALL, **options})


def paper_targets(image: np.ndarray, patch: int) -> np.ndarray:
    """Patches of one image [C, H, W] in float64, row by row, each channel-last and normalised."""
    _, height, width = image.shape
    rows = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            pixels = image[:, top : top + patch, left : left + patch].transpose(1, 2, 0).ravel()
            rows.append((pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6))
    return np.stack(rows)


def test_targets_equal_the_papers_in_float64() -> None:
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 48))
    ours = normalise(patchify(torch.tensor(images, dtype=torch.float32), (4, 6)))
    assert relative(ours, np.stack([paper_targets(image, 8) for image in images])) <= 1e-5


def test_targets_equal_lightlys() -> None:
    lightly = pytest.importorskip("lightly.models.utils")
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = patchify(images, (4, 4)), lightly.patchify(images, 8)
    assert torch.equal(ours, theirs)
    assert torch.equal(normalise(ours), lightly.normalize_mean_var(theirs))


def test_loss_and_gradient_equal_the_papers_in_float64() -> None:
    """The objective's own forward, its last layer replaced by predictions that we know."""
    objective = small()
    images = torch.randn(3, 3, 32, 32)
    predictions = torch.randn(3, 16, 192, requires_grad=True)
    chosen: list[Tensor] = []

    def decode(pooled: Tensor, cells: Tensor, visible: Tensor) -> Tensor:
        chosen.append(visible)
        return predictions

    objective.decoder.forward = decode
    loss, _ = objective([images], 0.0)
    loss.backward()
    targets = np.stack([paper_targets(image, 8) for image in images.double().numpy()])
    masked = np.ones((3, 16), bool)
    np.put_along_axis(masked, chosen[0].numpy(), False, axis=1)
    assert (masked.sum(1) == 12).all()
    error = predictions.detach().double().numpy() - targets
    # models_mae.py: mean over a patch's values, then over the masked patches alone.
    assert relative(loss.detach(), (error**2).mean(-1)[masked].mean(), loss_of="the paper") <= 1e-5
    assert (
        relative(predictions.grad, 2 * error * masked[..., None] / (masked.sum() * 192), gradient_of="the paper")
        <= 1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_decoder_and_whole_loss_equal_lightlys_with_the_same_weights() -> None:
    modules = pytest.importorskip("lightly.models.modules")
    utils = pytest.importorskip("lightly.models.utils")
    torch.manual_seed(0)
    ours = Decoder(32, 192, (4, 4), 64, 2, 4).double()
    theirs = modules.MAEDecoderTIMM(16, 8, 3, 32, 64, 2, 4).double()
    renamed = {"embed": "decoder_embed", "blocks": "decoder_blocks", "norm": "decoder_norm", "predict": "decoder_pred"}

    def their_name(name: str) -> str:
        first, *rest = name.split(".")
        return ".".join([renamed.get(first, first), *rest])

    state = {their_name(name): value for name, value in ours.state_dict().items()}
    left_out = theirs.load_state_dict(state, strict=False)
    assert (left_out.missing_keys, left_out.unexpected_keys) == (["decoder_pos_embed"], [])
    assert torch.allclose(theirs.decoder_pos_embed[0, 1:], ours.positions, atol=1e-6)
    ours.positions = theirs.decoder_pos_embed[0, 1:].clone()

    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    order = torch.rand(2, 16).argsort(1)
    visible, masked = order[:, :4], order[:, 4:]
    pooled, cells = (torch.randn(2, n, 32, dtype=torch.float64) for n in (1, 4))
    losses, gradients = [], []
    for who in ("ours", "theirs"):
        a, b = pooled.clone().requires_grad_(), cells.clone().requires_grad_()
        if who == "ours":
            out = take(ours(a[:, 0], b, visible), masked)
            target = take(normalise(patchify(images, (4, 4))), masked)
        else:
            tokens = utils.repeat_token(theirs.mask_token, (2, 17))
            index = torch.cat([torch.zeros(2, 1, dtype=torch.int64), visible + 1], 1)
            tokens = utils.set_at_index(tokens, index, theirs.embed(torch.cat([a, b], 1)))
            out = theirs.predict(utils.get_at_index(theirs.decode(tokens), masked + 1))
            target = utils.normalize_mean_var(utils.get_at_index(utils.patchify(images, 8), masked))
        loss = torch.nn.functional.mse_loss(out, target)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([a.grad, b.grad], 1))
    assert relative(losses[0], losses[1], loss_of="LightlySSL") <= 1e-10
    assert relative(gradients[0], gradients[1], gradient_of="LightlySSL") <= 1e-10
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(their_name(name))
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-8, atol=1e-12), name


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    decoder = Decoder(4, 6, (2, 2), 8, 1, 2).double()
    visible = torch.tensor([[2, 0], [1, 3]])
    pooled, cells = (torch.randn(2, *n, 4, dtype=torch.float64, requires_grad=True) for n in ((), (2,)))
    assert torch.autograd.gradcheck(lambda a, b: decoder(a, b, visible), (pooled, cells))


def test_the_view_and_the_mask_are_the_published_ones() -> None:
    objective = MAE(ToyBackbone(), image_size=112)
    (view,) = objective.views
    assert (view.size, view.scale, view.flip_p, view.photometric) == ((112, 112), (0.2, 1.0), 0.5, None)
    assert objective.visible == 49
    assert len(objective.decoder.blocks) == 8
    assert objective.decoder.blocks[0].attn.num_heads == 16
    assert objective.decoder.predict.weight.shape == (192, 512)
    assert MAE.pool == "mean"


def test_hidden_pixels_reach_the_loss_only_as_targets() -> None:
    objective = small()
    images = torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []
    objective.decoder.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[2], out.detach()]))
    torch.manual_seed(1)
    objective([images], 0.0)
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, seen[0], False)
    pixels = hidden.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    others = torch.where(pixels, torch.randn_like(images), images)
    torch.manual_seed(1)
    objective([others], 0.0)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_every_trainable_parameter_gets_a_gradient_and_is_optimised_once() -> None:
    objective = small()
    objective([torch.randn(2, 3, 32, 32)], 0.5)[0].backward()
    trainable = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in objective.parameters() if p.grad is not None}
    grouped = [p for g in objective.parameter_groups() for p in g["params"]]
    assert sorted(id(p) for p in grouped) == sorted(trainable)


def test_raw_pixels_as_targets() -> None:
    objective = small(normalise_targets=False)
    loss, _ = objective([torch.full((2, 3, 32, 32), 100.0)], 0.0)
    assert loss > 5000


def test_a_patch_grid_that_does_not_divide_the_image_repeats_pixels() -> None:
    image = torch.arange(32.0)[None, None, :, None].expand(1, 1, 32, 32)
    patches = patchify(image, (5, 5))
    assert patches.shape == (1, 25, 49)
    rows = patches[0, ::5].view(5, 7, 7)[:, :, 0].flatten()
    assert set(rows.tolist()) == set(range(32))
    assert torch.equal(rows, rows.sort().values)


@pytest.mark.parametrize(("size", "ratio"), [(8, 0.75), (16, 0.9), (16, 0.0)])
def test_a_grid_with_nothing_to_see_or_to_predict_gets_a_sentence(size: int, ratio: float) -> None:
    with pytest.raises(ValueError, match=r"MAE cannot mask .* toy has a grid of"):
        small(size, mask_ratio=ratio)


def test_decoder_widths_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="decoder_width 64 is no multiple of decoder_heads 5"):
        small(decoder_heads=5)
    with pytest.raises(ValueError, match="multiple of 4"):
        small(decoder_width=66, decoder_heads=3)


def test_images_need_neither_be_square_nor_have_three_channels() -> None:
    takes_any_images(partial(MAE, **SMALL))


def test_one_image_is_enough() -> None:
    loss, scalars = small()([torch.randn(1, 3, 32, 32)], 0.0)
    assert loss.isfinite()
    assert all(s.isfinite() for s in scalars.values())


def test_bf16_autocast_gives_a_finite_float32_loss_near_the_exact_one() -> None:
    objective = small()
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    exact, _ = objective([images], 0.5)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = objective([images], 0.5)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.02 * exact
    loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_exact_continuation_from_a_state_dict() -> None:
    def run(objective: MAE, optimiser: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for i in steps:
            torch.manual_seed(i)
            loss, _ = objective([torch.randn(4, 3, 32, 32)], i / 10)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            objective.after_step(i / 10)
            losses.append(loss.item())
        return losses

    def fresh() -> tuple[MAE, torch.optim.Optimizer]:
        objective = small()
        return objective, torch.optim.AdamW(objective.parameter_groups(), lr=1e-3)

    objective, optimiser = fresh()
    run(objective, optimiser, range(3))
    saved = copy.deepcopy((objective.state_dict(), optimiser.state_dict()))
    losses = run(objective, optimiser, range(3, 6))
    again, optimiser = fresh()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(saved[0])
    optimiser.load_state_dict(saved[1])
    assert run(again, optimiser, range(3, 6)) == losses


def test_vital_signs_stay_quiet_while_it_learns() -> None:
    objective = small()
    history = train(objective, toy_images(512)[0], steps=120, lr=2e-3)
    assert history[-1]["loss"] < 0.95 * history[20]["loss"]
    assert sick(objective, history) == set()


def test_vital_signs_trip_on_each_way_to_learn_nothing() -> None:
    objective = small()
    images = toy_images(64)[0]

    def tripped(images: Tensor) -> set[str]:
        return sick(objective, [{k: v.item() for k, v in objective([images], 0.5)[1].items()}])

    assert {"target_spread", "explained"} <= tripped(torch.ones_like(images))
    with torch.no_grad():
        objective.encoder.norm3.weight.zero_()
    assert "feature_spread" in tripped(images)
    with torch.no_grad():
        objective.decoder.predict.weight.zero_()
    assert {"prediction_spread"} <= tripped(images)


def test_signs_of_a_perfect_decoder() -> None:
    targets = torch.randn(4, 6, 12)
    values = signs(targets, targets, targets, torch.randn(4, 8))
    assert values["explained"].item() == 1
    assert values["prediction_spread"].item() == pytest.approx(1, abs=0.05)


def test_created_by_name() -> None:
    objective = objectives.create("mae", ToyBackbone(), image_size=32, **SMALL)
    assert isinstance(objective, MAE)
    assert objective.backbone is objective.encoder
