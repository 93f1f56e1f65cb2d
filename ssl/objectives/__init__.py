"""Objectives, self-supervised but for the yardstick: one file each, one contract (`objectives.contract.Objective`).

    backbone = backbones.create("vit_s16", pool=objectives.objective("mae").pool)
    objective = objectives.create("mae", backbone, image_size=224, mask_ratio=0.6)

Importing this package imports no torch: names are known before anything heavy is loaded.
"""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbones import Backbone
    from objectives.barlow_twins import BarlowTwins
    from objectives.byol import BYOL
    from objectives.contract import Objective
    from objectives.data2vec import Data2Vec
    from objectives.dino import DINO
    from objectives.dinov2 import DINOv2
    from objectives.distillation import Distillation
    from objectives.gram import GramAnchoring
    from objectives.ibot import IBOT
    from objectives.ijepa import IJEPA
    from objectives.lejepa import LeJEPA
    from objectives.mae import MAE
    from objectives.moco_v2 import MoCoV2
    from objectives.moco_v3 import MoCoV3
    from objectives.msn import MSN
    from objectives.simclr import SimCLR
    from objectives.simmim import SimMIM
    from objectives.simsiam import SimSiam
    from objectives.spark import SparK
    from objectives.supervised import Supervised
    from objectives.swav import SwAV
    from objectives.vicreg import VICReg

_CLASSES = {
    "barlow_twins": "BarlowTwins",
    "byol": "BYOL",
    "data2vec": "Data2Vec",
    "dino": "DINO",
    "dinov2": "DINOv2",
    "distillation": "Distillation",
    "gram": "GramAnchoring",
    "ibot": "IBOT",
    "ijepa": "IJEPA",
    "lejepa": "LeJEPA",
    "mae": "MAE",
    "moco_v2": "MoCoV2",
    "moco_v3": "MoCoV3",
    "msn": "MSN",
    "simclr": "SimCLR",
    "simmim": "SimMIM",
    "simsiam": "SimSiam",
    "spark": "SparK",
    "supervised": "Supervised",
    "swav": "SwAV",
    "vicreg": "VICReg",
}

NAMES: tuple[str, ...] = tuple(_CLASSES)
"""Every objective there is; `objectives.<name>` is its module."""

__all__ = [
    "BYOL",
    "DINO",
    "IBOT",
    "IJEPA",
    "MAE",
    "MSN",
    "NAMES",
    "BarlowTwins",
    "DINOv2",
    "Data2Vec",
    "Distillation",
    "GramAnchoring",
    "LeJEPA",
    "MoCoV2",
    "MoCoV3",
    "SimCLR",
    "SimMIM",
    "SimSiam",
    "SparK",
    "Supervised",
    "SwAV",
    "VICReg",
    "create",
    "objective",
]


def objective(name: str) -> "type[Objective]":
    """The class of an objective.

    Raises:
        ValueError: an unknown name, with the nearest known ones.
    """
    if name not in _CLASSES:
        near = get_close_matches(name.lower(), NAMES, n=3) or NAMES
        raise ValueError(f"there is no objective {name!r}; did you mean {' or '.join(near)}?")
    return getattr(import_module(f"objectives.{name}"), _CLASSES[name])


def create(name: str, backbone: "Backbone", *, image_size: int | tuple[int, int], **options: Any) -> "Objective":
    """The objective `name` around `backbone` for images of `image_size` pixels (a side, or height and width).

    Args:
        options: keywords of the objective's class, whose defaults are the published ones.

    Raises:
        ValueError: an unknown name or option, or a backbone and a size that the objective can make no sense of.
    """
    from inspect import signature

    cls = objective(name)
    known = [option for option in signature(cls).parameters if option not in ("backbone", "image_size")]
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, n=3) or known
            raise ValueError(f"objective {name} has no option {option!r}; did you mean {' or '.join(near)}?")
    return cls(backbone, image_size=image_size, **options)


def __getattr__(attribute: str) -> Any:
    for name, cls in _CLASSES.items():
        if attribute == cls:
            return objective(name)
    raise AttributeError(f"module 'objectives' has no attribute {attribute!r}")
