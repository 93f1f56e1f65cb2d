"""Do training and validation images really differ? Exact copies across the split make every accuracy too good, and so
may validation images that a backbone was pretrained on."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import objectives
from pipeline.config import Config
from pipeline.data import preparation
from pipeline.data.beton import BetonError, BetonReader
from pipeline.data.packed import Packed, read_facts, read_names, read_packed


def duplicates(train: Packed, val: Packed) -> list[tuple[str, str]]:
    """Names of (training image, validation image) that are the same file, byte for byte (or pixel for pixel, where they
    are stored as such). An image that was encoded again, or cropped, is another to this test."""
    pairs = _pairs(train.path, val.path)
    if not pairs:
        return []
    train_names, val_names = (read_names(packed.path) for packed in (train, val))
    return [
        (train_names[a] if train_names else f"image {a}", val_names[b] if val_names else f"image {b}") for a, b in pairs
    ]


@dataclass(frozen=True)
class Met:
    """How many `of` the validation images a backbone was pretrained on, None where nobody can tell any more, and
    whether it saw labels there, too."""

    count: int | None
    of: int
    labelled: bool

    def sentence(self, names: Sequence[str]) -> str:
        """What that means for backbones of these names; empty where it was pretrained on none of them."""
        called = f"{' and '.join(names)} {'were' if len(names) > 1 else 'was'} pretrained on"
        if self.count is None:
            return (
                f"whether {called} some of the {self.of:,} validation images is not known: what it was pretrained on "
                "is not, or no longer, in the cache"
            )
        if not self.count:
            return ""
        too_good = "with labels: accuracies are" if self.labelled else "without labels: accuracies may be somewhat"
        return (
            f"{self.count:,} of the {self.of:,} validation images were among those that {called}, {too_good} too good"
        )


NEVER = Met(0, 0, False)
"""Of a backbone that nobody pretrained."""


def met(config: Config, images: str | None, val: Packed, *, cache: Path) -> Met:
    """How many validation images a run learnt from in pretraining, by the same test as `duplicates`.

    Nothing is packed for that: where its training set is neither in `cache`, nor in the run's own, nor the .beton that
    it named, nobody can tell.

    Args:
        images: the fingerprint of its training set; None for checkpoints that do not know it.
    """
    labelled = objectives.objective(config.objective).labelled
    places = [Path(config.data)] if config.data.endswith(".beton") else []
    for kept in dict.fromkeys((cache, preparation.cache_folder(config.cache))):
        places += [*sorted(kept.glob("*.beton")), *sorted(kept.glob("*/*.beton"))]
    for path in places:
        with contextlib.suppress(BetonError):
            if (read_facts(path).get("fingerprint") or read_packed(path).fingerprint) == images:
                return Met(len({b for _, b in _pairs(path, val.path)}), val.images, labelled)
    return Met(None, val.images, labelled)


def _pairs(path: Path, other: Path) -> list[tuple[int, int]]:
    """The numbers of an image of one .beton and of each of the other's that is the same. Of the first only what is as
    large as one of the other's is read: a large set takes no longer than what it might share."""
    reader, asked = BetonReader(path), BetonReader(other)
    sizes, wanted = (one.metadata[["width", "height", "size"]].tolist() for one in (reader, asked))
    among = set(wanted)
    known = {_content(reader, i): i for i, size in enumerate(sizes) if size in among}
    found = [_content(asked, i) for i in range(len(asked))] if known else []
    return [(known[content], i) for i, content in enumerate(found) if content in known]


def _content(reader: BetonReader, index: int) -> bytes:
    """A digest of an image as it is stored, its size in pixels included."""
    row = reader.metadata[index]
    size = f"{row['width']} {row['height']}".encode()
    return hashlib.blake2b(reader.payload(index), digest_size=16, key=size).digest()
