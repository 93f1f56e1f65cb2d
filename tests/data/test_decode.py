"""Decoding: what is kept, what is changed and why, what is refused, and decoders that crash or hang."""

import io
import os
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import decode as decoding
from pipeline.data.decode import DecodedImage, decode
from pipeline.data.magic import NotAnImage, Rejected
from pipeline.data.workers import Decoders, Extent, Outcome, Task, Unreadable


def picture(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def saved(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(pixels: np.ndarray, **options) -> bytes:
    return saved(pixels, "JPEG", **{"quality": 95, "subsampling": 0, **options})


def pixels_of(decoded: DecodedImage) -> np.ndarray:
    if isinstance(decoded.image, bytes):
        pixels = cv2.imdecode(
            np.frombuffer(decoded.image, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
        assert pixels is not None
    else:
        pixels = decoded.image
    assert pixels.shape == (*decoded.size, 3)
    assert pixels.dtype == np.uint8
    return pixels


def far(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


# ---------------------------------------------------------------------------------------------------------------- kept


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}, {"keep_rgb": True}])
def test_an_ordinary_jpeg_is_kept_to_the_byte(options):
    data = jpeg(picture(), **options)
    decoded = decode(data)
    assert (decoded.image, decoded.size, decoded.why, decoded.warnings) == (data, (60, 80), "", ())


def test_a_grey_jpeg_is_kept_and_ffcv_reads_three_channels():
    data = saved(Image.fromarray(picture()).convert("L"), "JPEG")
    assert decode(data).image == data
    libffcv = pytest.importorskip("ffcv.libffcv")
    out = np.zeros((60, 80, 3), np.uint8)
    source = np.frombuffer(data, np.uint8).copy()
    assert libffcv.imdecode(source, out.reshape(-1), 60, 80, 60, 80, 0, 0, 1, 1, False, False) == 0
    assert far(out, pixels_of(decode(data))) < 3


def test_what_is_kept_is_what_ffcv_decodes_silently(shared_data):
    libffcv = pytest.importorskip("ffcv.libffcv")
    kept = 0
    for path in sorted(shared_data("nasty_images").rglob("*")):
        if not path.is_file() or path.parent.name == "size":
            continue
        try:
            decoded = decode(path.read_bytes())
        except Rejected:
            continue
        if isinstance(decoded.image, np.ndarray):
            continue
        kept += 1
        height, width = decoded.size
        out = np.zeros((height, width, 3), np.uint8)
        source = np.frombuffer(decoded.image, np.uint8).copy()
        status = libffcv.imdecode(source, out.reshape(-1), height, width, height, width, 0, 0, 1, 1, False, False)
        assert status == 0, path
        assert far(out, pixels_of(decoded)) < 3, path
    assert kept > 40


# ------------------------------------------------------------------------------------------------------------- changed


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(orientation, kind):
    turned = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    decoded = decode(saved(turned, kind, exif=exif, **options))
    table = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1], 8: lambda a: np.rot90(a),
    }  # fmt: skip
    assert far(pixels_of(decoded), table[orientation](turned)) < 4
    assert (decoded.why == "") == (kind == "JPEG" and orientation == 1)


def test_16_bit_grey_is_a_smooth_ramp():
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (16, 1))
    for kind in ("PNG", "TIFF"):
        grey = pixels_of(decode(saved(Image.fromarray(ramp), kind)))[0, :, 0].astype(int)
        assert grey.tolist() == list(range(256))


@pytest.mark.parametrize(("bits", "high"), [(8, 255), (10, 1023), (12, 4095), (14, 16383), (16, 65535)])
def test_the_bit_depth_of_a_sensor_fills_the_range(bits, high):
    ramp = np.tile(np.linspace(0, high, 256).astype(np.uint16), (16, 1))
    grey = pixels_of(decode(saved(Image.fromarray(ramp), "TIFF")))[0, :, 0].astype(int)
    assert np.abs(grey - np.arange(256)).max() <= 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255), (-3, 3), (0, 1e6)])
def test_floating_point_fills_the_range(low, high):
    ramp = np.tile(np.linspace(low, high, 256).astype(np.float32), (16, 1))
    grey = pixels_of(decode(saved(Image.fromarray(ramp), "TIFF")))[0, :, 0].astype(int)
    assert np.abs(grey - np.arange(256)).max() <= 1
    ramp[3, 3] = np.nan
    assert pixels_of(decode(saved(Image.fromarray(ramp), "TIFF"))).std() > 50


def test_alpha_shows_the_picture_on_white():
    rgba = np.dstack([picture(), np.full((60, 80), 255, np.uint8)])
    rgba[:30, :, 3] = 0
    seen = pixels_of(decode(saved(rgba, "PNG")))
    assert (seen[:30] == 255).all()
    assert far(seen[30:], rgba[30:, :, :3]) < 1
    half = np.dstack([np.zeros((60, 80, 3), np.uint8), np.full((60, 80), 128, np.uint8)])
    half[0, 0] = (255, 0, 0, 255)
    assert pixels_of(decode(saved(half, "PNG")))[5, 5].tolist() == [127, 127, 127]


def test_alpha_that_hides_everything_is_ignored():
    rgba = np.dstack([picture(), np.zeros((60, 80), np.uint8)])
    assert far(pixels_of(decode(saved(rgba, "PNG"))), picture()) < 1
    white_on_nothing = np.full((20, 20, 4), 255, np.uint8)
    white_on_nothing[:, :10] = 0
    assert pixels_of(decode(saved(white_on_nothing, "PNG"))).std() > 50


def test_cmyk_has_the_right_colours(shared_data):
    cmyk = Image.fromarray(picture()).convert("CMYK")
    assert far(pixels_of(decode(saved(cmyk, "JPEG", quality=95))), picture()) < 6
    folder = shared_data("nasty_images")
    for name in ("jpeg/cmyk_adobe.jpg", "tiff/cmyk_jpeg.tif"):  # Adobe stores them inverted
        drawing = pixels_of(decode((folder / name).read_bytes()))
        assert (drawing[0, 0] > [200, 0, 0]).all(), "the corner is red"
        assert (drawing[0, 0] < [256, 60, 60]).all(), "the corner is red"
        assert (drawing[-1] < 40).all(), "the ground is black"


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM"])
def test_other_formats_and_palettes(kind):
    image = Image.fromarray(picture(32, 32))
    image = image.quantize(200) if kind in ("GIF", "BMP") else image
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(saved(image, kind, **options))
    assert far(pixels_of(decoded), np.asarray(image.convert("RGB"))) < 1
    assert decoded.why == f"was {kind}"


def test_an_animation_is_its_first_frame():
    frames = [Image.fromarray(picture(seed=i)) for i in range(3)]
    for kind in ("PNG", "WEBP", "GIF", "TIFF"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert far(pixels_of(decode(data)), picture(seed=0)) < 12, kind


def test_small_images_are_raw_and_large_ones_jpeg():
    assert isinstance(decode(saved(picture(128, 128), "PNG")).image, np.ndarray)
    large = decode(saved(picture(128, 129), "PNG"))
    assert isinstance(large.image, bytes)
    assert far(pixels_of(large), picture(128, 129)) < 2


def test_resize_brings_the_shorter_side_down_and_never_up():
    data = jpeg(picture(300, 400))
    assert decode(data, resize=150).size == (150, 200)
    assert decode(data, resize=300).image == data
    assert decode(saved(picture(300, 400), "PNG"), resize=500).size == (300, 400)


def test_an_enormous_image_is_shrunk_and_a_larger_one_refused(monkeypatch):
    monkeypatch.setattr(decoding, "KEPT_PIXELS", 5000)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 20_000)
    for data in (jpeg(picture(100, 150)), saved(picture(100, 150), "PNG")):
        height, width = decode(data).size
        assert height * width <= 5000 * 1.05
        assert abs(width / height - 1.5) < 0.05
    for data in (jpeg(picture(200, 150)), saved(picture(200, 150), "PNG")):
        with pytest.raises(Rejected, match=r"too large: 150x200"):
            decode(data)


# ------------------------------------------------------------------------------------------------- refused, or noticed


def test_a_jpeg_cut_anywhere_is_refused():
    data = jpeg(picture(200, 300), quality=90)
    for share in (0.1, 0.3, 0.5, 0.9, 0.99):
        with pytest.raises(Rejected, match="truncated"):
            decode(data[: int(share * len(data))])
    with pytest.raises(Rejected, match="zero bytes"):
        decode(data[: len(data) // 3].ljust(len(data), b"\0"))
    with pytest.raises(Rejected, match=r"truncated|damaged"):
        decode(data[: len(data) // 2] + b"\xff\xd9")


def test_a_png_or_tiff_cut_in_the_middle_is_refused():
    for kind in ("PNG", "TIFF", "BMP", "WEBP", "GIF"):
        data = saved(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8), kind)
        with pytest.raises(Rejected):
            decode(data[: len(data) // 2])


def test_garbage_after_a_jpeg_is_harmless():
    data = jpeg(picture()) + os.urandom(2000)
    assert decode(data).image == data


def test_a_flat_image_and_a_grey_end_are_noticed():
    assert "flat" in decode(jpeg(np.full((64, 64, 3), 255, np.uint8))).warnings[0]
    assert "flat" in decode(saved(np.zeros((64, 64, 3), np.uint8), "PNG")).warnings[0]
    greyed = picture(64, 64)
    greyed[40:] = 128
    assert "grey end" in decode(saved(greyed, "PNG")).warnings[0]
    assert decode(saved(picture(64, 64), "PNG")).warnings == ()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"x", "not an image"),
        (b"<!DOCTYPE html><html>" + b" " * 100, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>" + b" " * 40, "SVG"),
        (b"\0" * 1000, "begins with zero bytes"),
        (b"PK\3\4" + b"x" * 100, "zip"),
        (b"\xff\xd8\xff\xe0", "truncated"),
        (b"\xff\xd8\xff\xd9" * 20, "damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "unreadable: a PNG file"),
        (b"GIF89a", "damaged header"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(data, reason):
    with pytest.raises(Rejected, match=reason) as caught:
        decode(data)
    assert isinstance(caught.value, NotAnImage) == str(caught.value).startswith("not an image")


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damage_is_refused_or_survived_never_another_error(kind, flips):
    data = bytearray(saved(picture(20, 24), kind))
    for share, value in flips:
        data[int(share * len(data))] = value
    try:
        pixels_of(decode(bytes(data)))
    except Rejected as error:
        assert str(error)  # noqa: PT017 - either outcome is right


# ------------------------------------------------------------------------------------------ decoders that crash or hang


def run(tasks: list[Task], **options) -> list[Outcome]:
    with Decoders(2, **options) as decoders:
        return [o for _, outcomes in decoders.decode([tasks[:5], tasks[5:]]) for o in outcomes]


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """`hostile(what)` are bytes that a child decodes by doing `what`; the others decode as ever."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "from pipeline.data import decode, workers\n"
        "real = decode.decode\n"
        "def hostile(data, **options):\n"
        "    exec(data[4:].decode()) if data.startswith(b'\\xff\\xd8\\xff!') else None\n"
        "    return real(data, **options)\n"
        "workers.decode = hostile\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root]))
    return lambda what: b"\xff\xd8\xff!" + what.encode()


def test_a_decoder_that_dies_or_hangs_costs_its_own_file_only(hostile):
    good = jpeg(picture())
    tasks = [Task(i, good) for i in range(12)]
    tasks[2] = Task(2, hostile("os.kill(os.getpid(), signal.SIGSEGV)"))
    tasks[3] = Task(3, hostile("os._exit(7)"))
    tasks[7] = Task(7, hostile("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); time.sleep(60)"))
    tasks[11] = Task(11, hostile("os.kill(os.getpid(), signal.SIGKILL)"))
    outcomes = run(tasks, seconds=1)
    reasons = {i: outcome.reason for i, outcome in enumerate(outcomes) if outcome.image is None}
    assert len(outcomes) == 12
    assert reasons.keys() == {2, 3, 7, 11}
    assert "SIGSEGV" in reasons[2]
    assert "status 7" in reasons[3]
    assert reasons[7] == "timed out: it cannot be decoded within 1 seconds"
    assert "want of memory" in reasons[11]
    assert all(o.image is not None and o.image.image == good for i, o in enumerate(outcomes) if i not in reasons)


def test_a_decoder_that_wants_all_memory_is_refused(hostile):
    outcomes = run([Task(0, hostile("bytearray(1 << 40)")), Task(1, jpeg(picture()))])
    assert outcomes[0].reason.startswith("too large: not enough memory")
    assert outcomes[1].image is not None


def test_files_are_read_by_children_and_their_faults_named(tmp_path):
    data = jpeg(picture())
    (tmp_path / "good.jpg").write_bytes(data)
    (tmp_path / "archive").write_bytes(b"junk" + data + b"junk")
    outcomes = run(
        [
            Task(0, Extent(str(tmp_path / "good.jpg"))),
            Task(1, Extent(str(tmp_path / "archive"), 4, len(data))),
            Task(2, Extent(str(tmp_path / "absent.jpg"))),
            Task(3, Unreadable("unreadable: gone")),
            Task(4, Extent(str(tmp_path))),
        ]
    )
    assert outcomes[0].image.image == outcomes[1].image.image == data
    assert outcomes[0].digest == outcomes[1].digest != b""
    assert [o.reason for o in outcomes[2:]] == [
        "unreadable: No such file or directory", "unreadable: gone", "unreadable: Is a directory",
    ]  # fmt: skip


def test_children_end_with_the_pool_even_in_the_middle_of_a_file(hostile):
    started = time.monotonic()
    with Decoders(2, seconds=60) as decoders:
        chunks = ([Task(i, jpeg(picture()) if i < 3 else hostile("time.sleep(50)"))] for i in range(8))
        next(decoders.decode(chunks))
        children = [child.process for child in decoders._children]
    assert time.monotonic() - started < 30
    assert children
    assert all(process.poll() == -signal.SIGKILL for process in children)


def test_a_decoder_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        run([Task(0, b"x")])
