"""From images nobody labelled to a measured backbone: pretrain, evaluate, pack, bench."""

import importlib.util
import sys
from pathlib import Path


def find_objectives() -> None:
    """Make the package `objectives` importable from a bare checkout, where it lives below `ssl/`.

    `ssl/` is a source root and never a package: an `ssl/__init__.py` would hide Python's own `ssl`.
    """
    root = str(Path(__file__).resolve().parents[1] / "ssl")
    if importlib.util.find_spec("objectives") is None and root not in sys.path:
        sys.path.append(root)


find_objectives()
