"""Which factors of an image does a representation hold linearly? Exact on generated images, whose factors are known.

Shape against texture is the question between CNNs and ViTs (Geirhos et al. 2019; Naseer et al. 2021, section 3.3).
"""

import torch
from torch import Tensor

from pipeline.evaluation import logistic
from pipeline.evaluation.accuracy import headline
from pipeline.evaluation.feature_set import FeatureSet

STRENGTHS = (1e-3, 1e-2, 1e-1)
HELD = 0.2
"""Of shape and texture together, from which on it means something which of them is the larger."""


def factors(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """For every factor the accuracy of a linear classifier on it, `_low`, `_high` (its 95 % interval), `_held`: how far
    that lies from chance, 0, to all, 1; as evidence which images it is right about, `_right`; and `shape_bias`, held
    shape as a share of held shape and texture."""
    if not train.factors or not val.factors:
        return None
    found: dict[str, float | Tensor] = {}
    for name, values in train.factors.items():
        classes = int(torch.cat([values, val.factors[name]]).max()) + 1
        probe = logistic.fit(train.features, values, classes=classes, strengths=STRENGTHS, seed=seed)
        numbers = headline(probe.predict(val.features), val.factors[name])
        found |= {name: numbers["top1"], f"{name}_low": numbers["low"], f"{name}_high": numbers["high"]}
        found[f"{name}_held"] = max(0.0, (float(numbers["top1"]) - 1 / classes) / (1 - 1 / classes))
        found[f"{name}_right"] = numbers["predicted"] == val.factors[name]
    held = [float(found[f"{name}_held"]) for name in ("shape", "texture")]
    return found | ({"shape_bias": held[0] / sum(held)} if sum(held) > HELD else {})
