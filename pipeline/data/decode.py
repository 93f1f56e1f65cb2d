"""One image file, in any format and state, becomes pixels that can be trained on, or is rejected with a reason.

What is stored: the bytes of a JPEG as they are wherever every JPEG decoder reads them right and silently; else
RGB pixels, raw where small, as a JPEG of quality 95 without chroma subsampling where large.

What is decided here, and why:
- Orientation (EXIF, else XMP) is applied, since no decoder of a training loop does.
- Alpha: the picture on a white page, as a viewer shows it; where nothing would be seen, the colours as stored.
- More than 8 bits of grey are scaled by the smallest usual bit depth that holds the brightest pixel (8, 10, 12,
  14, 16), never clipped. Floating point: 0..1, 0..255, or else from darkest to brightest.
- An animation or a multi-page file is its first frame.
- ICC profiles are ignored, as every training loop does.
- A JPEG whose decoder complains is rejected if pixels are missing, and re-encoded if it only has stray bytes.
"""

import io
import os
import re
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from pipeline.data.magic import HEAD, Rejected, check_is_image

Pixels = NDArray[np.uint8]  # [h, w, 3], RGB

MAX_PIXELS = 1 << 27  # 134 megapixels: more is rejected as too large
KEPT_PIXELS = 1 << 24  # 16.8 megapixels: more is shrunk, since a loader holds several batches of the largest image
RAW_PIXELS = 128 * 128  # up to here re-encoding costs more than it saves
MAX_SIDE = (1 << 16) - 1  # a .beton has 16 bits for a side
QUALITY = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)


@dataclass(frozen=True)
class DecodedImage:
    """What is stored of one image.

    image     the bytes of a JPEG, or pixels uint8 [h, w, 3]
    size      (h, w) of the image
    why       why the original bytes are not kept; empty where they are
    warnings  what looks wrong but may be meant
    """

    image: bytes | Pixels
    size: tuple[int, int]
    why: str = ""
    warnings: tuple[str, ...] = ()


def decode(data: bytes, *, resize: int | None = None) -> DecodedImage:
    """Decode one file completely and say what to store of it.

    `resize`: the shorter side is brought down to this many pixels where it is longer.
    Raises `Rejected`. May crash or hang on hostile files, as every decoder may, and diverts the process's standard
    error while it runs: `pipeline.data.workers` runs it where neither matters.
    """
    found = check_is_image(data[:HEAD])
    try:
        if found == "JPEG":
            decoded = _decode_jpeg(data, resize)
        else:
            decoded = _store(_decode_other(data, found), resize, f"was {found}")
    except MemoryError as error:
        raise Rejected("too large: not enough memory to decode it") from error
    return decoded


# ----------------------------------------------------------------------------------------------------- what is stored


def _store(pixels: Pixels, resize: int | None, why: str, notes: tuple[str, ...] = ()) -> DecodedImage:
    notes += _looks_wrong(pixels)
    height, width = pixels.shape[:2]
    shrink = min(1.0, resize / min(height, width)) if resize else 1.0
    shrink = min(shrink, (KEPT_PIXELS / (height * width)) ** 0.5)
    if shrink < 1:
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        pixels = cast(Pixels, cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
        height, width = pixels.shape[:2]
    if height * width <= RAW_PIXELS:
        return DecodedImage(np.ascontiguousarray(pixels), (height, width), why, notes)
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), QUALITY)
    if not done:
        raise Rejected("too large: it cannot be encoded as a JPEG")
    return DecodedImage(encoded.tobytes(), (height, width), why, notes)


def _looks_wrong(pixels: Pixels) -> tuple[str, ...]:
    height = len(pixels)
    last = pixels[-1, -1]
    tail = height - height // 4
    if not (pixels[-1] == last).all() or not (pixels[tail:] == last).all():
        return ()
    if (pixels == last).all():
        return ("flat: every pixel has the same colour",)
    if height >= 16 and np.abs(last.astype(int) - 128).max() <= 2:
        return ("grey end: the last quarter is one flat grey, as a truncated file leaves it",)
    return ()


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise Rejected(f"damaged: it claims {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise Rejected(
            f"too large: {width}x{height} is {width * height / 1e6:.0f} megapixels, over {MAX_PIXELS / 1e6:.0f}"
        )
    if max(width, height) > MAX_SIDE:
        raise Rejected(f"too large: {width}x{height}, and a side may have {MAX_SIDE} pixels")


# --------------------------------------------------------------------------------------------------------------- JPEG


@dataclass(frozen=True, slots=True)
class _JpegHeader:
    width: int
    height: int
    components: int
    precision: int  # bits per sample
    process: int  # low byte of the SOF marker: C0 baseline, C1 extended, C2 progressive …
    orientation: int
    scan: int  # address of the first scan


def _read_jpeg_header(data: bytes) -> _JpegHeader:
    """Walk the markers up to the first scan (ITU-T T.81, annex B)."""
    frame: tuple[int, int, int, int, int] | None = None
    exif = xmp = 0
    at = 2
    while True:
        at = data.find(b"\xff", at)  # stray bytes between segments are legal for decoders
        while 0 <= at < len(data) - 1 and data[at + 1] == 0xFF:
            at += 1
        if not 0 <= at < len(data) - 4:
            raise Rejected("truncated: the header of this JPEG is not complete")
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            at += 2
            continue
        if marker == 0xD9:
            raise Rejected("damaged: this JPEG ends before its first scan")
        length = int.from_bytes(data[at + 2 : at + 4])
        body = at + 4
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if body + 6 > len(data):
                raise Rejected("truncated: the header of this JPEG is not complete")
            frame = (marker, *struct.unpack_from(">BHHB", data, body))
        elif marker == 0xE1 and not exif and data.startswith(b"Exif\0", body):
            exif = _exif_orientation(data[body + 6 : at + 2 + length])
        elif marker == 0xE1 and not xmp and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", body):
            named = re.search(rb"tiff:Orientation(?:=[\"']|>)([1-8])", data[body : at + 2 + length])
            xmp = int(named[1]) if named else 0
        elif marker == 0xDA:
            if frame is None:
                raise Rejected("damaged: this JPEG has a scan but no frame header")
            process, precision, height, width, components = frame
            return _JpegHeader(width, height, components, precision, process, exif or xmp or 1, body)
        at += 2 + max(length, 2)


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block, 0 where it is absent or the block is broken."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 0
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * min(entries, 512), 12):
            tag, kind_, _count = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + ("I" if kind_ == 4 else "H"), tiff, entry + 8)
                return value if 1 <= value <= 8 else 0
    except struct.error:
        pass
    return 0


def _decode_jpeg(data: bytes, resize: int | None) -> DecodedImage:
    header = _read_jpeg_header(data)
    _check_size(header.width, header.height)
    if header.precision != 8 or header.process not in (0xC0, 0xC1, 0xC2) or header.components not in (1, 3):
        what = f"JPEG of {header.components} x {header.precision} bits, process {header.process:X}"
        try:
            pixels = _orient(_decode_other(data, "JPEG", oriented=False), header.orientation)
        except Rejected as error:
            raise Rejected(f"unreadable: {what}, which no decoder here reads") from error
        return _store(pixels, resize, f"was a {what}")

    if data.rfind(b"\xff\xd9", header.scan) < 0:
        zeros = len(data) - len(data.rstrip(b"\0"))
        what = f"the last {zeros / len(data):.0%} of the file are zero bytes" if zeros > 512 else "no end marker"
        raise Rejected(f"truncated: {what}")
    with _diverted_errors() as complaints:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_COLOR_RGB)
    if decoded is None:
        raise Rejected("damaged: this JPEG has no complete picture")
    pixels = cast(Pixels, decoded)
    height, width = pixels.shape[:2]
    if (height, width) != (header.height, header.width):
        raise Rejected(f"damaged: its header says {header.width}x{header.height}, it is {width}x{height}")
    why, notes = "", cast(tuple[str, ...], ())
    if complaints:
        said = complaints.decode("utf-8", "replace").splitlines()[0].removeprefix("Corrupt JPEG data: ")
        _check_harmless(said)
        why, notes = "had stray bytes", (f"stray bytes: {said}",)
    if header.orientation != 1:
        why, pixels = "was rotated by EXIF", _orient(pixels, header.orientation)
    if height * width > KEPT_PIXELS or (resize and min(height, width) > resize):
        why = "was resized"
    if why:
        return _store(pixels, resize, why, notes)
    return DecodedImage(data, (height, width), "", _looks_wrong(pixels))


def _check_harmless(said: str) -> None:
    """Raise `Rejected` where a decoder's complaint means missing pixels.

    Stray bytes between header segments, or before a restart marker, cost nothing; image data left over at the end
    mean that the decoder lost its place.
    """
    stray = re.search(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})", said)
    if stray is None or (stray[2] == "d9" and int(stray[1]) > 16):
        raise Rejected(f"damaged: {said}")


@contextmanager
def _diverted_errors() -> Iterator[bytearray]:
    """What libraries print to standard error within the block, as bytes, once the block has ended."""
    said = bytearray()
    ours = os.dup(2)
    os.dup2(_SINK, 2)
    try:
        yield said
    finally:
        os.dup2(ours, 2)
        os.close(ours)
        length = os.lseek(_SINK, 0, os.SEEK_CUR)
        if length:
            said += os.pread(_SINK, min(length, 4096), 0)
            os.ftruncate(_SINK, 0)
            os.lseek(_SINK, 0, os.SEEK_SET)


_SINK_FILE = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
_SINK = _SINK_FILE.fileno()


def _orient(pixels: Pixels, orientation: int) -> Pixels:
    """Undo a camera's rotation (EXIF 2.32, tag Orientation)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# ------------------------------------------------------------------------------------------------- every other format


def _decode_other(data: bytes, found: str, oriented: bool = True) -> Pixels:
    """Decode with Pillow; only the plug-in of the announced format is tried."""
    formats = ["BMP", "DIB"] if found == "BMP" else [found]
    if found == "HEIF":
        _register_heif()
    with warnings.catch_warnings(), _diverted_errors():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except Image.DecompressionBombError as error:  # Pillow's own limit is higher than ours
            raise Rejected(f"too large: over {MAX_PIXELS / 1e6:.0f} megapixels") from error
        except Image.UnidentifiedImageError as error:
            raise Rejected(f"unreadable: a {found} file with a damaged header") from error
        except Exception as error:
            raise Rejected(f"unreadable: a {found} file, {_short(error)}") from error
        _check_size(*image.size)
        try:
            image.load()
            return _to_rgb(_transposed(image) if oriented else image)
        except MemoryError:
            raise
        except Exception as error:
            cut = "truncated" in str(error) or isinstance(error, EOFError)
            raise Rejected(f"{'truncated' if cut else 'unreadable'}: a {found} file, {_short(error)}") from error


def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise Rejected("unreadable: HEIF images need `pip install pillow-heif`, or conversion") from None
    register_heif_opener()


def _transposed(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata of readable pixels
        return image


def _short(error: Exception) -> str:
    return str(error).strip()[:120] or type(error).__name__


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _to_8_bits(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None  # only inPlace returns None
        return np.asarray(converted)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _on_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def _on_white(rgba: Pixels) -> Pixels:
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    if (alpha == 255).all():
        return np.ascontiguousarray(colour)
    shown = (colour * (alpha / np.float32(255)) + (255 - alpha) + 0.5).astype(np.uint8)
    nothing_seen = (shown == shown[0, 0]).all()
    return np.ascontiguousarray(colour) if nothing_seen else shown


def _to_8_bits(values: NDArray) -> Pixels:
    """Grey values of any type and range [h, w] as 0..255."""
    floating = np.issubdtype(values.dtype, np.floating)
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if floating and low >= 0 and high <= 1:
        low, scale = 0.0, 255.0
    elif low >= 0 and high <= (255 if floating else 65535):
        bits = next(b for b in (8, 10, 12, 14, 16) if high < 2**b)
        low, scale = 0.0, 255 / (2**bits - 1)
    else:
        scale = 255 / ((high - low) or 1.0)
    return ((values - low) * scale + 0.5).astype(np.uint8)
