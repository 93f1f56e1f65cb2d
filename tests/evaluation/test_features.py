"""Are features extracted once, and is what comes from disk what was extracted?"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.contract import Features
from pipeline.data import embedded
from pipeline.data.packed import Packed
from pipeline.evaluation import examine
from pipeline.evaluation.duplicates import duplicates
from pipeline.evaluation.evaluate import truth
from pipeline.evaluation.features import digest, look, look_once, random_views
from pipeline.evaluation.floors import pixels
from pipeline.evaluation.images import IN_CACHE, Images, evaluation_view
from tests.evaluation.test_evaluate import SIDE, MeanColour, pack


class Counting(MeanColour):
    """Counts the images it was shown; its weight scales what it gives."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))
        self.images = 0

    def forward(self, images: Tensor, summaries: bool = False) -> Features:
        self.images += len(images)
        return super().forward(images * self.weight, summaries)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(tmp_path_factory.mktemp("features"), "train", 60, 0)


def once(folder: Path, backbone: nn.Module, packed: Packed, **more: object) -> Features:
    return look_once(folder, {"": backbone}, packed, [evaluation_view(SIDE)], **more)[""]


def test_a_second_pass_reads_what_the_first_one_wrote(tmp_path: Path, packed: Packed) -> None:
    backbone = Counting()
    first, again = once(tmp_path, backbone, packed), once(tmp_path, backbone, packed)
    assert backbone.images == 60
    for a, b in zip(first[:3], again[:3]):
        assert torch.equal(a, b)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_weights_images_views_or_precision_are_other_features(tmp_path: Path, packed: Packed) -> None:
    once(tmp_path, Counting(), packed)
    for n, (backbone, data, more) in enumerate(
        [
            (Counting(2.0), packed, {}),
            (Counting(), replace(packed, fingerprint="another"), {}),
            (Counting(), packed, {"limit": 10}),
            (Counting(), packed, {"precision": "bf16"}),
        ],
        2,
    ):
        once(tmp_path, backbone, data, **more)
        assert backbone.images == (10 if "limit" in more else 60)
        assert len(list(tmp_path.iterdir())) == n
    whole = Counting()
    once(tmp_path, whole, packed, limit=60)  # all of them: no other pass
    assert whole.images == 0


def test_summaries_of_more_layers_are_added_where_they_were_not_kept_and_a_torn_file_is_made_again(
    tmp_path: Path, packed: Packed
) -> None:
    backbone = Counting()
    once(tmp_path, backbone, packed)
    (last,) = once(tmp_path, backbone, packed, summaries=1).summaries
    assert backbone.images == 120
    both = once(tmp_path, backbone, packed, summaries=2).summaries
    assert backbone.images == 180
    assert len(both) == len(once(tmp_path, backbone, packed, summaries=4).summaries) == 2  # it has no more
    assert backbone.images == 240
    assert once(tmp_path, backbone, packed).summaries == ()
    for asked in (1, 5):
        kept = once(tmp_path, backbone, packed, summaries=asked).summaries
        assert torch.equal(kept[-1], both[-1])
        assert len(kept) == min(asked, 2)
    assert torch.equal(last, both[-1])
    assert backbone.images == 240
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    once(tmp_path, backbone, packed)
    assert backbone.images == 300


def test_the_digest_tells_weights_and_configurations_apart() -> None:
    a, b = (backbones.create("lenet5", image_size=32) for _ in range(2))
    assert digest(a) != digest(b)
    b.load_state_dict(a.state_dict())
    assert digest(a) == digest(b)
    b.layers_renamed = 1
    assert digest(a) == digest(b)
    other = backbones.create("lenet5", image_size=64)
    other.load_state_dict(a.state_dict())
    assert digest(a) != digest(other)


@pytest.mark.parametrize("name", ["resnet20", "vit_ti8"])
def test_what_sums_up_the_last_layers_is_kept_in_half_precision(name: str, packed: Packed) -> None:
    backbone = backbones.create(name, image_size=SIDE).eval()
    one = look({"": backbone}, packed.path, [evaluation_view(SIDE)], summaries=2, batch_size=7)[""]
    images = Images(backbone, packed.path, one.labels, SIDE, torch.device("cpu"))
    shown = next(iter(images.batches()))
    with torch.no_grad():
        expected = backbone(images.normalised(shown.images), summaries=True)
    torch.testing.assert_close(one.features[:, 0], expected.pooled, atol=1e-5, rtol=1e-4)
    for found, layer in zip(one.summaries, expected.summaries[-2:], strict=True):
        torch.testing.assert_close(found, layer.half(), atol=2e-3, rtol=2e-3)


def test_pooled_features_are_those_of_all_images_at_once(packed: Packed) -> None:
    backbone = backbones.create("resnet20", image_size=SIDE).eval()
    images = Images(backbone, packed.path, torch.zeros(60), SIDE, torch.device("cpu"))
    shown = next(iter(images.batches())).images
    assert len(shown) > IN_CACHE
    with torch.no_grad():
        expected = backbone(images.normalised(shown)).pooled
    torch.testing.assert_close(images.pooled(shown), expected, atol=1e-5, rtol=1e-4)


def test_random_views_differ_and_are_the_same_again(packed: Packed) -> None:
    views = random_views(SIDE)
    first, again = (look({"": MeanColour()}, packed.path, views, limit=20)[""] for _ in range(2))
    assert first.features.shape == (20, 10, 3)
    assert torch.equal(first.features, again.features)
    assert first.features.std(dim=1).min() > 0.01


def test_images_are_the_same_limited_set_every_time(packed: Packed) -> None:
    images = Images(MeanColour(), packed.path, torch.arange(60), SIDE, torch.device("cpu"), batch_size=8)
    few = [batch.which for batch in images.batches(13)]
    assert [len(part) for part in few] == [8, 5]
    assert len(torch.cat(few).unique()) == 13
    assert torch.equal(torch.cat(few), torch.cat([batch.labels for batch in images.batches(13)]))


def test_the_factors_of_generated_images_are_known_and_what_pixels_hold_of_them(tmp_path: Path) -> None:
    train, val = (embedded.packed(tmp_path, part, n, image_size=16) for part, n in (("train", 300), ("val", 150)))
    some = torch.tensor([5, 0, 7])
    expected = embedded.factors(8)
    for name, values in truth(train, some, torch.device("cpu")).items():
        assert values.tolist() == expected[name][[5, 0, 7]].tolist()
    numbers = examine({"": pixels()}, train, val, image_size=16, protocols=("factors",))[""].numbers
    assert numbers["factors_colour_held"] > 0.15
    assert numbers["factors_position_held"] > 0.15
    assert numbers["factors_shape_held"] < 0.1  # of equal area: no count of pixels names a shape
    assert numbers["factors_colour_low"] <= numbers["factors_colour"] <= numbers["factors_colour_high"]


def test_copies_across_the_split_are_found_and_named(tmp_path: Path, packed: Packed) -> None:
    assert duplicates(packed, pack(tmp_path, "other", 40, 7)) == []
    same = pack(tmp_path, "same", 12, 0)  # the same seed: its images are the first of `packed`
    assert duplicates(packed, same) == [(str(i), str(i)) for i in range(12)]
