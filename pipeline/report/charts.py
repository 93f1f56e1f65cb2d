"""The charts of a report: every one draws what its protocol found, and nothing where it was not asked."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from pipeline.evaluation.accuracy import confusion
from pipeline.evaluation.changes import CORRUPTIONS, GEOMETRY
from pipeline.evaluation.measures import MEASURES
from pipeline.evaluation.similarity import cka
from pipeline.report.contest import Contest, Entry
from pipeline.report.drawing import INK, PALETTE, WIDTH, Picture, clear_to, coloured, colours, legend, short, svg
from pipeline.report.verdict import (
    BUDGETS,
    LABEL_FREE,
    LEADING,
    by_depth,
    from_scratch,
    having,
    headline,
    leading,
    rivals,
    score,
    trust,
)

CONFUSED = 40
"""Classes whose confusions are drawn at most."""
DRAWN = 2
"""Pairs of backbones whose layers are compared in a picture at most."""


def accuracy(contest: Contest) -> Iterator[Picture]:
    """Accuracies with their intervals, beside both floors."""
    keys = {headline(protocol) for protocol in LEADING if protocol not in ("low_shot", "retrieval")}
    shown = [m for m in MEASURES if m.key in keys and contest.entries[0].trained.numbers.get(m.key) is not None]
    if not shown:
        return
    rows = coloured(contest)
    figure = Figure(figsize=(WIDTH, 0.55 + len(shown) * (0.3 + 0.24 * len(rows))))
    axes = figure.subplots()
    ticks, y = [], 0.0
    for measure in shown:
        top = y
        for one, colour in rows:
            value, low, high = with_bounds(one, measure.key, str(measure.bounds))
            bar = [[max(0, value - low)], [max(0, high - value)]]  # a bootstrap of mAP need not hold the value
            axes.errorbar(value, y, xerr=bar, fmt="o", color=colour, capsize=2, ms=5)
            if (floor := one.untrained.numbers.get(measure.key)) is not None:
                axes.plot(100 * float(floor), y, "|", color=colour, ms=11, mew=1.5)
            if (pixels := one.pixels.numbers.get(measure.key)) is not None:
                axes.vlines(100 * float(pixels), y - 0.5, y + 0.5, color=INK, lw=0.8, ls=":")
            axes.annotate(f"{one.name}  {value:.1f}", (high, y), xytext=(6, 0), textcoords="offset points", va="center",
                          fontsize=8, color=INK)  # fmt: skip
            y += 1
        ticks.append(((top + y - 1) / 2, measure.title))
        y += 0.8
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, %" if contest.classes else "%")
    axes.margins(x=0.05)
    left, right = axes.get_xlim()
    left = left if axes.dataLim.x0 < 0 else max(0, left)  # explained variance can be below 0
    axes.set_xlim(left, right + 0.55 * (right - left))
    yield Picture(
        "Accuracy", svg(figure, "Accuracy"),
        "Point and bar: accuracy and its 95 % interval over the validation images. Tick: the same network "
        "untrained. Dotted line: raw pixels.",
    )  # fmt: skip


def with_bounds(one: Entry, key: str, bounds: str) -> tuple[float, float, float]:
    """A score and its interval, in per cent; the interval is the score itself where none is known."""
    numbers = one.trained.numbers
    value = float(numbers[key] or 0)
    found = (numbers[f"{bounds}_{side}"] for side in ("low", "high"))
    low, high = (value if bound is None or math.isnan(bound) else float(bound) for bound in found)
    return 100 * value, 100 * low, 100 * high


def low_shot(contest: Contest) -> Iterator[Picture]:
    """Accuracy against the number of labels."""
    budgets = [b for b in BUDGETS if contest.entries[0].trained.numbers.get(f"low_shot_{b}") is not None]
    if not budgets:
        return
    labelled = {"n1": "1", "n5": "5", "n10": "10", "p1": "1 %", "p10": "10 %"}
    figure = Figure(figsize=(WIDTH, 3.2))
    units = {"n": "labels a class", "p": "share of the labels"}
    parts = {unit: part for kind, unit in units.items() if (part := [b for b in budgets if b[0] == kind])}
    for axes, (unit, part) in zip(figure.subplots(1, len(parts), sharey=True, squeeze=False).flat, parts.items()):
        for one, colour in coloured(contest):
            of_part = [with_bounds(one, f"low_shot_{b}", f"low_shot_{b}") for b in part]
            axes.plot(range(len(part)), [value for value, *_ in of_part], "o-", color=colour, ms=4, label=one.name)
            band = [low for _, low, _ in of_part], [high for *_, high in of_part]
            axes.fill_between(range(len(part)), *band, color=colour, alpha=0.15, lw=0)
        axes.set_xticks(range(len(part)), [labelled[b] for b in part])
        axes.margins(x=0.15)
        axes.set_xlabel(unit)
        axes.set_ylabel("accuracy, %" if unit == "labels a class" else "")
    legend(figure, contest)
    yield Picture(
        "Few labels", svg(figure, "Few labels"),
        "Logistic regression on few labels, each number drawn five times, the same for all. Band: Student's 95 % "
        "interval over the draws.",
    )  # fmt: skip


def degradation(contest: Contest) -> Iterator[Picture]:
    """Training error over depth, of plain and of residual nets."""
    kinds = {kind: nets for kind, nets in by_depth(contest).items() if len(nets) > 1}
    if not kinds:
        return
    figure = Figure(figsize=(0.6 * WIDTH, 3.0))
    axes = figure.subplots()
    colour_of = colours(contest)
    errors = {one.name: 100 * float(one.trained.numbers["scratch_train_error"] or 0) for one in contest.entries}
    for kind, nets in kinds.items():
        depths = sorted(nets)
        curve = [errors[nets[depth].name] for depth in depths]
        axes.plot(depths, curve, color=INK, lw=1, ls="--" if kind == "plain" else "-")
        for depth, error in zip(depths, curve):
            axes.plot(depth, error, "o", color=colour_of[nets[depth].name], ms=7)
            axes.annotate(f"{nets[depth].name}  {error:.1f}", (depth, error), xytext=(8, 0), fontsize=8, color=INK,
                          textcoords="offset points", va="center")  # fmt: skip
    axes.set_xticks(sorted({depth for nets in kinds.values() for depth in nets}))
    axes.set_xlabel("layers")
    axes.set_ylabel("training error, %")
    axes.margins(0.15)
    axes.set_xlim(right=axes.get_xlim()[1] + 0.35 * (axes.get_xlim()[1] - axes.get_xlim()[0]))
    axes.set_ylim(bottom=0)
    yield Picture(
        "Training error by depth", svg(figure, "Training error by depth"),
        "Of the images that were learnt from scratch, the share still wrong. Dashed: plain nets; line: the same with "
        f"shortcuts. {' '.join(from_scratch(contest))}",
    )  # fmt: skip


def layerwise(contest: Contest) -> Iterator[Picture]:
    """Accuracy by depth."""
    if not all("layerwise_knn" in one.trained.evidence for one in contest.entries):
        return
    figure = Figure(figsize=(WIDTH, 3.0))
    for axes, kind, label in zip(figure.subplots(1, 2, sharey=True), ("knn", "linear"), ("k-NN", "linear")):
        for one, colour in coloured(contest):
            curve = 100 * one.trained.evidence[f"layerwise_{kind}"].numpy()
            axes.plot(np.arange(1, len(curve) + 1) / len(curve), curve, "o-", color=colour, ms=3)
        axes.set_xlabel(f"depth, {label}")
        axes.set_xticks([0, 0.5, 1], ["input", "half", "last"])
    figure.axes[0].set_ylabel("accuracy, %")
    legend(figure, contest)
    yield Picture(
        "Where the knowledge sits", svg(figure, "Where the knowledge sits"),
        "Accuracy on every block or stage, its cells averaged. Where the curve falls towards the end, the last layers "
        "serve the objective more than the classes.",
    )  # fmt: skip


def factors(contest: Contest) -> Iterator[Picture]:
    """Which factors of generated images are held linearly."""
    names = [k.removeprefix("factors_").removesuffix("_held") for k in contest.entries[0].trained.numbers
             if k.startswith("factors_") and k.endswith("_held")]  # fmt: skip
    if not names:
        return
    figure = Figure(figsize=(WIDTH, 0.4 + 0.42 * len(names)))
    axes = figure.subplots()
    marks = [(one.name, one.trained.numbers, colour, "o") for one, colour in coloured(contest)]
    for y, name in enumerate(names):
        axes.axhline(y, color=INK, lw=0.3, alpha=0.3)
        for _, numbers, colour, mark in marks:
            axes.plot(100 * float(numbers[f"factors_{name}_held"] or 0), y, mark, color=colour, ms=7, alpha=0.85)
        for held in {float(one.pixels.numbers.get(f"factors_{name}_held") or 0) for one in contest.entries}:
            axes.plot(100 * held, y, "|", color=INK, ms=12)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(-3, 103)
    axes.set_xlabel("held linearly, % of the way from chance to all")
    legend(figure, contest)
    yield Picture(
        "Which factors are held", svg(figure, "Which factors are held"),
        "Linear classifiers of each factor that the images were generated from. Tick: raw pixels. Shape right of "
        "texture is what people do; texture right of shape is what CNNs trained on photographs were found to do "
        "(Geirhos et al. 2019). Both are among the comparisons below.",
    )  # fmt: skip


def confusions(contest: Contest) -> Iterator[Picture]:
    """Which classes are taken for which, by the first classifier that was trained."""
    evidence, count = contest.entries[0].trained.evidence, len(contest.classes)
    protocol = next((name for name in LEADING if f"{name}_predicted" in evidence), None)
    if protocol is None or not count:
        return
    tables = torch.zeros(len(contest.entries), count, count, dtype=torch.float64)
    for one, table in zip(contest.entries, tables):
        found = confusion(one.trained.evidence[f"{protocol}_predicted"], one.trained.labels)[:count, :count]
        table[: len(found), : len(found)] = found
    mistaken = (tables.sum(2) - tables.diagonal(dim1=1, dim2=2)).sum(0)
    shown = mistaken.topk(min(count, CONFUSED)).indices.sort().values
    columns = min(3, len(contest.entries))
    rows = -(-len(contest.entries) // columns)
    side = WIDTH / columns
    figure = Figure(figsize=(WIDTH, rows * side * 1.12))
    names = [short(contest.classes[i]) for i in shown]
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat):
        if i >= len(contest.entries):
            axes.axis("off")
            continue
        table = tables[i]
        shares = (table / table.sum(1, keepdim=True).clamp(min=1))[shown][:, shown].numpy()
        axes.imshow(shares, cmap=clear_to(PALETTE[0]), vmin=0, vmax=1)
        axes.set_title(contest.entries[i].name, fontsize=9)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.tick_params(length=0)
        if len(names) <= 6:
            for y, x in np.ndindex(*shares.shape):
                axes.text(x, y, f"{100 * shares[y, x]:.0f}", ha="center", va="center", fontsize=8)
    figure.tight_layout()
    few = f" Of {count:,} classes, the {CONFUSED} that are most often mistaken." if count > CONFUSED else ""
    yield Picture(
        "Confusions", svg(figure, "Confusions"),
        f"The answers behind {LEADING[protocol]}: of each true class (row), the share taken for each class (column)."
        f"{few}",
    )  # fmt: skip


def cost(contest: Contest) -> Iterator[Picture]:
    """Accuracy against multiply-adds, parameters, and hours of pretraining where all are known."""
    if (protocol := leading(contest.entries[0])) is None:
        return
    panels: dict[str, Callable[[Entry], float | None]] = {
        "multiply-adds of one image, G": lambda one: one.cost.multiply_adds / 1e9,
        "parameters, M": lambda one: one.cost.parameters / 1e6,
        "hours of a GPU, or CPU, in training": lambda one: one.cost.hours(),
    }
    panels = {label: value for label, value in panels.items() if all(value(one) for one in contest.entries)}
    alike: dict[tuple[str, str], list[Entry]] = {}
    for one in sorted(contest.entries, key=lambda one: one.cost.multiply_adds):
        alike.setdefault((one.config.objective, one.family), []).append(one)
    figure = Figure(figsize=(WIDTH, 2.8))
    for axes, (label, value) in zip(figure.subplots(1, len(panels), sharey=True), panels.items()):
        for same in alike.values():
            axes.plot([value(one) for one in same], [100 * score(one) for one in same], color=INK, lw=0.6, alpha=0.4)
        for one, colour in coloured(contest):
            axes.plot(value(one), 100 * score(one), "o", color=colour, ms=7)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.margins(x=0.2, y=0.2)
    figure.axes[0].set_ylabel(f"{LEADING[protocol]}, %")
    legend(figure, contest)
    caption = "Up and to the left is better. Lines: CNNs, or ViTs, of one objective, by their multiply-adds."
    yield Picture("Accuracy and cost", svg(figure, "Accuracy and cost"), caption)


def trustworthy(contest: Contest) -> Iterator[Picture]:
    """Label-free scores against k-NN accuracy, or linear accuracy where there is none."""
    rows = trust(contest)
    if not rows:
        return
    accuracy = rows[0].accuracy
    label = accuracy.removesuffix("_top1").replace("knn", "k-NN")
    figure = Figure(figsize=(WIDTH, 4.4))
    for axes, name in zip(figure.subplots(2, 3, sharey=True).flat, LABEL_FREE):
        points = having(contest, f"label_free_{name}", accuracy)
        for one, colour in coloured(contest):
            if one.name in points:
                x, y = points[one.name]
                axes.plot(x, 100 * y, "o", color=colour, ms=5)
        axes.set_xlabel(name.replace("_", " "))
        axes.margins(0.15)
    for axes in (figure.axes[0], figure.axes[3]):
        axes.set_ylabel(f"{label}, %")
    figure.tight_layout()
    legend(figure, contest)
    yield Picture(
        "Scores without labels", svg(figure, "Scores without labels"),
        f"A score is worth something here as far as {label} accuracy rises, or falls, with it.",
    )  # fmt: skip


def robustness(contest: Contest) -> Iterator[Picture]:
    """k-NN accuracy under every change, by severity."""
    if not all("robustness_clean_right" in one.trained.evidence for one in contest.entries):
        return
    for title, changes, caption in (
        ("What it sees through: place, size, and missing parts", tuple(GEOMETRY),
         "Shift by 5 to 25 % of the side; crop of 80 to 15 % of the area; shrunk to 85 to 30 %; turned by 15 to 90 "
         "degrees; 15 to 75 % of the patches hidden; patches of a 2 to 8 a side grid shuffled."),
        ("What it sees through: corruptions", tuple(CORRUPTIONS),
         "ImageNet-C's corruptions at their five severities (Hendrycks & Dietterich 2019); the ice of frost is drawn."),
    ):  # fmt: skip
        columns = 3 if len(changes) == 6 else 5
        rows = -(-len(changes) // columns)
        figure = Figure(figsize=(WIDTH, 1.55 * rows + 0.4))
        for axes, name in zip(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat, changes):
            for one, colour in coloured(contest):
                clean = 100 * float(one.trained.numbers["robustness_clean"] or 0)
                curve = 100 * one.trained.evidence[f"robustness_{name}_right"].double().mean(1).numpy()
                axes.plot(range(6), [clean, *curve], color=colour, lw=1.4)
            axes.set_title(name.replace("_", " "), fontsize=8)
            axes.set_xticks([0, 5], ["clean", "worst"], fontsize=7)
            axes.tick_params(axis="y", labelsize=7)
        for axes in figure.axes[len(changes) :]:
            axes.axis("off")
        figure.tight_layout()
        legend(figure, contest)
        images = len(contest.entries[0].trained.evidence["robustness_clean_right"])
        yield Picture(
            title, svg(figure, title),
            f"k-NN accuracy in per cent on {images} changed validation images, against the unchanged training images, "
            f"by severity. {caption}",
        )  # fmt: skip


def similarity(contest: Contest) -> Iterator[Picture]:
    """Linear CKA between the layers of rivals, and within each."""
    found = {one.name: one.trained.evidence.get("similarity_grams", torch.empty(0)) for one in contest.entries}
    pairs = [
        (a, b) for a, b in rivals(contest) if len(found[a.name]) and found[a.name].shape[1:] == found[b.name].shape[1:]
    ]
    of_pairs = f" Of the {len(pairs)} pairs that meet on this page, the first {DRAWN} are drawn."
    for first, second in pairs[:DRAWN]:
        grams = [found[one.name] for one in (first, second)]
        figure = Figure(figsize=(WIDTH, 2.7))
        shown: Sequence[tuple[Entry, Entry, int, int]] = (
            (first, first, 0, 0), (second, second, 1, 1), (first, second, 0, 1),
        )  # fmt: skip
        for axes, (a, b, i, j) in zip(figure.subplots(1, 3), shown):
            table = cka(grams[i], grams[j]).clamp(0, 1).numpy()
            axes.imshow(table, cmap=clear_to(PALETTE[0]), vmin=0, vmax=1, origin="lower", aspect="auto")
            axes.set_xlabel(b.name, fontsize=8)
            axes.set_ylabel(a.name, fontsize=8)
            axes.set_xticks([0, table.shape[1] - 1], ["1", str(table.shape[1])], fontsize=7)
            axes.set_yticks([0, table.shape[0] - 1], ["1", str(table.shape[0])], fontsize=7)
            for y, x in np.ndindex(*table.shape):
                if max(table.shape) <= 6:
                    axes.text(x, y, f"{table[y, x]:.2f}"[1:] if table[y, x] < 0.995 else "1", ha="center",
                              va="center", fontsize=7)  # fmt: skip
        figure.tight_layout()
        title = f"How alike the layers are: {first.name}, {second.name}"
        yield Picture(
            title, svg(figure, title),
            "Linear CKA of all activations, 0 (nothing in common, the page's colour) to 1 (the same but for rotation "
            "and scale), from the input on: of a ViT every block, of a CNN every residual block."
            f"{of_pairs if len(pairs) > DRAWN else ''}",
        )  # fmt: skip


def depth(contest: Contest) -> Iterator[Picture]:
    """Gradients, activations and the distance of attention by depth, whichever was looked at."""
    panels: Sequence[tuple[str, str, str]] = (
        ("depth_gradient", "gradient, root mean square",
         "Gradient of the pooled features with respect to the parameters at each depth."),
        ("depth_activation", "activation, root mean square", "The size of the activations at each depth."),
        ("seeing_distance", "attention distance, share of side",
         "Of transformers, how far each head looks (dots) and their mean."),
    )  # fmt: skip
    panels = tuple(p for p in panels if any(p[0] in one.trained.evidence for one in contest.entries))
    if not panels:
        return
    figure = Figure(figsize=(WIDTH, 2.8))
    for axes, (key, label, _) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        for one, colour in coloured(contest):
            if key not in one.trained.evidence:
                continue
            curve = one.trained.evidence[key].numpy()
            at = np.arange(1, len(curve) + 1) / len(curve)
            if curve.ndim == 2:
                axes.plot(np.repeat(at, curve.shape[1]), curve.flatten(), ".", color=colour, ms=3, alpha=0.6)
                curve = curve.mean(1)
            axes.plot(at, curve, "o-", color=colour, ms=2.5, lw=1.2)
        if key == "seeing_distance":
            axes.set_ylim(0, max(0.75, axes.get_ylim()[1]))
        else:
            axes.set_yscale("log")
        axes.set_title(label, fontsize=8)
        axes.set_xticks([0, 1], ["input", "last"])
        axes.tick_params(which="both", labelsize=7)
    figure.tight_layout()
    legend(figure, contest)
    yield Picture("By depth", svg(figure, "By depth"), " ".join(caption for _, _, caption in panels))
