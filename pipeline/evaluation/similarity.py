"""How alike are the layers of two backbones? Linear centred kernel alignment, from minibatches.

Layers are `Backbone.blocks()`: every block of a ViT, every residual block of a CNN. Each backbone is shown the same
images in the same batches and leaves the Gram matrices of its layers behind, so that any two that were examined can be
compared without running either again.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from backbones.contract import Backbone
from pipeline.evaluation.feature_set import FeatureSet

IMAGES = 512
BATCH = 64
"""Images in all and of a batch: the unbiased estimate needs no more than a few (Nguyen et al. 2021, appendix A)."""


def similarity(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """As evidence `grams` float32 [L, batches, n, n], of every layer l the products of all its activations between the
    n validation images of a batch; as a number, `neighbours`, the mean similarity of a layer with the next."""
    if val.images is None or not isinstance(val.images.backbone, Backbone):
        return None
    found = [layer_grams(val.images.backbone, val.images.normalised(shown)) for shown in _batches(val, IMAGES)]
    if not found:
        return None
    grams = torch.stack(found, dim=1).cpu()
    table = cka(grams, grams)
    neighbours = [float(table[i, j]) for i, j in pairwise(range(len(table)))]
    return {"grams": grams} | ({"neighbours": sum(neighbours) / len(neighbours)} if neighbours else {})


def _batches(val: FeatureSet, images: int) -> list[Tensor]:
    """Whole batches of the same images for every backbone; fewer where the set is small."""
    assert val.images is not None
    shown = torch.cat([batch.images for batch in val.images.batches(images)])
    size = min(BATCH, len(shown))
    return list(shown[: len(shown) // size * size].split(size)) if size > 3 else []


def layer_grams(backbone: Backbone, images: Tensor) -> Tensor:
    """Gram matrices [L, n, n] of the outputs of all blocks for normalised images [n, C, H, W]; no output is kept."""
    grams: list[Tensor] = []

    def take(output: Tensor) -> None:
        x = output.flatten(1).float()
        grams.append(x @ x.T / x.shape[1])  # by their number, so that wide layers stay small numbers

    with of_blocks(backbone, take), torch.no_grad():
        backbone(images)
    return torch.stack(grams)


@contextmanager
def of_blocks(backbone: Backbone, take: Callable[[Tensor], object]) -> Iterator[None]:
    """Within it, `take` gets the output of every block as it comes."""

    def hook(block: nn.Module, inputs: object, output: Tensor) -> None:
        take(output)

    with ExitStack() as hooks:
        for block in backbone.blocks():
            hooks.callback(block.register_forward_hook(hook).remove)
        yield


def cka(first: Tensor, second: Tensor) -> Tensor:
    """Linear CKA [L, M] of the layers of two backbones, in [0, 1] but for noise (Nguyen et al. 2021, equation 3).

    The mean over batches of the unbiased HSIC_1(K, L), by the roots of the means of HSIC_1(K, K) and HSIC_1(L, L).

    Args:
        first, second: Gram matrices [L, batches, n, n] and [M, batches, n, n] of the same batches, n > 3.

    Raises:
        ValueError: not the same batches, or too few images in one.
    """
    if first.shape[1:] != second.shape[1:] or first.shape[-1] < 4:
        raise ValueError(
            f"CKA needs Gram matrices of the same batches of at least 4 images: {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    k, m = _without_diagonal(first), _without_diagonal(second)
    cross = hsic(k[:, None], m[None])
    own = hsic(k, k), hsic(m, m)
    return cross / (own[0][:, None] * own[1][None]).clamp(min=torch.finfo(torch.float64).tiny).sqrt()


def _without_diagonal(gram: Tensor) -> Tensor:
    gram = gram.double()
    return gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """The mean over batches of the unbiased HSIC_1 (Song et al. 2012; Nguyen et al. 2021, equation 4) of Gram matrices
    [..., batches, n, n] whose diagonal is zero."""
    n = k.shape[-1]
    rows_k, rows_m = k.sum(-1), m.sum(-1)
    trace = (k * m).sum((-2, -1))
    total = rows_k.sum(-1) * rows_m.sum(-1) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (rows_k * rows_m).sum(-1)
    return ((trace + total - mixed) / (n * (n - 3))).mean(-1)
