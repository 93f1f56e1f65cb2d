"""A data set that needs no download: photograph-like images drawn by the program, with every factor known.

Each image shows one object on a background. Shape, texture, colour, position, scale and background are drawn
independently, so that "which of them does a representation hold?" has an exact answer (after dSprites, Matthey et al.
2017, and the cue-conflict images of Geirhos et al. 2019). What photographs have is there too, as nuisance: a 1/f
spectrum (Field 1987), light from one side, a cast shadow, lens blur and sensor noise. Shapes have equal areas, so that
counting coloured pixels names none.

Image i of a part is a pure function of (seed, part, i): all randomness is a hash of these, nothing holds a state, and
the parts "train" and "val" are disjoint because they hash different words.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from pipeline.data.beton import BetonWriter
from pipeline.data.packed import Packed, read_facts, read_packed, write_facts
from pipeline.errors import UserError

Floats = NDArray[np.floating]  # float32 wherever it has pixels

FACTORS = MappingProxyType(
    {
        "shape": (
            "disc", "square", "triangle", "star", "cross", "heart", "crescent", "ring", "arrow", "flower",
        ),
        "texture": ("plain", "stripes", "checks", "dots", "zigzag", "rings", "marble", "gradient"),
        "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
        "background": ("clouds", "wood", "foliage", "horizon", "tiles", "studio"),
        "position": tuple(f"{v} {h}" for v in ("top", "middle", "bottom") for h in ("left", "centre", "right")),
        "scale": ("small", "medium", "large"),
    }
)  # fmt: skip
"""Every factor and the names of its values, each equally likely."""

PARTS = ("train", "val")
LABEL = "colour"
CHUNK = 64  # images drawn together: what stays inside a core's cache at 64 pixels

_HUES = np.array([0.0, 0.075, 0.15, 0.33, 0.5, 0.62, 0.76, 0.9])  # of FACTORS["colour"], in turns
_RADII = np.array([0.16, 0.2, 0.25])  # of a disc of the object's area, in image sides
_FIRST_FIELD = 64  # hash words below it are one image's scalars, from it on its noise fields


def generate(
    n: int, image_size: int, seed: int = 0, part: str = "train", start: int = 0
) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.int64]]]:
    """Images `start` to `start + n` of one part, and the factors they were drawn from.

    Args:
        image_size: pixels per side. The scene is the same at every size; its noise is not.
        part: "train" or "val".

    Returns:
        uint8 images [n, image_size, image_size, 3] (RGB), and for every name in `FACTORS` int64 values [n].

    Raises:
        ValueError: an unknown part, or fewer than 8 pixels per side.
    """
    if image_size < 8:
        raise ValueError(f"an embedded image has at least 8 pixels per side, not {image_size}")
    truth = factors(n, seed, part, start)
    images = np.empty((n, image_size, image_size, 3), np.uint8)
    for first in range(0, n, CHUNK):
        last = min(n, first + CHUNK)
        keys = _keys(np.arange(start + first, start + last), seed, part)
        images[first:last] = _render(keys, {f: values[first:last] for f, values in truth.items()}, image_size)
    return images, truth


def factor_of(address: str) -> str:
    """The factor by which "embedded:FACTOR" labels the generated images; colour for "embedded".

    Raises:
        UserError: there is no such factor.
    """
    factor = address.partition(":")[2] or LABEL
    if factor not in FACTORS:
        raise UserError(f"--data {address}: the generated images are labelled by one of {', '.join(FACTORS)}")
    return factor


def packed(
    cache_dir: str | Path, part: str, n: int, image_size: int = 64, seed: int = 0, factor: str = LABEL
) -> Packed:
    """The first n images of a part as a .beton of raw pixels, labelled by one factor; drawn once, then reused.

    The file's name tells everything its content depends on, this program included. Two processes may draw it at once.

    Raises:
        ValueError: an unknown factor or part.
    """
    if factor not in FACTORS:
        raise ValueError(f"the embedded set has no factor {factor!r}; it has {', '.join(FACTORS)}")
    program = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=4).hexdigest()
    path = Path(cache_dir) / f"embedded-{part}-{n}-{image_size}px-seed{seed}-{factor}-{program}" / "images.beton"
    if path.is_file() and read_facts(path):
        return read_packed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(digest_size=16)
    with BetonWriter(path, n_max=n) as writer:
        for first in range(0, n, CHUNK):
            images, truth = generate(min(CHUNK, n - first), image_size, seed, part, first)
            for image, label in zip(images, truth[factor].tolist()):
                writer.write(image, label)
            digest.update(images.tobytes() + truth[factor].tobytes())
    result = Packed(path.resolve(), n, FACTORS[factor], digest.hexdigest())
    write_facts(
        result,
        (f"{part}/{i:06d}" for i in range(n)),
        source="embedded",
        embedded={"part": part, "n": n, "image_size": image_size, "seed": seed, "factor": factor},
    )
    return result


def factors(n: int, seed: int = 0, part: str = "train", start: int = 0) -> dict[str, NDArray[np.int64]]:
    """The factors of images `start` to `start + n` of one part, without drawing them: int64 values [n] by name."""
    keys = _keys(np.arange(start, start + n), seed, part)
    return {
        name: (_uniform(keys, word) * len(values)).astype(np.int64)
        for word, (name, values) in enumerate(FACTORS.items())
    }


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection that scatters nearby integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(index: NDArray[np.int64], seed: int, part: str) -> NDArray[np.uint64]:
    """One 64-bit key per image [n]."""
    if part not in PARTS:
        raise ValueError(f"the embedded set has the parts {' and '.join(PARTS)}, not {part!r}")
    word = hashlib.blake2b(f"embedded {seed} {part}".encode(), digest_size=8).digest()
    return _mix(np.frombuffer(word, "<u8") + index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _hash(keys: NDArray[np.uint64], words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Independent 64-bit values [n, *words.shape]."""
    return _mix(keys.reshape(-1, *[1] * words.ndim) ^ _mix(words * np.uint64(0xD6E8FEB86659FD93) + np.uint64(1)))


def _uniform(keys: NDArray[np.uint64], word: int) -> Floats:
    """One number in [0, 1) per image [n]."""
    return (_hash(keys, np.array([word], np.uint64))[:, 0] >> np.uint64(11)) * 2.0**-53


def _normal(keys: NDArray[np.uint64], word: int, shape: tuple[int, ...]) -> Floats:
    """Noise [n, *shape] of zero mean and unit variance: each value a sum of four bytes, nearly normal."""
    count = int(np.prod(shape))
    words = np.arange(_FIRST_FIELD + (word << 32), _FIRST_FIELD + (word << 32) + (count + 1) // 2, dtype=np.uint64)
    four = _hash(keys, words).view(np.uint16).reshape(len(keys), -1, 2)[:, :count]
    low, high = four[..., 0], four[..., 1]
    total = (low & 255) + (low >> 8) + (high & 255) + (high >> 8)
    return ((total.astype(np.float32) - 510.0) / 147.8).reshape(len(keys), *shape)


@lru_cache
def _frequencies(side: int) -> tuple[Floats, Floats]:
    """Cycles per image of a real 2-D Fourier transform: vertical [side, 1] and horizontal [1, side / 2 + 1]."""
    vertical, horizontal = fft.fftfreq(side, 1 / side), fft.rfftfreq(side, 1 / side)
    return vertical[:, None].astype(np.float32), horizontal[None].astype(np.float32)


def _fields(noise: Floats, falloff: Floats, stretch: Floats, angle: Floats) -> Floats:
    """Noise [n, s, s] given a spectrum 1 / frequency^falloff, `stretch` times longer along `angle`; unit variance."""
    vertical, horizontal = _frequencies(noise.shape[-1])
    c, s = _wide(np.cos(angle)), _wide(np.sin(angle))
    along, across = horizontal * c + vertical * s, vertical * c - horizontal * s
    square = (along * _wide(stretch)) ** 2 + across**2
    square[:, 0, 0] = 1.0
    spectrum = fft.rfft2(noise) * np.exp(-0.5 * _wide(falloff) * np.log(square))
    spectrum[:, 0, 0] = 0.0
    field = fft.irfft2(spectrum, s=noise.shape[-2:])
    return field / (field.std(axis=(1, 2), keepdims=True) + 1e-6)


def _colour(hue: Floats, saturation: Floats, value: Floats) -> Floats:
    """HSV in [0, 1] to RGB [n, 1, 1, 3]."""
    ramp = np.abs((hue[:, None] + np.array([0.0, 2 / 3, 1 / 3])) % 1.0 * 6.0 - 3.0)
    rgb = value[:, None] * (1.0 - saturation[:, None] * (1.0 - np.clip(ramp - 1.0, 0.0, 1.0)))
    return rgb.astype(np.float32)[:, None, None, :]


def _box(x: Floats, y: Floats, w: float, h: float) -> Floats:
    return np.maximum(np.abs(x) - w, np.abs(y) - h)


def _triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x) * 0.866 - y * 0.5, y) - 0.5


def _star(x: Floats, y: Floats) -> Floats:
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    # The edge from a tip (radius 1, angle 0) to the notch (radius .42, half a sector away).
    tip, notch = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]]) / np.hypot(*(notch - tip))
    return (radius * np.cos(angle) - 1.0) * np.float32(normal[0]) + radius * np.sin(angle) * np.float32(normal[1])


def _heart(x: Floats, y: Floats) -> Floats:
    x, y = np.abs(x), 0.45 - y
    lobe = np.hypot(x - 0.46, y - 0.4) - 0.55
    flanks = np.maximum((x - y) * 0.7071 - 0.508, y - 0.4 + 0.0 * x)
    return np.minimum(lobe, flanks)


def _arrow(x: Floats, y: Floats) -> Floats:
    head = np.maximum((np.abs(x) - (y + 1.0) * 0.9) * 0.74, y + 0.05)
    return np.minimum(head, _box(x, y - 0.45, 0.3, 0.55))


_SHAPES: Mapping[str, Callable[[Floats, Floats], Floats]] = {
    "disc": lambda x, y: np.hypot(x, y) - 1.0,
    "square": lambda x, y: _box(x, y, 1.0, 1.0),
    "triangle": _triangle,
    "star": _star,
    "cross": lambda x, y: np.minimum(_box(x, y, 1.0, 0.34), _box(x, y, 0.34, 1.0)),
    "heart": _heart,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1.0, 0.82 - np.hypot(x - 0.48, y)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.76) - 0.24,
    "arrow": _arrow,
    "flower": lambda x, y: np.hypot(x, y) - 0.8 - 0.24 * np.cos(6 * np.arctan2(y, x)),
}
"""About how far a point [n, s, s] lies outside the outline, negative inside; y points down."""


def _of_equal_area(outline: Callable[[Floats, Floats], Floats]) -> Callable[[Floats, Floats], Floats]:
    """The outline, scaled to the area of the unit disc."""
    step = np.float32(0.01)
    y, x = np.mgrid[-1.6:1.6:step, -1.6:1.6:step].astype(np.float32)
    size = np.float32(np.sqrt((outline(x, y) < 0).sum() * step**2 / np.pi))
    return lambda x, y: outline(x * size, y * size) / size


_OUTLINES = {name: _of_equal_area(outline) for name, outline in _SHAPES.items()}


def _print(wave: Floats) -> Floats:
    """A wave in [-1, 1] with the flat tops and steep flanks of printed cloth."""
    return np.tanh(2.5 * wave) / np.float32(0.9)


_TEXTURES: Mapping[str, Callable[[Floats, Floats, Floats, Floats, Floats], Floats]] = {
    # u, v: phase in radians along and across the pattern [n, s, s]; x, y: object coordinates; field: noise.
    "plain": lambda u, v, x, y, field: np.zeros_like(u),
    "stripes": lambda u, v, x, y, field: _print(np.sin(u)),
    "checks": lambda u, v, x, y, field: _print(1.6 * np.sin(u * 0.75) * np.sin(v * 0.75)),
    "dots": lambda u, v, x, y, field: 1.1 * _print(np.cos(u * 0.9) + np.cos(v * 0.9) - 0.75) + 0.3,
    "zigzag": lambda u, v, x, y, field: _print(np.sin(u + 1.7 * np.arcsin(np.sin(v * 0.6)))),
    "rings": lambda u, v, x, y, field: _print(np.sin(np.hypot(x, y) * 6.5 + v[:, :1, :1])),
    "marble": lambda u, v, x, y, field: np.clip(field, -1.6, 1.6),
    "gradient": lambda u, v, x, y, field: np.clip(
        1.5 * (x * np.sin(u[:, :1, :1]) + y * np.cos(u[:, :1, :1])), -1.8, 1.8
    ),
}


class _Draws:
    """The scalars of some images: each call takes the next word of every image's hash."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self.keys, self.word = keys, len(FACTORS)

    def __call__(self, low: float, high: float) -> Floats:
        """One number in [low, high) per image [n]."""
        self.word += 1
        return low + (high - low) * _uniform(self.keys, self.word)


def _render(keys: NDArray[np.uint64], value: dict[str, NDArray[np.int64]], side: int) -> NDArray[np.uint8]:
    """The images [n, side, side, 3] of some keys, given their factors."""
    draw = _Draws(keys)
    y, x = (np.mgrid[:side, :side].astype(np.float32)[:, None] + 0.5) / side
    light = draw(0, 2 * np.pi)  # the side the light comes from
    light_x, light_y = _wide(np.cos(light)), _wide(np.sin(light))

    background = _background(draw, value["background"], x, y)
    u, v, radius = _object_coordinates(draw, value["position"], value["scale"], x, y)
    outside = _by_value(value["shape"], _OUTLINES, u, v) * radius  # in image sides
    shadow = _by_value(value["shape"], _OUTLINES, u + 0.3 * light_x, v + 0.3 * light_y) * radius
    cover = _soft(outside, 0.5 / side)[..., None]
    dark = _wide(draw(0.35, 0.6)) * _soft(shadow, _wide(draw(0.02, 0.06)))
    surface = _surface(draw, value["texture"], value["colour"], u, v, radius)
    # A rounded body: brighter towards the light, darker at its rim.
    shade = 1.0 + 0.22 * (u * light_x + v * light_y) - 0.35 * np.exp(np.minimum(outside, 0.0) / (0.15 * radius))
    image = background * (1.0 - dark)[..., None] * (1.0 - cover) + surface * shade[..., None] * cover

    slope, exposure = _wide(draw(0.0, 0.5)), _wide(draw(0.8, 1.15))
    image *= (exposure * (1.0 + slope * ((x - 0.5) * light_x + (y - 0.5) * light_y)))[..., None]
    image = _blur(image, draw(0.0, 0.2))
    grain = _normal(keys, 3, (side, side, 3)) * _wide(draw(0.008, 0.035))[..., None]
    image += grain * (0.5 + np.sqrt(np.maximum(image, 0.0)))  # read noise and shot noise
    return (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _wide(scalars: Floats) -> Floats:
    """One number per image, to be broadcast over its pixels: [n] to [n, 1, 1]."""
    return scalars.astype(np.float32)[:, None, None]


def _soft(outside: Floats, width: Floats | float) -> Floats:
    """Coverage in [0, 1] of pixels that lie `outside` an edge `width` wide."""
    return 0.5 - 0.5 * np.tanh(outside / width)


def _by_value(values: NDArray[np.int64], table: Mapping[str, Callable[..., Floats]], *arguments: Floats) -> Floats:
    """Evaluate the table's function that each image's value selects, on that image's share of the arguments."""
    result = np.empty_like(arguments[0])
    for number, function in enumerate(table.values()):
        chosen = np.flatnonzero(values == number)
        if len(chosen):
            result[chosen] = function(*(argument[chosen] for argument in arguments))
    return result


def _object_coordinates(
    draw: _Draws, position: NDArray[np.int64], scale: NDArray[np.int64], x: Floats, y: Floats
) -> tuple[Floats, Floats, Floats]:
    """Coordinates [n, s, s] in which the object is upright, undeformed and of unit size; and that size [n, 1, 1]."""
    centre_x = 0.5 + 0.17 * (position % 3 - 1) + draw(-0.06, 0.06)
    centre_y = 0.5 + 0.17 * (position // 3 - 1) + draw(-0.06, 0.06)
    radius = _wide(_RADII[scale] * draw(0.93, 1.07))
    turn, stretch, shear = draw(-0.45, 0.45), draw(-0.14, 0.14), draw(-0.12, 0.12)
    u, v = (x - _wide(centre_x)) / radius, (y - _wide(centre_y)) / radius
    c, s = _wide(np.cos(turn)), _wide(np.sin(turn))
    u, v = (c * u + s * v) * _wide(np.exp(stretch)), (c * v - s * u) * _wide(np.exp(-stretch))
    u = u + _wide(shear) * v
    bend, phase = _wide(draw(0.0, 0.1)), _wide(draw(0, 2 * np.pi))
    return u + bend * np.sin(2.2 * v + phase), v + bend * np.sin(2.2 * u - phase), radius


def _surface(
    draw: _Draws, texture: NDArray[np.int64], colour: NDArray[np.int64], u: Floats, v: Floats, radius: Floats
) -> Floats:
    """The object's printed surface [n, s, s, 3]: its hue, lighter and darker in turns along the pattern."""
    angle, waves = draw(0, np.pi), draw(7.0, 11.0)  # waves per image side, whatever the object's size
    c, s = _wide(np.cos(angle)), _wide(np.sin(angle))
    pace = _wide(2 * np.pi * waves) * radius
    along = pace * (c * u + s * v) + _wide(draw(0, 2 * np.pi))
    across = pace * (c * v - s * u) + _wide(draw(0, 2 * np.pi))
    noise = _fields(_normal(draw.keys, 2, u.shape[1:]), draw(1.6, 2.0), np.ones(len(u), np.float32), draw(0, np.pi))
    pattern = _by_value(texture, _TEXTURES, along, across, u, v, noise)[..., None]
    hue = _HUES[colour] + draw(-0.02, 0.02)
    saturation, bright, contrast = draw(0.6, 0.95), draw(0.6, 0.95), _wide(draw(0.25, 0.42))[..., None]
    return _colour(hue, saturation, bright) * (1.0 - contrast + contrast * pattern) + 0.06 * contrast * pattern


_BACKGROUNDS: Mapping[str, Callable[[Floats, Floats, Floats, Floats, Floats], Floats]] = {
    # x, y: image coordinates in [0, 1] [n, s, s]; a, b: two numbers of each image in [0, 1) [n, 1, 1]; field: noise.
    "clouds": lambda x, y, a, b, field: 0.5 + 0.27 * field,
    "wood": lambda x, y, a, b, field: 0.5 + 0.27 * field,
    "foliage": lambda x, y, a, b, field: 0.5 + 0.45 * np.tanh(2.5 * field) + 0.05 * field,
    "horizon": lambda x, y, a, b, field: (
        (0.8 - 0.5 * np.abs(y - 0.3 - 0.4 * a) + 0.12 * field) * _soft(0.3 + 0.4 * a + 0.1 * (b - 0.5) * x - y, 0.015)
    ),
    "tiles": lambda x, y, a, b, field: _tiles(x * (3 + 2 * a) + a, y * (3 + 2 * a) + b) + 0.1 * field,
    "studio": lambda x, y, a, b, field: 0.3 + a * x + b * y - 1.2 * ((x - 0.5) ** 2 + (y - 0.5) ** 2) + 0.03 * field,
}
_FALLOFF = np.array([1.8, 1.4, 1.5, 1.1, 1.0, 1.0])  # of the amplitude spectrum of each background's noise


def _tiles(x: Floats, y: Floats) -> Floats:
    """Bricks of size 1 x 0.5 in bond, light joints between them."""
    row = np.floor(2.0 * y)
    from_joint = np.minimum(0.5 - np.abs((x + 0.5 * (row % 2)) % 1.0 - 0.5), 0.25 - np.abs(y - 0.5 * row - 0.25))
    return _soft(from_joint - 0.05, 0.03) * 0.7 + 0.3 * np.sin(7.1 * np.floor(x + 0.5 * (row % 2)) + 3.3 * row) ** 2


def _background(draw: _Draws, kind: NDArray[np.int64], x: Floats, y: Floats) -> Floats:
    """What stands behind the object [n, s, s, 3]: two muted colours mixed by a pattern, all of it a little rough."""
    n, side = len(kind), y.shape[-1]
    stretch = np.where(kind == list(_BACKGROUNDS).index("wood"), 7.0, 1.0)
    field = _fields(_normal(draw.keys, 0, (side, side)), _FALLOFF[kind], stretch, draw(0, np.pi))
    x, y = (np.broadcast_to(one, (n, side, side)) for one in (x, y))
    pattern = _by_value(kind, _BACKGROUNDS, x, y, _wide(draw(0, 1)), _wide(draw(0, 1)), field)[..., None]
    hue = draw(0, 1)
    first = _colour(hue, draw(0.05, 0.7), draw(0.2, 0.5))
    second = _colour(hue + draw(-0.3, 0.3), draw(0.05, 0.7), draw(0.5, 0.9))
    rough = np.roll(field, side // 3, axis=(1, 2))[..., None]  # the same spectrum, elsewhere
    return (first + (second - first) * pattern) * (1.0 + 0.06 * rough)


def _blur(image: Floats, share: Floats) -> Floats:
    """A lens that spills a `share` [n] of each pixel's light into either neighbour, along rows and columns."""
    side = _wide(share)[..., None]
    for axis in (1, 2):
        moved = np.moveaxis(image, axis, 1)
        spilled = side * moved
        kept = moved - 2.0 * spilled
        kept[:, 1:] += spilled[:, :-1]
        kept[:, :-1] += spilled[:, 1:]
        kept[:, 0] += spilled[:, 0]  # the border reflects
        kept[:, -1] += spilled[:, -1]
        image = np.moveaxis(kept, 1, axis)
    return image
