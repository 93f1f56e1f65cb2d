"""Where in the network does the knowledge sit? k-NN and a linear classifier on every block or stage."""

import torch
from torch import Tensor

from pipeline.evaluation import interval, knn, linear
from pipeline.evaluation.feature_set import FeatureSet

K = 20
LEARNING_RATES = (1e-3, 1e-2, 1e-1)


def layerwise(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """Accuracy on the mean of layer l's cells, as `Features.summaries` has it: knn_1 … knn_L, linear_1 … linear_L, and
    `last`, k-NN on the last one, `last_low`, `last_high` (its 95 % interval); as evidence, `knn` and `linear` [L]."""
    train, val = train.labelled(), val.labelled()
    if len(train.labels) < 2 or not len(val.labels) or not train.summaries:
        return None
    classes = int(train.labels.max()) + 1
    by_knn, by_linear = [], []
    for bank, queries in ((a[:, -1].float(), b[:, -1].float()) for a, b in zip(train.summaries, val.summaries)):
        right = knn.predict(bank, train.labels, queries, ks=(K,))[K] == val.labels
        by_knn.append(right.double().mean().item())
        probe = linear.linear_probe(
            bank, train.labels, queries, val.labels, classes=classes, lrs=LEARNING_RATES, seed=seed
        )
        by_linear.append(probe["top1"])
    found: dict[str, float | Tensor] = {"knn": torch.tensor(by_knn), "linear": torch.tensor(by_linear)}
    for name, curve in (("knn", by_knn), ("linear", by_linear)):
        found |= {f"{name}_{layer}": value for layer, value in enumerate(curve, 1)}
    low, high = interval.of_share(right)
    return found | {"last": by_knn[-1], "last_low": low, "last_high": high}
