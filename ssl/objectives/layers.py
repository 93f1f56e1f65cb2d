"""Which layers a backbone returns, known before the first batch."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from backbones import Backbone


@torch.no_grad()
def layer_shapes(backbone: "Backbone", size: tuple[int, int]) -> list[tuple[int, int]]:
    """(N_l, D_l) of each layer for whole images of `size` pixels: what one blank image gives in evaluation mode."""
    training = backbone.training
    image = next(backbone.parameters()).new_zeros(1, backbone.in_channels, *size)
    layers = backbone.eval()(image, layers=True).layers
    backbone.train(training)
    return [(layer.shape[1], layer.shape[2]) for layer in layers]
