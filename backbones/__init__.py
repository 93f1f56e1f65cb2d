"""Images in, features out: one interface from LeNet-5 to ViT-H. Importing this package does not import torch."""

from typing import TYPE_CHECKING, Any

from backbones.names import UnknownBackbone

if TYPE_CHECKING:
    from backbones.build import create
    from backbones.contract import Backbone, Features
    from backbones.exported import load

__all__ = ["Backbone", "Features", "UnknownBackbone", "create", "load"]

_HOME = {
    "create": "backbones.build",
    "load": "backbones.exported",
    "Backbone": "backbones.contract",
    "Features": "backbones.contract",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'backbones' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
