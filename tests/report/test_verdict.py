"""Does the verdict say what was tested, no more and no less?"""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import config, recipes
from pipeline.evaluation.evaluate import Findings
from pipeline.evaluation.paired import Difference, holm
from pipeline.report import page, verdict
from pipeline.report.contest import Contest
from tests.report.contests import contest, entry, factored, findings, scratch, shaken


@pytest.fixture(scope="module")
def clear() -> Contest:
    """The ViT is much better than the CNN, which is better than the floors."""
    floor = findings(3.0, 9)
    return contest(
        [entry("resnet18", "dino", findings(0.9, 1), floor), entry("vit_ti16", "dino", findings(0.5, 2), floor)], floor
    )


@pytest.fixture(scope="module")
def equal() -> Contest:
    """Both are equally good, and no better than their untrained selves."""
    floor = findings(0.8, 9)
    return contest(
        [entry("resnet18", "dino", findings(0.8, 1), floor), entry("vit_ti16", "dino", findings(0.8, 2), floor)], floor
    )


def test_a_clear_winner_is_named_with_its_lead(clear: Contest) -> None:
    first, *others = verdict.sentences(clear, verdict.claims(clear))
    found = re.fullmatch(
        r"On these 400 images vit_ti16 \+ dino beats resnet18 \+ dino by ([\d.]+) ± ([\d.]+) points of "
        r"k-NN accuracy\.",
        first,
    )
    assert found
    a, b = (one.trained.numbers["knn_top1"] for one in clear.entries)
    assert float(found[1]) == pytest.approx(100 * (b - a), abs=0.051)
    assert 1 < float(found[2]) < 8
    assert any(
        line.startswith("vit_ti16 + dino is also better than resnet18 + dino in logistic-regression accuracy")
        for line in others
    )
    assert not any("untrained" in line for line in others)


def test_no_winner_is_named_where_there_is_none(equal: Contest) -> None:
    tested = verdict.claims(equal)
    lines = verdict.sentences(equal, tested)
    assert lines[0].startswith(
        "On these 400 images no difference between resnet18 + dino and vit_ti16 + dino was found"
    )
    assert not any("beats" in line or "better than vit" in line or "better than resnet" in line for line in lines)
    doubts = [line for line in lines if "was not found to be better than its untrained self (" in line]
    assert len(doubts) == 2
    assert not any(claim.significant for claim in tested)


def test_pretraining_is_doubted_only_where_the_untrained_floor_was_not_beaten(equal: Contest, clear: Contest) -> None:
    good, poor = clear.entries[1].trained, equal.entries[0].untrained
    weak = entry("resnet18", "dino", poor, findings(3.0, 9))
    held = contest([weak, clear.entries[1]], good)
    lines = [line for line in verdict.sentences(held, verdict.claims(held)) if "was not found to be better" in line]
    (of_weak,) = (line for line in lines if line.startswith("resnet18"))
    only = (
        r"resnet18 \+ dino was not found to be better than raw pixels \(−\S+ points, significantly worse\) "
        r"in k-NN accuracy\."
    )
    assert re.fullmatch(only, of_weak)
    lines = verdict.sentences(equal, verdict.claims(equal))
    assert sum(line.endswith("accuracy: its pretraining has not shown its worth here.") for line in lines) == 2


def test_who_holds_under_crops_and_corruptions_is_said(equal: Contest) -> None:
    cnn, vit = equal.entries
    firm = replace(vit, trained=shaken(vit.trained, 1, crop=0.9))
    weak = replace(cnn, trained=shaken(cnn.trained, 2, crop=0.6))
    tested = verdict.claims(replace(equal, entries=(weak, firm)))
    by_what = {claim.what: claim for claim in tested if not claim.floor}
    assert {name for name in by_what if "under" in name} == {
        *(
            f"k-NN accuracy under {name}"
            for name in ("shift", "crop", "scale", "rotation", "occlusion", "patch shuffle")
        ),
        "k-NN accuracy under corruptions",
    }
    crop = by_what["k-NN accuracy under crop"]
    expected = [one.trained.evidence["robustness_crop_right"].double().mean().item() for one in (firm, weak)]
    sign = 1 if crop.first == firm.name else -1
    assert crop.difference.mean == pytest.approx(sign * (expected[0] - expected[1]))
    lines = verdict.sentences(replace(equal, entries=(weak, firm)), tested)
    (won,) = [line for line in lines if line.startswith("vit_ti16 + dino is better than resnet18 + dino in ")]
    assert re.fullmatch(r".* in k-NN accuracy under crop \([\d.]+ ± [\d.]+\)\.", won)
    (undecided,) = [line for line in lines if line.startswith("No difference between them was found in ")]
    assert "k-NN accuracy under shift, scale, rotation, occlusion, patch shuffle and corruptions" in undecided

    names = ("gaussian_noise", "shot_noise", "impulse_noise", "fog", "snow", "jpeg", "contrast", "elastic")
    noisy = replace(weak, trained=shaken(cnn.trained, 2, **dict.fromkeys(names, 1.0)))
    other = replace(firm, trained=shaken(vit.trained, 1))
    held = replace(equal, entries=(noisy, other))
    lines = verdict.sentences(held, verdict.claims(held))
    (won,) = [line for line in lines if line.startswith("resnet18 + dino is better than vit_ti16 + dino in ")]
    assert "k-NN accuracy under corruptions (" in won


def test_the_sign_of_a_claim_decides_who_is_named() -> None:
    won = verdict.Claim("a", "b", "linear accuracy", Difference(0.021, 0.013, 0.029, 1e-6, 400), 1e-5)
    lost = verdict.Claim("a", "b", "linear accuracy", Difference(-0.021, -0.029, -0.013, 1e-6, 400), 1e-5)
    unsure = verdict.Claim("a", "b", "linear accuracy", Difference(0.021, 0.001, 0.041, 0.04, 400), 0.3)
    assert won.sentence() == "a beats b by 2.1 ± 0.8 points of linear accuracy."
    assert lost.sentence() == "b beats a by 2.1 ± 0.8 points of linear accuracy."
    assert unsure.sentence() == "No difference between a and b was found in linear accuracy (+2.1 ± 2.0 points)."


def test_shape_and_texture_are_tested(clear: Contest) -> None:
    cnn, vit = clear.entries
    pair = (
        replace(cnn, trained=factored(cnn.trained, shape=0.3, texture=0.8)),
        replace(vit, trained=factored(vit.trained, shape=0.7, texture=0.5)),
    )
    held = replace(clear, entries=pair)
    tested = verdict.claims(held)
    of = {claim.what: claim for claim in tested}
    assert abs(of["linear accuracy on shape"].difference.mean) == pytest.approx(0.4)
    assert abs(of["linear accuracy on texture"].difference.mean) == pytest.approx(0.3)
    lines = verdict.sentences(held, tested)
    assert any(
        line.startswith("resnet18 + dino is better than vit_ti16 + dino in linear accuracy on tex") for line in lines
    )
    assert any("vit_ti16 + dino is also better" in line and "on shape" in line for line in lines)


def test_what_stands_on_other_images_than_the_lead_says_so(clear: Contest) -> None:
    entries = []
    for i, one in enumerate(reversed(clear.entries)):
        found = shaken(one.trained, i, crop=0.9 - 0.3 * i)
        fewer = {key: of[..., :150] for key, of in found.evidence.items() if key.startswith("robustness")}
        entries.append(replace(one, trained=found._replace(evidence=found.evidence | fewer)))
    held = replace(clear, entries=tuple(entries))
    tested = verdict.claims(held)
    assert {claim.difference.images for claim in tested if claim.what.startswith(verdict.UNDER)} == {150}
    assert {claim.difference.images for claim in tested if not claim.what.startswith(verdict.UNDER)} == {400}
    lines = verdict.sentences(held, tested)
    assert any(re.search(r"k-NN accuracy under crop \(.*on 150 images\)\.", line) for line in lines)
    (undecided,) = [line for line in lines if line.startswith("No difference between them was found in ")]
    assert undecided.endswith("patch shuffle and corruptions (each on 150 images).")
    assert f"<td>150</td><td>{100 * tested[-5].difference.mean:+.1f}</td>" in page.render(held, [], ["compare"])


def test_what_is_undecided_keeps_its_sign() -> None:
    def claim(what: str, mean: float, p: float) -> verdict.Claim:
        return verdict.Claim("a", "b", what, Difference(mean, mean - 0.02, mean + 0.02, p, 400), p)

    floor = findings(3.0, 9, ("knn",))
    first, second = (replace(entry("resnet18", "dino", floor, floor), name=name) for name in "ab")
    held = contest([first, second], floor)
    assert [(a.name, b.name) for a, b in verdict.rivals(held)] == [("a", "b")]
    said = (("linear accuracy", -0.05, 1e-4), ("k-NN accuracy", -0.01, 0.3), ("retrieval mAP", 0.01, 0.3))
    tested = [claim(*one) for one in said]
    assert verdict.sentences(held, tested)[1] == (
        "No difference between them was found in k-NN accuracy (−1.0 ± 2.0) and retrieval mAP (+1.0 ± 2.0); a plus is "
        "in favour of a."
    )


def test_claims_are_adjusted_together_and_cover_every_measure(clear: Contest) -> None:
    tested = verdict.claims(clear)
    assert all(claim.p >= claim.difference.p for claim in tested)
    assert min(claim.p for claim in tested) > min(claim.difference.p for claim in tested)
    whats = {claim.what for claim in tested if claim.second == "vit_ti16 + dino"}
    assert {
        "k-NN accuracy",
        "retrieval mAP",
        "accuracy with 1 label a class",
        "accuracy with 10 % of the labels",
    } <= whats


def test_a_cnn_meets_a_vit_of_the_same_objective_and_the_best_meet_too() -> None:
    floor, good, fair, poor = (findings(noise, own, ("knn",)) for own, noise in enumerate((3, 0.5, 0.9, 1.5)))
    entries = [
        entry("resnet18", "dino", fair, floor), entry("vit_ti16", "dino", poor, floor),
        entry("resnet18", "mae", poor, floor), entry("vit_ti16", "mae", good, floor),
    ]  # fmt: skip
    pairs = [(a.name, b.name) for a, b in verdict.rivals(contest(entries, floor))]
    assert set(pairs) == {
        ("resnet18 + mae", "vit_ti16 + mae"),
        ("resnet18 + dino", "vit_ti16 + dino"),
        ("vit_ti16 + mae", "resnet18 + dino"),
    }
    entries = [
        entry("resnet18", "mae", good, floor), entry("resnet18", "dino", fair, floor),
        entry("vit_ti16", "dino", poor, floor),
    ]  # fmt: skip
    assert [(a.name, b.name) for a, b in verdict.rivals(contest(entries, floor))] == [
        ("resnet18 + dino", "vit_ti16 + dino"),  # the question, before who is best
        ("resnet18 + mae", "resnet18 + dino"),
    ]


def alike(rng: np.random.Generator, cnns: int, *, tuned: bool) -> Contest:
    """One ViT and so many CNNs, all right about 70 % of images, in the linear protocol or, not `tuned`, by k-NN."""
    protocol, labels = "linear" if tuned else "knn", torch.zeros(400, dtype=torch.int64)
    nothing = Findings({}, {}, labels)
    entries = []
    for i in range(cnns + 1):
        predicted = torch.from_numpy(rng.random(400) >= 0.7).long()
        numbers: dict[str, float | int | None] = {f"{protocol}_top1": 1 - predicted.double().mean().item()}
        if tuned:
            numbers["linear_held_out_mean_1"] = rng.binomial(100, 0.7) / 100
        found = Findings(numbers, {f"{protocol}_predicted": predicted}, labels)
        entries.append(replace(entry("resnet18" if i else "vit_ti16", "dino", found, nothing), name=f"run {i}"))
    return contest(entries, nothing, (protocol,))


def test_that_the_best_of_many_was_chosen_makes_no_false_lead() -> None:
    """Chosen on the images that judge, the best of fifteen would be found to differ from one as good in 10 of 100."""
    rng = np.random.default_rng(0)
    for cnns in (7, 15):
        false = sum(any(one.significant for one in verdict.claims(alike(rng, cnns, tuned=True))) for _ in range(700))
        assert 0.02 * 700 < false < 0.065 * 700, cnns


def test_where_no_image_was_held_out_all_pairs_that_might_have_met_are_adjusted_for() -> None:
    held = alike(np.random.default_rng(1), 3, tuned=False)
    tested, others = verdict.claims(held), verdict.passed_over(held)
    assert len(tested) + len(others) == 4 * 3 / 2
    own = [claim.difference.p for claim in tested]
    assert [claim.p for claim in tested] == holm([*own, *others])[: len(own)]
    assert verdict.passed_over(alike(np.random.default_rng(1), 3, tuned=True)) == []
    assert verdict.passed_over(replace(held, entries=held.entries[:2])) == []


def test_who_meets_is_told_by_training_images_held_out() -> None:
    held = alike(np.random.default_rng(2), 2, tuned=True)
    vit, first, second = held.entries
    by_val = sorted((first, second), key=lambda one: verdict.score(one))
    best = [
        replace(one, trained=one.trained._replace(numbers={**one.trained.numbers, "linear_held_out_mean_1": aside}))
        for one, aside in zip((*by_val, vit), (0.9, 0.6, 0.7))
    ]
    assert [(a.name, b.name) for a, b in verdict.rivals(replace(held, entries=tuple(best)))] == [
        (by_val[0].name, vit.name)
    ]


def test_degradation_is_what_plain_and_residual_nets_from_scratch_are_set_against_each_other_for() -> None:
    floor = Findings({}, {}, torch.empty(0))
    nets = [
        scratch("plain56", 0.5, 0.6), scratch("resnet20", 0.8, 0.9), scratch("plain20", 0.7, 0.8),
        scratch("resnet56", 0.81, 0.91),
    ]  # fmt: skip
    held = contest(nets, floor, ("scratch",))
    pairs = [(a.name, b.name) for a, b in verdict.rivals(held)]
    assert pairs == [("plain20", "plain56"), ("resnet20", "resnet56")]
    first, also, *_, length, published = verdict.sentences(held, verdict.claims(held))
    assert re.fullmatch(r"On these 400 images plain20 beats plain56 by .* points of accuracy from scratch\.", first)
    assert also.startswith("plain20 is also better than plain56 in accuracy on what was learnt from scratch (")
    assert length == "From scratch each network learnt for 2 epochs of 300 images."
    assert "13,653 times as many: what depth does here need not be what they found." in published
    longer = [scratch("plain20", 0.7, 0.8, 30_000), scratch("plain56", 0.6, 0.7, 30_000)]
    assert [line for line in verdict.from_scratch(contest(longer, floor)) if "He et al" in line] == []


def test_balanced_accuracy_leads_where_classes_are_uneven() -> None:
    labels = torch.tensor([0] * 300 + [1] * 60 + [2] * 40)
    often, rare = (torch.where(labels == 0, 0, torch.arange(400) % 4 % 3 if i else 0) for i in range(2))
    rare = torch.where((labels == 0) & (torch.arange(400) % 5 == 0), 1, torch.where(labels > 0, labels, rare))
    numbers = [
        {"linear_top1": (one == labels).double().mean().item(), "linear_held_out_mean_1": 0.5, "val_images": 400}
        for one in (often, rare)
    ]
    found = [Findings({**n}, {"linear_predicted": one}, labels) for n, one in zip(numbers, (often, rare))]
    floor = Findings({"linear_top1": 0.75}, {"linear_predicted": torch.zeros(400, dtype=torch.int64)}, labels)
    held = contest([entry("resnet18", "mae", found[0], floor), entry("vit_ti16", "mae", found[1], floor)], floor)
    first, second, *_ = verdict.claims(held)
    assert (first.what, second.what) == ("balanced linear accuracy", "linear accuracy")
    assert abs(first.difference.mean) == pytest.approx((0.8 + 1 + 1) / 3 - 1 / 3)
    assert abs(second.difference.mean) == pytest.approx((240 + 100 - 300) / 400)
    lead, *others = verdict.sentences(held, verdict.claims(held))
    assert re.search(r"vit_ti16 \+ mae beats resnet18 \+ mae by 60\.0 ± [\d.]+ points of balanced linear", lead)
    assert any(
        line.startswith("resnet18 + mae was not found to be better than its untrained self (+0.0 points)")
        and "in balanced linear accuracy" in line
        for line in others
    )
    assert "more than 1.5 times as many of these images as the smallest" in page.render(held, [], ["compare"])
    assert not verdict.uneven(torch.tensor([0, 0, 0, 2, 2]))
    assert verdict.uneven(torch.tensor([0, 0, 0, 0, 2, 2]))
    assert not verdict.uneven(torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("protocol", ["finetune", "attentive", "low_shot", "retrieval"])
def test_the_best_are_told_by_whatever_was_measured(protocol: str) -> None:
    labels, key = torch.zeros(40, dtype=torch.int64), verdict.headline(protocol)
    nothing = Findings({}, {}, labels)
    scores = {"resnet18": 0.3, "resnet50": 0.6, "vit_ti16": 0.5, "vit_s16": 0.7}
    entries = [entry(name, "dino", Findings({key: one}, {}, labels), nothing) for name, one in scores.items()]
    assert [(a.name, b.name) for a, b in verdict.rivals(contest(entries, nothing, (protocol,)))] == [
        ("resnet50 + dino", "vit_s16 + dino")
    ]


def test_what_is_unequal_is_said(clear: Contest) -> None:
    assert verdict.unfair(clear) == []
    cnn, vit = clear.entries
    more = replace(vit, cost=replace(vit.cost, images_seen=30_000), config=replace(vit.config, image_size=96))
    lines = verdict.unfair(replace(clear, entries=(cnn, more)))
    assert lines == [
        "images seen in pretraining: vit_ti16 + dino has 3.0 times as many as resnet18 + dino",
        "image size: resnet18 + dino 64 px, vit_ti16 + dino 96 px",
    ]


def test_labels_in_pretraining_and_what_no_count_of_multiply_adds_holds_are_said(clear: Contest) -> None:
    cnn, vit = clear.entries
    taught = replace(cnn, config=replace(cnn.config, objective="supervised"))
    more = replace(vit, cost=replace(vit.cost, compute=3e14))
    assert verdict.unfair(replace(clear, entries=(taught, more))) == [
        "multiply-adds of pretraining (masks not deducted, heads and teacher not counted): vit_ti16 + dino has 3.0 "
        "times as many as resnet18 + dino",
        "labels in pretraining: resnet18 + dino learnt from them",
    ]
    assert verdict.unfair(replace(clear, entries=(replace(taught, run=None), vit))) == []
    assert verdict.unfair(replace(clear, entries=(taught, replace(vit, config=taught.config)))) == []


def test_what_saw_nothing_is_set_against_no_multiple(clear: Contest) -> None:
    cnn, vit = clear.entries
    bare = replace(cnn, cost=replace(cnn.cost, images_seen=0, compute=0.0))
    assert verdict.unfair(replace(clear, entries=(bare, vit))) == [
        "images seen in pretraining: vit_ti16 + dino has 10,000, resnet18 + dino none",
        "multiply-adds of pretraining (masks not deducted, heads and teacher not counted): vit_ti16 + dino has 1e+14, "
        "resnet18 + dino none",
    ]
    more = replace(vit, name="more", cost=replace(vit.cost, images_seen=20_000))
    assert verdict.unfair(replace(clear, entries=(bare, vit, more)))[:2] == [
        "images seen in pretraining: more has 20,000, resnet18 + dino none",
        "images seen in pretraining: more has 2.0 times as many as vit_ti16 + dino",
    ]
    assert verdict.unfair(replace(clear, entries=(bare,) * 2)) == []


def test_earlier_training_and_tuning_are_said(clear: Contest) -> None:
    cnn, vit = clear.entries

    def lines(objective: str = "dino", **asked: Any) -> list[str]:
        bare = config.Config(backbone="resnet20", objective=objective, data="photos", **asked)
        filled = config.resolve(bare, images=5000, side=32)
        other = replace(vit, config=replace(vit.config, image_size=filled.image_size))
        return verdict.unfair(replace(clear, entries=(replace(cnn, config=filled), other)))

    recipe = recipes.find("dino", "cnn", "thumbnails")
    assert lines() == []
    half = recipe.batch_size // 2
    assert lines(epochs=2, batch_size=half, options={"out_dim": 77}) == [
        f"resnet18 + dino otherwise than by the recipe: --epochs {recipe.epochs} → 2, --batch-size "
        f"{recipe.batch_size} → {half}, --options.out-dim {recipe.options['out_dim']} → 77"
    ]
    counted = "earlier training, which is not counted here: resnet18 + dino"
    assert lines(init="runs/a") == [f"{counted} begins with the weights of runs/a"]
    unpublished = "no published tuning stands behind the recipe of resnet18 + dino"
    assert lines("distillation", options={"teacher": "vit_s16"}) == [f"{counted} is taught by vit_s16", unpublished]


def test_label_free_scores_are_correlated_with_accuracy_from_four_runs_on() -> None:
    floor = findings(3, 0, ("knn",))
    noises = (0.4, 0.6, 0.8, 1.1, 1.5)
    entries = [
        entry("resnet18", "dino", findings(noise, i, ("knn", "label_free")), floor) for i, noise in enumerate(noises)
    ]
    entries = [replace(one, name=f"run {i}") for i, one in enumerate(entries)]
    found = verdict.trust(contest(entries, floor, ("knn", "label_free")))
    assert {row.score for row in found} == set(verdict.LABEL_FREE)
    for row in found:
        assert (row.accuracy, row.runs) == ("knn_top1", 5)
        rho, low, high, p = row.correlation
        assert -1 <= rho <= 1, row.score
        assert low < rho < high or abs(rho) == pytest.approx(1)
        assert 6 * 2 / math.factorial(5) <= p <= 1  # of six rows and five runs, which no correlation can be shown by
    assert verdict.trust(contest(entries[:3], floor, ("knn", "label_free"))) == []

    lacking = [
        replace(one, trained=one.trained._replace(numbers={**one.trained.numbers, "label_free_alpha_req": undefined}))
        for one, undefined in zip(entries, (None, math.nan))
    ]
    rows = {row.score: row.runs for row in verdict.trust(contest([lacking[0], *entries[1:]], floor))}
    assert rows == {**dict.fromkeys(verdict.LABEL_FREE, 5), "alpha_req": 4}
    assert "alpha_req" not in {row.score for row in verdict.trust(contest([*lacking, *entries[2:]], floor))}
