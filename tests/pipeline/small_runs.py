"""The small images and the small network of the runs through Ray, and what they have lost at each step."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SMALL = [
    *("--loader", "opencv", "--image-size", "16", "--batch-size", "8", "--knn-every", "0", "--precision", "fp32"),
    *("--options.local-views", "1", "--options.local-size", "8", "--options.out-dim", "16", "--backbone", "vit_ti8"),
    *("--options.hidden-dim", "16"),
]


def draw(folder: Path, images: int = 48) -> Path:
    """Noise of 20 pixels a side in two classes; returns the folder."""
    generator = np.random.default_rng(0)
    for i in range(images):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def losses(run: Path) -> list[float]:
    """The loss of every step of a run."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
