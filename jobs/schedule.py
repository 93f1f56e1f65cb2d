"""When a job fires: cron lines in a time zone, with daylight saving told plainly.

A cron line names times on the clock on the wall, as cron, Kubernetes and KubeRay read it: minute, hour, day of month,
month, day of week; 0 and 7 are Sunday; where both days are restricted, either suffices. Twice a year the clock jumps:

    forward    a time that does not exist fires at the jump: 02:30 at 03:00
    back       a time that comes twice fires the first time

A line of every hour (`*`, not `*/2`) follows real time: what does not exist does not fire, what comes twice does twice.

APScheduler finds the times that match. It is asked without a time zone and with days of the week by name, because its
own reading of a crontab calls Monday 0, wants both days to match, and falls into a loop in the hour that comes twice.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

MINUTE = timedelta(minutes=1)
MONTHS = dict(zip(["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"], range(1, 13)))
DAYS = dict(zip(["sun", "mon", "tue", "wed", "thu", "fri", "sat"], range(7)))
FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, MONTHS),
    ("day of week", 0, 7, DAYS),
)
_PART = re.compile(r"(\*|(\w+)(?:-(\w+))?)(?:/(\d+))?", re.ASCII)
SPANS = (timedelta(days=1), timedelta(days=32), timedelta(days=367), timedelta(days=8 * 366))
DAYS_IN = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@dataclass(frozen=True)
class Cron:
    """The values of each field of a cron line; `either` says whether one matching kind of day is enough."""

    line: str
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]
    months: tuple[int, ...]
    weekdays: tuple[int, ...]
    either: bool
    every_hour: bool


def parse(line: str) -> Cron:
    """A cron line of five fields.

    Raises:
        ValueError: one clause on what is wrong with it.
    """
    words = line.lower().split()
    if len(words) != 5:
        raise ValueError(f"has {len(words)} fields, not five: minute, hour, day of month, month, day of week")
    values = [_values(word, *field) for word, field in zip(words, FIELDS)]
    if 7 in values[4] and not words[4].startswith("*"):  # Kubernetes knows Sunday as 0 alone
        words[4] = ",".join(map(str, sorted({day % 7 for day in values[4]})))
    values[4] = sorted({day % 7 for day in values[4]})
    for days, others in ((2, 4), (4, 2)):
        if "*" in words[days] and "*" not in (words[days], words[others]):
            raise ValueError(
                f"{FIELDS[days][0]} {words[days]!r} beside a {FIELDS[others][0]}: schedulers differ on whether "
                f"both must match; write {','.join(map(str, values[days]))}, and either suffices"
            )
    restricted = [not word.startswith("*") for word in words]
    cron = Cron(
        line=" ".join(words),
        minutes=tuple(values[0]), hours=tuple(values[1]), days=tuple(values[2]), months=tuple(values[3]),
        weekdays=tuple(values[4]), either=restricted[2] and restricted[4], every_hour=len(values[1]) == 24,
    )  # fmt: skip
    if not cron.either and all(DAYS_IN[month - 1] < min(cron.days) for month in cron.months):
        raise ValueError(f"never fires: no such month has a day {min(cron.days)}")
    return cron


def _values(word: str, name: str, low: int, high: int, names: dict[str, int]) -> list[int]:
    found: set[int] = set()
    for part in word.split(","):
        match = _PART.fullmatch(part)
        if not match:
            raise ValueError(f"{name} {part!r} is none of *, 5, 1-5, */10, 1-30/5, or a list of these")
        whole, first, last, step = match.groups()
        if step and whole != "*" and last is None:
            raise ValueError(f"{name} {part!r}: schedulers differ on it; write {first}-{high}/{step}")
        numbers = (
            (low, high) if whole == "*" else tuple(_number(w, name, low, high, names) for w in (first, last or first))
        )
        if numbers[0] > numbers[1]:
            raise ValueError(f"{name} {part!r} runs backwards; write two ranges, as in {first}-{high},{low}-{last}")
        if step and int(step) < 1:
            raise ValueError(f"{name} {part!r}: a step is at least 1")
        found |= set(range(numbers[0], numbers[1] + 1, int(step or 1)))
    return sorted(found)


def _number(word: str, name: str, low: int, high: int, names: dict[str, int]) -> int:
    number = names.get(word, int(word) if word.isdecimal() else -1)
    if not low <= number <= high:
        raise ValueError(f"{name} {word!r} is not within {low} to {high}")
    return number


@dataclass(frozen=True)
class Schedule:
    """A cron line in a time zone."""

    cron: Cron
    zone: ZoneInfo

    def firings(self, after: datetime, until: datetime) -> list[datetime]:
        """Every firing in (after, until], in UTC, ascending."""
        near = timedelta(hours=3)  # no clock jumps further
        edges = (after - near, after, after + near, until - near, until, until + near)
        jumps = len({edge.astimezone(self.zone).utcoffset() for edge in edges}) > 1
        margin = near if jumps else timedelta(0)
        walls = self._walls(self._wall(after) - margin, self._wall(until) + margin)
        found = {instant for wall in walls for instant in self._instants(wall)}
        return sorted(instant for instant in found if after < instant <= until)

    def next(self, after: datetime) -> datetime:
        """The first firing after an instant, in UTC."""
        for span in SPANS:
            if firings := self.firings(after, after + span):
                return firings[0]
        raise ValueError(f"cron line {self.cron.line!r} does not fire within eight years")

    def newest(self, until: datetime) -> datetime | None:
        """The last firing at or before an instant, in UTC; None where there was none in eight years."""
        for span in SPANS:
            if firings := self.firings(until - span, until):
                return firings[-1]
        return None

    def skipped(self, after: datetime, until: datetime) -> list[datetime]:
        """Times on the wall within (after, until] that fire at the jump, since daylight saving removes them, without a
        time zone."""
        if self.cron.every_hour:
            return []
        walls = self._walls(self._wall(after), self._wall(until))
        return [wall for wall in walls if self._wall(self._instant(wall, 0)) != wall]

    def _wall(self, instant: datetime) -> datetime:
        return instant.astimezone(self.zone).replace(tzinfo=None)

    def _walls(self, start: datetime, end: datetime) -> Iterator[datetime]:
        """Matching times of the clock on the wall from start to end, without a time zone."""
        now, last = start.replace(tzinfo=UTC), end.replace(tzinfo=UTC)
        while (found := self._trigger.get_next_fire_time(None, now)) is not None and found <= last:
            yield found.replace(tzinfo=None)
            now = found + MINUTE

    @cached_property
    def _trigger(self) -> Any:
        from apscheduler.triggers.combining import OrTrigger
        from apscheduler.triggers.cron import CronTrigger

        cron = self.cron
        names = {number: name for name, number in DAYS.items()}
        clock = {
            "minute": _listed(cron.minutes), "hour": _listed(cron.hours), "month": _listed(cron.months),
            "timezone": UTC,
        }  # fmt: skip
        days, weekdays = _listed(cron.days), ",".join(names[day] for day in cron.weekdays)
        if cron.either:
            return OrTrigger([CronTrigger(day=days, **clock), CronTrigger(day_of_week=weekdays, **clock)])
        return CronTrigger(day=days, day_of_week=weekdays, **clock)

    def _instants(self, wall: datetime) -> list[datetime]:
        """The instants, in UTC, at which a time on the wall fires."""
        first, second = self._instant(wall, 0), self._instant(wall, 1)
        if first == second:
            return [first]
        if first < second:  # the clock shows it twice
            return [first, second] if self.cron.every_hour else [first]
        return [] if self.cron.every_hour else [self._jump(second, first)]  # the clock never shows it

    def _instant(self, wall: datetime, fold: int) -> datetime:
        return wall.replace(tzinfo=self.zone, fold=fold).astimezone(UTC)

    def _jump(self, low: datetime, high: datetime) -> datetime:
        """The instant in (low, high] at which the zone's offset changes."""
        before = low.astimezone(self.zone).utcoffset()
        while low.astimezone(self.zone).utcoffset() == before and low < high:
            low += MINUTE
        return low


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
