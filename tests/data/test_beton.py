"""Our .beton files against FFCV's own reader, writer and loader, and against damage."""

import contextlib
import io
import os

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import beton
from pipeline.data.beton import JPEG, RAW, BetonError, BetonReader, BetonWriter
from pipeline.data.packed import read_packed


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth image [h, w, 3], which JPEG keeps nearly as it is."""
    coarse = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


images = st.one_of(
    st.binary(min_size=1, max_size=200).map(lambda data: (data, (7, 9))),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9)).map(
        lambda s: (np.random.default_rng(s[2]).integers(0, 255, (s[0], s[1], 3), np.uint8), None)
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(st.tuples(images, st.integers(-1, 2**62)), max_size=12),
    spare=st.integers(0, 5),
    page=st.sampled_from([64, 128, 4096]),
)
def test_what_is_written_is_read(samples, spare, page, tmp_path):
    before, beton.PAGE = beton.PAGE, page
    try:
        with BetonWriter(tmp_path / "a.beton", n_max=len(samples) + spare) as writer:
            for index, ((image, size), label) in enumerate(samples):
                assert writer.write(image, label, size) == index
    finally:
        beton.PAGE = before
    reader = BetonReader(tmp_path / "a.beton")
    assert len(reader) == len(samples)
    assert (reader.image_field, reader.label_field) == ("image", "label")
    header = np.fromfile(tmp_path / "a.beton", beton.HEADER, 1)[0]
    for ((image, size), label), record, (payload, height, width, read_label) in zip(samples, reader.metadata, reader):
        assert label == read_label == record["label"]
        assert (height, width) == (size or image.shape[:2])
        assert record["mode"] == (JPEG if size else RAW)
        assert np.array_equal(payload, image)
        last = record["data_ptr"] + record["size"] - 1
        assert record["data_ptr"] // header["page"] == last // header["page"], "a payload crosses a page"
    assert os.listdir(tmp_path) == ["a.beton"]


def test_a_payload_larger_than_a_page_makes_pages_larger(tmp_path):
    big = np.random.default_rng(0).integers(0, 255, (1200, 1000, 3), np.uint8)  # 3.6 MB: 2 pages of 2 MiB
    with BetonWriter(tmp_path / "a.beton", 3) as writer:
        for image in (big[:10], big, big[:20]):
            writer.write(image)
    reader = BetonReader(tmp_path / "a.beton")
    assert np.array_equal(reader.read(1)[0], big)
    assert np.array_equal(reader.read(2)[0], big[:20])
    assert np.fromfile(tmp_path / "a.beton", beton.HEADER, 1)[0]["page"] == 4 << 20


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_loads_ours(tmp_path, os_cache):
    pytest.importorskip("ffcv")
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    pictures = [picture(i, 40 + i % 3, 50) for i in range(9)]
    with BetonWriter(tmp_path / "a.beton", n_max=100) as writer:
        for i, pixels in enumerate(pictures):
            writer.write(jpeg(pixels) if i % 2 else pixels, i - 1, pixels.shape[:2])
    loader = Loader(
        str(tmp_path / "a.beton"),
        batch_size=4,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={
            "image": [CenterCropRGBImageDecoder((40, 40), 1.0), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    seen = [(x.clone().numpy(), y.clone().numpy()) for x, y in loader]
    loaded, labels = (np.concatenate(part) for part in zip(*seen))
    assert labels.ravel().tolist() == list(range(-1, 8))
    for pixels, got in zip(pictures, loaded):
        side = min(pixels.shape[:2])
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        crop = cv2.resize(pixels[top : top + side, left : left + side], (40, 40), interpolation=cv2.INTER_AREA)
        assert np.abs(got.astype(int) - crop).mean() < 3


class _Dataset:
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_we_read_what_ffcv_writes_under_other_names(tmp_path):
    pytest.importorskip("ffcv")
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    pictures = [picture(i, 30 + i, 20) for i in range(7)]
    rows = [
        (0.5, i, np.frombuffer(b"x" * (i + 1), np.uint8), p, {"a": i}, np.zeros((2, 2), np.float32), 10 + i)
        for i, p in enumerate(pictures)
    ]
    fields = {
        "weight": FloatField(), "patient": IntField(), "raw": BytesField(), "photo": RGBImageField(write_mode="raw"),
        "facts": JSONField(), "grid": NDArrayField(np.dtype("float32"), (2, 2)), "label": IntField(),
    }  # fmt: skip
    path = tmp_path / "foreign.beton"
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(_Dataset(rows), chunksize=3)
    reader = BetonReader(path)
    assert (reader.image_field, reader.label_field) == ("photo", "label")
    assert reader.metadata["label"].tolist() == list(range(10, 17))
    for pixels, (got, height, width, _) in zip(pictures, reader):
        assert (height, width) == pixels.shape[:2]
        assert np.array_equal(got, pixels)
    assert read_packed(path).classes == ()  # labels up to 16 for 7 images are no classes


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_we_read_ffcv_files_without_labels(tmp_path, mode):
    pytest.importorskip("ffcv")
    from ffcv.fields import RGBImageField
    from ffcv.writer import DatasetWriter

    pictures = [picture(i, 30, 20) for i in range(5)]
    path = tmp_path / "foreign.beton"
    field = RGBImageField(write_mode=mode, jpeg_quality=95)
    DatasetWriter(str(path), {"x": field}, num_workers=1).from_indexed_dataset(_Dataset([(p,) for p in pictures]))
    reader = BetonReader(path)
    assert (reader.image_field, reader.label_field) == ("x", None)
    assert (reader.metadata["label"] == -1).all()
    for pixels, (got, *_) in zip(pictures, reader):
        if mode == "jpg":
            got = cv2.imdecode(np.frombuffer(got, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.abs(got.astype(int) - pixels).mean() < 3
    one, two = read_packed(path), read_packed(path)
    assert one == two
    assert (one.images, one.classes, len(one.fingerprint)) == (5, (), 32)


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.beton"
    with BetonWriter(path, 8) as writer:
        for i in range(6):
            writer.write(picture(i, 8, 9), i)
    return path


def test_every_cut_of_a_file_is_noticed(whole, tmp_path):
    data = whole.read_bytes()
    cut = tmp_path / "cut.beton"
    for length in [0, 1, 23, 24, 500, 2105, 2300, beton.PAGE, beton.PAGE + 100, len(data) - 24, len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(BetonError, match=r"cut\.beton"):
            BetonReader(cut)


def test_a_file_that_becomes_shorter_or_goes_while_it_is_open(whole):
    """Read where it was cut, it would end the process (SIGBUS): `tests.chaos.data_faults` does that to a run."""
    reader, images = BetonReader(whole), list(BetonReader(whole))
    whole.rename(whole.with_suffix(".gone"))
    reader.check_whole()
    assert [np.array_equal(now[0], then[0]) for now, then in zip(reader, images)] == [True] * 6
    os.truncate(whole.with_suffix(".gone"), len(reader.data) - 1)
    lost = r"whole\.beton: was cut short while it was read .* packed again"
    with pytest.raises(BetonError, match=lost):
        reader.check_whole()
    first = int(reader.metadata["data_ptr"].argmin())
    os.truncate(whole.with_suffix(".gone"), int(reader.metadata["data_ptr"][first]) + 1)
    with pytest.raises(BetonError, match=lost):
        reader.payload(first)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2400), value=st.integers(0, 255))
def test_a_changed_byte_is_a_sentence_or_harmless(whole, tmp_path, at, value):
    data = bytearray(whole.read_bytes())
    data[at] = value
    changed = tmp_path / "changed.beton"
    changed.write_bytes(data)
    with contextlib.suppress(BetonError):  # any other exception fails
        list(BetonReader(changed))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cut short, or no .beton"),
        (b"\xff\xd8\xff\xe0" * 2000, "not a .beton"),
        (b"\0" * 5000, "not a .beton"),
        (np.array([(2, 1, 2 << 20, 5, 0)], beton.HEADER).tobytes() + b"\0" * 5000, "never finished"),
    ],
)
def test_foreign_files_are_told_in_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "a.beton"
    path.write_bytes(content)
    with pytest.raises(BetonError, match=sentence):
        BetonReader(path)
    with pytest.raises(BetonError, match="cannot be opened"):
        BetonReader(tmp_path / "absent.beton")


def test_nothing_is_left_of_a_file_that_failed(tmp_path):
    def fail() -> None:
        with BetonWriter(tmp_path / "a.beton", 4) as writer:
            writer.write(picture(0, 4, 4))
            assert len(os.listdir(tmp_path)) == 1
            assert not (tmp_path / "a.beton").exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_failed_file_leaves_the_earlier_one(whole):
    before = whole.read_bytes()
    with pytest.raises(RuntimeError), BetonWriter(whole, 4):
        raise RuntimeError
    assert whole.read_bytes() == before


def test_what_does_not_fit_is_refused(tmp_path):
    with BetonWriter(tmp_path / "a.beton", 1) as writer:
        for image, size, sentence in [
            (np.zeros((4, 4), np.uint8), None, "uint8"),
            (np.zeros((4, 4, 3), np.float32), None, "uint8"),
            (b"x", None, "size="),
            (b"x", (70_000, 3), "65535"),
            (b"", (3, 3), "bytes"),
        ]:
            with pytest.raises(ValueError, match=sentence):
                writer.write(image, size=size)
        writer.write(picture(0, 3, 3))
        with pytest.raises(ValueError, match="n_max"):
            writer.write(picture(0, 3, 3))
