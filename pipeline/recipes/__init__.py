"""Hyper-parameters as data: one recipe per (objective, backbone family, data scale), each with its source.

One module an objective, named as it: its `options(...)` are all options with their published values, its `RECIPES` maps
(family, scale) to a `Recipe`. A recipe fills whatever the user left open. `base_lr` is the peak learning rate at a
global batch of 256 and scales linearly with the batch (Goyal et al. 2017); `warmup` and options such as
`teacher_temp_warmup` are shares of the run, so that a shorter run keeps the published shape. The rate rises from 0;
I-JEPA's and MSN's authors start at 2e-4, SwAV's at 0.3. Nothing here imports torch: `--help` reads it.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from objectives import NAMES
from pipeline.recipes.recipe import Recipe

__all__ = ["DEFAULT", "OBJECTIVES", "RECIPES", "SCALES", "Recipe", "find", "objective_for", "options_of", "scale_of"]

DEFAULT = "dino"

SCALES = MappingProxyType(
    {
        "embedded": "the generated data set, on 2 CPU cores",
        "thumbnails": "images of at most 48 pixels, such as CIFAR",
        "small": "fewer than 200,000 images",
        "large": "200,000 images or more",
    }
)

OBJECTIVES = tuple(sorted(NAMES))

RECIPES: Mapping[tuple[str, str, str], Recipe] = MappingProxyType(
    {
        (name, family, scale): recipe
        for name in OBJECTIVES
        for (family, scale), recipe in import_module(f"pipeline.recipes.{name}").RECIPES.items()
    }
)


def objective_for(address: str) -> str:
    """The objective where none is asked for: `DEFAULT`, but LeJEPA on the generated images.

    Some 200 small steps are too few for a ViT and a teacher to find their way: there DINO stays below raw pixels, which
    LeJEPA leaves far behind (README.md, table of results).
    """
    return "lejepa" if generated(address) else DEFAULT


def generated(address: str) -> bool:
    """Whether `--data` names the generated images."""
    return address.split(":")[0] == "embedded"


def scale_of(address: str, images: int, side: int) -> str:
    """The data scale of a set: a key of `SCALES`.

    Args:
        address: what `--data` said.
        images: how many training images there are.
        side: their median shorter side, in pixels.
    """
    if generated(address):
        return "embedded"
    if side <= 48:
        return "thumbnails"
    return "small" if images < 200_000 else "large"


def find(objective: str, family: str, scale: str) -> Recipe:
    """The recipe for an objective ("dino"), a backbone family ("cnn" or "vit") and a data scale.

    Raises:
        KeyError: where none of the four scales has a recipe for the pair.
    """
    order = {"embedded": ("embedded", "small"), "thumbnails": ("thumbnails", "small")}.get(scale, (scale,))
    for candidate in order:
        if (objective, family, candidate) in RECIPES:
            return RECIPES[objective, family, candidate]
    raise KeyError(f"no recipe for {objective} on a {family} at scale {scale}")


def options_of(objective: str) -> dict[str, Any]:
    """Every option of an objective with its published value: what `--options.*` accepts."""
    return dict(import_module(f"pipeline.recipes.{objective}").options())
