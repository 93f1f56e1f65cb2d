"""What the benches have in common: what is asked for, what a contender is, how its images are counted."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tyro.conf import Positional

if TYPE_CHECKING:
    from objectives.views import View


@dataclass(frozen=True)
class Arguments:
    """Measure a part of the pipeline on this machine: images of the source per second, or seconds."""

    bench: Positional[str]
    """loader: JPEG files to views. photometric: views to what the network reads, on this machine's CPU. step: a step of
    training beside LightlySSL's. engine: whole runs, with Ray and without. watcher: a run, with its checkpoints
    evaluated beside it and without. start: a command until it has answered, with help or with what is wrong."""
    data: str | None = None
    """Images to measure with: anything `pipeline.pack` takes; left open: photographs drawn for the purpose."""
    batch_size: int = 32
    """Images of a batch."""
    threads: int | None = None
    """Threads or processes of each contender; left open: one to a core."""
    seconds: float = 5.0
    """How long a round measures."""
    rounds: int = 3
    """Rounds of each contender; the best counts, of a watcher their mean."""
    write: str | None = None
    """A file whose block `<!-- bench:NAME -->` … `<!-- /bench:NAME -->` takes the table."""
    only: str | None = None
    """Measure this one contender in this process and print its figure."""
    debug: bool = False
    """Show the traceback of an error."""


class Measured(Protocol):
    """What has a figure: a `Contender`, a whole run, a command."""

    @property
    def title(self) -> str:
        """What the table calls it."""

    def figure(self, path: Path, arguments: Arguments) -> float:
        """In the bench's unit."""


class Contender(NamedTuple):
    """One way to do the job. `batches` yields the number of images that it has just finished, for ever."""

    title: str
    batches: Callable[[Path, Arguments], Iterator[int]]

    def figure(self, path: Path, arguments: Arguments) -> float:
        """Images per second."""
        return rate(self.batches(path, arguments), arguments.seconds)


class Bench(NamedTuple):
    """Contenders for one job, the first of which is the yardstick of the ratios.

    limit: seconds that a whole run may take; None where a round takes `--seconds`.
    by_turns: figures of all contenders by turns in one run, for differences smaller than a machine's own from one run
        to the next; ratios are then those within a turn.
    unit: of the figures: "images/s", or "s", of which less is better.
    """

    job: str
    contenders: Mapping[str, Measured]
    limit: float | None = None
    by_turns: Callable[[Arguments], dict[str, list[float]]] | None = None
    unit: str = "images/s"

    def best(self, figures: Sequence[float]) -> float:
        """The round that the machine disturbed least."""
        return min(figures) if self.unit == "s" else max(figures)

    def words(self, figure: float) -> str:
        """ "1,234" images/s, "0.25" s."""
        return f"{figure:.2f}" if self.unit == "s" else f"{figure:,.0f}"


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images per second over at least `seconds`, after one batch that does not count."""
    next(batches)
    images, started = 0, time.perf_counter()
    for done in batches:
        images += done
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return images / elapsed
    raise RuntimeError("the contender ended before its time")


def threads(arguments: Arguments) -> int:
    """As asked for, or one to a core."""
    from pipeline.data.workers import cores

    return arguments.threads or cores()


JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gray_p": 0.2}


def views(photometric: bool = False) -> list["View"]:
    """DINO's multi-crop: two views of 224 pixels and eight of 96, with BYOL's colours where asked for."""
    from objectives.views import Photometric, View

    def colours(**more: float) -> Any:
        return Photometric(**{**JITTER, **more}) if photometric else None  # type: ignore[arg-type]

    return [
        View("global", (224, 224), (0.25, 1.0), photometric=colours(blur_p=1.0)),
        View("global", (224, 224), (0.25, 1.0), photometric=colours(blur_p=0.1, solarize_p=0.2)),
        *[View("local", (96, 96), (0.05, 0.25), photometric=colours(blur_p=0.5))] * 8,
    ]
