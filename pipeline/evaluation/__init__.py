"""How good is a backbone? Protocols on frozen features, and the floors they are to be judged against."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluation.evaluate import evaluate_backbone, examine, with_floors
    from pipeline.evaluation.feature_set import FeatureSet
    from pipeline.evaluation.protocols import PROTOCOLS

NAMES = (
    *("knn", "linear", "logistic", "low_shot", "retrieval", "label_free", "factors", "layerwise"),
    *("similarity", "robustness", "seeing", "depth", "attentive", "finetune", "scratch"),
    *("multilabel", "regression"),
)
"""The protocols, known without importing torch: the keys of `PROTOCOLS`."""

COMPARED = NAMES[:-5]
"""What a comparison takes where none is named: all but those that train for minutes or need a table of labels."""

BY_TABLE = NAMES[-2:]
"""Those of a table of labels, which are no classes."""

DEFAULT = ("knn", "linear")
"""Those that every run ends with, and that are taken where none is named."""

__all__ = [
    "BY_TABLE",
    "COMPARED",
    "DEFAULT",
    "NAMES",
    "PROTOCOLS",
    "FeatureSet",
    "evaluate_backbone",
    "examine",
    "with_floors",
]


def __getattr__(name: str) -> Any:
    if name in ("evaluate_backbone", "examine", "with_floors"):
        from pipeline.evaluation import evaluate

        return getattr(evaluate, name)
    if name == "PROTOCOLS":
        from pipeline.evaluation.protocols import PROTOCOLS

        return PROTOCOLS
    if name == "FeatureSet":
        from pipeline.evaluation.feature_set import FeatureSet

        return FeatureSet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
