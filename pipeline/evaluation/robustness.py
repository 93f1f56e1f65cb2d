"""What does a representation see through? k-NN accuracy of changed images against the unchanged training images."""

import torch
from torch import Tensor

from pipeline.evaluation import knn
from pipeline.evaluation.changes import CORRUPTIONS, GEOMETRY, SEVERITIES, change
from pipeline.evaluation.feature_set import FeatureSet

IMAGES = 500
"""Validation images that are changed, always the same: every one of them 95 times."""
K = 20


def robustness(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """`clean`, and for every change its accuracy over five severities; `geometry` and `corruptions`, the means of each
    kind; as evidence `<change>_right` bool [5, n], and `clean_right` [n].

    Changes depend on the seed and the batch alone: two backbones of one image size see the same pixels.
    """
    train = train.labelled()
    if val.images is None or not len(train.labels):
        return None
    elected: dict[str, list[list[Tensor]]] = {name: [[] for _ in SEVERITIES] for name in (*GEOMETRY, *CORRUPTIONS)}
    clean, labels = [], []
    for number, shown in enumerate(val.images.batches(IMAGES)):
        known = shown.labels >= 0
        if not bool(known.any()):
            continue
        images, truth = shown.images[known], shown.labels[known].to(train.labels.device)

        def right(images: Tensor, truth: Tensor = truth) -> Tensor:
            found = val.images.pooled(images)  # type: ignore[union-attr]
            return (knn.predict(train.features, train.labels, found, ks=(K,))[K] == truth).cpu()

        clean.append(right(images))
        labels.append(truth)
        for kind, name in enumerate(elected):
            for severity in SEVERITIES:
                own = ((seed * 1_009 + number) * 1_009 + kind) * 7 + severity
                elected[name][severity - 1].append(right(change(images, name, severity, own)))
    if not labels:
        return None
    answers = {name: torch.stack([torch.cat(parts) for parts in of]) for name, of in elected.items()}
    means = {name: of.double().mean().item() for name, of in answers.items()}
    found: dict[str, float | Tensor] = {"clean": torch.cat(clean).double().mean().item(), **means}
    found["geometry"] = sum(means[name] for name in GEOMETRY) / len(GEOMETRY)
    found["corruptions"] = sum(means[name] for name in CORRUPTIONS) / len(CORRUPTIONS)
    return found | {f"{name}_right": of for name, of in answers.items()} | {"clean_right": torch.cat(clean)}
