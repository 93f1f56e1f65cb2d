"""Is the generated set what it claims: reproducible, with independent factors, and split for good?"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare

from pipeline.config import Config
from pipeline.data import embedded, preparation
from pipeline.data.beton import BetonReader
from pipeline.data.embedded import FACTORS, factors, generate
from pipeline.errors import UserError


def test_an_image_depends_on_seed_part_and_number_alone() -> None:
    images, truth = generate(100, 32, seed=3)
    one, its = generate(1, 32, seed=3, start=77)
    assert np.array_equal(images[77], one[0])
    assert {name: values[77] for name, values in truth.items()} == {name: values[0] for name, values in its.items()}
    assert images.dtype == np.uint8
    assert images.shape == (100, 32, 32, 3)


def test_another_seed_or_part_gives_other_images() -> None:
    sets = [
        generate(200, 16, seed, part)[0].reshape(200, -1) for seed, part in ((0, "train"), (0, "val"), (1, "train"))
    ]
    distinct = {image.tobytes() for images in sets for image in images}
    assert len(distinct) == 600


def test_no_validation_image_is_nearly_a_training_image() -> None:
    train, val = (generate(400, 16, part=part)[0].reshape(400, -1).astype(np.float32) for part in ("train", "val"))
    apart = np.linalg.norm(val[:, None] - train[None], axis=2)
    within = np.linalg.norm(train[:, None] - train[None], axis=2) + np.diag(np.full(400, np.inf))
    assert apart.min() > 0.4 * np.median(within.min(axis=1))


@pytest.mark.parametrize("part", embedded.PARTS)
def test_every_value_is_equally_likely(part: str) -> None:
    for name, values in factors(20_000, part=part).items():
        counts = np.bincount(values, minlength=len(FACTORS[name]))
        assert len(counts) == len(FACTORS[name])
        assert chisquare(counts).pvalue > 1e-4, name


def test_factors_are_independent_of_each_other_and_of_the_order() -> None:
    truth = factors(50_000)
    for a, b in combinations(truth, 2):
        table = np.histogram2d(truth[a], truth[b], bins=(len(FACTORS[a]), len(FACTORS[b])))[0]
        assert chi2_contingency(table).pvalue > 1e-4, (a, b)
    for name, values in truth.items():
        table = np.histogram2d(values[:-1], values[1:], bins=len(FACTORS[name]))[0]
        assert chi2_contingency(table).pvalue > 1e-4, name


def test_the_parts_factors_are_independent() -> None:
    train, val = factors(20_000, part="train"), factors(20_000, part="val")
    for name in FACTORS:
        table = np.histogram2d(train[name], val[name], bins=len(FACTORS[name]))[0]
        assert chi2_contingency(table).pvalue > 1e-4, name


def test_the_same_scene_at_every_size() -> None:
    """An image of 64 pixels, shrunk, mostly resembles its twin of 32 pixels more than any other."""
    large = generate(40, 64)[0].reshape(40, 32, 2, 32, 2, 3).mean(axis=(2, 4)).reshape(40, -1)
    small = generate(40, 32)[0].reshape(40, -1)
    smooth = np.linalg.norm(large[:, None] - small[None], axis=2)
    assert (smooth.argmin(axis=1) == np.arange(40)).mean() > 0.7


def test_shapes_have_equal_areas_and_stay_distinct() -> None:
    y, x = np.mgrid[-2:2:401j, -2:2:401j].astype(np.float32)
    inside = {name: outline(x, y) < 0 for name, outline in embedded._OUTLINES.items()}
    areas = [mask.sum() * 0.01**2 for mask in inside.values()]
    assert areas == pytest.approx([np.pi] * len(areas), rel=0.02)
    for a, b in combinations(inside, 2):
        shared = (inside[a] & inside[b]).sum() / (inside[a] | inside[b]).sum()
        assert shared < 0.95, (a, b)


def test_colours_are_the_hues_they_are_called() -> None:
    """The pixels that differ most from grey are the object's: their hue is near the named one."""
    import colorsys

    images, truth = generate(200, 32)
    errors = []
    for image, colour in zip(images, truth["colour"]):
        pixels = image.reshape(-1, 3).astype(float)
        vivid = pixels[(pixels.max(1) - pixels.min(1)).argsort()[-25:]].mean(0) / 255
        errors.append(abs((colorsys.rgb_to_hsv(*vivid)[0] - embedded._HUES[colour] + 0.5) % 1 - 0.5))
    assert np.median(errors) < 0.05


def test_packed_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = embedded.packed(tmp_path, "val", 70, 16, factor="colour")
    images, truth = generate(70, 16, part="val")
    reader = BetonReader(packed.path)
    assert (len(reader), packed.images, packed.classes) == (70, 70, FACTORS["colour"])
    pixels, height, width, label = reader.read(69)
    assert np.array_equal(pixels, images[69])
    assert (height, width, label) == (16, 16, truth["colour"][69])

    monkeypatch.setattr(embedded, "generate", None)  # drawing again would fail
    assert embedded.packed(tmp_path, "val", 70, 16, factor="colour") == packed


def test_what_differs_has_its_own_file_and_fingerprint(tmp_path: Path) -> None:
    sets = [
        embedded.packed(tmp_path, "val", 9, 16),
        embedded.packed(tmp_path, "train", 9, 16),
        embedded.packed(tmp_path, "val", 8, 16),
        embedded.packed(tmp_path, "val", 9, 16, seed=1),
        embedded.packed(tmp_path, "val", 9, 16, factor="scale"),
    ]
    assert len({p.path for p in sets}) == len({p.fingerprint for p in sets}) == len(sets)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no factor 'smell'; it has shape, texture"):
        embedded.packed(tmp_path, "train", 4, factor="smell")
    with pytest.raises(ValueError, match="parts train and val, not 'test'"):
        generate(1, 32, part="test")
    with pytest.raises(ValueError, match="at least 8 pixels"):
        generate(1, 4)


def test_the_command_line_names_the_factor_that_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "EMBEDDED", {"train": 8, "val": 4})
    for data, factor in (("embedded", "colour"), ("embedded:shape", "shape")):
        train, val, _ = preparation.prepare(Config(data=data, cache=str(tmp_path)))
        assert val is not None
        assert train.classes == val.classes == FACTORS[factor]
    with pytest.raises(UserError, match="embedded:hue: the generated images are labelled by one of shape"):
        preparation.prepare(Config(data="embedded:hue", cache=str(tmp_path)))
