"""The loader: every image once an epoch, the same batches from any point, two backends with one result, no hangs."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numba import njit, typeof

from objectives.views import View
from pipeline.data.beton import BetonReader, BetonWriter
from pipeline.data.loader import BATCHES_AHEAD, Batch, make_loader

pytestmark = pytest.mark.timeout(120)  # a hang is the failure these tests look for
VIEWS = [
    View("global", (32, 40), (0.3, 1.0)),
    View("local", (16, 16), (0.05, 0.3)),
    View("local", (16, 16), (0.05, 0.3)),
]
CENTRE = [View("centre", (24, 24), None)]


def has_ffcv() -> bool:
    threads = torch.get_num_threads()
    try:
        import ffcv.loader  # noqa: F401
    except (ImportError, OSError):
        return False
    finally:
        torch.set_num_threads(threads)
    return True


BACKENDS = [pytest.param("ffcv", marks=pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed")), "opencv"]


def picture(i: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth random image whose size depends on i."""
    height, width = 40 + i % 7 * 9, 50 + i % 5 * 11
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def write(path: Path, n: int, kind: str) -> Path:
    rng = np.random.default_rng(0)
    with BetonWriter(path, n) as writer:
        for i in range(n):
            image = picture(i, rng)
            if kind == "raw" or (kind == "mixed" and i % 2):
                writer.write(image, label=i % 10)
            else:
                jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
                writer.write(jpeg, label=i % 10, size=image.shape[:2])
    return path


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("betons")
    return {kind: write(folder / f"{kind}.beton", 50, kind) for kind in ("raw", "jpg", "mixed")}


def take(n: int, path: Path, views=VIEWS, state=None, **options) -> list[Batch]:
    with make_loader(path, views, **{"batch_size": 8, "threads": 2, **options}) as loader:
        if state:
            loader.load_state(state)
        return list(itertools.islice(loader, n))


def equal(a: Batch, b: Batch) -> bool:
    return (
        a.epoch == b.epoch
        and torch.equal(a.index, b.index)
        and torch.equal(a.label, b.label)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_what_it_promises(betons, backend):
    batch = take(1, betons["mixed"], backend=backend)[0]
    assert [tuple(v.shape) for v in batch.views] == [(8, 3, 32, 40), (8, 3, 16, 16), (8, 3, 16, 16)]
    for view in batch.views:
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert batch.index.dtype == batch.label.dtype == torch.int64
    assert torch.equal(batch.label, batch.index % 10)
    assert not torch.equal(batch.views[1], batch.views[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_shows_every_image_once_and_the_next_in_another_order(betons, backend):
    batches = take(10, betons["raw"], batch_size=10, backend=backend)
    for epoch in (0, 1):
        assert [b.epoch for b in batches[5 * epoch : 5 * epoch + 5]] == [epoch] * 5
        assert sorted(torch.cat([b.index for b in batches[5 * epoch : 5 * epoch + 5]]).tolist()) == list(range(50))
    assert not torch.equal(batches[0].index, batches[5].index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_ordered_pass_without_shuffling_and_again(betons, backend):
    with make_loader(betons["jpg"], CENTRE, batch_size=16, shuffle=False, backend=backend) as loader:
        assert loader.batches_per_epoch == 4
        first, second = list(loader), list(loader)
    assert [len(b.index) for b in first] == [16, 16, 16, 2]
    assert torch.cat([b.index for b in first]).tolist() == list(range(50))
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_do_not_depend_on_the_number_of_threads(betons, backend):
    one, four = (take(8, betons["mixed"], backend=backend, threads=n) for n in (1, 4))
    assert all(equal(a, b) for a, b in zip(one, four, strict=True))


def test_an_images_views_do_not_depend_on_batch_or_ranks(betons):
    whole = {}
    for batch in take(2, betons["raw"], batch_size=24, backend="opencv"):
        whole |= {int(i): [v[n] for v in batch.views] for n, i in enumerate(batch.index)}
    ranks = [take(6, betons["raw"], batch_size=4, rank=r, world=2, backend="opencv") for r in range(2)]
    assert torch.equal(torch.cat([ranks[0][0].index, ranks[1][0].index]), take(1, betons["raw"])[0].index)
    for batch in itertools.chain(*ranks):
        for n, i in enumerate(batch.index.tolist()):
            assert all(torch.equal(v[n], w) for v, w in zip(batch.views, whole[i]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_sees_the_batches_it_would_have_seen(betons, backend):
    uninterrupted = take(15, betons["mixed"], backend=backend)
    for stop in (1, 4, 6, 7):  # inside an epoch of 6 batches, at its end, in the next
        with make_loader(betons["mixed"], VIEWS, batch_size=8, backend=backend) as loader:
            for _ in itertools.islice(loader, stop):
                pass
            state = loader.state()
        resumed = take(15 - stop, betons["mixed"], state=state, backend=backend)
        assert all(equal(a, b) for a, b in zip(resumed, uninterrupted[stop:], strict=True))


def test_the_same_loader_goes_on_where_it_was_left(betons):
    uninterrupted = take(6, betons["raw"], backend="opencv")
    with make_loader(betons["raw"], VIEWS, batch_size=8, backend="opencv") as loader:
        parts = [b for _ in range(3) for b in itertools.islice(loader, 2)]
    assert all(equal(a, b) for a, b in zip(parts, uninterrupted, strict=True))


def test_a_run_goes_on_with_another_world_and_batch(betons):
    with make_loader(betons["raw"], VIEWS, batch_size=4, world=2, rank=1, backend="opencv") as loader:
        for _ in itertools.islice(loader, 2):
            pass
        state = loader.state()
    assert state == {"epoch": 0, "position": 16}
    seen = torch.cat([b.index for b in take(4, betons["raw"], batch_size=4, backend="opencv")])
    rest = [take(2, betons["raw"], state=state, batch_size=5, world=3, rank=r, backend="opencv") for r in range(3)]
    later = torch.cat([b.index for step in zip(*rest) for b in step])
    assert sorted(torch.cat([seen, later]).tolist()) == sorted(set(range(50)) & set(torch.cat([seen, later]).tolist()))
    assert len(later) == 30


def test_a_foreign_state_is_refused(betons):
    with (
        make_loader(betons["raw"], VIEWS, batch_size=4, backend="opencv") as loader,
        pytest.raises(ValueError, match="another data set"),
    ):
        loader.load_state({"epoch": 0, "position": 51})


@pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed")
@pytest.mark.parametrize(("kind", "level"), [("raw", 0), ("jpg", 16)])
def test_both_backends_cut_the_same(betons, kind, level):
    ours, theirs = (take(8, betons[kind], backend=backend) for backend in ("ffcv", "opencv"))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index)
        for x, y in zip(a.views, b.views):
            difference = (x.int() - y.int()).abs()
            assert difference.max() <= level
            assert difference.float().mean() <= level / 8


@pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed")
def test_both_backends_cut_real_photographs_alike(shared_data, tmp_path):
    files = sorted(shared_data("photos_fullsize").rglob("*.jpg"))[:12]
    with BetonWriter(tmp_path / "photos.beton", len(files)) as writer:
        for file in files:
            size = cv2.imread(str(file), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION).shape[:2]
            writer.write(file.read_bytes(), size=size)
    ours, theirs = (take(3, tmp_path / "photos.beton", batch_size=4, backend=b) for b in ("ffcv", "opencv"))
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.views, b.views):
            assert (x.int() - y.int()).abs().float().mean() < 2.5


@pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed")
def test_files_written_by_ffcv_load(tmp_path):
    program = """
import sys, numpy as np
from ffcv.writer import DatasetWriter
from ffcv.fields import IntField, RGBImageField
class Images:
    def __len__(self): return 20
    def __getitem__(self, i): return np.full((40, 50, 3), 10 * i, np.uint8), i
if __name__ == "__main__":
    fields = {"picture": RGBImageField(write_mode="proportion", compress_probability=0.5), "class": IntField()}
    DatasetWriter(sys.argv[1], fields, num_workers=1).from_indexed_dataset(Images())
"""
    (tmp_path / "write.py").write_text(program)
    path = tmp_path / "theirs.beton"
    subprocess.run([sys.executable, tmp_path / "write.py", path], check=True, timeout=90, capture_output=True)
    for backend in ("ffcv", "opencv"):
        with make_loader(path, CENTRE, batch_size=20, shuffle=False, backend=backend) as loader:
            (batch,) = loader
        assert batch.label.tolist() == list(range(20))
        level = batch.views[0].float().mean((1, 2, 3))
        assert (level - 10 * batch.label).abs().max() < 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_jpeg_is_counted_and_black_never_stale(betons, tmp_path, backend):
    path = tmp_path / "damaged.beton"
    path.write_bytes(betons["jpg"].read_bytes())
    record = BetonReader(path).metadata[5]
    with path.open("r+b") as file:
        file.seek(int(record["data_ptr"]))
        file.write(bytes(int(record["size"])))
    with make_loader(path, CENTRE, batch_size=10, shuffle=False, backend=backend) as loader:
        damaged = list(loader)
        assert loader.decode_errors == {5: 1}
    intact = take(5, betons["jpg"], views=CENTRE, batch_size=10, shuffle=False, backend=backend)
    assert (damaged[0].views[0][5] == 0).all()
    keep = torch.arange(10) != 5
    assert torch.equal(damaged[0].views[0][keep], intact[0].views[0][keep])
    assert all(equal(a, b) for a, b in zip(damaged[1:], intact[1:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_the_receivers_own(betons, backend):
    batches = take(8, betons["raw"], backend=backend)
    again = take(8, betons["raw"], backend=backend)
    assert all(equal(a, b) for a, b in zip(batches, again, strict=True))
    assert len({v.data_ptr() for b in batches for v in b.views}) == 8 * len(VIEWS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_the_background_is_raised_here(betons, backend):
    with make_loader(betons["raw"], VIEWS, batch_size=8, backend=backend) as loader:

        def broken(indices, epoch):
            raise RuntimeError("the disk went away")

        loader._cutter.cut = broken  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="the disk went away"):
            next(iter(loader))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_inside_the_decoding_threads_is_raised_here(betons, backend, monkeypatch):
    def broken(*arguments):
        raise ValueError("bad window")

    if backend == "ffcv":
        monkeypatch.setattr("pipeline.data.ffcv_loader._cut_rows", broken)
    else:
        monkeypatch.setattr("pipeline.data.crops.cut", broken)
    with (
        make_loader(betons["raw"], VIEWS, batch_size=8, backend=backend) as loader,
        pytest.raises(ValueError, match="bad window"),
    ):
        next(iter(loader))


def test_who_waits_for_a_batch_is_told_so(betons):
    with make_loader(betons["raw"], VIEWS, batch_size=8, backend="opencv") as loader:
        cut, waited = loader._cutter.cut, []
        loader._cutter.cut = lambda *step: time.sleep(2.5) or cut(*step)  # type: ignore[method-assign]
        loader.waiting = waited.append
        assert len(next(iter(loader)).index) == 8
        assert len(waited) >= 2
        assert 0.9 < waited[0] < waited[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_thread_is_left_by_closing_dropping_or_restarting(betons, backend):
    before = set(threading.enumerate())  # one of an earlier test's may end meanwhile

    def own() -> set[threading.Thread]:
        return set(threading.enumerate()) - before

    for _ in range(5):
        with make_loader(betons["raw"], VIEWS, batch_size=8, threads=2, backend=backend) as loader:
            for _ in range(3):
                next(iter(loader))
            assert 0 < len(own()) <= 3
    assert own() == set()
    loader = make_loader(betons["raw"], VIEWS, batch_size=8, threads=2, backend=backend)
    iterator = iter(loader)
    next(iterator)
    del loader, iterator
    gc.collect()
    deadline = time.monotonic() + 60
    while own() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert own() == set()


def test_no_more_batches_are_made_than_may_wait(betons):
    made = []
    with make_loader(betons["raw"], VIEWS, batch_size=8, backend="opencv") as loader:
        cut = loader._cutter.cut
        loader._cutter.cut = lambda indices, epoch: (made.append(1), cut(indices, epoch))[1]  # type: ignore[method-assign]
        next(iter(loader))
        time.sleep(0.5)
        assert len(made) <= BATCHES_AHEAD + 2  # taken, waiting, and one in the making


def test_two_loaders_run_at_once(betons):
    for backend in ("ffcv", "opencv") if has_ffcv() else ("opencv",):
        with (
            make_loader(betons["raw"], VIEWS, batch_size=8, backend=backend) as train,
            make_loader(betons["jpg"], CENTRE, batch_size=8, shuffle=False, backend=backend) as val,
        ):
            for _, (a, b) in zip(range(6), zip(train, val)):
                assert len(a.index) == len(b.index) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_threads_are_left_alone(betons, backend):
    before = torch.get_num_threads()
    take(2, betons["raw"], backend=backend)
    assert torch.get_num_threads() == before


def test_a_closed_loader_says_so(betons):
    loader = make_loader(betons["raw"], VIEWS, batch_size=8, backend="opencv")
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 51}, "50 images.*global batch of 51.*lower the batch size to 50"),
        ({"batch_size": 30, "world": 2}, "global batch of 60.*2 ranks.*to 25"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank 2 of world 2"),
        ({"batch_size": 4, "world": 2, "drop_last": False}, "drop_last=False on 2 ranks"),
        ({"batch_size": 4, "backend": "dali"}, "'dali'.*auto, ffcv, opencv"),
    ],
)
def test_what_fits_no_loader_is_refused_in_a_sentence(betons, options, words):
    with pytest.raises(ValueError, match=words):
        make_loader(betons["raw"], VIEWS, **options)


def test_without_ffcv_auto_takes_opencv_and_ffcv_is_refused(betons, monkeypatch):
    monkeypatch.setitem(sys.modules, "pipeline.data.ffcv_loader", None)
    with make_loader(betons["raw"], VIEWS, batch_size=8) as loader:
        assert loader.backend == "opencv"
    with pytest.raises(ImportError, match="use 'opencv'"):
        make_loader(betons["raw"], VIEWS, batch_size=8, backend="ffcv")


@pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed")
def test_what_was_compiled_before_ffcv_is_found_after_it(betons):
    """FFCV changes a type that all of numba shares, and with it the key of what was compiled for that."""
    compiled = njit(lambda out: out.size)
    given = np.zeros(3, np.uint8)
    assert compiled(given) == 3
    take(1, betons["raw"], backend="ffcv")
    assert typeof(given).mutable
    assert list(compiled.overloads.values())


@pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed")
def test_auto_takes_ffcv(betons):
    with make_loader(betons["raw"], VIEWS, batch_size=8) as loader:
        assert loader.backend == "ffcv"


def test_a_program_that_never_closes_its_loader_ends(betons):
    program = (
        "from objectives.views import View; from pipeline.data.loader import make_loader\n"
        f"loader = make_loader({str(betons['raw'])!r}, [View('v', (16, 16), (0.3, 1.0))], batch_size=8)\n"
        "print(len(next(iter(loader)).index))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        timeout=90,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ".:ssl"},
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "8"
    assert "Error" not in done.stderr
