"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, sec. 3.4; DINO's eval_knn.py)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

KS = (10, 20, 100, 200)
SIMILARITIES = 1 << 26
"""Entries of the similarity matrix held at a time: 256 MB in float32."""


def predict(
    train_x: Tensor, train_y: Tensor, val_x: Tensor, *, ks: Sequence[int] = KS, temperature: float = 0.07
) -> dict[int, Tensor]:
    """The class that each validation image's k nearest training images elect.

    Neighbours are nearest by cosine similarity s, and each votes for its class with the weight exp(s / temperature).

    Args:
        train_x: features [N, D]; they and `val_x` [M, D] may be on any one device, of any length.
        train_y: int64 labels [N], not negative.
        ks: numbers of neighbours; where there are fewer training images, all of them vote.

    Returns:
        int64 classes [M] for every k.

    Raises:
        ValueError: an empty training set, a negative label, or sizes that do not fit.
    """
    if not len(train_x) or len(train_x) != len(train_y) or train_x.shape[1:] != val_x.shape[1:]:
        raise ValueError(
            f"k-NN needs features [N, D] with N labels and [M, D], N > 0, not {list(train_x.shape)} with "
            f"{len(train_y)} and {list(val_x.shape)}"
        )
    if int(train_y.min()) < 0:
        raise ValueError("k-NN takes labelled training images only, and a label is negative")
    bank = F.normalize(train_x.float(), dim=1).T
    classes = int(train_y.max()) + 1
    elected: dict[int, list[Tensor]] = {k: [] for k in ks}
    for queries in F.normalize(val_x.float(), dim=1).split(max(1, SIMILARITIES // len(train_x))):
        similarity, neighbour = (queries @ bank).topk(min(max(ks), len(train_x)), dim=1)
        weight = (similarity / temperature).exp()
        label = train_y[neighbour]
        for k in ks:
            votes = weight.new_zeros(len(queries), classes)
            elected[k].append(votes.scatter_add_(1, label[:, :k], weight[:, :k]).argmax(dim=1))
    return {k: torch.cat(parts) if parts else train_y.new_empty(0) for k, parts in elected.items()}


def knn(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy in [0, 1] for every k; arguments as of `predict`, and the true labels [M] of `val_x`."""
    elected = predict(train_x, train_y, val_x, ks=ks, temperature=temperature)
    return {k: (classes == val_y.to(classes.device)).double().mean().item() for k, classes in elected.items()}
