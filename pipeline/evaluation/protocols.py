"""The protocols: each takes the features of two sets and gives named numbers.

A protocol is a function `(train, val, *, seed) -> {name: number}`, or None where labels are missing. Whatever it learns
or chooses, it learns and chooses on `train`. Its first number, `top1`, is its headline. To add one, write it here or
anywhere and put it into `PROTOCOLS`.
"""

from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from pipeline.evaluation import interval, linear
from pipeline.evaluation import knn as neighbours
from pipeline.evaluation.feature_set import FeatureSet

HEADLINE_K = 20
"""The k whose accuracy stands for k-NN: DINO's and solo-learn's choice, and the best of DINO's four on ImageNet."""


class EvaluationProtocol(Protocol):
    def __call__(self, train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float] | None: ...


def knn(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float] | None:
    """DINO's weighted k-NN, temperature 0.07: top1 (k = 20), low, high (its 95 % interval) and k10, k20, k100, k200."""
    train, val = train.labelled(), val.labelled()
    if not len(train.labels) or not len(val.labels):
        return None
    elected = neighbours.predict(train.features, train.labels, val.features)
    right = {k: classes == val.labels for k, classes in elected.items()}
    return _headline(right[HEADLINE_K]) | {f"k{k}": _accuracy(correct) for k, correct in right.items()}


def linear_probe(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float] | None:
    """A linear classifier: top1, low, high (its 95 % interval) and the lr that a held-out slice of train chose."""
    train, val = train.labelled(), val.labelled()
    if len(train.labels) < 2 or not len(val.labels):
        return None
    probe = linear.fit(train.features, train.labels, classes=int(train.labels.max()) + 1, seed=seed)
    return _headline(probe.predict(val.features) == val.labels) | {"lr": probe.lr}


def _accuracy(correct: Tensor) -> float:
    return correct.double().mean().item()


def _headline(correct: Tensor) -> dict[str, float]:
    low, high = interval.bootstrap(correct)
    return {"top1": _accuracy(correct), "low": low, "high": high}


PROTOCOLS: MappingProxyType[str, EvaluationProtocol] = MappingProxyType({"knn": knn, "linear": linear_probe})
