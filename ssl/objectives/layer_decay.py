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
        stem: what the rate of `stem_of` it is multiplied by besides. Tokens and positions have that of depth 0 without.
    """
    depths = backbone.depths()
    last, first_layers = max(depths.values()), stem_of(depths)
    scales = {
        id(parameter): decay ** (last - depths[name]) * (stem if name in first_layers else 1.0)
        for name, parameter in backbone.named_parameters()
    }
    split: dict[tuple[int, float], dict[str, Any]] = {}
    for i, group in enumerate(groups):
        for parameter in group["params"]:
            scale = scales.get(id(parameter), 1.0)
            new = {**group, "params": [], "lr_scale": group["lr_scale"] * scale}
            split.setdefault((i, scale), new)["params"].append(parameter)
    return list(split.values())


def stem_of(depths: dict[str, int]) -> set[str]:
    """Which parameters of depth 0 are the patch projection, or where there is none a CNN's first layers; tokens and
    positions, which share the depth, are not."""
    first = {name for name, depth in depths.items() if depth == 0}
    patches = {name for name in first if "patch_embed" in name}
    return patches or {name for name in first if not name.endswith(("_token", "_pos", "pos_embed"))}
