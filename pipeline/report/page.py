"""The report as one HTML file that needs nothing else: no network, no script, no file beside it."""

import math
import shlex
from datetime import datetime
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from pipeline.evaluation.evaluate import Results
from pipeline.redaction import redact
from pipeline.report import drawing, pictures, verdict
from pipeline.report.contest import Contest, Entry
from pipeline.training.conclusion import versions


class Column(NamedTuple):
    """A column of the table of numbers: `key` of the results, its bounds below it where they are known, the factor it
    is shown by, and whether more of it is better (None: not to be said)."""

    title: str
    key: str
    bounds: str | None = None
    factor: float = 100
    more: bool | None = True


COLUMNS = (
    Column("k-NN", "knn_top1", "knn"),
    Column("linear", "linear_top1", "linear"),
    Column("linear, balanced", "linear_balanced"),
    Column("linear, macro F1", "linear_macro_f1"),
    Column("logistic", "logistic_top1", "logistic"),
    Column("attentive", "attentive_top1", "attentive"),
    Column("fine-tuned", "finetune_top1", "finetune"),
    Column("from scratch", "scratch_top1", "scratch"),
    Column("its training error", "scratch_train_error", None, 100, None),
    Column("1 a class", "low_shot_n1", "low_shot_n1"),
    Column("5 a class", "low_shot_n5", "low_shot_n5"),
    Column("10 a class", "low_shot_n10", "low_shot_n10"),
    Column("1 %", "low_shot_p1", "low_shot_p1"),
    Column("10 %", "low_shot_p10", "low_shot_p10"),
    Column("retrieval mAP", "retrieval_map", "retrieval"),
    Column("shape bias", "factors_shape_bias", None, 100, None),
    Column("RankMe", "label_free_rankme", None, 1, None),
    Column("α-ReQ", "label_free_alpha_req", None, 1, None),
    Column("effective rank", "label_free_effective_rank", None, 1, None),
    Column("uniformity", "label_free_uniformity", None, 1, None),
    Column("alignment", "label_free_alignment", None, 1, None),
    Column("LiDAR", "label_free_lidar", None, 1, None),
)


def render(contest: Contest, command: list[str]) -> str:
    """The page. `command` is what was typed, to be shown."""
    tested = verdict.claims(contest)
    colours = drawing.colours(contest)
    columns = [c for c in COLUMNS if any(one.trained.numbers.get(c.key) is not None for one in contest.entries)]
    rows = [(one.name, one.trained.numbers, colours[one.name], False) for one in contest.entries]
    floors = {f"{one.config.backbone} untrained": one.untrained.numbers for one in contest.entries}
    rows += [(name, numbers, "", True) for name, numbers in floors.items()]
    rows.append(("raw pixels", contest.pixels.numbers, "", True))
    best = {
        c.key: max(
            (float(v) for one in contest.entries if (v := one.trained.numbers.get(c.key)) is not None), default=0
        )
        for c in columns
    }
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
        columns=columns,
        rows=[
            {
                "name": name,
                "colour": colour,
                "floor": floor,
                "cells": [cell(c, numbers, None if floor or not c.more else best[c.key]) for c in columns],
            }
            for name, numbers, colour, floor in rows
        ],
        fairness=[fairness(one) | {"colour": colours[one.name]} for one in contest.entries],
        pictures=list(pictures.pictures(contest)),
        trust=verdict.trust(contest),
        command=redact(shlex.join(command)),
        trainings=[redact(training(one)) for one in contest.entries],
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        times=", ".join(f"{name} {seconds:.0f} s" for name, seconds in contest.seconds.items()),
        p=lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
    )


def title(contest: Contest) -> str:
    names = [one.name for one in contest.entries]
    if len(names) > 3:
        return f"{len(names)} backbones on {contest.data}"
    return f"{' against '.join(names)} on {contest.data}"


def cell(column: Column, numbers: Results, best: float | None) -> dict[str, Any]:
    """A number for people, the bounds below it."""
    value = numbers.get(column.key)
    if value is None or math.isnan(value):
        return {"text": "–", "interval": "", "best": False}
    bounds = [numbers.get(f"{column.bounds}_{side}") for side in ("low", "high")] if column.bounds else [None]
    digits = 1 if column.factor == 100 else 2
    return {
        "text": f"{column.factor * value:.{digits}f}",
        "interval": " – ".join(f"{column.factor * float(b):.{digits}f}" for b in bounds if b is not None),
        "best": best is not None and value >= best,
    }


def fairness(one: Entry) -> dict[str, str]:
    """What stands behind a backbone."""
    cost = one.cost
    return {
        "name": one.name,
        "parameters": f"{cost.parameters / 1e6:.2f} M",
        "multiply_adds": f"{cost.multiply_adds / 1e9:.3f} G",
        "field": "the whole image" if one.field is None else f"{one.field} of {one.config.image_size} px",
        "images_seen": f"{cost.images_seen:,}",
        "compute": f"{cost.compute / 1e12:,.1f} T",
        "training": "–" if cost.seconds is None else f"{cost.seconds:,.0f} s on {cost.device or 'unknown'}",
        "batch": f"{one.config.batch_size}, {one.config.lr:.2g}",
        "recipe": one.config.recipe or "–",
    }


def training(one: Entry) -> str:
    """The command that trains a backbone again."""
    return shlex.join(["python", "-m", "pipeline.pretrain", "--config", f"{one.run}/config.yaml"]) + (
        f"   # seed {one.config.seed}: {one.name}"
    )
