"""Which window of an image each view shows, and how that window becomes the view's pixels.

Both are pure functions. The window follows from a stateless hash of (seed, epoch, image index, view number),
so it is the same for any number of threads, any batch, any number of ranks and any resume point; the pixels
follow from the window by one antialiased bicubic resampling, shared by every loader. The published recipes
resample bicubically (DINO, MAE, SimCLR, BYOL); OpenCV's INTER_AREA, which FFCV uses, turns into blocks as
soon as a crop is smaller than its view.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from objectives.views import View

# Columns of `view_table`, one row for each view.
HEIGHT, WIDTH, SCALE_LOW, SCALE_HIGH, LOG_RATIO_LOW, LOG_RATIO_HIGH, FLIP_P, CROP_PCT, CROP_OF, COLUMNS = range(10)

# Draws of one view's stream: 0..39 belong to the ten trials of the crop, four each.
FLIP_DRAW = 40

# What a stream of draws is for, so that the order of an epoch, its crops and its colours are independent.
ORDER, CROP, PHOTOMETRIC = 1, 2, 3

U = np.uintp  # numba guards every signed index against counting from the end, which doubles the time of a tight loop


def compiled(function: Callable[..., Any]) -> Any:
    """numba without the GIL, kept on disk between processes where a cache folder can be written."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no writable folder
        return njit(**options)(function)


def _mix(x: Any) -> Any:
    """splitmix64 (Steele, Lea & Flood 2014): a bijection of 64 bits; for numba scalars and for uint64 arrays."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


mix = compiled(_mix)


def stream(purpose: int, seed: int, epoch: int) -> np.uint64:
    """The key from which every draw of one purpose in one epoch is derived."""
    key = np.array([purpose], np.uint64)
    for part in (seed, epoch):
        key = _mix(key ^ _mix(np.array([part & 0xFFFFFFFFFFFFFFFF], np.uint64)))
    return key[0]


def sample_keys(key: np.uint64, index: np.ndarray, view: int) -> np.ndarray:
    """Keys [B] of images `index` [B] for view number `view`: what the compiled code computes, vectorised."""
    return _mix(_mix(key ^ _mix(np.asarray(index).astype(np.uint64))) + np.uint64(view))


def uniforms(keys: np.ndarray, draw: int) -> np.ndarray:
    """Draw number `draw` of every stream in `keys` [B]: float64 [B] in [0, 1)."""
    return (_mix(keys + np.uint64(draw)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..images-1 in which `epoch` shows the images, int64 [images]."""
    keys = _mix(stream(ORDER, seed, epoch) ^ _mix(np.arange(images, dtype=np.uint64)))
    return np.argsort(keys, kind="stable")


@compiled
def _view_key(key, index, view):
    return mix(mix(key ^ mix(np.uint64(index))) + np.uint64(view))


@compiled
def _uniform(key, draw):
    return np.float64(mix(key + np.uint64(draw)) >> np.uint64(11)) * 2.0**-53


def view_table(views: Sequence["View"]) -> np.ndarray:
    """The views as numbers, float64 [views, COLUMNS], for compiled code; scale -1 marks a deterministic centre crop."""
    rows, names = [], [view.name for view in views]
    own = [view.name for view in views if view.crop_of is None]
    for number, view in enumerate(views):
        height, width = view.size
        low, high = (-1.0, -1.0) if view.scale is None else view.scale
        if height < 1 or width < 1:
            raise ValueError(f"view {view.name!r} has size {height}x{width}: both sides must be at least 1 pixel")
        if view.scale is not None and not 0 < low <= high <= 1:
            raise ValueError(f"view {view.name!r} has scale {view.scale}: give 0 < low <= high <= 1")
        if view.scale is None and not 0 < view.crop_pct <= 1:
            raise ValueError(f"view {view.name!r} has crop_pct {view.crop_pct}: give a share in (0, 1]")
        if not 0 < view.ratio[0] <= view.ratio[1]:
            raise ValueError(f"view {view.name!r} has ratio {view.ratio}: give 0 < low <= high, width over height")
        if view.crop_of is not None and own.count(view.crop_of) != 1:
            raise ValueError(f"view {view.name!r} is a crop of {view.crop_of!r}: name one view with a crop of its own")
        logs = math.log(view.ratio[0]), math.log(view.ratio[1])
        whose = number if view.crop_of is None else names.index(view.crop_of)
        rows.append((height, width, low, high, *logs, view.flip_p, view.crop_pct, whose))
    if not rows:
        raise ValueError("no views given: a loader needs at least one")
    return np.array(rows, np.float64)


@compiled
def random_box(key, height, width, scale_low, scale_high, log_low, log_high):
    """(top, left, height, width) of a random resized crop (Szegedy et al. 2015) as torchvision draws it.

    Ten trials of area ~ U(scale) * image and log aspect ~ U(log ratio); then the largest centred window that
    has an allowed ratio.
    """
    area = np.float64(height) * np.float64(width)
    for trial in range(10):
        target = area * (scale_low + (scale_high - scale_low) * _uniform(key, 4 * trial))
        aspect = math.exp(log_low + (log_high - log_low) * _uniform(key, 4 * trial + 1))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(_uniform(key, 4 * trial + 2) * (height - h + 1))
            left = int(_uniform(key, 4 * trial + 3) * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width < height * math.exp(log_low):
        h = min(max(round(width / math.exp(log_low)), 1), height)
    elif width > height * math.exp(log_high):
        w = min(max(round(height * math.exp(log_high)), 1), width)
    return (height - h) // 2, (width - w) // 2, h, w


@compiled
def centre_box(height, width, view_height, view_width, crop_pct):
    """(top, left, height, width): the largest centred window with the view's aspect, both sides times `crop_pct`."""
    zoom = min(height / view_height, width / view_width) * crop_pct
    h = min(max(round(view_height * zoom), 1), height)
    w = min(max(round(view_width * zoom), 1), width)
    return (height - h) // 2, (width - w) // 2, h, w


@compiled
def box(key, index, view, table, height, width):
    """(top, left, height, width, flipped) of view number `view`, a row of `table`, in image `index`."""
    whose = int(table[view, CROP_OF])
    row = table[whose]
    if row[SCALE_LOW] < 0:
        top, left, h, w = centre_box(height, width, row[HEIGHT], row[WIDTH], row[CROP_PCT])
        return top, left, h, w, False
    k = _view_key(key, index, whose)
    top, left, h, w = random_box(
        k, height, width, row[SCALE_LOW], row[SCALE_HIGH], row[LOG_RATIO_LOW], row[LOG_RATIO_HIGH]
    )
    return top, left, h, w, _uniform(k, FLIP_DRAW) < row[FLIP_P]


@compiled
def _cubic(x):
    """Keys' cubic convolution kernel (1981) with a = -1/2, as in Pillow and in torchvision's antialiased bicubic."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@compiled
def _taps(source, target):
    """First source position, number and weights of the taps of each of `target` positions over `source` pixels.

    Weights are padded with zeros to groups of four, which lets the loops below keep their sums in registers.
    """
    step = source / target
    stretch = max(step, 1.0)
    reach = 2.0 * stretch
    most = (math.ceil(reach) * 2 + 1 + 3) // 4 * 4
    first = np.empty(target, np.int64)
    count = np.empty(target, np.int64)
    weights = np.zeros((target, most), np.float32)
    for o in range(target):
        centre = (o + 0.5) * step
        a = max(int(centre - reach + 0.5), 0)
        b = min(int(centre + reach + 0.5), source)
        total = 0.0
        for k in range(a, b):
            total += _cubic((k - centre + 0.5) / stretch)
        for k in range(a, b):
            weights[o, k - a] = _cubic((k - centre + 0.5) / stretch) / total
        first[o] = a
        count[o] = b - a
    return first, count, weights


@compiled
def resample(image, top, left, h, w, flipped, out):
    """Window (top, left, h, w) of `image` [H, W, 3] uint8 to `out` [oh, ow, 3] uint8, mirrored when `flipped`.

    Antialiased bicubic, as Pillow's `crop().resize(BICUBIC)` but for the rounding that it does between its passes.
    """
    width = image.shape[1]
    out_height, out_width, _ = out.shape
    y_first, y_count, y_weights = _taps(h, out_height)
    x_first, x_count, x_weights = _taps(w, out_width)
    pixels = image.reshape(-1)
    n = 3 * w
    column = np.zeros(n + 3 * x_weights.shape[1], np.float32)
    line = np.empty(3 * out_width, np.float32)
    for y in range(out_height):
        column[:n] = np.float32(0.5)  # for rounding: the horizontal weights sum to one
        for k in range(0, y_count[y], 4):
            a, b, c, d = y_weights[y, k], y_weights[y, k + 1], y_weights[y, k + 2], y_weights[y, k + 3]
            source = y_first[y] + k  # rows behind the last carry weight 0; the last one stands in for them
            at_a = ((top + source) * width + left) * 3
            at_b = ((top + min(source + 1, h - 1)) * width + left) * 3
            at_c = ((top + min(source + 2, h - 1)) * width + left) * 3
            at_d = ((top + min(source + 3, h - 1)) * width + left) * 3
            row_a, row_b = pixels[at_a : at_a + n], pixels[at_b : at_b + n]
            row_c, row_d = pixels[at_c : at_c + n], pixels[at_d : at_d + n]
            for j in range(n):
                column[j] += (
                    a * np.float32(row_a[j]) + b * np.float32(row_b[j])
                    + c * np.float32(row_c[j]) + d * np.float32(row_d[j])
                )  # fmt: skip
        for x in range(out_width):
            red = np.float32(0.0)
            green = np.float32(0.0)
            blue = np.float32(0.0)
            i, at = U(x), U(3 * x_first[x])
            for k in range(U(0), U(x_count[x]), U(4)):
                a, b, c, d = x_weights[i, k], x_weights[i, k + U(1)], x_weights[i, k + U(2)], x_weights[i, k + U(3)]
                red += (a * column[at] + b * column[at + U(3)]) + (c * column[at + U(6)] + d * column[at + U(9)])
                at += U(1)
                green += (a * column[at] + b * column[at + U(3)]) + (c * column[at + U(6)] + d * column[at + U(9)])
                at += U(1)
                blue += (a * column[at] + b * column[at + U(3)]) + (c * column[at + U(6)] + d * column[at + U(9)])
                at += U(10)
            to = U(3 * (out_width - 1 - x if flipped else x))
            line[to] = red
            line[to + U(1)] = green
            line[to + U(2)] = blue
        flat = out[y].reshape(-1)
        for j in range(3 * out_width):
            flat[j] = np.uint8(min(max(line[j], np.float32(0)), np.float32(255)))


@compiled
def cut(image, key, index, table, row, rows, out):
    """Cut every view of one decoded image into its place in a batch.

    image [H, W, 3] uint8; key: `stream(CROP, seed, epoch)`; index: the image's number in the data set; row: its number
    among the `rows` samples of the batch; out: flat uint8, view after view, each [rows, height, width, 3].
    """
    start = 0
    for view in range(table.shape[0]):
        height, width = int(table[view, HEIGHT]), int(table[view, WIDTH])
        size = 3 * height * width
        top, left, h, w, flipped = box(key, index, view, table, image.shape[0], image.shape[1])
        at = start + row * size
        resample(image, top, left, h, w, flipped, out[at : at + size].reshape(height, width, 3))
        start += rows * size


def batch_bytes(table: np.ndarray, rows: int) -> int:
    """Bytes of the flat buffer that `cut` fills for a batch of `rows` samples."""
    return int(3 * (table[:, HEIGHT] * table[:, WIDTH]).sum()) * rows
