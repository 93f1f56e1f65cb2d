"""Crops: inside the image, distributed as torchvision's, a function of (seed, epoch, index, view) alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from objectives.views import View
from pipeline.data import crops

pytestmark = pytest.mark.timeout(120)
TWO = [View("global", (224, 224), (0.3, 1.0)), View("local", (96, 96), (0.05, 0.3))]


def boxes(view: View, height: int, width: int, n: int, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
    table, key = crops.view_table([view]), crops.stream(crops.CROP, seed, epoch)
    return np.array([crops.box(key, index, 0, table, height, width) for index in range(n)])


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    scale=st.tuples(st.floats(1e-4, 1), st.floats(1e-4, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    crop_pct=st.floats(0.01, 1),
    index=st.integers(0, 2**40),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_every_box_lies_inside_the_image(height, width, scale, ratio, size, crop_pct, index, seed):
    views = [View("random", size, tuple(scale), tuple(ratio)), View("centre", size, None, crop_pct=crop_pct)]
    table, key = crops.view_table(views), crops.stream(crops.CROP, seed, 0)
    for view in range(2):
        top, left, h, w, _ = crops.box(key, index, view, table, height, width)
        assert 1 <= h <= height
        assert 1 <= w <= width
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(375, 500, (0.3, 1.0)), (375, 500, (0.05, 0.3)), (60, 400, (0.2, 1.0))]
)
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    n = 4000
    ours = boxes(View("v", (96, 96), scale), height, width, n)
    torch.manual_seed(1)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    for quantity in (
        lambda b: b[:, 2] * b[:, 3],  # area
        lambda b: b[:, 3] / b[:, 2],  # aspect
        lambda b: b[:, 0] / (height - b[:, 2] + 1),  # where, vertically
        lambda b: b[:, 1] / (width - b[:, 3] + 1),
    ):
        assert ks_2samp(quantity(ours.astype(float)), quantity(theirs.astype(float))).pvalue > 1e-3


def test_half_of_the_views_are_flipped():
    flipped = boxes(TWO[0], 300, 300, 4000)[:, 4].mean()
    assert 0.46 < flipped < 0.54
    assert boxes(View("v", (8, 8), (0.2, 1.0), flip_p=0.0), 300, 300, 500)[:, 4].sum() == 0
    assert boxes(View("v", (8, 8), (0.2, 1.0), flip_p=1.0), 300, 300, 500)[:, 4].all()


def test_draws_differ_between_seeds_epochs_images_and_views_and_repeat_otherwise():
    same = boxes(TWO[0], 400, 400, 50)
    assert (same == boxes(TWO[0], 400, 400, 50)).all()
    for other in (boxes(TWO[0], 400, 400, 50, seed=1), boxes(TWO[0], 400, 400, 50, epoch=1)):
        assert (same != other).any(axis=1).mean() > 0.9
    table, key = crops.view_table([TWO[0], TWO[0]]), crops.stream(crops.CROP, 0, 0)
    second = np.array([crops.box(key, index, 1, table, 400, 400) for index in range(50)])
    assert (same != second).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("scale", [(0.3, 1.0), None])
def test_a_crop_of_another_view_is_the_same_window_in_its_own_size(scale):
    first = View("first", (20, 30), scale)
    views = [TWO[1], first, View("large", (40, 60), (0.05, 0.1), flip_p=1.0, crop_of="first")]
    table, key = crops.view_table(views), crops.stream(crops.CROP, 0, 0)
    both = [[crops.box(key, index, view, table, 300, 200) for index in range(50)] for view in (1, 2)]
    assert both[0] == both[1]
    assert len({flipped for *_, flipped in both[0]}) == (2 if scale else 1)
    image = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    out = np.zeros(crops.batch_bytes(table, 1), np.uint8)
    crops.cut(image, key, 0, table, 0, 1, out)
    top, left, h, w, flipped = both[0][0]
    large = np.zeros((40, 60, 3), np.uint8)
    crops.resample(image, top, left, h, w, flipped, large)
    assert (out[-large.size :].reshape(large.shape) == large).all()


def test_one_view_says_nothing_about_another():
    u = np.stack(
        [crops.uniforms(crops.sample_keys(crops.stream(crops.CROP, 0, 0), np.arange(5000), v), 0) for v in range(4)]
    )
    off_diagonal = np.abs(np.corrcoef(u) - np.eye(4)).max()
    assert off_diagonal < 0.05


def test_compiled_and_vectorised_draws_are_the_same():
    key, index = crops.stream(crops.CROP, 7, 3), np.arange(100)
    vectorised = crops.uniforms(crops.sample_keys(key, index, 2), 5)
    compiled = [crops._uniform(np.uint64(crops._view_key(key, i, 2)), 5) for i in index]
    assert (vectorised == compiled).all()


def test_centre_crop_is_the_largest_window_of_the_views_aspect():
    def centre(height, width, size, crop_pct=1.0):
        return tuple(crops.centre_box(height, width, *size, crop_pct))

    assert centre(300, 500, (224, 224)) == (0, 100, 300, 300)
    assert centre(300, 500, (100, 200)) == (25, 0, 250, 500)
    assert centre(256, 256, (224, 224), 0.875) == (16, 16, 224, 224)
    assert (boxes(View("v", (224, 224), None), 256, 300, 20) == (16, 38, 224, 224, 0)).all()


def test_an_epochs_order_is_a_permutation_of_its_own():
    first = crops.epoch_order(1000, 0, 0)
    assert sorted(first) == list(range(1000))
    assert (first == crops.epoch_order(1000, 0, 0)).all()
    for other in (crops.epoch_order(1000, 0, 1), crops.epoch_order(1000, 1, 0)):
        assert (first == other).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.1


@pytest.mark.parametrize("window", [(0, 0, 300, 400), (13, 40, 200, 150), (5, 6, 60, 70), (0, 0, 1, 1), (7, 9, 3, 250)])
@pytest.mark.parametrize("size", [(224, 224), (96, 48), (1, 1), (5, 300)])
def test_resampling_equals_pillows_bicubic(window, size):
    smooth = np.random.default_rng(0).integers(0, 256, (20, 26, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(smooth).resize((400, 300), Image.Resampling.BICUBIC))
    top, left, h, w = window
    ours = np.empty((*size, 3), np.uint8)
    crops.resample(image, top, left, h, w, False, ours)
    crop = Image.fromarray(image).crop((left, top, left + w, top + h))
    theirs = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(ours - theirs).mean() < 0.5
    mirrored = np.empty_like(ours)
    crops.resample(image, top, left, h, w, True, mirrored)
    assert (mirrored[:, ::-1] == ours).all()


def test_a_flat_image_stays_flat_and_a_full_window_is_the_image():
    flat = np.full((50, 60, 3), 255, np.uint8)
    out = np.empty((96, 96, 3), np.uint8)
    crops.resample(flat, 3, 4, 40, 50, False, out)
    assert (out == 255).all()
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    same = np.empty_like(image)
    crops.resample(image, 0, 0, 50, 60, False, same)
    assert (same == image).all()


@pytest.mark.parametrize(
    ("view", "word"),
    [
        (View("v", (0, 5), (0.1, 1.0)), "size 0x5"),
        (View("v", (5, 5), (0.0, 1.0)), "scale"),
        (View("v", (5, 5), (0.9, 0.1)), "scale"),
        (View("v", (5, 5), None, crop_pct=1.5), "crop_pct"),
        (View("v", (5, 5), (0.1, 1.0), ratio=(2.0, 1.0)), "ratio"),
        (View("v", (5, 5), (0.1, 1.0), crop_of="w"), "crop of 'w'"),
    ],
)
def test_a_view_that_cannot_be_cut_is_refused_by_name(view, word):
    with pytest.raises(ValueError, match=f"'v'.*{word}"):
        crops.view_table([view])


def test_a_crop_of_a_crop_and_of_one_view_among_namesakes_is_refused():
    first, second = (View(name, (5, 5), (0.1, 1.0)) for name in ("first", "second"))
    again, third = View("again", (5, 5), None, crop_of="first"), View("v", (5, 5), None, crop_of="again")
    crops.view_table([first, second, again])
    for views in ([first, again, third], [first, first, again]):
        with pytest.raises(ValueError, match=r"is a crop of '\w+': name one view with a crop of its own"):
            crops.view_table(views)
