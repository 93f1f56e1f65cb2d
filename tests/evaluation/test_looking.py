"""Are features that a cluster's workers extract those of one process?"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.contract import Features
from pipeline import cluster, compare, evaluate
from pipeline.data.packed import Packed
from pipeline.errors import UserError
from pipeline.evaluation import examine
from pipeline.evaluation.features import batches_of, joined, look, look_at, random_views
from pipeline.evaluation.floors import pixels
from pipeline.evaluation.images import evaluation_view
from tests.chaos.cluster_faults import ROOT, Machines
from tests.evaluation.test_evaluate import SIDE, MeanColour, pack

BATCH = 7


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(tmp_path_factory.mktemp("looking"), "train", 100, 0)


def equal(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, one in expected.items():
        for a, b in zip([*found[name][:3], *found[name].summaries], [*one[:3], *one.summaries], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("limit", [None, 40, 7, 3])
@pytest.mark.parametrize("shares", [1, 2, 5])
def test_shares_joined_in_any_order_are_the_whole_pass(packed: Packed, limit: int | None, shares: int) -> None:
    views = [evaluation_view(SIDE)]
    whole = look({"": MeanColour()}, packed.path, views, summaries=2, batch_size=BATCH, limit=limit)
    shares = min(shares, batches_of(limit or 100, views, BATCH))
    parts = [
        look_at({"": MeanColour()}, packed.path, views, share=(k, shares), summaries=2, batch_size=BATCH, limit=limit)
        for k in range(shares)
    ]
    equal(joined(parts[::-1], packed.path), whole)


def test_without_a_cluster_features_are_extracted_in_this_process() -> None:
    assert cluster.looking("local", None) is look


@pytest.mark.parametrize("command", [evaluate.main, compare.main])
@pytest.mark.parametrize(
    ("words", "why"), [("--workers 0", "must be at least 1"), ("--engine local --workers 2", "local is one process")]
)
def test_workers_that_an_engine_cannot_have_are_refused(command, words, why, capsys) -> None:
    assert command(["nothing", *words.split()]) == 2
    assert why in capsys.readouterr().err


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """Two nodes of one core."""
    paths = (ROOT, ROOT / "ssl", Path(__file__).parent)
    found = Machines(2, PYTHONPATH=":".join(map(str, paths)))
    os.environ["RAY_ADDRESS"] = found.cluster.address
    try:
        yield found
    finally:
        import ray

        ray.shutdown()
        found.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as a worker of these machines has: another number may change a sum's last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class DiesOnce(MeanColour):
    """Kills the first process that runs it."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def forward(self, images: Tensor, summaries: bool = False) -> Features:
        if not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return super().forward(images, summaries)


class Meets(MeanColour):
    """Goes on only once another process works beside it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def forward(self, images: Tensor, summaries: bool = False) -> Features:
        (self.folder / str(os.getpid())).touch()
        until = time.monotonic() + 120
        while len(list(self.folder.iterdir())) < 2:
            assert time.monotonic() < until, "alone for two minutes"
            time.sleep(0.05)
        return super().forward(images, summaries)


class Broken(MeanColour):
    """Gives no number for the first image of a batch."""

    def forward(self, images: Tensor, summaries: bool = False) -> Features:
        features = super().forward(images, summaries)
        features.pooled[0] = torch.nan
        return features


@pytest.mark.ray
def test_two_machines_give_what_one_process_gives(
    machines: Machines, packed: Packed, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = cluster.looking("ray", None)
    assert "features are extracted by 2 workers of 1 CPU core\n" in capsys.readouterr().out
    views = [evaluation_view(SIDE)]
    both: dict[str, nn.Module] = {"cnn": backbones.create("resnet20", image_size=SIDE), "vit": backbones.create(
        "vit_ti8", image_size=SIDE)}  # fmt: skip
    for limit in (None, 40):
        options = {"summaries": 2, "batch_size": BATCH, "limit": limit}
        equal(spread(both, packed.path, views, **options), look(both, packed.path, views, **options))
    options = {"batch_size": 10 * BATCH, "limit": 30}
    equal(
        spread({"": pixels()}, packed.path, random_views(SIDE), **options),
        look({"": pixels()}, packed.path, random_views(SIDE), **options),
    )
    assert all(module.training for backbone in both.values() for module in backbone.modules())

    val = pack(tmp_path, "val", 40, 1)
    protocols = {"image_size": SIDE, "protocols": ("knn", "layerwise", "label_free"), "batch_size": BATCH}
    here = examine(both, packed, val, **protocols, cache=tmp_path / "here")
    there = examine(both, packed, val, **protocols, cache=tmp_path / "there", look=spread)
    assert {name: one.numbers for name, one in there.items()} == {name: one.numbers for name, one in here.items()}
    names = [sorted(file.name for file in (tmp_path / where).iterdir()) for where in ("here", "there")]
    assert names[0] == names[1]
    again = examine(both, packed, val, **protocols, cache=tmp_path / "there", look=None)  # the cache has it all
    assert again["cnn"].numbers == here["cnn"].numbers


@pytest.mark.ray
def test_workers_extract_side_by_side_and_a_killed_one_is_replaced(
    machines: Machines, packed: Packed, tmp_path: Path
) -> None:
    spread, views = cluster.looking("ray", 2), [evaluation_view(SIDE)]
    expected = look({"": MeanColour()}, packed.path, views, batch_size=25)
    (tmp_path / "met").mkdir()
    equal(spread({"": Meets(tmp_path / "met")}, packed.path, views, batch_size=25), expected)
    equal(spread({"": DiesOnce(tmp_path / "died")}, packed.path, views, batch_size=25), expected)
    assert (tmp_path / "died").exists()


@pytest.mark.ray
def test_where_no_worker_has_room_this_process_extracts(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job's entry point may hold what its own workers would wait for."""
    import ray

    monkeypatch.setattr(cluster.looking.__globals__["time"], "monotonic", iter(range(0, 10**6, 10)).__next__)
    cluster.join()
    room = ray.util.placement_group([{"CPU": 1}] * 2)
    ray.get(room.ready())
    try:
        assert cluster.looking("ray", None) is look
        assert (
            "no machine of the cluster has 1 CPU core free: features are extracted in this" in capsys.readouterr().out
        )
    finally:
        ray.util.remove_placement_group(room)


@pytest.mark.ray
def test_what_a_worker_meets_is_told_as_one_process_tells_it(machines: Machines, packed: Packed) -> None:
    spread, views = cluster.looking("ray", None), [evaluation_view(SIDE)]
    with pytest.raises(FloatingPointError, match=rf"^4 images of {packed.path} have features .* NaN or infinite"):
        spread({"": Broken()}, packed.path, views, batch_size=25)
    with pytest.raises(UserError, match="--workers 9: the cluster has 2 CPU cores and no GPU"):
        cluster.looking("ray", 9)
