"""Is the report one file that needs nothing else, and does it show what was found?"""

import html
import io
import json
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from pipeline import config as configuration
from pipeline.evaluation.changes import CORRUPTIONS, GEOMETRY
from pipeline.evaluation.evaluate import Findings
from pipeline.report import charts, drawing, page, pictures, verdict
from pipeline.report.contest import Contest
from pipeline.report.numbers import as_json
from pipeline.report.sights import GAP, SIDE, sights
from tests.report.contests import contest, entry, factored, findings, scratch, shaken

ALL = ("knn", "linear", "low_shot", "retrieval", "label_free", "layerwise")


@pytest.fixture(scope="module")
def shown() -> Contest:
    floor = findings(3.0, 9, ("knn",))
    two = [findings(noise, i, ALL) for i, noise in enumerate((0.5, 0.8))]
    kinds = (("resnet18", "dino"), ("vit_ti16", "dino"), ("resnet18", "mae"), ("vit_ti16", "mae"))
    entries = [entry(b, o, two[i % 2], floor) for i, (b, o) in enumerate(kinds)]
    return replace(contest(entries, floor, ALL), copies=(("train/a.jpg", "val/b.jpg"),))


@pytest.fixture(scope="module")
def text(shown: Contest) -> str:
    return page.render(
        shown, list(pictures.pictures(shown)), ["python", "-m", "pipeline.compare", "runs/a b", "runs/c"]
    )


class Parser(HTMLParser):
    """Collects tags with what they point to, and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.points: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.points += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.points += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_needs_no_other_file_and_no_script(text: str) -> None:
    parser = Parser()
    parser.feed(text)
    assert parser.open == []
    assert all(point.startswith(("#", "data:")) for point in parser.points)
    assert "<script" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [i for i in parser.ids if i]
    assert [i for i, count in Counter(ids).items() if count > 1] == []  # several drawings on one page
    assert {point[1:] for point in parser.points if point.startswith("#")} <= set(ids)


def test_it_shows_every_number_picture_and_command(shown: Contest, text: str) -> None:
    for one in shown.entries:
        assert f"{100 * one.trained.numbers['knn_top1']:.1f}" in text
        assert f"--config {one.run}/config.yaml" in text
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert [t for t in titles if t not in ("Numbers", "Cost", "Fairness", "All comparisons", "Reproduce")] == [
        "Accuracy", "Few labels", "Where the knowledge sits", "Confusions", "Accuracy and cost",
        "Scores without labels",
    ]  # fmt: skip
    assert "python -m pipeline.compare &#39;runs/a b&#39; runs/c" in text
    assert "1 validation image is also among the training images" in re.sub(r"<.*?>", "", text)
    assert "a recipe &amp; its source" in text
    assert "class &lt;0&gt;" in text
    assert "class <0>" not in text
    assert text.index('class="verdict"') < text.index("<h2>Numbers")


def test_of_a_checkpoint_without_its_run_the_page_holds_the_configuration(shown: Contest, tmp_path: Path) -> None:
    first, *rest = shown.entries
    text = html.unescape(page.render(replace(shown, entries=(replace(first, lone=True), *rest)), [], ["compare"]))
    assert f"python -m pipeline.pretrain --config {first.slug}.yaml   # seed 0: {first.name}" in text
    (found,) = re.findall(rf"<code>{first.slug}.yaml</code> is to hold:</p>\n<pre>(.*?)</pre>", text, re.DOTALL)
    (tmp_path / "config.yaml").write_text(found)
    assert configuration.load(tmp_path / "config.yaml") == first.config


def test_a_score_without_labels_is_shown_beside_linear_accuracy_and_left_out_where_it_is_undefined(
    shown: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = contest(
        [entry("resnet18", "dino", findings(0.3 + i / 5, i, ("linear", "label_free")), shown.entries[0].untrained)
         for i in range(6)],
        shown.entries[0].pixels,
    )  # fmt: skip
    named = [replace(one, name=f"run {i}") for i, one in enumerate(ranked.entries)]
    undefined = named[0].trained._replace(numbers={**named[0].trained.numbers, "label_free_alpha_req": None})
    ranked = replace(ranked, entries=(replace(named[0], trained=undefined), *named[1:]))
    with rc_context(drawing.STYLE):
        (picture,) = charts.trustworthy(ranked)
    assert "as far as linear accuracy rises" in picture.caption
    rendered = page.render(ranked, [picture], ["compare"])
    for row in verdict.trust(ranked):
        by = row.correlation
        bounds = "–" if math.isnan(by.low) else f"{by.low:+.2f} to {by.high:+.2f}"
        cells = re.search(rf"<td>{row.score.replace('_', ' ')}</td><td>linear</td>(.*?)</tr>", rendered)
        assert cells
        assert re.findall(r">([^<]+)</td>", cells[1])[:3] == [f"{row.runs}", f"{by.rho:+.2f}", bounds]
        assert row.runs == 6 - (row.score == "alpha_req")

    figures = []
    monkeypatch.setattr(charts, "svg", lambda figure, title: figures.append(figure) or "")
    list(charts.trustworthy(ranked))
    assert [len(axes.lines) for axes in figures[0].axes] == [6 - (name == "alpha_req") for name in verdict.LABEL_FREE]


def test_how_many_comparisons_are_adjusted_for_and_who_chose_them_is_said(shown: Contest, text: str) -> None:
    assert "Nothing was tested" not in text
    assert "Who meets whom was chosen on training images that were held out, not on these." in text
    by_knn = [
        replace(one, trained=one.trained._replace(numbers={"knn_top1": one.trained.numbers["knn_top1"]}))
        for one in shown.entries
    ]
    untuned = replace(shown, entries=tuple(by_knn))
    rendered = page.render(untuned, [], ["compare"])
    assert f"and for {len(verdict.passed_over(untuned))} of backbones that might have met here" in rendered
    assert "Who meets whom" not in rendered


def test_what_a_linear_classifier_reads_is_shown(shown: Contest) -> None:
    cnn, vit, *_ = shown.entries
    chosen = replace(vit, trained=vit.trained._replace(choices={"linear_pooling": "class_4"}))
    rows = dict(page.fairness(replace(shown, entries=(cnn, chosen))))
    assert rows["linear classifier reads"][1] == "the class token of the last 4 layers"
    assert cnn.trained.choices["linear_pooling"] in ("mean_1", "mean_4")
    assert rows["linear classifier reads"][0].startswith("the mean of the cells")
    assert "logistic regression reads" not in rows  # was not measured
    assert as_json(replace(shown, entries=(cnn, chosen)))["entries"][1]["choices"] == {"linear_pooling": "class_4"}


def test_by_which_recipe_the_whole_network_learnt_is_shown(shown: Contest) -> None:
    choices = (
        {"finetune_recipe": "one & its rate", "scratch_recipe": "two"}, {"finetune_recipe": "three"},
        {"finetune_recipe": "one & its rate"}, {},
    )  # fmt: skip
    entries = [replace(one, trained=one.trained._replace(choices=of)) for one, of in zip(shown.entries, choices)]
    rendered = page.render(replace(shown, entries=tuple(entries)), [], ["compare"])
    assert "<li>resnet18 + dino, resnet18 + mae, fine-tuned: one &amp; its rate</li>" in rendered
    assert "<li>vit_ti16 + dino, fine-tuned: three</li>" in rendered
    assert "<li>resnet18 + dino, from scratch: two</li>" in rendered


def test_the_cost_of_a_point_is_shown_or_why_it_is_not(shown: Contest) -> None:
    first, second = shown.entries[:2]
    gpu = replace(first.cost, memory=3 << 30, seconds=7200.0, workers=4, device="a GPU")
    unknown, elastic = (
        replace(second.cost, seconds=None, training=None, training_memory=None),
        replace(first.cost, workers=None),
    )
    entries = [replace(one, cost=cost) for one, cost in zip(shown.entries, (gpu, unknown, elastic, first.cost))]
    rows = dict(page.costs(replace(shown, entries=tuple(entries))))
    points = [100 * float(one.trained.numbers["linear_top1"] or 0) for one in entries]
    no_summary = "– (no summary of this checkpoint)"
    assert rows["images/s of inference"] == ["850"] * 4
    assert rows["peak memory of inference"][:2] == ["3,072 MiB", "– (kept by CUDA's allocator only)"]
    assert rows["images/s of training"] == ["83", no_summary, "83", "83"]
    assert rows["time of training"][:2] == ["7,200 s on 4 × a GPU", no_summary]
    assert rows["points of linear accuracy per hour of a GPU, or CPU, in training"] == [
        f"{points[0] / 8:,.1f}", no_summary, "– (workers came and went)", f"{points[3] * 30:,.1f}",
    ]  # fmt: skip
    by_size = rows["points of linear accuracy per G multiply-adds of an image"]
    assert by_size == [f"{one / 1.8:,.1f}" for one in points]
    bare = [replace(one, trained=one.trained._replace(numbers={})) for one in entries]
    assert not any("points" in title for title, _ in page.costs(replace(shown, entries=tuple(bare))))


def test_robustness_is_drawn_change_by_change(shown: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [replace(one, trained=shaken(one.trained, i, crop=0.9)) for i, one in enumerate(shown.entries)]
    held = replace(shown, entries=tuple(kept))
    with rc_context(drawing.STYLE):
        place, corrupted = charts.robustness(held)
    assert all(f">{name.replace('_', ' ')}<" in place.markup for name in GEOMETRY)
    assert all(f">{name.replace('_', ' ')}<" in corrupted.markup for name in CORRUPTIONS)
    assert all(f">{one.name}<" in picture.markup for one in kept for picture in (place, corrupted))
    assert "on 400 changed validation images" in place.caption
    rendered = page.render(held, [place, corrupted], ["compare"])
    assert "<td>k-NN, changed in place or size</td>" in rendered
    assert "with few labels over the draws of which are labelled" in rendered
    assert place.title in rendered

    figures = []
    monkeypatch.setattr(charts, "svg", lambda figure, title: figures.append(figure) or "")
    list(charts.robustness(held))
    for figure, changes in zip(figures, (GEOMETRY, CORRUPTIONS), strict=True):
        for axes, name in zip(figure.axes, changes):
            for line, one in zip(axes.lines, kept, strict=True):
                clean, *curve = line.get_ydata()
                assert clean == pytest.approx(100 * one.trained.numbers["robustness_clean"])
                assert curve == pytest.approx(100 * one.trained.evidence[f"robustness_{name}_right"].double().mean(1))


def test_factors_are_drawn_beside_raw_pixels(shown: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = shown.entries
    held = ({"shape": 0.8, "texture": 0.3, "hue": 0.5}, {"shape": 0.2, "texture": 0.7, "hue": 0.6})
    pixels = factored(first.pixels, shape=0.1, texture=0.4, hue=0.9)
    kept = [replace(one, trained=factored(one.trained, **of), pixels=pixels) for one, of in zip((first, second), held)]
    with_factors = replace(shown, entries=tuple(kept))
    with rc_context(drawing.STYLE):
        (picture,) = charts.factors(with_factors)
    assert all(f">{name}<" in picture.markup for name in held[0])
    assert "Tick: raw pixels. Shape right of texture is what people do" in picture.caption
    assert "<td>shape bias</td><td>72.7</td><td>22.2</td>" in page.render(with_factors, [picture], ["compare"])

    figures = []
    monkeypatch.setattr(charts, "svg", lambda figure, title: figures.append(figure) or "")
    list(charts.factors(with_factors))
    points = [(line.get_marker(), *line.get_xdata(), *line.get_ydata()) for line in figures[0].axes[0].lines]
    for y, (name, tick) in enumerate((("shape", 10), ("texture", 40), ("hue", 90))):
        assert [at for mark, at, row in (one for one in points if len(one) == 3) if (mark, row) == ("o", y)] == [
            pytest.approx(100 * of[name]) for of in held
        ]
        assert [at for mark, at, row in (one for one in points if len(one) == 3) if (mark, row) == ("|", y)] == [
            pytest.approx(tick)
        ]


def test_of_many_classes_the_most_mistaken_are_drawn_whatever_classifier_was_trained(
    shown: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.arange(500) % 50
    wrong = torch.where(labels >= 20, (labels + 1) % 50, labels)  # 30 classes are mistaken, the last for the first
    wrong[(labels < 10) & (torch.arange(500) < 50)] += 1  # and ten now and then
    kept = [
        replace(one, trained=Findings({}, {"finetune_predicted": predicted}, labels))
        for one, predicted in zip(shown.entries, (wrong, labels))
    ]
    many = replace(shown, entries=tuple(kept), classes=tuple(f"kind {i}" for i in range(50)))
    figures = []
    monkeypatch.setattr(charts, "svg", lambda figure, title: figures.append(figure) or "")
    (picture,) = charts.confusions(many)
    assert "The answers behind fine-tuned accuracy" in picture.caption
    assert picture.caption.endswith("Of 50 classes, the 40 that are most often mistaken.")
    (first, second), size = figures[0].axes[:2], charts.CONFUSED
    drawn = [*range(10), *range(20, 50)]
    assert [label.get_text() for label in first.get_yticklabels()] == [f"kind {i}" for i in drawn]
    table = first.images[0].get_array()
    assert table.shape == (size, size)
    assert table[0, :3].tolist() == pytest.approx([0.9, 0.1, 0])
    assert table[-1, 0] == table[10, 11] == 1
    np.testing.assert_array_equal(second.images[0].get_array(), np.eye(size))


def test_that_layers_of_the_first_pairs_alone_are_drawn_is_said(shown: Contest) -> None:
    x = torch.randn(3, 2, 8, 6, generator=torch.Generator().manual_seed(0)).double()
    grams = x @ x.mT
    kept = [
        replace(one, trained=one.trained._replace(evidence={**one.trained.evidence, "similarity_grams": grams[:, :1]}))
        for one in shown.entries
    ]
    pairs = len(verdict.rivals(shown))
    assert pairs == 3
    with rc_context(drawing.STYLE):
        drawn = list(charts.similarity(replace(shown, entries=tuple(kept))))
    assert len(drawn) == 2
    assert all("Of the 3 pairs that meet on this page, the first 2 are drawn." in one.caption for one in drawn)
    other = replace(kept[0], trained=kept[0].trained._replace(evidence={"similarity_grams": grams}))
    with rc_context(drawing.STYLE):
        drawn = list(charts.similarity(replace(shown, entries=(other, *kept[1:]))))
    assert all("pairs" not in one.caption for one in drawn)


def test_names_stand_escaped_in_what_pictures_are_called(shown: Contest) -> None:
    name = 'resnet18 + dino (a & "b" <c>)'
    figure = Figure()
    figure.subplots()
    assert f'aria-label="{html.escape(name)}"' in drawing.svg(figure, name)
    ElementTree.fromstring(drawing.svg(figure, name))
    photograph = drawing.Picture(name, drawing.png(np.zeros((4, 6, 3), np.uint8), name), "")
    assert ElementTree.fromstring(photograph.markup.replace(">", "/>")).attrib["alt"] == name
    assert photograph.file()[0].endswith(".png")


def test_training_error_is_drawn_over_depth() -> None:
    floor = Findings({}, {}, torch.empty(0))
    nets = [scratch(name, 0.7, 0.8 - i / 20) for i, name in enumerate(("plain20", "plain56", "resnet20", "resnet56"))]
    drawn = {picture.title: picture for picture in pictures.pictures(contest(nets, floor, ("scratch",)))}
    assert list(drawn) == ["Accuracy", "Training error by depth", "Confusions", "Accuracy and cost"]
    for one in nets:
        error = 100 * float(one.trained.numbers["scratch_train_error"] or 0)
        assert f"{one.name}  {error:.1f}" in drawn["Training error by depth"].markup
    assert "learnt for 2 epochs of 300 images." in drawn["Training error by depth"].caption
    apart = [nets[0], nets[2]]  # one depth of each kind
    assert list(charts.degradation(contest(apart, floor, ("scratch",)))) == []


def test_it_is_made_for_phones_dark_rooms_and_paper(text: str) -> None:
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert '<table class="many">' in text  # four backbones and three floors fit a page's width in small print alone
    assert drawing.INK not in text  # drawings take the page's colour
    assert "currentColor" in text


def test_the_pictures_draw_the_numbers(shown: Contest) -> None:
    drawn = {picture.title: picture.markup for picture in pictures.pictures(shown)}
    for one in shown.entries:
        assert f"{one.name}  {100 * one.trained.numbers['knn_top1']:.1f}" in drawn["Accuracy"]
    assert drawn["Few labels"].count("resnet18 + dino") == 1
    only = [
        replace(one, trained=one.trained._replace(numbers={
            key: value for key, value in one.trained.numbers.items() if not key.startswith("low_shot_p")
        })) for one in shown.entries
    ]  # fmt: skip
    (few,) = charts.low_shot(replace(shown, entries=tuple(only)))
    assert "share of the labels" in drawn["Few labels"]
    assert "share of the labels" not in few.markup
    assert "hours of a GPU" in drawn["Accuracy and cost"]
    first, *others = shown.entries
    unknown = replace(first, cost=replace(first.cost, seconds=None))
    (cost,) = charts.cost(replace(shown, entries=(unknown, *others)))
    assert "hours of a GPU" not in cost.markup


def test_what_a_protocol_found_is_drawn_without_the_others(shown: Contest) -> None:
    """How far heads look is found by `seeing`, gradients by `depth`."""
    cnn, vit, *_ = shown.entries
    looked = vit.trained._replace(evidence={"seeing_distance": torch.rand(12, 3)})
    (picture,) = charts.depth(replace(shown, entries=(cnn, replace(vit, trained=looked))))
    assert "attention distance" in picture.markup
    assert "gradient" not in picture.markup + picture.caption
    felt = vit.trained._replace(evidence={"depth_gradient": torch.rand(12)})
    (picture,) = charts.depth(replace(shown, entries=(cnn, replace(vit, trained=felt))))
    assert "gradient" in picture.markup
    assert "heads" not in picture.caption
    assert not list(charts.depth(shown))


def test_the_attention_of_every_head_is_shown(shown: Contest) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    maps = torch.zeros(6, 8, 4, 4)
    for head in range(8):
        maps[:, head, head // 4, head % 4] = 1  # each head at a place of its own
    evidence = {
        "seeing_images": images, "seeing_cells": images.permute(0, 2, 3, 1), "seeing_attention": maps,
        "seeing_field": torch.rand(32, 32, generator=generator),
        "seeing_neighbours": images[:, None].repeat(1, 5, 1, 1, 1),
    }  # fmt: skip
    found = shown.entries[1].trained
    trained = found._replace(evidence=evidence, numbers={**found.numbers, "seeing_field_radius": 5.0})
    one = replace(shown.entries[1], trained=trained)
    drawn = {picture.title: picture for picture in sights(replace(shown, entries=(one, shown.entries[0])))}
    heads = drawn["Where each head of vit_ti16 + dino attends"]
    assert "the last block's 8 heads" in heads.caption
    sheet = np.asarray(Image.open(io.BytesIO(heads.file()[1])))
    step = SIDE + GAP
    assert sheet.shape[:2] == (4 * 2 * step - GAP, 7 * step - GAP)  # of four images, six heads and two more below
    for head in range(8):
        y, x = (step * (head // 6), step * (1 + head % 6))
        bright = sheet[y : y + SIDE, x : x + SIDE, 0].reshape(4, SIDE // 4, 4, SIDE // 4).mean((1, 3))
        assert bright.argmax() == head
        assert (bright > 0).sum() == 1


def test_every_picture_is_a_file_of_its_own(shown: Contest) -> None:
    drawn = list(pictures.pictures(shown))
    drawn.append(drawing.Picture("What it sees", drawing.png(np.full((4, 6, 3), 128, np.uint8), "What it sees"), ""))
    files = dict(picture.file() for picture in drawn)
    assert len(files) == len(drawn)
    assert {"accuracy.svg", "few-labels.svg", "what-it-sees.png"} <= set(files)
    assert Image.open(io.BytesIO(files.pop("what-it-sees.png"))).size == (6, 4)
    for content in files.values():
        root = ElementTree.fromstring(content)
        assert root.tag.endswith("svg")
        assert "background:#fff" in root.attrib["style"]


def test_numbers_are_kept_as_plain_json(shown: Contest) -> None:
    nan = replace(
        shown.entries[0], trained=shown.entries[0].trained._replace(numbers={"label_free_alpha_req": float("nan")})
    )
    undefined = replace(shown, entries=(nan, *shown.entries[1:]))
    plain = json.loads(json.dumps(as_json(undefined), allow_nan=False))
    assert plain["entries"][0]["trained"]["label_free_alpha_req"] is None
    assert plain["entries"][1]["trained"]["knn_top1"] == shown.entries[1].trained.numbers["knn_top1"]
    assert plain["entries"][1]["cost"]["parameters"] == 11_200_000

    said = json.loads(json.dumps(as_json(shown), allow_nan=False))
    tested = verdict.claims(shown)
    assert [line["sentence"] for line in said["verdict"]] == verdict.sentences(shown, tested)
    for line in said["verdict"]:
        assert line["claims"]
        assert all(said["claims"][i]["first"] in line["sentence"] or "them" in line["sentence"] for i in line["claims"])
    stood_on = [i for line in said["verdict"] for i in line["claims"]]
    assert len(stood_on) == len(set(stood_on))
    assert {i for i, claim in enumerate(tested) if not claim.floor} <= set(stood_on)
    cnn = shown.entries[0].trained
    table = said["entries"][0]["confusions"]["knn"]
    assert sum(map(sum, (row.values() for row in table.values()))) == len(cnn.labels)
    right = sum(row.get(name, 0) for name, row in table.items())
    assert right / len(cnn.labels) == cnn.numbers["knn_top1"]
    for kept, claim in zip(said["claims"], tested, strict=True):
        assert (kept["first"], kept["second"], kept["what"]) == (claim.first, claim.second, claim.what)
        assert (kept["mean"], kept["p"], kept["p_adjusted"]) == (claim.difference.mean, claim.difference.p, claim.p)
        assert kept["significant"] == (claim.p < 0.05)
    assert {row["score"] for row in said["trust"]} == set(verdict.LABEL_FREE)
    assert [row["rank_correlation"] for row in said["trust"]] == [row.correlation.rho for row in verdict.trust(shown)]
    assert all(row["runs"] == 4 and row["low"] is None for row in said["trust"])
