"""How the numbers of an evaluation are shown to people: one list for the table of a run and for the report."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from pipeline.data.embedded import FACTORS


class Measure(NamedTuple):
    """A row of a table of numbers: `key` of the results, its bounds (`<bounds>_low`, `<bounds>_high`) where they are
    known, the factor it is shown by, and whether more of it is better (None: not to be said)."""

    title: str
    key: str
    bounds: str | None = None
    factor: float = 100
    more: bool | None = True

    def text(self, numbers: Mapping[str, float | None]) -> str:
        """The number, without its unit; a dash where nothing was measured."""
        value = numbers.get(self.key)
        return "–" if value is None or math.isnan(value) else self._shown(value)

    def interval(self, numbers: Mapping[str, float | None]) -> str:
        """ "24.5 – 30.0"; a dash where nothing can be said of it, empty where it was not asked for."""
        bounds = [numbers[key] for side in ("low", "high") if (key := f"{self.bounds}_{side}") in numbers]
        known = [self._shown(one) for one in bounds if one is not None and not math.isnan(one)]
        return " – ".join(known) or "–" * bool(bounds)

    def _shown(self, value: float) -> str:
        return f"{self.factor * value:.{1 if self.factor == 100 else 2}f}".replace("-", "−")


MEASURES = (
    Measure("k-NN", "knn_top1", "knn"),
    Measure("linear", "linear_top1", "linear"),
    Measure("linear, balanced", "linear_balanced", "linear_balanced"),
    Measure("linear, macro F1", "linear_macro_f1", "linear_macro_f1"),
    Measure("logistic regression", "logistic_top1", "logistic"),
    Measure("attentive probe", "attentive_top1", "attentive"),
    Measure("fine-tuned", "finetune_top1", "finetune"),
    Measure("from scratch", "scratch_top1", "scratch"),
    Measure("training error from scratch", "scratch_train_error", "scratch_train_error", 100, None),
    Measure("1 label a class", "low_shot_n1", "low_shot_n1"),
    Measure("5 labels a class", "low_shot_n5", "low_shot_n5"),
    Measure("10 labels a class", "low_shot_n10", "low_shot_n10"),
    Measure("1 % of the labels", "low_shot_p1", "low_shot_p1"),
    Measure("10 % of the labels", "low_shot_p10", "low_shot_p10"),
    Measure("several labels, mAP", "multilabel_map", "multilabel"),
    Measure("several labels, area under ROC", "multilabel_auc", "multilabel_auc"),
    Measure("variance explained", "regression_r2", "regression"),
    Measure("rank correlation", "regression_rank", "regression_rank", 1),
    Measure("retrieval mAP", "retrieval_map", "retrieval"),
    Measure("k-NN of the last layer", "layerwise_last", "layerwise_last"),
    Measure("k-NN, changed in place or size", "robustness_geometry", "robustness_geometry"),
    Measure("k-NN, corrupted", "robustness_corruptions", "robustness_corruptions"),
    *(Measure(f"{name}, read linearly", f"factors_{name}", f"factors_{name}", 100, None) for name in FACTORS),
    Measure("shape bias", "factors_shape_bias", None, 100, None),
    Measure("RankMe", "label_free_rankme", None, 1, None),
    Measure("α-ReQ", "label_free_alpha_req", None, 1, None),
    Measure("effective rank", "label_free_effective_rank", None, 1, None),
    Measure("uniformity", "label_free_uniformity", None, 1, None),
    Measure("alignment", "label_free_alignment", None, 1, None),
    Measure("LiDAR", "label_free_lidar", None, 1, None),
    Measure("CKA of neighbouring layers", "similarity_neighbours", None, 1, None),
    Measure("radius of the effective field, px", "seeing_field_radius", None, 1, None),
    Measure("distance of attention, in image sides", "seeing_attention_distance", None, 1, None),
    Measure("gradient of the first layer by the last's", "depth_gradient_ratio", None, 1, None),
)
"""In the order of the tables. Every protocol's headline is among them."""
