"""What an objective asks of the data, and how it says that it is well: plain data, imported without torch."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Photometric:
    """Photometric changes of one view, drawn for each sample on its own.

    Jitter strengths are torchvision's: brightness, contrast and saturation factors are drawn from
    `[max(0, 1 - x), 1 + x]`, the hue shift from `[-hue, hue]` in turns of the colour circle.
    All four are applied together with probability `jitter_p`, in random order.

    `blur_sigma` is the range of the Gaussian's standard deviation in pixels. Solarising inverts every pixel at
    or above half of the range (128 of 255).
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_p: float = 0.8
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0


@dataclass(frozen=True)
class View:
    """One view of each image of the batch.

    `size` is (height, width) in pixels. `scale` is the range of the crop's share of the image's area and `ratio`
    that of its width over its height, as in a random resized crop. Without a scale the crop is the centre one:
    the shorter side is resized to `size / crop_pct`, and nothing is random but what `flip_p` and
    `photometric` ask for.

    `crop_of` names another view of the same objective, one with a crop of its own, whose crop it is,
    mirroring included, in its own size and with its own photometric changes; what it says of the crop
    itself is then not looked at.
    """

    name: str
    size: tuple[int, int]
    scale: tuple[float, float] | None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    crop_pct: float = 0.875
    photometric: Photometric | None = None
    crop_of: str | None = None


class VitalSign(NamedTuple):
    """A scalar of the objective that is healthy while `low <= scalars[name] <= high`.

    The ranges hold for a run whose learning-rate warm-up is over: a network that has seen nothing yet may lie
    outside. `meaning` is half a sentence for the person who reads the warning: what a value outside tells.
    """

    name: str
    low: float
    high: float
    meaning: str
