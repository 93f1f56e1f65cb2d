"""`python -m pipeline.classify CLASSIFIER PHOTOS`: name new images by what an evaluation learned."""

import csv
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from pipeline.command import command
from pipeline.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Name every image by a classifier that `pipeline.evaluate` left in its run's folder `classifiers/`."""

    classifier: Positional[str]
    """The .safetensors file."""
    data: Positional[str]
    """The images: any source that pretraining takes; labels are not needed."""
    output: str = "classes.csv"
    """A CSV of every image, its class, and the probability that the classifier gives it."""
    cache: str | None = None
    """Where packed data sets are kept; left open: ~/.cache/ssl-pretraining."""
    debug: bool = False
    """Show the traceback of an error."""


def classify(arguments: Arguments) -> None:
    """Write the CSV, and print how many images were given each class, the commonest first."""
    import torch

    from pipeline.data import pack, packed, preparation
    from pipeline.device import here, placed
    from pipeline.evaluation import classifier as classifiers
    from pipeline.evaluation.images import Images

    classifier = classifiers.load(arguments.classifier)
    output = Path(arguments.output)
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    with preparation.progress_bar("packing", "files") as progress:
        images = pack.pack(arguments.data, preparation.cache_folder(arguments.cache), on_progress=progress)
    device = here()
    unknown = torch.full((images.images,), -1)
    shown = Images(placed(classifier, device), images.path, unknown, classifier.image_size, device)
    names = packed.read_names(images.path) or [f"image {i}" for i in range(images.images)]
    given: Counter[str] = Counter()
    rows = []
    with torch.no_grad():
        for batch in shown.batches():
            sure, which = classifier(shown.normalised(batch.images)).softmax(dim=1).max(dim=1)
            for index, probability, number in zip(batch.which.tolist(), sure.tolist(), which.tolist()):
                rows.append((names[index], classifier.classes[number], f"{probability:.4f}"))
                given[classifier.classes[number]] += 1
    with output.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([("path", "class", "probability"), *rows])
    for name, count in given.most_common():
        print(f"{count:>9,}  {name}")
    left_out = f"; {images.rejected_count:,} files left out ({images.rejected})" if images.rejected_count else ""
    print(f"{len(rows):,} images in {output}{left_out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 Ctrl-C."""
    return command(Arguments, "pipeline.classify", classify, argv)


if __name__ == "__main__":
    sys.exit(main())
