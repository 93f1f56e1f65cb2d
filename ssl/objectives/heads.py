"""Heads on top of a backbone's pooled features."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.precision import full_precision

NORMS = ("none", "batch")


def mlp(
    widths: Sequence[int],
    *,
    norm: str = "none",
    activation: Callable[[], nn.Module] = nn.GELU,
    last_norm: str = "none",
    last_bias: bool = True,
) -> nn.Sequential:
    """Fully connected layers `widths[0] -> ... -> widths[-1]`; norm and activation after each but the last.

    `last_norm` follows the last layer: "batch", or "standardise" for a batch norm without learned scale and shift.
    A layer that a batch norm follows has no bias of its own; `last_bias` is whether the last has one otherwise.
    """
    if norm not in NORMS:
        raise ValueError(f"head norm {norm!r} is not known; choose one of {', '.join(NORMS)}")
    if last_norm not in (*NORMS, "standardise"):
        raise ValueError(f"last head norm {last_norm!r} is not known; choose one of {', '.join(NORMS)}, standardise")
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[:-1]):
        layers.append(nn.Linear(n_in, n_out, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm1d(n_out))
        layers.append(activation())
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias and last_norm == "none"))
    if last_norm != "none":
        layers.append(nn.BatchNorm1d(widths[-1], affine=last_norm == "batch"))
    return nn.Sequential(*layers)


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are `scale * direction / |direction|` (Salimans & Kingma 2016).

    `fixed_scale` keeps every row at length 1 (DINO's `norm_last_layer`). Both are 2-D parameters, so that weight
    decay treats them as in DINO's code.
    """

    def __init__(self, n_in: int, n_out: int, *, fixed_scale: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(n_out, n_in).uniform_(-(n_in**-0.5), n_in**-0.5))
        self.scale = nn.Parameter(torch.ones(n_out, 1), requires_grad=not fixed_scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        return F.linear(x, self.scale * F.normalize(self.direction, dim=-1))


class DINOHead(nn.Module):
    """DINO's projection head (Caron et al. 2021, sec. 3.1 and appendix C).

    Three fully connected layers with GELU, `width -> hidden -> hidden -> bottleneck`, L2 normalisation, and a
    weight-normalised layer to the K = `out_dim` prototypes. Without batch norm as published; `norm="batch"` puts one
    after the first two layers.
    """

    def __init__(
        self, width: int, hidden_dim: int, bottleneck_dim: int, out_dim: int, *, norm: str, norm_last_layer: bool
    ) -> None:
        super().__init__()
        self.projector = mlp([width, hidden_dim, hidden_dim, bottleneck_dim], norm=norm)
        for layer in self.projector.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, fixed_scale=norm_last_layer)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled [B, D] -> prototype scores [B, K], cosines where the last layer's scale is fixed."""
        return self.last_layer(F.normalize(full_precision(self.projector(pooled)), dim=-1))
