"""What a run shows while it trains: one live line on a terminal, an occasional plain line in a log."""

import math
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any


@dataclass
class Status:
    """Where a run stands.

    Args:
        seen, planned: images.
        epochs: of the whole run.
        images_per_second: over the last seconds.
        data_wait: share of the time spent waiting for data, over the same seconds.
        loss: mean over the same seconds.
        signs: vital signs by name.
        alarms: names of the signs outside their healthy range.
        knn: last online k-NN accuracy, and the images seen when it was measured.
    """

    seen: int = 0
    planned: int = 1
    epochs: int = 1
    images_per_second: float = math.nan
    data_wait: float = math.nan
    loss: float = math.nan
    signs: dict[str, float] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    knn: tuple[float, int] | None = None
    messages: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The status in one line, the foremost first: a narrow terminal shows its beginning."""
        parts = [f"epoch {self.epochs * self.seen / self.planned:.1f}/{self.epochs}"]
        if self.images_per_second > 0:
            left = (self.planned - self.seen) / self.images_per_second
            parts += [
                f"{self.images_per_second:.0f} images/s",
                f"{timedelta(seconds=round(left))} left",
                f"loss {self.loss:.4f}",
                *([f"k-NN {self.knn[0]:.1%}"] if self.knn else []),
                f"waiting for data {self.data_wait:.0%}",
            ]
            parts += [f"{name} {value:.2f}{'!' if name in self.alarms else ''}" for name, value in self.signs.items()]
        return " · ".join(parts)


class Display:
    """Draws statuses on this process's standard error or output.

    Args:
        every: seconds between lines where the output is no terminal; the first come sooner.
    """

    def __init__(self, every: float = 20.0) -> None:
        self.live = sys.stderr.isatty()
        self.every = every
        self._last = -math.inf
        self._interval = min(5.0, every)
        self._bar: Any = None

    def show(self, status: Status) -> None:
        """Show a status; messages in it are printed once."""
        for message in status.messages:
            self.say(message)
        status.messages = []
        if self.live:
            self._draw(status)
        elif time.monotonic() - self._last >= self._interval and status.images_per_second > 0:
            self._last = time.monotonic()
            self._interval = min(self.every, self._interval * 2)
            print(f"[{status.seen / status.planned:4.0%}] {status.line()}", flush=True)

    def say(self, message: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False)
        else:
            print(message, flush=True)

    def close(self, status: Status | None = None) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif status is not None and not self.live:
            print(f"[{status.seen / status.planned:4.0%}] {status.line()}", flush=True)

    def _draw(self, status: Status) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.table import Column

        if self._bar is None:
            rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            self._bar = Progress(
                BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}", table_column=rest),
                console=Console(stderr=True), refresh_per_second=4, expand=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=status.planned)
        self._bar.update(self._task, completed=status.seen, total=status.planned, description=status.line())
