"""What each backbone sees, in images: cells in colour, attention, receptive fields, nearest neighbours."""

from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipeline.report.contest import Contest, Entry
from pipeline.report.drawing import Picture, png

SIDE = 96  # pixels of an image on the page
GAP = 6
ATTENDING = 4
"""Images for which the attention of every head is shown."""
HEADS = 6
"""Heads beside each other; more go on below."""


def sights(contest: Contest) -> Iterator[Picture]:
    """Per backbone one sheet of images and their cells, and one of the attention of every head; then fields, then
    neighbours."""
    seen = [one for one in contest.entries if "seeing_cells" in one.trained.evidence]
    for one in seen:
        evidence = one.trained.evidence
        rows = [_images(evidence["seeing_images"]), _images(rearrange(evidence["seeing_cells"], "n h w c -> n c h w"))]
        title = f"What {one.name} sees"
        yield Picture(
            title, png(_sheet(rows), title),
            "The image, and its cells coloured by their first three principal components over all images shown.",
        )  # fmt: skip
        if "seeing_attention" in evidence:
            title = f"Where each head of {one.name} attends"
            yield Picture(
                title, png(_sheet(_heads(one)), title),
                f"The image, and right of it the attention of the last block's {evidence['seeing_attention'].shape[1]} "
                "heads, one by one, each by its own brightest cell.",
            )  # fmt: skip
    if seen:
        title = "How far a cell sees"
        fields = torch.stack([_field(one) for one in seen])
        radii = "; ".join(
            f"{one.name}: half within {one.trained.numbers['seeing_field_radius']:.0f} px, "
            + ("all of the image in theory" if one.field is None else f"{one.field} px in theory")
            for one in seen
        )
        yield Picture(
            title, png(_sheet([_images(fields)]), title),
            "The effective receptive field of the centre cell: how much each pixel moves it, brightness the square "
            "root, left to right in the order of the table. The frame is the theoretical one where it lies inside. "
            f"{radii}.",
        )  # fmt: skip
        for one in seen:
            title = f"Nearest neighbours by {one.name}"
            sheet = [
                _images(torch.cat([image[None], near]))
                for image, near in zip(one.trained.evidence["seeing_images"], one.trained.evidence["seeing_neighbours"])
            ]
            yield Picture(
                title, png(_sheet(sheet[:4]), title),
                "A validation image, and beside it the training images most like it, nearest first.",
            )  # fmt: skip


def _heads(one: Entry) -> list[list[np.ndarray]]:
    """Of every image, itself and the attention of all heads, in rows of `HEADS`."""
    evidence = one.trained.evidence
    rows = []
    for image, maps in zip(evidence["seeing_images"][:ATTENDING], evidence["seeing_attention"]):
        beside = _images(image[None])[0]
        for some in maps.split(HEADS):
            rows.append([beside, *_images(_glow(some))])
            beside = np.full_like(beside, 128)
    return rows


def _images(images: Tensor) -> list[np.ndarray]:
    """uint8 [n, 3, H, W] as arrays [SIDE, SIDE, 3]; small ones keep their pixels."""
    exact = images.shape[-1] < SIDE
    size = (SIDE, SIDE)
    resized = (
        F.interpolate(images.float(), size=size, mode="nearest")
        if exact
        else F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    )
    return list(rearrange(resized.clamp(0, 255).round().to(torch.uint8), "n c h w -> n h w c").numpy())


def _glow(maps: Tensor) -> Tensor:
    """Attention [n, h, w] as images uint8 [n, 3, h, w], each by its own largest."""
    share = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
    colour = torch.tensor([255.0, 190.0, 60.0])
    return (share[:, None] * colour[:, None, None]).round().to(torch.uint8)


def _field(one: Entry) -> Tensor:
    """The effective receptive field as an image uint8 [3, SIDE, SIDE], the theoretical one framed."""
    field = one.trained.evidence["seeing_field"]
    share = (field / field.max().clamp(min=1e-12)).sqrt()
    grey = F.interpolate(share[None, None], size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]
    image = (grey * 255).round().to(torch.uint8).expand(3, -1, -1).clone()
    if one.field is not None and one.field < field.shape[-1]:
        half = one.field / field.shape[-1] * SIDE / 2
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        # The centre cell's own place: where the field's mass lies.
        weight = grey[0].square()
        middle = [(weight * axis).sum() / weight.sum().clamp(min=1e-12) for axis in (y, x)]
        far = torch.maximum((y - middle[0]).abs(), (x - middle[1]).abs())
        image[:, (far - half).abs() < 0.75] = torch.tensor([59, 130, 196], dtype=torch.uint8)[:, None]
    return image


def _sheet(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Rows of images on one grey sheet."""
    width = max(len(row) for row in rows) * (SIDE + GAP) - GAP
    sheet = np.full((len(rows) * (SIDE + GAP) - GAP, width, 3), 128, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet[y * (SIDE + GAP) :, x * (SIDE + GAP) :][:SIDE, :SIDE] = image
    return sheet
