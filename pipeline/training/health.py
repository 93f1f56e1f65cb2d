"""Is a run well, and what is done where it is not?

Every rank judges the same averaged numbers, so all come to the same verdict without a word. What is done is data:
`interventions.json` in the run folder lists each intervention, so that a run that is continued, or replayed, goes the
same way again.
"""

import contextlib
import json
import math
import statistics
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from objectives.views import VitalSign
from pipeline.training.run_folder import RunFolder

PATIENCE = 20  # steps in a row outside its healthy range after which a vital sign is spoken of
COLLAPSED = 100  # and after which the run is taken for collapsed, if it was inside for `ENOUGH` before
RECALLED = 1000  # steps before a checkpoint that are judged again when training goes on from it
WINDOW, ENOUGH = 100, 50  # steps that a value is compared with, at most and at least
SPIKE = 10.0  # robust standard deviations above their median
SPIKE_STEPS = 5  # in a row: a single bad batch is forgotten by itself
MOST = 10  # interventions in one run

# What is tried, in turns, while a run falls ill again before a new checkpoint was taken in good health.
LADDERS: Mapping[str, tuple[str, ...]] = {
    "nonfinite": ("skip", "fp32_head", "lr"),
    "spike": ("skip", "lr", "lr"),
    "collapse": ("lr", "lr"),
}


class Unwell(Exception):
    """A run has fallen ill.

    Attributes:
        cause: a key of `LADDERS`.
        first, until: images seen before the first and after the last step of it.
        sentence: for people.
    """

    def __init__(self, cause: str, first: int, until: int, sentence: str) -> None:
        super().__init__(sentence)
        self.cause, self.first, self.until, self.sentence = cause, first, until, sentence

    def answered(self, back: int, change: str) -> "Intervention":
        """What was done about it; arguments as of `Intervention`."""
        return Intervention(self.cause, self.first, self.until, self.sentence, back, change)


@dataclass(frozen=True)
class Intervention:
    """One thing that is changed, as plain data.

    Args:
        cause, first, until, sentence: as of `Unwell`.
        back: images seen at the checkpoint that training went back to.
        change: "skip" (the batches from `first` to `until` leave no trace), "fp32_head" (all but the backbones computes
            in float32) or "lr" (half of it), both from `back` on; "end" nothing more, the run ends.
    """

    cause: str
    first: int
    until: int
    sentence: str
    back: int
    change: str

    @property
    def begins(self) -> int:
        """Images seen before the first step that it changes."""
        return self.first if self.change == "skip" else self.back

    def line(self, *, further: bool = False) -> str:
        """What was done, in words; `further`: it went back to a checkpoint before the one of the last attempt."""
        done = {
            "skip": f"the batches of images {self.first:,} to {self.until:,} are skipped",
            "fp32_head": "its heads and its loss are computed in fp32 from there",
            "lr": "the learning rate is halved from there",
        }[self.change]
        place = ", one checkpoint further than before" * further
        return f"warning: {self.sentence}; back to {self.back:,} images{place}, and {done}"


class Care:
    """The interventions of a run, and what they amount to at any point of it."""

    def __init__(self, done: list[Intervention]) -> None:
        self.done = done

    @classmethod
    def read(cls, folder: RunFolder) -> "Care":
        """The interventions that a run folder lists.

        Raises:
            ValueError: the list is damaged.
        """
        if not folder.exists("interventions.json"):
            return cls([])
        return cls.of(json.loads(folder.read("interventions.json")))

    @classmethod
    def of(cls, listed: list[dict[str, Any]]) -> "Care":
        """The interventions of such a list.

        Raises:
            ValueError: it is none, or an entry is not as it was written.
        """
        try:
            done = [Intervention(**{key: value for key, value in one.items() if key != "checksum"}) for one in listed]
        except (AttributeError, TypeError) as error:
            raise ValueError("no list of interventions") from error
        care = cls(done)
        if any(now["checksum"] != one.get("checksum", now["checksum"]) for now, one in zip(care.listed, listed)):
            raise ValueError("an entry is not as it was written")
        return care

    @property
    def listed(self) -> list[dict[str, Any]]:
        """The interventions as plain data, each with a checksum (CRC-32)."""
        plain = [asdict(one) for one in self.done]
        return [{**one, "checksum": f"{zlib.crc32(json.dumps(one).encode()):08x}"} for one in plain]

    def skips(self, seen: int) -> bool:
        """Whether the batch that comes after `seen` images is left out."""
        return any(one.change == "skip" and one.first <= seen < one.until for one in self.done)

    def fp32_head(self, seen: int) -> bool:
        """Whether all but the backbones is computed in float32."""
        return any(one.change == "fp32_head" and one.back <= seen for one in self.done)

    def lr_scale(self, seen: int) -> float:
        """What the learning rate is multiplied by."""
        return 0.5 ** sum(one.change == "lr" and one.back <= seen for one in self.done)

    def in_vain(self, cause: str) -> set[int]:
        """Images seen at the checkpoints from which a run that collapsed has gone on: a collapse may have begun before
        it showed, and from there it would come again. An illness of another cause shows at once."""
        return {one.back for one in self.done if one.cause == cause == "collapse"}

    def said(self) -> str:
        """The last thing that was done, in words."""
        *before, last = self.done
        return last.line(further=any(one.cause == last.cause and one.until > last.back < one.back for one in before))

    def treat(self, unwell: Unwell, back: int, *, half: bool) -> Intervention | None:
        """Choose and note what is changed; None where everything has been tried.

        Args:
            back: images seen at the newest checkpoint taken in good health.
            half: whether the run computes in bf16.
        """
        tried = [one.change for one in self.done if one.cause == unwell.cause and one.until > back]
        ladder = [rung for rung in LADDERS[unwell.cause] if rung != "fp32_head" or half]
        if len(tried) >= len(ladder) or len(self.done) >= MOST:
            return None
        chosen = unwell.answered(back, ladder[len(tried)])
        self.done.append(chosen)
        return chosen

    def write(self, folder: RunFolder) -> None:
        """Keep the list with the run; one rank does."""
        folder.write_json("interventions.json", self.listed)


@dataclass
class Health:
    """Judges one step after the other.

    Args:
        signs: the objective's vital signs.
        batch: images of a step, over all ranks.
        settled: images seen after which the signs' ranges hold: the learning-rate warm-up is over.
        heal: whether a leap of the loss and a collapse end the training; else they are only spoken of.
        collapsed: steps in a row outside its range that make a collapse.
    """

    signs: Sequence[VitalSign]
    batch: int
    settled: float = 0.0
    heal: bool = True
    collapsed: int = COLLAPSED
    outside: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    _inside: dict[str, int] = field(default_factory=dict)
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _high: int = 0

    def recall(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Forget all, and judge again what was recorded until a checkpoint, so as to go on from it in the same mind."""
        self.outside, self._inside, self._high = {}, {}, 0
        self._losses.clear()
        for row in rows[-RECALLED:]:
            with contextlib.suppress(Unwell):  # it was dealt with then
                self.check(row, int(row["images"]))
        self.messages.clear()

    @property
    def well(self) -> bool:
        """Whether the loss is where it was, and no vital sign outside its range that was inside for `ENOUGH` steps."""
        return not self._high and not any(
            steps and self._inside[name] >= ENOUGH for name, steps in self.outside.items()
        )

    @property
    def alarms(self) -> list[str]:
        """Names of the signs that have stayed outside their range."""
        return [name for name, steps in self.outside.items() if steps >= PATIENCE]

    def check(self, row: Mapping[str, float], seen: int) -> None:
        """Judge the step that ended at `seen` images.

        Args:
            row: loss, grad_norm and the objective's scalars, averaged over ranks.

        Raises:
            Unwell: a loss or gradient that is not finite, a loss that has leapt and stays up, a sign that has been
                outside its range for too long.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row[name]):
                what = {"loss": "loss", "grad_norm": "gradient norm"}[name]
                raise Unwell("nonfinite", seen - self.batch, seen, f"the {what} is {row[name]} at {seen:,} images")
        self._leapt(row["loss"], seen)
        for sign in self.signs:
            if sign.name in row:
                self._sign(sign, row[sign.name], seen)

    def _leapt(self, loss: float, seen: int) -> None:
        if len(self._losses) >= ENOUGH:
            usual = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(one - usual) for one in self._losses)
            if loss > usual + SPIKE * max(spread, 0.01 * abs(usual)):
                self._high += 1
                if self.heal and self._high >= SPIKE_STEPS:
                    first = max(0, seen - (self._high + 1) * self.batch)
                    raise Unwell(
                        "spike", first, seen,
                        f"the loss leapt from {usual:.4g} to {loss:.4g} at {seen:,} images and stayed there",
                    )  # fmt: skip
                return
        self._high = 0
        self._losses.append(loss)

    def _sign(self, sign: VitalSign, value: float, seen: int) -> None:
        name = sign.name
        inside = sign.low <= value <= sign.high
        steps = self.outside[name] = 0 if inside else self.outside.get(name, 0) + 1
        self._inside[name] = self._inside.get(name, 0) + inside
        text = f"{name} is {value:.3g}, healthy is {sign.low:g} to {sign.high:g}: {sign.meaning}"
        if steps == PATIENCE:
            self.messages.append(f"warning: {text}")
        since = max(seen - steps * self.batch, math.ceil(self.settled))
        if self.heal and steps and self._inside[name] >= ENOUGH and seen - since >= self.collapsed * self.batch:
            raise Unwell("collapse", since, seen, f"collapse at {seen:,} images: {text}")
