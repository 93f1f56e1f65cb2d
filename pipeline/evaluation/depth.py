"""Does the signal reach every depth, and the gradient come back? Statistics by depth, before anything is trained on."""

import torch
from torch import Tensor

from backbones.contract import Backbone
from pipeline.evaluation.feature_set import FeatureSet
from pipeline.evaluation.similarity import of_blocks

IMAGES = 64


def depth(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """`gradient_ratio`: the gradient at the first depth as a multiple of that at the last; far below 1 it vanishes on
    its way back, far above it explodes (Glorot & Bengio 2010; He et al. 2016, section 4.1).

    As evidence `gradient` [depths of `Backbone.depths`], the root mean square of the gradients of all parameters there,
    and `activation` [L], that of what every one of `Backbone.blocks` gives. The gradient is that of a fixed random
    weighting of the pooled features, no labels needed.
    """
    if val.images is None or not isinstance(val.images.backbone, Backbone):
        return None
    backbone = val.images.backbone
    shown = next(iter(val.images.batches(IMAGES))).images
    found: dict[str, float | Tensor] = {}
    given: list[Tensor] = []
    before = {p: p.requires_grad for p in backbone.parameters()}
    try:
        for p in before:
            p.requires_grad_(True)
        with torch.enable_grad(), of_blocks(backbone, lambda output: given.append(size(output))):
            features = backbone(val.images.normalised(shown))
            weights = torch.randn(features.pooled.shape, generator=torch.Generator().manual_seed(seed))
            loss = (features.pooled.float() * weights.to(shown.device)).sum() / len(shown)
            named = dict(backbone.named_parameters())
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    finally:
        for p, needed in before.items():
            p.requires_grad_(needed)
    by_depth: dict[int, list[Tensor]] = {}
    depths = backbone.depths()
    for name, gradient in zip(named, gradients):
        if gradient is not None:
            by_depth.setdefault(depths[name], []).append(gradient.detach().double().flatten())
    sizes = torch.stack([torch.cat(by_depth[d]).square().mean().sqrt() for d in sorted(by_depth)])
    found["gradient"] = sizes
    found["gradient_ratio"] = float(sizes[0] / sizes[-1].clamp(min=1e-300))
    found["activation"] = torch.stack(given)
    return found


def size(output: Tensor) -> Tensor:
    """The root mean square of a block's output [B, ...]."""
    return output.detach().double().square().mean().sqrt()
