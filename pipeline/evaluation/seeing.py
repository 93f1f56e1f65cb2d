"""What does a backbone see? Its cells in colour, its nearest neighbours, how far a cell looks, and where heads attend.

All pictures are of the same few validation images for every backbone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.contract import Backbone
from pipeline.evaluation.feature_set import FeatureSet

IMAGES = 6
NEIGHBOURS = 5
FIELD_IMAGES = 32
"""Images that are shown, neighbours of each, and images that the effective receptive field is averaged over."""


def seeing(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float | Tensor] | None:
    """`field_radius`: within how many pixels of its centre half of a cell's gradient lies; of a plain transformer,
    every block of which attends among all cells, `attention_distance`, the mean over its blocks and heads, in shares of
    the image's side.

    As evidence: `images` uint8 [n, 3, H, W]; `cells` uint8 [n, h, w, 3]; `field` float32 [H, W]; `neighbours` uint8
    [n, k, 3, H, W]; of a plain transformer `attention` float32 [n, heads, h, w] of the last block and `distance`
    [L, heads].
    """
    if val.images is None or train.images is None:
        return None
    backbone = val.images.backbone
    if not isinstance(backbone, Backbone):
        return None
    shown = next(iter(val.images.batches(max(IMAGES, FIELD_IMAGES)))).images
    few = shown[:IMAGES]
    height, width = few.shape[-2:]
    grid = backbone.grid(height, width)
    inputs = val.images.normalised(few)
    with torch.no_grad():
        cells = backbone(inputs).cells.float()
        pooled = val.images.pooled(few)
    field = effective_field(backbone, val.images.normalised(shown[:FIELD_IMAGES]))
    found: dict[str, float | Tensor] = {
        "images": few,
        "cells": rearrange(in_colour(cells), "n (h w) c -> n h w c", h=grid[0]),
        "field": field,
        "field_radius": half_radius(field),
        "neighbours": _fetched(train, _nearest(train.features, pooled)),
    }
    prefix = int(getattr(getattr(backbone, "network", None), "num_prefix_tokens", 0))
    with _attending(backbone) as maps, torch.no_grad():
        if maps is not None:
            backbone(inputs)
    if maps and among_all(maps, len(few), prefix + cells.shape[1]):
        cells_only = [_among_cells(one, cells.shape[1]) for one in maps]
        distance = torch.stack([attention_distance(one, grid) for one in cells_only])
        last = maps[-1][:, :, 0, prefix:] if prefix else cells_only[-1].mean(2)
        found |= {
            "attention": rearrange(last, "n a (h w) -> n a h w", h=grid[0]).float(),
            "distance": distance,
            "attention_distance": distance.mean().item(),
        }
    return found


def among_all(maps: Sequence[Tensor], images: int, tokens: int) -> bool:
    """Whether each of these attention maps is [images, heads, tokens, tokens], of as many heads: attention in windows
    (Swin), to fewer keys (PVT), of a class token alone (CaiT) or of channels (XCiT) is not, and cannot be told by
    cells."""
    return {tuple(one.shape) for one in maps} == {(images, maps[0].shape[1], tokens, tokens)}


def in_colour(cells: Tensor) -> Tensor:
    """Cells [n, N, D] of some images as colours uint8 [n, N, 3]: their first three principal components over all of
    them, each stretched from its 2nd to its 98th percentile (as DINOv2's figure 1 shows them)."""
    flat = cells.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    parts = flat @ axes[:3].T
    if parts.shape[1] < 3:
        parts = F.pad(parts, [0, 3 - parts.shape[1]])
    # A component's sign is arbitrary: the longer tail is made bright.
    parts = parts * torch.where((parts**3).sum(0) < 0, -1.0, 1.0)
    low, high = (torch.quantile(parts, q, dim=0) for q in (0.02, 0.98))
    scaled = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).view(*cells.shape[:2], 3)


def effective_field(backbone: Backbone, inputs: Tensor) -> Tensor:
    """How much each pixel moves the centre cell: the mean over images and channels of the size of the gradient of its
    mean activation (Luo et al. 2016, section 2), float32 [H, W], its sum 1.

    Args:
        inputs: normalised images [B, C, H, W].
    """
    grid = backbone.grid(*inputs.shape[-2:])
    centre = (grid[0] // 2) * grid[1] + grid[1] // 2
    frozen = [p for p in backbone.parameters() if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)
        with torch.enable_grad():
            inputs = inputs.detach().clone().requires_grad_(True)
            # Noise in signs cancels within a cell's channels: each channel by a random weight of its own.
            weights = torch.randn(backbone.width, generator=torch.Generator().manual_seed(0)).to(inputs)
            (backbone(inputs).cells[:, centre].float() @ weights).sum().backward()
        assert inputs.grad is not None
        size = inputs.grad.abs().mean((0, 1))
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return (size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)).float()


def half_radius(field: Tensor) -> float:
    """Within how many pixels of its centre of mass half of a field [H, W] lies."""
    y, x = (torch.arange(side, dtype=torch.float64, device=field.device) for side in field.shape)
    weight = field.double()
    total = weight.sum().clamp(min=1e-300)
    at_y, at_x = (weight.sum(1) * y).sum() / total, (weight.sum(0) * x).sum() / total
    distance = ((y - at_y)[:, None] ** 2 + (x - at_x) ** 2).sqrt().flatten()
    order = distance.argsort()
    reached = weight.flatten()[order].cumsum(0) >= total / 2
    return float(distance[order][reached.double().argmax()])


def attention_distance(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean distance at which each head attends, in shares of the longer side: [heads] of attention [B, heads, N, N]
    among cells, rows summing to 1 (Dosovitskiy et al. 2021, figure 7)."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([y, x], dim=-1).view(-1, 2).double().to(attention.device)
    distance = torch.cdist(places, places) / max(grid)
    return (attention.double() * distance).sum(-1).mean((0, 2)).float()


def _among_cells(attention: Tensor, cells: int) -> Tensor:
    """Attention [B, heads, T, T] of cells to cells alone, its rows summing to 1."""
    part = attention[:, :, -cells:, -cells:]
    return part / part.sum(-1, keepdim=True).clamp(min=1e-12)


def _nearest(bank: Tensor, queries: Tensor) -> Tensor:
    """Indices [n, k] of the nearest training images by cosine similarity."""
    similarity = F.normalize(queries.to(bank), dim=1) @ F.normalize(bank, dim=1).T
    return similarity.topk(min(NEIGHBOURS, len(bank)), dim=1).indices


def _fetched(train: FeatureSet, nearest: Tensor) -> Tensor:
    """The training images uint8 [n, k, 3, H, W] that `nearest` [n, k] names, in the order of `train.features`."""
    assert train.images is not None
    assert train.which is not None
    wanted = train.which[nearest.cpu()]
    found: dict[int, Tensor] = {}
    for shown in train.images.batches():
        for row, index in enumerate(shown.which.tolist()):
            if bool((wanted == index).any()):
                found[index] = shown.images[row].cpu()
        if len(found) == len(wanted.unique()):
            break
    return torch.stack([torch.stack([found[int(i)] for i in row]) for row in wanted])


@contextmanager
def _attending(backbone: nn.Module) -> Iterator[list[Tensor] | None]:
    """A list that the attention of every block, [B, heads, T, T] of a plain transformer, is added to in a forward
    within; None for a network without attention of that kind."""
    blocks: list[Any] = [m for m in backbone.modules() if hasattr(m, "fused_attn") and hasattr(m, "attn_drop")]
    if not blocks:
        yield None
        return
    maps: list[Tensor] = []
    fused = [block.fused_attn for block in blocks]
    # Written out, timm's attention passes its rows through a dropout, which shows them.
    hooks = [
        block.attn_drop.register_forward_hook(lambda module, args, out: maps.append(args[0].detach().float()))
        for block in blocks
    ]
    try:
        for block in blocks:
            block.fused_attn = False
        yield maps
    finally:
        for block, was in zip(blocks, fused):
            block.fused_attn = was
        for hook in hooks:
            hook.remove()
