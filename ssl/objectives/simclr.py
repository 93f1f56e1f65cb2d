"""SimCLR: a simple framework for contrastive learning (Chen et al. 2020, arXiv 2002.05709).

Equation numbers are the paper's, those of DCL are of decoupled contrastive learning (Yeh et al. 2022, arXiv
2110.06848). What the paper leaves open follows the authors' code.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.contract import Objective, TooFewImages, pair
from objectives.contrast import VITAL_SIGNS, contrast_signs, cosines
from objectives.distributed import gather, rank, world_size
from objectives.heads import mlp
from objectives.multicrop import pooled_features
from objectives.precision import full_precision
from objectives.views import Photometric, View

if TYPE_CHECKING:
    from backbones import Backbone


def contrast(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Each of this rank's 2B embeddings against the 2N of all ranks: s_ij / tau [2B, 2N], and where the positive is.

    An embedding is no candidate for itself: there the similarity is minus infinity.

    Args:
        z: of both views of this rank's images [2, B, D].
        temperature: tau.
    """
    _, batch, _ = z.shape
    everyone = gather(full_precision(z).transpose(0, 1)).transpose(0, 1)
    n = everyone.shape[1]
    logits = cosines(z.flatten(0, 1), everyone.flatten(0, 1)) / temperature
    first = rank() * batch + torch.arange(batch, device=z.device)
    itself, positive = torch.cat([first, first + n]), torch.cat([first + n, first])
    return logits.scatter(1, itself[:, None], -torch.inf), positive


def nt_xent(logits: Tensor, positive: Tensor) -> Tensor:
    """-log of the positive's share among all candidates (eq. 1), averaged over anchors."""
    return F.cross_entropy(logits, positive)


def decoupled(logits: Tensor, positive: Tensor) -> Tensor:
    """NT-Xent whose denominator leaves the positive out, so that an easy one weakens no gradient.

    DCL, equation 6 as LightlySSL cites it.
    """
    negatives = logits.scatter(1, positive[:, None], -torch.inf)
    return (negatives.logsumexp(dim=1) - logits.gather(1, positive[:, None]).squeeze(1)).mean()


def simclr_colours(strength: float, blur_p: float) -> Photometric:
    """Colour jitter of a strength, grey at times, blur (appendix A)."""
    jitter = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    return Photometric(*jitter, gray_p=0.2, blur_p=blur_p)


class SimCLR(Objective):
    """Two views of an image attract each other and repel those of all other images of the batch, of all ranks.

    The more images in the batch, the better (fig. 9). Defaults are those of the ResNet-50 in the authors' README:
    100 epochs, batches of 4096.

    Args:
        backbone: the encoder f; what its head g makes of the features is for the loss alone.
        image_size: of the views, in pixels: a side or (height, width).
        scale: area range of the crops. jitter: strength of the colour jitter. blur_p: share of blurred views.
        hidden_dim, out_dim, head_layers: widths and depth of g.
        head_norm: "batch", after each of its layers, the last without shift; or "none".
        temperature: tau of eq. 1.
        decoupled: DCL's loss, which depends less on large batches.
    """

    family = "contrastive"
    paper = "Chen et al. 2020, arXiv 2002.05709"

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        jitter: float = 1.0,
        blur_p: float = 0.5,
        hidden_dim: int = 2048,
        out_dim: int = 128,
        head_layers: int = 3,
        head_norm: str = "batch",
        temperature: float = 0.1,
        decoupled: bool = False,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        backbone.grid(*size)
        colours = simclr_colours(jitter, blur_p)
        self.views = tuple(View(f"view {i + 1}", size, scale, photometric=colours) for i in range(2))
        self.temperature = temperature
        self.decoupled = decoupled
        self.encoder = backbone
        widths = [backbone.width, *[hidden_dim] * (head_layers - 1), out_dim]
        self.head = mlp(widths, norm=head_norm, activation=nn.ReLU, last_norm=head_norm)
        if head_norm == "batch":
            self.head[-1].bias.requires_grad_(False)
        self.vital_signs = VITAL_SIGNS

    @property
    def backbone(self) -> "Backbone":
        """The encoder f: features before the head are the better ones (sec. 4.2)."""
        return self.encoder

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and signs of the two views [B, C, h, w].

        Raises:
            TooFewImages: one image over all ranks, which has nothing to be told apart from.
        """
        if len(views[0]) * world_size() < 2:
            raise TooFewImages("SimCLR contrasts images with each other, a batch of 1 has no other; take at least 2")
        pooled = pooled_features(self.encoder, views)
        z = self.head(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])
        logits, positive = contrast(z, self.temperature)
        loss = decoupled(logits, positive) if self.decoupled else nt_xent(logits, positive)
        return loss, contrast_signs(logits, positive, pooled.flatten(0, 1))
