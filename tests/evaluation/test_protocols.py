"""Every score against an independent computation: scikit-learn, scipy, or the paper's formula written out."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import linalg, special, stats
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pipeline.evaluation import accuracy, interval, label_free, logistic, low_shot, paired, retrieval
from pipeline.evaluation.accuracy import headline
from pipeline.evaluation.feature_set import FeatureSet
from pipeline.evaluation.protocols import PROTOCOLS


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def gaussians(n: int, classes: int, dim: int, noise: float, seed: int) -> FeatureSet:
    centres = draws(7).normal(size=(classes, dim))
    y = np.arange(n) % classes
    x = (centres[y] + noise * draws(seed).normal(size=(n, dim))) * np.geomspace(0.1, 3, dim) + 1
    return FeatureSet(torch.from_numpy(x).float(), torch.from_numpy(y), tuple(map(str, range(classes))))


def test_headline_numbers_are_scikit_learns() -> None:
    y = torch.from_numpy(draws().choice(5, 400, p=[0.5, 0.3, 0.1, 0.1, 0.0]))
    predicted = torch.where(torch.from_numpy(draws(1).random(400) < 0.6), y, torch.from_numpy(draws(2).choice(6, 400)))
    found = headline(predicted, y)
    assert found["top1"] == pytest.approx(metrics.accuracy_score(y, predicted))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["balanced"] == pytest.approx(metrics.balanced_accuracy_score(y, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(y, predicted, average="macro"))


def test_the_intervals_of_imbalanced_classes_are_those_of_images_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.from_numpy(draws().choice(4, 120, p=[0.7, 0.15, 0.1, 0.05]))
    predicted = torch.where(torch.from_numpy(draws(1).random(120) < 0.7), y, torch.from_numpy(draws(2).choice(4, 120)))
    whole = headline(predicted, y)
    monkeypatch.setattr(accuracy, "AT_ONCE", 1000)
    found = headline(predicted, y)
    scores: dict[str, list[float]] = {"balanced": [], "macro_f1": []}
    for again in draws(3).integers(0, 120, (400, 120)):
        shown, said = y[again], predicted[again]
        scores["balanced"].append(metrics.balanced_accuracy_score(shown, said))
        scores["macro_f1"].append(metrics.f1_score(shown, said, average="macro"))
    for name, drawn in scores.items():
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
        theirs = np.percentile(drawn, [2.5, 97.5])
        assert [found[f"{name}_low"], found[f"{name}_high"]] == pytest.approx(theirs, abs=0.025)
        assert found[name] == whole[name]
        assert found[f"{name}_low"] == pytest.approx(whole[f"{name}_low"], abs=0.01)


def test_scores_of_imbalanced_classes_without_spread_have_no_interval() -> None:
    y = torch.tensor([0, 0, 0, 1])
    found = headline(y, y)
    assert (found["balanced"], found["macro_f1"]) == (1, 1)
    assert all(math.isnan(found[f"{name}_{side}"]) for name in ("balanced", "macro_f1") for side in ("low", "high"))
    assert found["low"] < 0.6


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_logistic_regression_is_scikit_learns(c: float) -> None:
    train = gaussians(300, 4, 12, 1.5, 0)
    weight, bias = logistic.minimise(train.features, train.labels, 4, c)
    theirs = LogisticRegression(C=c, max_iter=10_000, tol=1e-10).fit(train.features.double(), train.labels)
    np.testing.assert_allclose(weight.T, theirs.coef_, atol=5e-3)

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        logits = train.features.double().numpy() @ weight + bias
        p = np.exp(logits - special.logsumexp(logits, axis=1, keepdims=True))
        return 0.5 * (weight**2).sum() - c * np.log(p[np.arange(300), train.labels]).sum()

    best = objective(theirs.coef_.T, theirs.intercept_)
    warm = logistic.minimise(train.features, train.labels, 4, c, start=(weight + 1, bias))
    for found in ((weight, bias), warm):
        assert objective(found[0].numpy(), found[1].numpy()) == pytest.approx(best, rel=1e-6)


def test_the_chosen_classifier_is_scikit_learns_on_standardised_features() -> None:
    train, val = gaussians(300, 4, 12, 1.5, 0), gaussians(200, 4, 12, 1.5, 1)
    probe = logistic.fit(train.features, train.labels, classes=4, strengths=(1e-3, 1e-1))
    scaler = StandardScaler().fit(train.features)
    theirs = LogisticRegression(C=probe.c, max_iter=3000).fit(scaler.transform(train.features), train.labels)
    same = probe.predict(val.features).numpy() == theirs.predict(scaler.transform(val.features))
    assert same.mean() >= 0.99
    assert theirs.score(scaler.transform(val.features), val.labels) > 0.6


@pytest.mark.parametrize("name", ["logistic", "low_shot", "retrieval", "layerwise", "factors"])
def test_permuted_labels_give_chance(name: str) -> None:
    def labelled(of: FeatureSet, labels: torch.Tensor) -> FeatureSet:
        return of._replace(
            labels=labels, summaries=(of.features[:, None],), factors={"shape": labels, "texture": labels}
        )

    train, val = (labelled(of, of.labels) for of in (gaussians(800, 4, 16, 1.0, 0), gaussians(400, 4, 16, 1.0, 1)))
    protocol = PROTOCOLS[name]
    found = protocol(train, val, seed=0)
    assert found is not None
    assert found[protocol.headline] > 0.5
    permuted = train.labels[torch.randperm(800, generator=torch.Generator().manual_seed(0))]
    found = protocol(labelled(train, permuted), val, seed=0)
    assert found is not None
    assert found[protocol.headline] == pytest.approx(0.25, abs=0.08)


def test_of_every_factor_the_images_are_kept_that_it_is_told_of() -> None:
    train, val = (
        of._replace(factors={"shape": of.labels, "texture": torch.arange(len(of.labels)) % 2})
        for of in (gaussians(400, 4, 16, 1.0, 0), gaussians(200, 4, 16, 1.0, 1))
    )
    found = PROTOCOLS["factors"](train, val, seed=0)
    assert found is not None
    for name in ("shape", "texture"):
        right = found[f"{name}_right"]
        assert (right.dtype, right.shape) == (torch.bool, (200,))
        assert right.double().mean().item() == found[name]


def test_what_logistic_regression_refuses() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        logistic.fit(torch.ones(1, 4), torch.tensor([0]), classes=2)
    with pytest.raises(ValueError, match="do not fit 2 classes"):
        logistic.fit(torch.ones(2, 4), torch.tensor([0, 2]), classes=2)


def test_average_precision_is_scikit_learns() -> None:
    gallery, queries = gaussians(150, 3, 6, 2.0, 0), gaussians(40, 3, 6, 2.0, 1)
    found = retrieval.average_precision(gallery.features, gallery.labels, queries.features, queries.labels)
    bank = torch.nn.functional.normalize(gallery.features, dim=1).double()
    for i, ap in enumerate(found):
        score = bank @ torch.nn.functional.normalize(queries.features[i], dim=0).double()
        hit = (gallery.labels == queries.labels[i]).numpy()
        assert ap.item() == pytest.approx(metrics.average_precision_score(hit, score), abs=1e-6)
    by_hand = retrieval.average_precision(
        torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1]]),
        torch.tensor([0, 1, 0]),
        torch.tensor([[1.0, 0]]),
        torch.tensor([0]),
    )
    assert by_hand.item() == pytest.approx((1 + 2 / 3) / 2)


def test_average_precision_of_equal_similarities_does_not_depend_on_the_order() -> None:
    """A collapsed backbone finds nothing, also where the gallery happens to begin with the query's class."""
    labels = torch.arange(100) // 10
    found = retrieval.average_precision(torch.ones(100, 4), labels, torch.ones(10, 4), torch.arange(10))
    assert found.tolist() == pytest.approx([0.1] * 10)
    few = torch.tensor([[1.0, 0, 0], [0, 1, 0], [3, 4, 0]])[torch.from_numpy(draws().integers(0, 3, 60))]
    queries, wanted = few[:10], labels[:10]
    found = retrieval.average_precision(few, labels[:60], queries, wanted)
    bank = torch.nn.functional.normalize(few, dim=1)
    for i, ap in enumerate(found):
        theirs = metrics.average_precision_score(labels[:60] == wanted[i], (bank @ bank[i]).round(decimals=5))
        assert ap.item() == pytest.approx(theirs, abs=1e-6)


def test_budgets_and_draws_of_few_labels() -> None:
    labels = torch.from_numpy(draws().permutation(np.repeat([0, 1, 2], [300, 40, 4])))
    assert {name: counts.tolist() for name, counts in low_shot.budgets(labels)} == {
        "n1": [1, 1, 1],
        "n5": [5, 5, 4],
        "n10": [10, 10, 4],
        "p10": [30, 4, 1],  # 1 % would be 3 images, but 5 of which every class has one
    }
    large = torch.arange(3).repeat_interleave(torch.tensor([3000, 400, 100]))
    assert dict(low_shot.budgets(large))["p1"].tolist() == [30, 4, 1]
    even = torch.arange(4).repeat_interleave(100)
    assert [name for name, _ in low_shot.budgets(even)] == ["n1", "n5", "n10"]  # 1 % is 1 a class, 10 % are 10
    chosen = low_shot.draw(labels, torch.tensor([5, 5, 4]), seed=1)
    assert torch.bincount(labels[chosen]).tolist() == [5, 5, 4]
    assert len(chosen.unique()) == 14
    assert torch.equal(chosen, low_shot.draw(labels, torch.tensor([5, 5, 4]), seed=1))
    assert not torch.equal(chosen, low_shot.draw(labels, torch.tensor([5, 5, 4]), seed=2))


def test_more_labels_are_better_and_the_interval_is_students() -> None:
    found = low_shot.low_shot(gaussians(800, 4, 12, 2.0, 0), gaussians(300, 4, 12, 2.0, 1), seed=0)
    assert found is not None
    assert found["n1"] < found["n5"] < found["n10"] < found["p10"] + 0.05
    each = found["n5_right"].double().mean(1).numpy()
    low, high = stats.t.interval(0.95, len(each) - 1, loc=each.mean(), scale=stats.sem(each))
    assert (found["n5_low"], found["n5_high"]) == pytest.approx((low, high))


def spectrum(values: list[float], n: int = 200, seed: int = 0) -> torch.Tensor:
    """[n, D] centred, its covariance's eigenvalues exactly `values`."""
    q, _ = np.linalg.qr(draws(seed).normal(size=(n, len(values) + 1)) * 1.0)
    q, _ = np.linalg.qr(np.column_stack([np.ones(n), q]))
    rotation, _ = np.linalg.qr(draws(seed + 1).normal(size=(len(values), len(values))))
    return torch.from_numpy(q[:, 1 : len(values) + 1] * np.sqrt(np.array(values) * (n - 1)) @ rotation)


def test_rankme_of_known_singular_values() -> None:
    values = np.array([9.0, 4.0, 1.0, 0.25])
    p = np.sqrt(values) / np.sqrt(values).sum() + 1e-7
    assert label_free.rankme(spectrum(values.tolist())) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert label_free.rankme(spectrum([1.0] * 7)) == pytest.approx(7, rel=1e-5)
    assert label_free.rankme(torch.zeros(5, 3)) == 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_of_a_power_law_is_its_exponent(alpha: float) -> None:
    x = spectrum([i**-alpha for i in range(1, 129)]) + 3
    assert label_free.alpha_req(x) == pytest.approx(alpha, abs=1e-6)
    assert math.isnan(label_free.alpha_req(torch.randn(3, 8)))


def test_lidar_is_the_papers_formula() -> None:
    images = draws().normal(size=(30, 1, 6)) * [3, 2, 1, 1, 0.1, 0.1]
    x = torch.from_numpy(images + 0.3 * draws(1).normal(size=(30, 8, 6)))
    means = x.mean(1).numpy()
    sigma_b = np.cov(means.T)
    sigma_w = sum(np.cov(one.T.numpy()) for one in x) / 30 + 1e-4 * np.eye(6)
    root = np.linalg.inv(np.real_if_close(linalg.sqrtm(sigma_w)))
    values = np.linalg.eigvalsh(root @ sigma_b @ root)
    p = values / np.abs(values).sum() + 1e-7
    assert label_free.lidar(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-8)


def test_uniformity_and_alignment_are_the_papers_formulas() -> None:
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    pairs = [math.exp(-2 * ((a - b) ** 2).sum()) for a, b in itertools.combinations(unit, 2)]
    assert label_free.uniformity(x) == pytest.approx(math.log(np.mean(pairs)), rel=1e-6)
    views = torch.randn(10, 4, 5, generator=torch.Generator().manual_seed(1))
    unit = (views / views.norm(dim=2, keepdim=True)).double().numpy()
    pairs = [((a - b) ** 2).sum() for one in unit for a, b in itertools.combinations(one, 2)]
    assert label_free.alignment(views) == pytest.approx(np.mean(pairs), rel=1e-6)


def test_uniformity_of_many_images_is_taken_over_some_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are packed class by class: the first images of a file are of one class, and lie close together."""
    train = gaussians(400, 4, 12, 0.1, 0)
    train = train.chosen(train.labels.argsort(stable=True))._replace(views=train.features[:20, None].expand(-1, 4, -1))
    whole = label_free.label_free(train, train, seed=0)
    monkeypatch.setattr(label_free, "PAIRS", 100)
    part = label_free.label_free(train, train, seed=0)
    assert whole is not None
    assert part is not None
    assert part["uniformity"] == pytest.approx(whole["uniformity"], abs=0.1)
    assert label_free.uniformity(train.features[:100]) > whole["uniformity"] + 0.5
    again = label_free.label_free(train, train, seed=0)
    assert again is not None
    assert again["uniformity"] == part["uniformity"]


def test_mcnemar_is_the_binomial_test_by_hand() -> None:
    first, second = torch.tensor([1, 1, 1, 1, 1, 0, 1, 0]).bool(), torch.tensor([0, 0, 0, 0, 0, 1, 1, 0]).bool()
    assert paired.mcnemar(first, second) == pytest.approx(2 * (1 + 6) / 2**6)  # 5 against 1
    assert paired.mcnemar(first, first) == 1.0


def test_a_paired_difference_and_how_often_it_errs() -> None:
    rng = draws()
    first = torch.from_numpy(rng.random(2000) < 0.7)
    found = paired.difference(first, first & torch.from_numpy(rng.random(2000) < 0.95))
    assert found.low < found.mean < found.high
    d = np.asarray(found.mean)
    spread = math.sqrt(d * (1 - d) / 2000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    assert found.p < 1e-10
    alarms = covered = 0
    for _ in range(150):  # no difference but in noise: the test errs in one of twenty, or a little less often
        a, b = (torch.from_numpy(rng.random(60)) for _ in range(2))
        one = paired.difference(a, b)
        alarms, covered = alarms + (one.p < 0.05), covered + (one.low <= 0 <= one.high)
    assert 1 <= alarms <= 18
    assert covered >= 132
    with pytest.raises(ValueError, match="same images"):
        paired.difference(first, first[1:])


@pytest.mark.parametrize("images", [2, 5, 15])
def test_few_images_prove_no_more_than_students_test_says(images: int) -> None:
    a, b = (torch.from_numpy(draws(seed).normal(size=images)) for seed in (2, 3))
    found = paired.difference(a, b)
    theirs = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))
    drawn = draws(4).choice((a - b).numpy(), (20_000, images)).mean(1)
    drawn = np.array([found.mean, *drawn])
    assert paired.of_statistics(drawn, np.zeros_like(drawn), images).p == pytest.approx(found.p, rel=0.05)
    # Of images that all differ alike, by how many there are.
    assert paired.difference(a + 0.1, a).p == pytest.approx(0.5 ** (images - 1))
    assert paired.difference(a, a).p == 1.0
    assert paired.difference(a[:1], b[:1]).p == 1.0
    assert paired.difference(a[:1].expand(5, 1), torch.arange(5.0)[:, None]).p == 1.0


def test_repetitions_widen_the_interval() -> None:
    """Draws of labels that disagree are an uncertainty of their own."""
    rng = draws()
    base = rng.random((5, 500)) < np.array([0.5, 0.6, 0.7, 0.8, 0.9])[:, None]
    other = torch.zeros(5, 500, dtype=torch.bool)
    wide = paired.difference(torch.from_numpy(base), other)
    flat = paired.difference(torch.from_numpy(base.mean(0)), other.double().mean(0))
    assert wide.high - wide.low > 3 * (flat.high - flat.low)


def test_balanced_accuracies_are_compared_class_by_class() -> None:
    labels = torch.tensor([0, 0, 0, 0, 2, 2])  # no image is of class 1
    first, second = torch.tensor([1, 1, 0, 0, 1, 1]).bool(), torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    found = paired.balanced(first, second, labels)
    assert found.mean == pytest.approx((2 / 4 + 2 / 2) / 2 - (2 / 4 + 1 / 2) / 2)
    error = math.sqrt(2 * (1 / 8) ** 2 + (1 / 4) ** 2)
    assert found.p == pytest.approx(2 * stats.norm.sf(found.mean / error))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=1e-4)
    assert paired.balanced(first, first, labels).p == 1.0
    one_size = torch.arange(600) % 3  # then it is accuracy, and its p McNemar's without the correction
    a, b = (torch.from_numpy(draws(seed).random(600) < 0.7) for seed in (5, 6))
    apart = int((a & ~b).sum()), int((~a & b).sum())
    statistic = (apart[0] - apart[1]) ** 2 / sum(apart)
    assert paired.balanced(a, b, one_size).p == pytest.approx(stats.chi2.sf(statistic, 1))


@pytest.mark.parametrize("sizes", [(300, 80, 20), (300, 100, 1, 1), (1000, 200, 100, 50, 10, 5, 2)])
def test_small_classes_make_no_false_lead_in_balanced_accuracy(sizes: tuple[int, ...]) -> None:
    """A bootstrap errs in 11 of 100 where a class has a single image."""
    rng = draws()
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    share = np.linspace(0.9, 0.4, len(sizes))[labels]
    alarms = 0
    for _ in range(800):
        known = rng.random(len(labels)) < share
        first, second = (torch.from_numpy(known ^ (rng.random(len(labels)) < 0.2)) for _ in range(2))
        alarms += paired.balanced(first, second, labels).p < 0.05
    assert 0.01 * 800 < alarms < 0.07 * 800


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("runs", [4, 6, 30])
def test_a_rank_correlation_is_as_likely_as_among_all_orders_of_the_runs(runs: int) -> None:
    x = torch.from_numpy(draws().normal(size=runs))
    y = x + torch.from_numpy(draws(1).normal(size=runs))
    rho, low, high, p = interval.rank_correlation(x, y)
    theirs = stats.spearmanr(x, y)
    if runs > 4:
        error = math.sqrt((1 + rho**2 / 2) / (runs - 3))
        for bound, by in ((low, -1.96), (high, 1.96)):
            assert math.atanh(bound) == pytest.approx(math.atanh(rho) + by * error, abs=1e-4)
    assert rho == pytest.approx(theirs.statistic)
    if runs > interval.EXACT:
        assert p == pytest.approx(theirs.pvalue, abs=5 / interval.DRAWS)
    else:
        by_hand = [abs(stats.spearmanr(x, y[list(order)]).statistic) for order in itertools.permutations(range(runs))]
        assert p == pytest.approx(np.mean(np.array(by_hand) >= abs(rho) - 1e-9))


def test_four_runs_show_no_rank_correlation() -> None:
    x = torch.arange(4.0)
    rho, *bounds, p = interval.rank_correlation(x, 2 * x)
    assert (rho, p) == (pytest.approx(1), pytest.approx(2 / 24))
    assert np.isnan(bounds).all()
    rho, *bounds, p = interval.rank_correlation(x, torch.ones(4))
    assert np.isnan([rho, *bounds]).all()
    assert p == 1


def test_an_interval_of_a_rank_correlation_is_no_point_and_holds_what_it_should() -> None:
    assert np.isnan(interval.rank_correlation(torch.arange(9.0), -torch.arange(9.0))[1:3]).all()
    rng, held = draws(), 0
    truth = 6 / math.pi * math.asin(0.7 / 2)  # Spearman's of a normal pair whose Pearson's is 0.7
    for _ in range(200):
        x = rng.normal(size=12)
        y = 0.7 * x + math.sqrt(1 - 0.49) * rng.normal(size=12)
        found = interval.rank_correlation(torch.from_numpy(x), torch.from_numpy(y))
        held += found.low <= truth <= found.high
    assert 180 <= held <= 199
