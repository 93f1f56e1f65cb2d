"""`python -m backbones`: every backbone with a short name, what it costs and what it sees."""

import argparse
import sys
from contextlib import nullcontext


def main() -> int:
    """Run the command line; returns 0, or 2 where a name is unknown."""
    parser = argparse.ArgumentParser(
        prog="python -m backbones",
        description="List backbones: parameters, multiply-adds, stride, width, receptive field. "
        "timm's models work too, those that give one map of features, and vit_<ti|s|b|l|h><patch> for any patch size.",
        epilog="example: python -m backbones --image-size 64 resnet18 vit_ti8",
    )
    parser.add_argument("names", nargs="*", help="short or timm names; all short names when none is given")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of a square image (default 224)")
    parser.add_argument("--in-channels", type=int, default=3, help="channels of an image (default 3)")
    parser.add_argument("--stem", choices=("auto", "imagenet", "small"), default="auto", help="as in backbones.create")
    options = parser.parse_args()

    from backbones import names

    try:
        wanted = [names.resolve(name) for name in options.names] or list(names.SHORT)
    except names.UnknownBackbone as error:
        print(error, file=sys.stderr)
        return 2
    show(wanted, options.image_size, options.in_channels, options.stem)
    return 0


def show(wanted: list[str], image_size: int, in_channels: int, stem: str) -> None:
    """Print the table, a row as soon as it is known, then why any backbone was left out."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from backbones import names

    title = f"Backbones at {image_size} x {image_size} pixels, {in_channels} channels"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1))
    table.add_column("name", no_wrap=True)
    for heading in ("params", "mult-adds", "stride", "cells", "width", "sees"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("published", no_wrap=True)
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    unfit = []
    growing = Live(table, console=console, refresh_per_second=8, vertical_overflow="visible")
    with growing if console.is_terminal else nullcontext():
        for name in wanted:
            try:
                table.add_row(name, *describe(name, image_size, in_channels, stem), names.entry(name).paper)
            except ValueError as error:
                unfit.append(str(error))
    if not console.is_terminal:
        console.print(table)
    for sentence in unfit:
        console.print(f"[dim]left out:[/dim] {sentence}", soft_wrap=True)
    console.print("sees: theoretical receptive field of one cell. Multiply-adds and parameters without a classifier.")


def describe(name: str, image_size: int, in_channels: int, stem: str) -> list[str]:
    """The cells of one row. Raises ValueError where the backbone cannot take such images."""
    import torch

    from backbones import cost, create

    with torch.device("meta"):
        backbone = create(name, image_size=image_size, in_channels=in_channels, stem=stem)
    rows, columns = backbone.grid(image_size, image_size)
    field = cost.receptive_field(backbone)
    return [
        f"{cost.parameters(backbone) / 1e6:.2f} M",
        f"{cost.multiply_adds(backbone, image_size) / 1e9:.3f} G",
        str(backbone.stride),
        f"{rows} x {columns}",
        str(backbone.width),
        "all" if field is None else f"{field} px",
    ]


if __name__ == "__main__":
    sys.exit(main())
