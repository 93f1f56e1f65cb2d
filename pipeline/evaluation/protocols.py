"""The protocols: each takes what a backbone makes of two sets of images and gives named numbers.

A protocol is a function `(train, val, *, seed) -> {name: number, tensor or module}`, or None where labels are missing.
Numbers are scores; tensors are evidence, for pictures and for tests between two backbones; `head` is the classifier it
trained, of cells, of pooled features or of what `pooling` names, or a backbone with its classifier. Whatever it learns
or chooses, it learns and chooses on `train`. To add one, write it anywhere and give it a line in `PROTOCOLS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from pipeline.evaluation import (
    attentive,
    depth,
    factors,
    finetune,
    label_free,
    layerwise,
    linear,
    logistic,
    low_shot,
    retrieval,
    robustness,
    seeing,
    similarity,
    targets,
)
from pipeline.evaluation import knn as neighbours
from pipeline.evaluation.accuracy import headline
from pipeline.evaluation.feature_set import FeatureSet, Found

HEADLINE_K = 20
"""The k whose accuracy stands for k-NN: DINO's and solo-learn's choice, and the best of DINO's four on ImageNet."""

NEEDS = ("layers", "poolings", "views", "factors", "images", "targets")
"""What a protocol may need beyond pooled features and labels: fields of `FeatureSet`, and its `summaries` of all layers
or of those that `pooling` takes."""


class Measure(Protocol):
    """From features of the training and of the validation images to numbers by name, and what stands behind
    them; None where the sets lack what is measured."""

    def __call__(self, train: FeatureSet, val: FeatureSet, *, seed: int) -> Mapping[str, Found] | None: ...


@dataclass(frozen=True)
class EvaluationProtocol:
    """A protocol, the number that stands for it, what it needs of `NEEDS`, whether it is nothing without labels, and
    what it takes to measure anything, which is told where it gives None."""

    measure: Measure
    headline: str = "top1"
    needs: tuple[str, ...] = ()
    labels: bool = True
    takes: str = "labelled images to learn from, and to be judged on"

    def __call__(self, train: FeatureSet, val: FeatureSet, *, seed: int) -> Mapping[str, Found] | None:
        return self.measure(train, val, seed=seed)


def knn(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """DINO's weighted k-NN, temperature 0.07: the headline numbers (k = 20), and accuracy k10, k20, k100, k200."""
    train, val = train.labelled(), val.labelled()
    if not len(train.labels) or not len(val.labels):
        return None
    elected = neighbours.predict(train.features, train.labels, val.features)
    by_k = {f"k{k}": (classes == val.labels).double().mean().item() for k, classes in elected.items()}
    return headline(elected[HEADLINE_K], val.labels) | by_k


def linear_probe(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, Found] | None:
    """A linear classifier: the headline numbers, the `pooling` and lr that a held-out slice of train chose, the
    accuracy on that slice of every pooling, `held_out_<pooling>`, by its best lr, and the `head`."""
    train, val = train.labelled(), val.labelled()
    if len(train.labels) < 2 or not len(val.labels):
        return None
    classes, lrs = int(train.labels.max()) + 1, linear.LEARNING_RATES
    tried: dict[str, dict[float, linear.Trial]] = {}
    for name in train.poolings():
        tried[name] = by = linear.trials(train.pooled(name), train.labels, classes=classes, lrs=lrs, seed=seed)
        lrs = linear.near(min(by, key=by.__getitem__)) if len(tried) == 1 else lrs
    pooling, lr = min(((name, lr) for name, by in tried.items() for lr in by), key=lambda one: tried[one[0]][one[1]])
    probe = linear.trained(train.pooled(pooling), train.labels, classes=classes, lr=lr, seed=seed)
    return {
        **headline(probe.predict(val.pooled(pooling)), val.labels), "lr": lr, "pooling": pooling,
        **{f"held_out_{name}": max(trial.accuracy for trial in by.values()) for name, by in tried.items()},
        "head": probe.head(),
    }  # fmt: skip


COLUMN = f"a column of --labels that varies, over {targets.LEAST} images that it knows of either set"
"""What protocols of a table take."""

PROTOCOLS: MappingProxyType[str, EvaluationProtocol] = MappingProxyType(
    {
        "knn": EvaluationProtocol(knn),
        "linear": EvaluationProtocol(linear_probe, needs=("poolings",)),
        "logistic": EvaluationProtocol(
            logistic.logistic, needs=("poolings",),
            takes=f"2 to {logistic.MOST:,} labelled images to learn from; linear takes more",
        ),
        "low_shot": EvaluationProtocol(
            low_shot.low_shot, "n10", takes="a class with more than 1 labelled image to learn from"
        ),
        "retrieval": EvaluationProtocol(retrieval.retrieval, "map"),
        "label_free": EvaluationProtocol(
            label_free.label_free, "rankme", ("views",), labels=False, takes="3 images to learn from"
        ),
        "factors": EvaluationProtocol(
            factors.factors, "shape", ("factors",), labels=False,
            takes="images of which it is known what was drawn: --data embedded",
        ),
        "layerwise": EvaluationProtocol(layerwise.layerwise, "last", ("layers",)),
        "similarity": EvaluationProtocol(similarity.similarity, "neighbours", ("images",), labels=False),
        "robustness": EvaluationProtocol(robustness.robustness, "corruptions", ("images",)),
        "seeing": EvaluationProtocol(seeing.seeing, "field_radius", ("images",), labels=False),
        "depth": EvaluationProtocol(depth.depth, "gradient_ratio", ("images",), labels=False),
        "attentive": EvaluationProtocol(
            attentive.attentive, needs=("images",), takes="10 labelled images to learn from, and some to be judged on"
        ),
        "finetune": EvaluationProtocol(finetune.finetune, needs=("images",)),
        "scratch": EvaluationProtocol(finetune.scratch, needs=("images",)),
        "multilabel": EvaluationProtocol(targets.multilabel, "map", ("targets",), labels=False, takes=COLUMN),
        "regression": EvaluationProtocol(targets.regression, "r2", ("targets",), labels=False, takes=COLUMN),
    }
)  # fmt: skip
