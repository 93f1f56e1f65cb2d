"""The report as one HTML file that needs nothing else: no network, no script, no file beside it."""

import math
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipeline.config import dump
from pipeline.evaluation import pooling
from pipeline.evaluation.evaluate import Results
from pipeline.evaluation.measures import MEASURES, Measure
from pipeline.redaction import redact
from pipeline.report import drawing, verdict
from pipeline.report.contest import Contest, Entry
from pipeline.report.drawing import Picture
from pipeline.training.conclusion import versions

Row = tuple[str, list[str]]
"""A title, and a text for every backbone."""


def render(contest: Contest, pictures: Sequence[Picture], command: list[str]) -> str:
    """The page. `command` is what was typed, to be shown."""
    tested = verdict.claims(contest)
    colours = drawing.colours(contest)
    shown: list[tuple[str, Results, str, bool]] = [
        (one.name, one.trained.numbers, colours[one.name], False) for one in contest.entries
    ]
    floors = {one.floors[0]: one.untrained.numbers for one in contest.entries}
    floors |= {one.floors[1]: one.pixels.numbers for one in contest.entries}
    shown += [
        (name, numbers, "", True) for name, numbers in floors.items() if any(one.key in numbers for one in MEASURES)
    ]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(
        title=title(contest),
        contest=contest,
        written=f"Written {datetime.now():%d %B %Y, %H:%M}.",
        sentences=verdict.sentences(contest, tested),
        claims=tested,
        passed_over=len(verdict.passed_over(contest)),
        uneven=verdict.UNEVEN if any(claim.what.startswith("balanced") for claim in tested) else None,
        chosen_apart=verdict.chosen_apart(contest),
        unfair=verdict.unfair(contest),
        copies=contest.copies,
        one_seed=len({(one.config.backbone, one.config.objective) for one in contest.entries}) == len(contest.entries),
        shown=[{"name": name, "colour": colour, "floor": floor} for name, _, colour, floor in shown],
        rows=[row for measure in MEASURES if (row := cells(measure, shown))],
        costs=costs(contest),
        fairness=fairness(contest),
        whole=[*whole(contest, "finetune", "fine-tuned"), *whole(contest, "scratch", "from scratch")],
        pictures=pictures,
        trust=verdict.trust(contest),
        command=redact(shlex.join(command)),
        trainings=[redact(training(one, one.run)) for one in contest.entries if one.run],
        configurations={f"{one.slug}.yaml": redact(dump(one.config)) for one in contest.entries if one.lone},
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        times=", ".join(f"{name} {seconds:.0f} s" for name, seconds in contest.seconds.items()),
        p=lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
    )


def title(contest: Contest) -> str:
    """The page's headline: the backbones by name where they are few, else their number, and the data."""
    names = [one.name for one in contest.entries]
    if len(names) > 3:
        return f"{len(names)} backbones on {contest.data}"
    return f"{' against '.join(names)} on {contest.data}"


def cells(measure: Measure, shown: list[tuple[str, Results, str, bool]]) -> dict[str, Any] | None:
    """A row of the table: a measure's number for every backbone and floor; None where no backbone has one."""
    values = [numbers.get(measure.key) for _, numbers, _, floor in shown if not floor]
    known = [float(v) for v in values if v is not None and not math.isnan(v)]
    if not known:
        return None
    best = max(known) if measure.more else math.inf

    def cell(numbers: Results, floor: bool) -> dict[str, Any]:
        value = numbers.get(measure.key)
        wins = not floor and value is not None and value >= best
        return {"text": measure.text(numbers), "interval": measure.interval(numbers), "best": wins, "floor": floor}

    return {"title": measure.title, "cells": [cell(numbers, floor) for _, numbers, _, floor in shown]}


def costs(contest: Contest) -> list[Row]:
    """What each backbone costs, and what a point of its accuracy does."""

    def no_summary(one: Entry) -> str:
        return f"– ({'no summary of this checkpoint' if one.run else 'not pretrained'})"

    def memory(one: Entry) -> str:
        return "– (kept by CUDA's allocator only)" if one.cost.memory is None else f"{one.cost.memory / 2**20:,.0f} MiB"

    def training_memory(one: Entry) -> str:
        peak = one.cost.training_memory
        return no_summary(one) if peak is None else f"{peak / 2**20:,.0f} MiB"

    def training(one: Entry) -> str:
        return no_summary(one) if one.cost.training is None else f"{one.cost.training:,.0f}"

    def seconds(one: Entry) -> str:
        if one.cost.seconds is None:
            return no_summary(one)
        workers = f"{one.cost.workers} × " if (one.cost.workers or 0) > 1 else ""
        return f"{one.cost.seconds:,.0f} s on {workers}{one.cost.device or 'unknown'}"

    rows = [
        row(contest, "parameters", lambda one: f"{one.cost.parameters / 1e6:.2f} M"),
        row(contest, "multiply-adds of an image", lambda one: f"{one.cost.multiply_adds / 1e9:.3f} G"),
        row(contest, "images/s of inference", lambda one: f"{one.cost.inference:,.0f}"),
        row(contest, "peak memory of inference", memory),
        row(contest, "images/s of training", training),
        row(contest, "peak memory of training, a process", training_memory),
        row(contest, "time of training", seconds),
        row(contest, "multiply-adds of pretraining", lambda one: f"{one.cost.compute / 1e12:,.2f} T"),
    ]
    if (protocol := verdict.leading(contest.entries[0])) is None:
        return rows
    what = verdict.LEADING[protocol]

    def by_hour(one: Entry) -> str:
        if one.cost.seconds is None:
            return no_summary(one)
        hours = one.cost.hours()
        return "– (workers came and went)" if hours is None else f"{100 * verdict.score(one) / hours:,.1f}"

    return [
        *rows,
        row(contest, f"points of {what} per hour of a GPU, or CPU, in training", by_hour),
        row(contest, f"points of {what} per G multiply-adds of an image",
            lambda one: f"{100 * verdict.score(one) / (one.cost.multiply_adds / 1e9):,.1f}"),
    ]  # fmt: skip


def row(contest: Contest, title: str, value: Callable[[Entry], str]) -> Row:
    """A row of a table with one column a backbone."""
    return title, [value(one) for one in contest.entries]


def fairness(contest: Contest) -> list[Row]:
    """What stands behind each backbone beside its cost."""

    def field(one: Entry) -> str:
        return "all" if one.field is None else f"{one.field} of {one.config.image_size} px"

    def reads(protocol: str) -> Callable[[Entry], str]:
        return lambda one: pooling.in_words(one.trained.choices.get(f"{protocol}_pooling", "–"))

    return [
        *(
            row(contest, f"{what} reads", reads(protocol))
            for protocol, what in (("linear", "linear classifier"), ("logistic", "logistic regression"))
            if protocol in contest.protocols
        ),
        row(contest, "a cell can see", field),
        row(contest, "images seen", lambda one: f"{one.cost.images_seen:,}"),
        row(contest, "batch size", lambda one: f"{one.config.batch_size or '–'}"),
        row(contest, "learning rate", lambda one: f"{one.config.lr:.2g}" if one.config.lr else "–"),
        row(contest, "seed", lambda one: f"{one.config.seed}"),
    ]


def whole(contest: Contest, protocol: str, how: str) -> list[str]:
    """By which recipes a protocol trained the whole network, each with the backbones that it trained."""
    of: dict[str, list[str]] = {}
    for one in contest.entries:
        if source := one.trained.choices.get(f"{protocol}_recipe"):
            of.setdefault(source, []).append(one.name)
    return [f"{', '.join(names)}, {how}: {source}" for source, names in of.items()]


def training(one: Entry, run: str) -> str:
    """The command that trains the backbone of a run again."""
    config = f"{one.slug}.yaml" if one.lone else f"{run}/config.yaml"
    return shlex.join(["python", "-m", "pipeline.pretrain", "--config", config]) + (
        f"   # seed {one.config.seed}: {one.name}"
    )
