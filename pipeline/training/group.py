"""What the driver of a run, Ray's controller and the workers know of each other, and what they say of it.

Knows nothing of Ray: `pipeline.cluster` makes an actor of `Hub`, which lives beside the driver.
"""

import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import OUT_OF_MEMORY

RETRIES = 3  # failures in a row, none of which got beyond the checkpoint of the one before, that are tried again
SOURCES = tuple(str(Path(__file__).resolve().parents[2] / name) for name in ("pipeline", "ssl", "backbones"))

# What a failed worker's error says where the worker itself is not to blame, or does not say it for people to read.
PEER_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|socket closed|remote process exited", re.I)
TIMED_OUT = re.compile(r"timed out waiting|timeout|hanging for", re.I)
NODE_GONE = re.compile(r"node.{0,80}(died|dead|terminated|was marked|failed)|actor's node", re.I | re.S)
KILLED = re.compile(r"worker process has died|died unexpectedly|connection error code|SYSTEM_ERROR", re.I)


@dataclass
class Worker:
    """One worker of the present group, as it last spoke of itself; `at` is when, in seconds of the hub's clock."""

    name: str
    doing: str
    at: float


class News(NamedTuple):
    """What the driver hears: rank 0's newest status if there is a new one, what there is to say, the seconds for which
    there has been no worker, the groups begun in them, why no further group is to be tried, "" while one is, and the
    mistake of the user's that a worker met, "" without one."""

    status: dict[str, Any] | None
    messages: list[str]
    alone: float
    starts: int
    gave_up: str
    refused: str


@dataclass(repr=False)
class Hub:
    """Through which rank 0 and the driver talk, so that no shared disk is needed, and which sees groups come and go.

    A group is the workers that train together from one start to the next. `leaving` is why it is to end with a
    checkpoint: "" not at all; "stop", or "taken" machines without which too few are left, and the run is over;
    "resize", or "preemption" of machines that others replace, and another group will go on.

    Args:
        timeout: seconds that a worker may keep the others waiting.
    """

    timeout: float
    status: dict[str, Any] | None = None
    messages: list[str] = field(default_factory=list)
    leaving: str = ""
    training: bool = False
    gave_up: str = ""
    refused: str = ""
    images: int = 0  # that rank 0 last spoke of
    _moved: float | None = None  # when that was
    _began: int = -1  # where the group before began
    _failures: int = 0
    _over: bool = False  # this group has failed or left
    _again: bool = False  # one before it has
    _alone: float = field(default_factory=time.monotonic)  # since when there has been no worker
    _starts: int = 0  # groups begun since
    _workers: dict[int, Worker] = field(default_factory=dict)

    # --- rank 0, and every worker

    def hear(self, rank: int, name: str, doing: str) -> None:
        """A sign of life of a worker: what it is called, and which of our lines it is in."""
        self._workers[rank] = Worker(name, doing, time.monotonic())
        self._starts = 0

    def give_up(self, why: str) -> None:
        """No further group is to be tried."""
        self.gave_up = self.gave_up or why

    def refuse(self, mistake: str) -> None:
        """A worker met what the user alone can mend; whether the others meet it too, the run is over."""
        self.refused = self.refused or mistake

    def began(self, workers: int, images: int, reached: int) -> None:
        """The group has made its first step, from `images` on; `reached` is how far the metrics file had come."""
        now, reached = time.monotonic(), max(reached, self.images)
        if self._again:
            lost = max(0, reached - images)
            again = f"{lost:,} images are trained again" if lost else "nothing is lost"
            after = f" after {now - self._moved:.1f} s" if self._moved else ""
            who = f"{workers} workers go" if workers > 1 else "1 worker goes"
            self.say(f"{who} on from {images:,} images{after}; {again}")
        if images > self._began:
            self._failures = 0
        self._began, self.images, self._moved = images, images, now
        self.training, self._again = True, False

    def beat(self, status: dict[str, Any]) -> str:
        """Rank 0's newest status in, why to leave out."""
        self.messages += status["messages"]
        self.status = {**status, "messages": []}
        if status["seen"] > self.images:
            self.images, self._moved = status["seen"], time.monotonic()
        if self.images >= status["planned"]:
            self.training = False
        return self.leaving

    def leave(self, why: str, sentence: str = "") -> bool:
        """Have the group end with a checkpoint, if one trains and is not about to leave already; whether it will."""
        if not self.training or self.leaving:
            return False
        self.leaving = why
        if sentence:
            self.say(sentence)
        return True

    def left(self) -> None:
        """The group has left its checkpoint."""
        self.training, self._over, self._again = False, True, True

    # --- Ray's controller

    def has_left(self) -> bool:
        """Whether the group that was to leave has left its checkpoint, or can no longer."""
        return not self.training

    def starting(self) -> None:
        """A new group is put together."""
        self._scatter()
        self._over = False
        self._starts += 1
        if self.leaving not in ("stop", "taken"):
            self.leaving = ""

    def fault(self, errors: dict[int, str]) -> None:
        """Workers of the group failed: rank → what their error says. Ends the run where trying again is no use."""
        if self._over:
            return
        cause = self.explain(errors)
        self._scatter()
        self._over = self._again = True
        self._failures += 1
        if self.gave_up or self.refused:
            return
        if self.leaving == "taken":
            self.gave_up = f"{cause} before it had left a checkpoint"
        elif self._failures > RETRIES:
            place = f"the checkpoint at {self._began:,} images" if self._began > 0 else "the beginning"
            self.gave_up = f"{cause}; {self._failures} times in a row none got beyond {place}"
        else:
            self.say(f"{cause}; training goes back to the newest checkpoint")

    def explain(self, errors: dict[int, str]) -> str:
        """One sentence on why a group failed, from what the errors of its ranks say."""
        own = {rank: text for rank, text in errors.items() if not PEER_GONE.search(text)}
        rank, text = next(iter((own or errors).items()))
        who = self._name(rank)
        if TIMED_OUT.search(text):
            return self._stuck(rank)
        if OUT_OF_MEMORY.search(text):
            return f"{who} ran out of memory ({_line(text)})"
        if NODE_GONE.search(text):
            return f"{who} was lost with its machine"
        if KILLED.search(text):
            return f"{who} was killed, by someone or by its machine's kernel for want of memory"
        if not own:
            gone = [one.name for other, one in self._workers.items() if other not in errors]
            return f"{gone[0] if len(gone) == 1 else 'a worker'} is gone: {who} lost its connection to it"
        return f"{who} failed: {_line(text)}"

    def _stuck(self, waiting: int) -> str:
        now = time.monotonic()
        minutes = f"{self.timeout / 60:g} minute{'s' * (self.timeout != 60)}"
        silent = {rank: one for rank, one in self._workers.items() if now - one.at > self.timeout / 2}
        if silent:
            names = ", ".join(
                f"{one.name} has given no sign of life for {now - one.at:.0f} s" for one in silent.values()
            )
            return f"the workers waited {minutes} (--timeout) for one another: {names}"
        places = ", ".join(f"{one.name} in {one.doing}" for one in self._workers.values())
        return f"{self._name(waiting)} waited {minutes} (--timeout) for the others: {places or 'none has spoken yet'}"

    def _name(self, rank: int) -> str:
        return self._workers[rank].name if rank in self._workers else f"worker {rank}"

    # --- the driver

    def news(self) -> "News":
        """What is new since the last call."""
        alone = 0.0 if self._workers else time.monotonic() - self._alone
        news = News(self.status, self.messages, alone, self._starts, self.gave_up, self.refused)
        self.status, self.messages = None, []
        return news

    def stop(self) -> None:
        """End the run with a checkpoint."""
        self.leaving = "stop"

    def say(self, sentence: str) -> None:
        """A message to whoever reads the driver's output."""
        self.messages.append(sentence)

    def _scatter(self) -> None:
        """The workers of this group are no more."""
        self.training = False
        if self._workers:
            self._workers.clear()
            self._alone = time.monotonic()


def doing(thread: int) -> str:
    """The innermost of our own lines that a thread of this process is in: "loader.py:224 __iter__"."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not frame.f_code.co_filename.startswith(SOURCES):
        frame = frame.f_back
    if frame is None:
        return "no line of ours"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def _line(text: str) -> str:
    """The last line of an error, which says what it is."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "without a word"
