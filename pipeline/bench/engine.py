"""Whole runs: with Ray and without."""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from pipeline.bench.contender import Arguments, Bench

TRAINING = ("--backbone", "vit_ti16", "--objective", "dino", "--image-size", "64", "--epochs", "2")


class Training(NamedTuple):
    """A whole pretraining run on one engine."""

    title: str
    options: tuple[str, ...]

    def figure(self, path: Path, arguments: Arguments) -> float:
        """Images per second of its steps, from the first to the last."""
        from pipeline import pretrain

        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            run = str(Path(folder) / "run")
            fixed = ("--limit", "1024", "--batch-size", str(arguments.batch_size), "--knn-every", "0", "--run", run)
            if pretrain.main([*TRAINING, *fixed, "--storage", folder, *self.options]):
                raise RuntimeError("the run failed")
            return float(json.loads((Path(run) / "summary.json").read_text())["images_per_second"])


BENCH = Bench(
    "training steps of DINO with ViT-Ti/16 at 64 pixels",
    {
        "local": Training("`--engine local`", ("--engine", "local")),
        "ray": Training("Ray Train, one worker", ("--engine", "ray")),
        "ray2": Training("Ray Train, two workers, half the batch and of the cores each", ("--workers", "2")),
    },
    limit=300,
)
