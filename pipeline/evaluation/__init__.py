"""How good is a backbone? k-NN and linear probes on frozen features, and the floors they are to be judged against."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluation.evaluate import evaluate_backbone, with_floors
    from pipeline.evaluation.feature_set import FeatureSet
    from pipeline.evaluation.protocols import PROTOCOLS

NAMES = ("knn", "linear")
"""The protocols, known without importing torch: the keys of `PROTOCOLS`."""

__all__ = ["NAMES", "PROTOCOLS", "FeatureSet", "evaluate_backbone", "with_floors"]


def __getattr__(name: str) -> Any:
    if name in ("evaluate_backbone", "with_floors"):
        from pipeline.evaluation import evaluate

        return getattr(evaluate, name)
    if name == "PROTOCOLS":
        from pipeline.evaluation.protocols import PROTOCOLS

        return PROTOCOLS
    if name == "FeatureSet":
        from pipeline.evaluation.feature_set import FeatureSet

        return FeatureSet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
