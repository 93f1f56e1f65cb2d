"""What does a representation see through? k-NN accuracy of changed images against the unchanged training images."""

import torch
from torch import Tensor

from pipeline.evaluation import interval, knn
from pipeline.evaluation.changes import CORRUPTIONS, GEOMETRY, SEVERITIES, change
from pipeline.evaluation.feature_set import FeatureSet

IMAGES = 500
"""Validation images that are changed, always the same: every one of them 105 times."""
K = 20


def robustness(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """`clean`, and for every change its accuracy over five severities; `geometry` and `corruptions`, the means of each
    kind, `_low`, `_high` (their 95 % intervals over images); as evidence `<change>_right` bool [5, n], and
    `clean_right` [n].

    Changes depend on the seed and the batch alone: two backbones of one image size see the same pixels.
    """
    train = train.labelled()
    if val.images is None or not len(train.labels):
        return None
    changed: dict[str, list[Tensor]] = {name: [] for name in (*GEOMETRY, *CORRUPTIONS)}
    clean = []
    for number, shown in enumerate(val.images.batches(IMAGES)):
        known = shown.labels >= 0
        if not bool(known.any()):
            continue
        images, truth = shown.images[known], shown.labels[known].to(train.labels.device)

        def right(features: Tensor, truth: Tensor = truth) -> Tensor:
            """Which of features [severities · n, D] have the n true classes, bool [severities, n]."""
            elected = knn.predict(train.features, train.labels, features, ks=(K,))[K]
            return (elected.view(-1, len(truth)) == truth).cpu()

        clean.append(right(val.images.pooled(images))[0])
        for kind, name in enumerate(changed):
            seeds = [((seed * 1_009 + number) * 1_009 + kind) * 7 + severity for severity in SEVERITIES]
            features = [
                val.images.pooled(change(images, name, severity, own)) for severity, own in zip(SEVERITIES, seeds)
            ]
            changed[name].append(right(torch.cat(features)))
    if not clean:
        return None
    answers = {name: torch.cat(parts, dim=1) for name, parts in changed.items()}
    means = {name: of.double().mean().item() for name, of in answers.items()}
    found: dict[str, float | Tensor] = {"clean": torch.cat(clean).double().mean().item(), **means}
    for group, names in (("geometry", GEOMETRY), ("corruptions", CORRUPTIONS)):
        of_images = torch.stack([answers[name].double().mean(0) for name in names]).mean(0)
        low, high = interval.of_mean(of_images)
        found |= {group: of_images.mean().item(), f"{group}_low": low, f"{group}_high": high}
    return found | {f"{name}_right": of for name, of in answers.items()} | {"clean_right": torch.cat(clean)}
