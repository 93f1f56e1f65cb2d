"""The verdict in sentences, each made from a tested number and worded by whether the test found anything.

Every claim compares two backbones on the same images in pairs. All claims of a report are tested together: their
p-values are adjusted (Holm 1979), so that the chance of a single false "beats" among them stays at 5 %. For that, who
meets whom is not chosen on the images that judge: it is by training images held out, where a linear classifier was
tuned on them; else every pair that might have met is adjusted for as well.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import NamedTuple

import torch
from torch import Tensor

import objectives
from backbones import names
from pipeline.config import departures
from pipeline.evaluation import interval
from pipeline.evaluation.changes import CORRUPTIONS, GEOMETRY
from pipeline.evaluation.duplicates import Met
from pipeline.evaluation.evaluate import Findings
from pipeline.evaluation.paired import Difference, balanced, difference, holm, of_statistics
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.report.contest import Contest, Entry

LEVEL = 0.05
UNEQUAL = 0.1
"""A difference in images seen, parameters or compute above this share is told at the top of the report."""

BUDGETS = {"n1": "1 label a class", "n5": "5 labels a class", "n10": "10 labels a class", "p1": "1 % of the labels",
           "p10": "10 % of the labels"}  # fmt: skip
LEADING = {"linear": "linear accuracy", "knn": "k-NN accuracy", "logistic": "logistic-regression accuracy",
           "attentive": "attentive-probe accuracy", "finetune": "fine-tuned accuracy",
           "multilabel": "mAP over several labels", "regression": "explained variance",
           "low_shot": f"accuracy with {BUDGETS['n10']}", "retrieval": "retrieval mAP",
           "scratch": "accuracy from scratch"}  # fmt: skip
"""What the headlines of protocols are called that tell how good a backbone is. The first that was measured stands for
it, and is what it is set against its floors in."""
BEHIND = {"multilabel": "drawn", "regression": "drawn", "low_shot": "n10_right", "retrieval": "precision"}
"""The evidence that is compared, where it is no class predicted for every image."""
UNEVEN = 1.5
"""How many times as many images as the smallest class the largest may have before balanced accuracy leads."""
TUNED = ("linear", "logistic")
"""The protocols that keep their accuracy on training images held out; the first that was measured chooses who meets."""
PUBLISHED = 64_000 * 128
"""Images that He et al. 2016, section 4.2, train each plain and residual net on, repetitions counted."""
FEW = 5
"""Claims up to which a sentence gives the difference of each."""
UNDER = "k-NN accuracy under "
RANKED = ("knn_top1", "linear_top1")
"""The accuracies that label-free scores are held against."""
LABEL_FREE = ("rankme", "alpha_req", "effective_rank", "uniformity", "alignment", "lidar")


class Claim(NamedTuple):
    """That `first` differs from `second`, a `floor` or another backbone, in `what`; `p` is adjusted for all claims of
    the report."""

    first: str
    second: str
    what: str
    difference: Difference
    p: float
    floor: bool = False

    @property
    def significant(self) -> bool:
        return self.p < LEVEL

    def sentence(self) -> str:
        points, half = 100 * self.difference.mean, 50 * (self.difference.high - self.difference.low)
        if not self.significant:
            return (
                f"No difference between {self.first} and {self.second} was found in {self.what} "
                f"({_points(self).removesuffix(' points')} ± {half:.1f} points)."
            )
        better, worse = (self.first, self.second) if points > 0 else (self.second, self.first)
        return f"{better} beats {worse} by {abs(points):.1f} ± {half:.1f} points of {self.what}."


def rivals(contest: Contest) -> list[tuple[Entry, Entry]]:
    """Who is set against whom: for every objective its best CNN against its best ViT, and the best two of all where
    that is another pair. A CNN against a ViT comes first, for that is the question; then who is best. Before all, of
    plain and of residual nets that were not pretrained, the shallowest against the deepest: degradation."""
    good = held_out if chosen_apart(contest) else score
    order = sorted(contest.entries, key=lambda one: -good(one))
    pairs = []
    for objective in dict.fromkeys(one.config.objective for one in order):
        best = {family: one for one in reversed(order) if one.config.objective == objective for family in [one.family]}
        if len(best) > 1:
            pairs.append((best["cnn"], best["vit"]))
    first, second = order[0], order[1]
    if not any({first.name, second.name} == {a.name, b.name} for a, b in pairs):
        pairs.insert(0, (first, second))
    pairs.sort(key=lambda pair: (pair[0].family == pair[1].family, -max(good(one) for one in pair)))
    ends = [(nets[min(nets)], nets[max(nets)]) for nets in by_depth(contest).values() if len(nets) > 1]
    ends = [pair for pair in ends if not any(one.run for one in pair)]
    known = [{one.name for one in pair} for pair in ends]
    return ends + [pair for pair in pairs if {one.name for one in pair} not in known]


def chosen_apart(contest: Contest) -> bool:
    """Whether who meets whom is told by images that do not judge."""
    return all(held_out(one) for one in contest.entries)


def held_out(one: Entry) -> float:
    """Accuracy on training images held out, of the best that its linear classifier may read; 0 where not measured."""
    numbers = one.trained.numbers
    tried = ([float(numbers[key] or 0) for key in numbers if key.startswith(f"{name}_held_out_")] for name in TUNED)
    return next((max(accuracies) for accuracies in tried if accuracies), 0.0)


def by_depth(contest: Contest) -> dict[str, dict[int, Entry]]:
    """The "plain" and "resnet" nets of He et al. 2016, section 4.2, that were trained from scratch, by their layers."""
    found: dict[str, dict[int, Entry]] = {}
    for one in contest.entries:
        if (net := names.cifar_net(one.config.backbone)) and "scratch_train_error" in one.trained.numbers:
            found.setdefault(net[0], {})[net[1]] = one
    return found


def score(one: Entry) -> float:
    """How good a backbone is on the images that judge; 0 where that was not measured."""
    protocol = leading(one)
    return float(one.trained.numbers[headline(protocol)] or 0.0) if protocol else 0.0


def leading(one: Entry) -> str | None:
    """The protocol whose headline stands for a backbone; None where none of `LEADING` was measured."""
    return next((name for name in LEADING if one.trained.numbers.get(headline(name)) is not None), None)


def headline(protocol: str) -> str:
    """The name of the number that stands for a protocol."""
    return f"{protocol}_{PROTOCOLS[protocol].headline}"


def claims(contest: Contest) -> list[Claim]:
    """Everything that is tested, the p-values adjusted together."""
    found = []
    for first, second in rivals(contest):
        for what, by in measured(first.trained, second.trained):
            found.append((first.name, second.name, what, by, False))
    for one in contest.entries:
        for floor, findings in zip(one.floors, (one.untrained, one.pixels)):
            above = (by for protocol in LEADING for by in compared(one.trained, findings, protocol))
            found += [(one.name, floor, what, by, True) for what, by in islice(above, 1)]
    adjusted = holm([*(one[3].p for one in found), *passed_over(contest)])
    return [Claim(*one[:4], p, one[4]) for one, p in zip(found, adjusted)]


def passed_over(contest: Contest) -> list[float]:
    """The p-values of all pairs that did not meet but might have, had the images that judge said otherwise."""
    if chosen_apart(contest):
        return []
    met = [{first.name, second.name} for first, second in rivals(contest)]
    others = [pair for pair in combinations(contest.entries, 2) if {one.name for one in pair} not in met]
    return [by.p for first, second in others for _, by in measured(first.trained, second.trained)]


def measured(first: Findings, second: Findings) -> Iterator[tuple[str, Difference]]:
    """What two backbones can be compared in on the same images, and how they differ in it."""
    for protocol in LEADING:
        if protocol not in ("low_shot", "retrieval"):
            yield from compared(first, second, protocol)
    mine, theirs = first.evidence, second.evidence
    if (key := "scratch_train_right") in mine and key in theirs:
        yield "accuracy on what was learnt from scratch", difference(mine[key], theirs[key])
    for budget, what in BUDGETS.items():
        if (key := f"low_shot_{budget}_right") in mine and key in theirs:
            yield f"accuracy with {what}", difference(mine[key], theirs[key])
    yield from compared(first, second, "retrieval")
    for factor in ("shape", "texture"):
        if (key := f"factors_{factor}_right") in mine and key in theirs:
            yield f"linear accuracy on {factor}", difference(mine[key], theirs[key])
    if "robustness_clean_right" in mine and "robustness_clean_right" in theirs:
        for name in GEOMETRY:
            a, b = (one[f"robustness_{name}_right"].double().mean(0) for one in (mine, theirs))
            yield f"{UNDER}{name.replace('_', ' ')}", difference(a, b)
        a, b = (
            torch.stack([one[f"robustness_{name}_right"].double().mean(0) for name in CORRUPTIONS]).mean(0)
            for one in (mine, theirs)
        )
        yield f"{UNDER}corruptions", difference(a, b)


def compared(first: Findings, second: Findings, protocol: str) -> Iterator[tuple[str, Difference]]:
    """How two backbones differ in what stands for a protocol, before it in balanced accuracy where their classes are
    uneven; nothing where one of them did not go through it."""
    what, behind = LEADING[protocol], BEHIND.get(protocol, "predicted")
    mine, theirs = (one.evidence.get(f"{protocol}_{behind}") for one in (first, second))
    if mine is None or theirs is None:
        return
    if behind == "drawn":
        yield what, of_statistics(mine.numpy(), theirs.numpy(), int(first.numbers["val_images"] or 0))
    elif behind == "predicted":
        right, others = mine == first.labels, theirs == second.labels
        if uneven(first.labels):
            yield f"balanced {what}", balanced(right, others, first.labels)
        yield what, difference(right, others)
    else:
        yield what, difference(mine, theirs)


def uneven(labels: Tensor) -> bool:
    """Whether the classes [N] of images differ in size by more than `UNEVEN`."""
    sizes = labels.bincount()
    return len(labels) > 0 and int(sizes.max()) > UNEVEN * int(sizes[sizes > 0].min())


def sentences(contest: Contest, tested: Sequence[Claim]) -> list[str]:
    """The verdict, most important first."""
    return [text for text, _ in with_evidence(contest, tested)]


def with_evidence(contest: Contest, tested: Sequence[Claim]) -> list[tuple[str, list[Claim]]]:
    """Every sentence of the verdict and the claims that it stands on; none under those that count images shown."""
    found: list[tuple[str, list[Claim]]] = []
    for first, second in rivals(contest):
        of = [claim for claim in tested if (claim.first, claim.second) == (first.name, second.name)]
        if not of:
            continue
        lead = of[0].sentence()
        lead = f"{lead[0].lower() if lead.startswith('No ') else lead[0]}{lead[1:]}"
        found.append((f"On these {of[0].difference.images:,} images {lead}", of[:1]))
        found += _grouped(first, second, of[0], of[1:])
    for one in contest.entries:
        unproven = [
            claim
            for claim in tested
            if claim.first == one.name and claim.floor and not (claim.significant and claim.difference.mean > 0)
        ]
        if unproven:
            floors = " or ".join(
                f"{'its untrained self' if claim.second == one.floors[0] else claim.second} ({_points(claim)}"
                f"{', significantly worse' if claim.significant else ''})"
                for claim in unproven
            )
            text = f"{one.name} was not found to be better than {floors} in {unproven[0].what}"
            if any(claim.second == one.floors[0] for claim in unproven):
                text += ": its pretraining has not shown its worth here"
            found.append((f"{text}.", unproven))
    return [*found, *((text, []) for text in from_scratch(contest))]


def from_scratch(contest: Contest) -> Iterator[str]:
    """How long the networks learnt that were trained from scratch, and what that is too short for."""
    lengths: dict[float, list[str]] = {}
    for one in contest.entries:
        if epochs := one.trained.numbers.get("scratch_epochs"):
            lengths.setdefault(epochs, []).append(one.name)
    for epochs, names_of in lengths.items():
        who = "each network" if len(lengths) == 1 else ", ".join(names_of)
        length = f"{epochs:,.1f}".removesuffix(".0") + (" epoch" if epochs == 1 else " epochs")
        yield f"From scratch {who} learnt for {length} of {contest.train_images:,} images."
    shown = max(lengths, default=0.0) * contest.train_images
    if by_depth(contest) and shown < (1 - UNEQUAL) * PUBLISHED:
        yield (
            f"He et al. 2016, section 4.2, show their plain and residual nets {PUBLISHED / 1e6:.1f} million images, "
            f"{PUBLISHED / shown:,.0f} times as many: what depth does here need not be what they found."
        )


def _points(claim: Claim) -> str:
    return f"{100 * claim.difference.mean:+.1f} points".replace("-", "−")


def _grouped(
    first: Entry, second: Entry, lead: Claim, others: Sequence[Claim]
) -> Iterator[tuple[str, list[Claim]]]:  # fmt: skip
    """The other claims on a pair, those that say the same in one sentence."""
    images = lead.difference.images
    for winner, loser, sign in ((first, second, 1), (second, first, -1)):
        won = [claim for claim in others if claim.significant and claim.difference.mean * sign > 0]
        also = "also " if lead.significant and lead.difference.mean * sign > 0 else ""
        if won:
            yield f"{winner.name} is {also}better than {loser.name} in {_listed(won, images)}.", won
    undecided = [claim for claim in others if not claim.significant]
    if undecided:
        signed = f"; a plus is in favour of {first.name}" if len(undecided) <= FEW else ""
        yield f"No difference between them was found in {_listed(undecided, images)}{signed}.", undecided


def _listed(of: Sequence[Claim], images: int) -> str:
    """What claims are about, with their differences where they are few, and on how many images where not on so many;
    those under a change of the images together."""
    changed = [claim for claim in of if claim.what.startswith(UNDER)]
    parts: list[str] = []
    for claim in of:
        name, said = claim.what, []
        if len(of) <= FEW:
            half = 50 * (claim.difference.high - claim.difference.low)
            points = _points(claim).removesuffix(" points")
            said.append(f"{points.lstrip('+−') if claim.significant else points} ± {half:.1f}")
        if claim.difference.images != images and claim not in changed[:-1]:
            each = "each " if claim in changed[1:] else ""
            said.append(f"{each}on {claim.difference.images:,} images")
        if claim in changed[1:]:  # the second "k-NN accuracy under …" of a sentence is a mere "…"
            name = name.removeprefix(UNDER)
        parts.append(f"{name} ({', '.join(said)})" if said else name)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def unfair(contest: Contest) -> list[str]:
    """What the backbones do not have in common, and what stands behind them that no count of images shows, in sentences
    for the top of the report."""
    pretrained: dict[Met, list[str]] = {}
    for one in contest.entries:
        pretrained.setdefault(one.met, []).append(one.name)
    found = [said for met, whose in pretrained.items() if (said := met.sentence(whose))]
    uncounted = "masks not deducted, heads and teacher not counted"
    for what, value, shown in (
        ("images seen in pretraining", lambda one: one.cost.images_seen, "{:,.0f}"),
        ("parameters", lambda one: one.cost.parameters, "{:,.0f}"),
        (f"multiply-adds of pretraining ({uncounted})", lambda one: one.cost.compute, "{:.2g}"),
    ):
        values = {one.name: float(value(one)) for one in contest.entries}
        some = [name for name in values if values[name]]
        least, most = (choose(some or values, key=values.__getitem__) for choose in (min, max))
        if none := [name for name in values if not values[name] and some]:
            found.append(f"{what}: {most} has {shown.format(values[most])}, {' and '.join(none)} none")
        if values[most] > (1 + UNEQUAL) * values[least]:
            found.append(f"{what}: {most} has {values[most] / values[least]:.1f} times as many as {least}")
    for what, option in (
        ("image size", lambda one: f"{one.config.image_size} px"),
        ("training images", lambda one: f"limit {one.config.limit}" if one.config.limit else "all"),
        ("data", lambda one: one.config.data),
        ("validation data of pretraining", lambda one: one.config.val_data or "left open"),
        ("seed", lambda one: str(one.config.seed)),
    ):
        if len({option(one) for one in contest.entries}) > 1:
            found.append(f"{what}: " + ", ".join(f"{one.name} {option(one)}" for one in contest.entries))
    if earlier := [f"{one.name} {said}" for one in contest.entries for said in _earlier(one)]:
        found.append(f"earlier training, which is not counted here: {', '.join(earlier)}")
    taught = [one.name for one in contest.entries if one.run and objectives.objective(one.config.objective).labelled]
    if 0 < len(taught) < len(contest.entries):
        found.append(f"labels in pretraining: {' and '.join(taught)} learnt from them")
    if own := [one.name for one in contest.entries if "unpublished" in (one.config.recipe or "")]:
        found.append(f"no published tuning stands behind the recipe of {', '.join(own)}")
    changed: dict[str, list[str]] = {}
    for one in contest.entries:
        if changes := departures(one.config):
            changed.setdefault(", ".join(changes), []).append(one.name)
    found += [f"{', '.join(whose)} otherwise than by the recipe: {changes}" for changes, whose in changed.items()]
    return found


def _earlier(one: Entry) -> Iterator[str]:
    """From what other training a backbone has learnt."""
    for begins, address in (
        ("begins with the weights of", one.config.init),
        ("goes on from", one.config.options.get("checkpoint")),
        ("is taught by", one.config.options.get("teacher")),
    ):
        if address:
            yield f"{begins} {address}"


class Trust(NamedTuple):
    """How far a label-free score ranks so many runs as an accuracy does, the p-value adjusted for all rows."""

    score: str
    accuracy: str
    runs: int
    correlation: interval.Correlation


def trust(contest: Contest) -> list[Trust]:
    """What label-free scores are worth here, each over the trained runs that have it; those of at least four."""
    found = []
    for name in LABEL_FREE:
        for accuracy in RANKED:
            pairs = having(contest, f"label_free_{name}", accuracy)
            if len(pairs) >= 4:
                x, y = torch.tensor(list(pairs.values()), dtype=torch.float64).T
                found.append(Trust(name, accuracy, len(pairs), interval.rank_correlation(x, y)))
    adjusted = holm([one.correlation.p for one in found])
    return [one._replace(correlation=one.correlation._replace(p=p)) for one, p in zip(found, adjusted)]


def having(contest: Contest, *keys: str) -> dict[str, list[float]]:
    """Numbers of the trained backbones that have all of them, by name; NaN is none."""
    values = {one.name: [one.trained.numbers.get(key) for key in keys] for one in contest.entries}
    return {
        name: [float(value) for value in of if value is not None]
        for name, of in values.items()
        if all(value is not None and not math.isnan(value) for value in of)
    }
