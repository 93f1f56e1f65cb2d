"""Layer-wise learning rates: the nearer to the pixels, the slower (Clark et al. 2020, ELECTRA, appendix A)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbones import Backbone


def decay_by_depth(
    groups: list[dict[str, Any]], backbone: "Backbone", *, decay: float, stem: float
) -> list[dict[str, Any]]:
    """Parameter groups split so that `lr_scale` falls by `decay` with each block from the last to the first.

    Args:
        groups: of `Objective.parameter_groups`. What is not the backbone's keeps its rate.
        backbone: whose `depths()` count; the deepest parameters keep their rate too.
        stem: what the rate of depth 0 is multiplied by besides (DINOv2 does it to the patch embedding, which shares
            its depth with positions and tokens).
    """
    depths = backbone.depths()
    last = max(depths.values())
    scales = {
        id(parameter): decay ** (last - depths[name]) * (stem if depths[name] == 0 else 1.0)
        for name, parameter in backbone.named_parameters()
    }
    split: dict[tuple[int, float], dict[str, Any]] = {}
    for i, group in enumerate(groups):
        for parameter in group["params"]:
            scale = scales.get(id(parameter), 1.0)
            new = {**group, "params": [], "lr_scale": group["lr_scale"] * scale}
            split.setdefault((i, scale), new)["params"].append(parameter)
    return list(split.values())
