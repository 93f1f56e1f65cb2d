"""`python -m objectives`: every objective, its family, the views it asks for, how it masks a CNN, and its paper."""

import argparse
import sys
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import backbones
import objectives
from objectives.views import View

LOG_WIDTH = 120
"""Of the table where there is no terminal to fit it to."""


def describe(views: tuple[View, ...]) -> str:
    """Counts, sizes and area ranges of views: "2 of 224x224, 0.4-1", one line for each kind."""
    kinds = Counter((view.size, view.scale) for view in views)
    return "\n".join(
        f"{count} of {h}x{w}, " + ("centre" if scale is None else f"{scale[0]:g}-{scale[1]:g}")
        for ((h, w), scale), count in kinds.items()
    )


NEEDED: dict[str, dict[str, Any]] = {"distillation": {"teacher": "random:vit_ti16"}, "supervised": {"classes": 1000}}
"""Options without which an objective cannot be made."""


MASKING = {None: "none", "visible": "dropped", "replaced": "replaced"}
"""What `Objective.masking` does to a cell."""

CAPTION = (
    "Views: how many, their size, and the range of their share of the image. Masking: a CNN computes without the "
    "pixels of cells that are dropped; those of cells that are replaced show one learned colour."
)


def main() -> None:
    """Print the table, with the published defaults on a ViT at 224 pixels."""
    argparse.ArgumentParser(prog="python -m objectives", description="List the objectives.").parse_args()
    columns = ("name", "family", "views at 224 px", "masking\non a CNN", "vital signs", "paper")
    table = Table(*columns, box=None, padding=(0, 2, 1, 0), caption=CAPTION, caption_justify="left")
    for name in objectives.NAMES:
        cls = objectives.objective(name)
        views, masking, signs = "its checkpoint's", "likewise", "its checkpoint's and more"
        if not cls.continues:
            # Published heads have up to 200 million weights; the meta device makes none of them.
            with torch.device("meta"):
                backbone = backbones.create("vit_ti16", pool=cls.pool)
                made = objectives.create(name, backbone, image_size=224, **NEEDED.get(name, {}))
            views, masking = describe(made.views), MASKING[cls.masking]
            signs = "\n".join(sign.name for sign in made.vital_signs)
        family, paper = cls.family.replace(" ", "\n"), cls.paper.replace(", ", "\n")
        table.add_row(name, family, views, masking, signs, paper)
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)


if __name__ == "__main__":
    main()
