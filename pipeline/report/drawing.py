"""The pictures of a report: matplotlib drawings as SVG that take the page's colours, photographs as PNG.

Text and axes are drawn in one marked colour, which the page replaces by its own: black on white, white on black, and
black again when printed.
"""

import base64
import io
import re
from html import escape
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from pipeline.report.contest import Contest, Entry

INK = "#010203"  # stands for the page's text colour until the drawing is put into it
PALETTE = ("#3b82c4", "#e07b39", "#3fa66b", "#c84e89", "#8a6fd1", "#b3942e", "#4fb3bf", "#8d8d8d")
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": False, "legend.frameon": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "axes.linewidth": 0.8,
}  # fmt: skip
WIDTH = 7.0  # inches, the width of the page's column


class Picture(NamedTuple):
    """A drawing (SVG text, or a PNG's data URI within an <img>), what it shows, and how to read it."""

    title: str
    markup: str
    caption: str

    def file(self) -> tuple[str, bytes]:
        """A file's name, made of the title, and its content: the drawing, on white, or the PNG."""
        name = re.sub(r"\W+", "-", self.title.lower()).strip("-")
        if photograph := re.match(r'<img [^>]*base64,([^"]+)', self.markup):
            return f"{name}.png", base64.b64decode(photograph[1])
        return f"{name}.svg", self.markup.replace('style="', 'style="background:#fff;', 1).encode()


def colours(contest: Contest) -> dict[str, str]:
    """A colour for every entry, by name."""
    return {one.name: PALETTE[i % len(PALETTE)] for i, one in enumerate(contest.entries)}


def svg(figure: Figure, title: str) -> str:
    """A figure as SVG to stand inside a page: its ids its own, its ink the page's, scaled to the width it has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="image\w+"', "", text)  # named by their content, which may come twice
    mark = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{mark}-", text)
    width = float(re.search(r'width="([\d.]+)pt"', text).group(1))  # type: ignore[union-attr]
    style = f'style="width:100%;max-width:{width * 4 / 3:.0f}px;height:auto"'
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt" width="[\d.]+pt"', style, text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def png(image: np.ndarray, title: str) -> str:
    """A uint8 image [H, W, 3] as an <img> that needs no file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}" width="{image.shape[1]}">'


def short(name: str) -> str:
    """A class's name without a number in front."""
    return re.sub(r"^n\d{8}[_-]", "", name).replace("_", " ")[:18]


def coloured(contest: Contest) -> list[tuple[Entry, str]]:
    """Every entry with its colour, the same in all charts."""
    of = colours(contest)
    return [(one, of[one.name]) for one in contest.entries]


def legend(figure: Figure, contest: Contest) -> None:
    """Names and colours below all axes."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=colour, label=one.name) for one, colour in coloured(contest)]
    columns = 2 if max(len(one.name) for one in contest.entries) > 22 else 3
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=columns, fontsize=8)


def clear_to(colour: str) -> Any:
    """A colour map from nothing to a colour: its low end shows the page."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    return LinearSegmentedColormap.from_list("clear", [(*to_rgb(colour), 0.0), (*to_rgb(colour), 1.0)])
