"""The report as one HTML file that needs nothing else: no network, no script, no file beside it."""

import math
import shlex
from collections.abc import Callable
from datetime import datetime
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from pipeline.evaluation.evaluate import Results
from pipeline.redaction import redact
from pipeline.report import drawing, pictures, verdict
from pipeline.report.contest import Contest, Entry
from pipeline.training.conclusion import versions


class Measure(NamedTuple):
    """A row of the table of numbers: `key` of the results, its bounds below it where they are known, the factor it
    is shown by, and whether more of it is better (None: not to be said)."""

    title: str
    key: str
    bounds: str | None = None
    factor: float = 100
    more: bool | None = True


MEASURES = (
    Measure("k-NN", "knn_top1", "knn"),
    Measure("linear", "linear_top1", "linear"),
    Measure("linear, balanced", "linear_balanced"),
    Measure("linear, macro F1", "linear_macro_f1"),
    Measure("logistic regression", "logistic_top1", "logistic"),
    Measure("attentive probe", "attentive_top1", "attentive"),
    Measure("fine-tuned", "finetune_top1", "finetune"),
    Measure("from scratch", "scratch_top1", "scratch"),
    Measure("training error from scratch", "scratch_train_error", None, 100, None),
    Measure("1 label a class", "low_shot_n1", "low_shot_n1"),
    Measure("5 labels a class", "low_shot_n5", "low_shot_n5"),
    Measure("10 labels a class", "low_shot_n10", "low_shot_n10"),
    Measure("1 % of the labels", "low_shot_p1", "low_shot_p1"),
    Measure("10 % of the labels", "low_shot_p10", "low_shot_p10"),
    Measure("retrieval mAP", "retrieval_map", "retrieval"),
    Measure("k-NN, changed in place or size", "robustness_geometry"),
    Measure("k-NN, corrupted", "robustness_corruptions"),
    Measure("shape bias", "factors_shape_bias", None, 100, None),
    Measure("RankMe", "label_free_rankme", None, 1, None),
    Measure("α-ReQ", "label_free_alpha_req", None, 1, None),
    Measure("effective rank", "label_free_effective_rank", None, 1, None),
    Measure("uniformity", "label_free_uniformity", None, 1, None),
    Measure("alignment", "label_free_alignment", None, 1, None),
    Measure("LiDAR", "label_free_lidar", None, 1, None),
)


def render(contest: Contest, command: list[str]) -> str:
    """The page. `command` is what was typed, to be shown."""
    tested = verdict.claims(contest)
    colours = drawing.colours(contest)
    shown: list[tuple[str, Results, str, bool]] = [
        (one.name, one.trained.numbers, colours[one.name], False) for one in contest.entries
    ]
    floors = {f"{one.config.backbone} untrained": one.untrained.numbers for one in contest.entries}
    floors["raw pixels"] = contest.pixels.numbers
    shown += [(name, numbers, "", True) for name, numbers in floors.items()]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(
        title=title(contest),
        contest=contest,
        written=f"Written {datetime.now():%d %B %Y, %H:%M}.",
        sentences=verdict.sentences(contest, tested),
        claims=tested,
        unfair=verdict.unfair(contest),
        copies=contest.copies,
        one_seed=len({(one.config.backbone, one.config.objective) for one in contest.entries}) == len(contest.entries),
        shown=[{"name": name, "colour": colour, "floor": floor} for name, _, colour, floor in shown],
        rows=[row for measure in MEASURES if (row := cells(measure, shown))],
        fairness=fairness(contest),
        pictures=list(pictures.pictures(contest)),
        trust=verdict.trust(contest),
        command=redact(shlex.join(command)),
        trainings=[redact(training(one)) for one in contest.entries],
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
    return {
        "title": measure.title,
        "cells": [
            cell(measure, numbers, math.inf if floor else best) | {"floor": floor} for _, numbers, _, floor in shown
        ],
    }


def cell(measure: Measure, numbers: Results, best: float) -> dict[str, Any]:
    """A number for people, the bounds below it."""
    value = numbers.get(measure.key)
    if value is None or math.isnan(value):
        return {"text": "–", "interval": "", "best": False}
    bounds = [numbers.get(f"{measure.bounds}_{side}") for side in ("low", "high")] if measure.bounds else []
    digits = 1 if measure.factor == 100 else 2
    return {
        "text": f"{measure.factor * value:.{digits}f}".replace("-", "−"),
        "interval": " – ".join(f"{measure.factor * float(b):.{digits}f}" for b in bounds if b is not None),
        "best": value >= best,
    }


def fairness(contest: Contest) -> list[tuple[str, list[str]]]:
    """What stands behind each backbone: rows of a title and a value for every one."""

    def row(title: str, value: Callable[[Entry], str]) -> tuple[str, list[str]]:
        return title, [value(one) for one in contest.entries]

    def seconds(one: Entry) -> str:
        return "–" if one.cost.seconds is None else f"{one.cost.seconds:,.0f} s on {one.cost.device or 'unknown'}"

    return [
        row("parameters", lambda one: f"{one.cost.parameters / 1e6:.2f} M"),
        row("multiply-adds of an image", lambda one: f"{one.cost.multiply_adds / 1e9:.3f} G"),
        row("a cell can see", lambda one: "all" if one.field is None else f"{one.field} of {one.config.image_size} px"),
        row("images seen", lambda one: f"{one.cost.images_seen:,}"),
        row("multiply-adds of pretraining", lambda one: f"{one.cost.compute / 1e12:,.2f} T"),
        row("time of training", seconds),
        row("batch size", lambda one: f"{one.config.batch_size}"),
        row("learning rate", lambda one: f"{one.config.lr or 0:.2g}"),
        row("seed", lambda one: f"{one.config.seed}"),
    ]


def training(one: Entry) -> str:
    """The command that trains a backbone again."""
    return shlex.join(["python", "-m", "pipeline.pretrain", "--config", f"{one.run}/config.yaml"]) + (
        f"   # seed {one.config.seed}: {one.name}"
    )
