"""Supervised classification, the yardstick: the same loop and views, with labels in place of a pretext.

Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv 1512.00567, sec. 7) on a linear classifier.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from objectives.contract import Objective, pair
from objectives.distributed import mean_over_ranks, world_size
from objectives.joint_embedding import Jitter
from objectives.precision import full_precision
from objectives.spread import effective_rank, feature_spread
from objectives.views import Photometric, View, VitalSign

if TYPE_CHECKING:
    from backbones import Backbone

UNLABELLED = -1
"""The label of an image that nobody labelled: it counts for nothing."""


def classification_loss(scores: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """-sum_k q'(k) log p(k) with q'(k) = (1 - epsilon) [k = y] + epsilon / K (Szegedy et al. 2016, sec. 7).

    Args:
        scores: logits [B, K]. labels: int64 [B], `UNLABELLED` for none.

    Averaged over the labelled images of all ranks together, however they are spread; without any it is 0.
    """
    losses = F.cross_entropy(
        full_precision(scores), labels, ignore_index=UNLABELLED, label_smoothing=label_smoothing, reduction="none"
    )
    labelled = mean_over_ranks((labels != UNLABELLED).sum().to(losses.dtype))
    return losses.sum() / labelled.clamp(min=1 / world_size())


class Supervised(Objective):
    """A linear classifier on the pooled features, trained together with the backbone.

    What the same architecture reaches on the same data when labels are there: the ceiling that a self-supervised
    objective is measured against.

    Args:
        backbone: the one that is trained.
        image_size: of the view, in pixels: a side or (height, width).
        classes: how many there are; the training loop fills it in from the data.
        label_smoothing: epsilon.
        scale: area range of the crop. jitter: strengths of brightness, contrast, saturation and hue.
    """

    family = "supervised"
    paper = "Szegedy et al. 2016, arXiv 1512.00567"
    labelled = True

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        classes: int | None = None,
        label_smoothing: float = 0.1,
        scale: tuple[float, float] = (0.08, 1.0),
        jitter: Jitter = (0.4, 0.4, 0.4, 0.0),
    ) -> None:
        super().__init__()
        if classes is None or classes < 2:
            raise ValueError(f"supervised learns from labels of at least 2 classes, not {classes}; give it classes=")
        size = pair(image_size)
        backbone.grid(*size)
        colours = Photometric(*jitter, jitter_p=1.0) if any(jitter) else None
        self.views = (View("image", size, scale, photometric=colours),)
        self.label_smoothing = label_smoothing
        self.encoder = backbone
        self.classifier = nn.Linear(backbone.width, classes)
        self.vital_signs = (
            VitalSign("labelled", 0.01, 1.0, "hardly an image of the batch carries a label"),
            VitalSign("feature_spread", 0.02, 1.0, "the backbone gives every image the same features"),
        )

    @property
    def backbone(self) -> "Backbone":
        """The one that is trained, without its classifier."""
        return self.encoder

    def forward(
        self, views: Sequence[Tensor], progress: float, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the images [B, C, h, w] and their labels int64 [B], and the share that the classifier gets right.

        Raises:
            ValueError: without labels.
        """
        if labels is None:
            raise ValueError("supervised was given no labels: call it with (views, progress, labels)")
        pooled = self.encoder(views[0]).pooled
        scores = self.classifier(pooled)
        loss = classification_loss(scores, labels, self.label_smoothing)
        known = labels != UNLABELLED
        right = (scores.detach().argmax(-1) == labels) & known
        return loss, {
            "accuracy": right.sum() / known.sum().clamp(min=1),
            "labelled": known.float().mean(),
            "feature_spread": feature_spread(pooled),
            "effective_rank": effective_rank(pooled),
        }
