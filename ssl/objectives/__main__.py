"""`python -m objectives`: every objective, what family it is of, the views it asks for, and its paper."""

import argparse
import sys
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

import backbones
import objectives
from objectives.views import View

LOG_WIDTH = 120
"""Of the table where there is no terminal to fit it to."""


def describe(views: tuple[View, ...]) -> str:
    """Counts, sizes and area ranges of views: "2 of 224x224, area 0.4-1", one line for each kind."""
    kinds = Counter((view.size, view.scale) for view in views)
    return "\n".join(
        f"{count} of {h}x{w}, " + ("centre" if scale is None else f"area {scale[0]:g}-{scale[1]:g}")
        for ((h, w), scale), count in kinds.items()
    )


NEEDED: dict[str, dict[str, Any]] = {"distillation": {"teacher": "random:vit_ti16"}, "supervised": {"classes": 1000}}
"""Options without which an objective cannot be made."""


def main() -> None:
    """Print the table, with the published defaults on a ViT at 224 pixels."""
    argparse.ArgumentParser(prog="python -m objectives", description="List the objectives.").parse_args()
    table = Table("name", "family", "views at 224 pixels", "vital signs", "paper", box=None, padding=(0, 2, 1, 0))
    for name in objectives.NAMES:
        cls = objectives.objective(name)
        if cls.continues:
            table.add_row(
                name, cls.family, "its checkpoint's", "its checkpoint's and more", cls.paper.replace(", ", "\n")
            )
            continue
        backbone, options = backbones.create("vit_ti16", pool=cls.pool), NEEDED.get(name, {})
        made = objectives.create(name, backbone, image_size=224, **options)
        signs = "\n".join(sign.name for sign in made.vital_signs)
        table.add_row(name, cls.family, describe(made.views), signs, cls.paper.replace(", ", "\n"))
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)


if __name__ == "__main__":
    main()
