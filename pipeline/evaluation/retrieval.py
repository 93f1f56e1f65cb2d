"""Does an image find its like? Mean average precision, every validation image searching the training images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluation import interval
from pipeline.evaluation.feature_set import FeatureSet

QUERIES = 5_000
GALLERY = 50_000
"""Images that search and are searched at most, always the same: beyond, sorting takes longer than extraction."""
AT_ONCE = 1 << 24  # similarities sorted at a time


def retrieval(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """map, low, high (its 95 % interval over queries); as evidence, each query's `precision` [M].

    An image counts as found where its label is the query's. Queries whose class the gallery lacks score 0.
    """
    train, val = train.labelled(), val.labelled()
    if not len(train.labels) or not len(val.labels):
        return None
    gallery, queries = train.at_most(GALLERY), val.at_most(QUERIES)
    precision = average_precision(gallery.features, gallery.labels, queries.features, queries.labels)
    low, high = interval.of_mean(precision)
    return {"map": precision.mean().item(), "low": low, "high": high, "precision": precision}


def average_precision(gallery: Tensor, gallery_y: Tensor, queries: Tensor, queries_y: Tensor) -> Tensor:
    """Average precision [M], float64, of each query [M, D] on a gallery [N, D] sorted by cosine similarity.

    The mean, over the images of the query's class, of the share of that class among all images up to it in the
    sorting, those as similar included: the area under the precision-recall curve without interpolation, whatever the
    order of the file.
    """
    bank = F.normalize(gallery.float(), dim=1).T
    found = []
    for part, labels in zip(*(t.split(max(1, AT_ONCE // len(gallery))) for t in (queries, queries_y))):
        similarity, order = (F.normalize(part.float(), dim=1) @ bank).sort(dim=1, descending=True)
        hit = (gallery_y[order] == labels[:, None]).double()
        place = torch.arange(1, hit.shape[1] + 1, device=hit.device)
        last = F.pad(similarity.diff(dim=1) != 0, [0, 1], value=True)  # of those as similar
        up_to = torch.where(last, place, hit.shape[1]).flip(1).cummin(1).values.flip(1)
        precision = hit.cumsum(1).gather(1, up_to - 1) / up_to
        found.append((precision * hit).sum(1) / hit.sum(1).clamp(min=1))
    return torch.cat(found)
