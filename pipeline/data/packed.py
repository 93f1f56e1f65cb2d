"""What is known about a packed data set: its `.beton`, and the facts in the `.json` beside it.

images.beton      the images, in the order of the source's listing
images.json       classes, fingerprint, source, what was rejected and what looked wrong
images.names.txt  the name of image i in line i, as a JSON string
rejected.csv      path, reason: every file that was left out
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.beton import BetonError, BetonReader


@dataclass(frozen=True)
class Packed:
    """A data set ready to be loaded.

    path            the .beton
    images          number of images in it
    classes         name of label 0, 1, …; empty where the images have no labels
    fingerprint     32 hexadecimal digits that name the content: same images and labels in the same order
    rejected        CSV of (path, reason), or None where nothing was left out
    rejected_count  number of its rows
    """

    path: Path
    images: int
    classes: tuple[str, ...] = ()
    fingerprint: str = ""
    rejected: Path | None = None
    rejected_count: int = 0


def write_atomically(path: Path, text: str) -> None:
    """Put `text` under `path`, complete or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with open(partial, "x", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_facts(packed: Packed, names: Iterable[str], **more: Any) -> None:
    """Write the sidecar of `packed.path`; `more` goes into it as it is (source, warnings, seconds …)."""
    facts: dict[str, Any] = {
        "images": packed.images,
        "classes": list(packed.classes),
        "fingerprint": packed.fingerprint,
        "rejected": packed.rejected.name if packed.rejected else None,
        "rejected_count": packed.rejected_count,
        **more,
    }
    write_atomically(packed.path.with_suffix(".names.txt"), "".join(f"{json.dumps(n)}\n" for n in names))
    write_atomically(packed.path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")


def read_facts(path: str | Path) -> Mapping[str, Any]:
    """The sidecar of a .beton, empty where it was not packed here. Raises `BetonError` where it is damaged."""
    sidecar = Path(path).with_suffix(".json")
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BetonError(f"{sidecar}: cannot be read ({error}); delete it and pack again") from error
    return facts if isinstance(facts, dict) and "fingerprint" in facts else {}


def read_names(path: str | Path) -> list[str]:
    """The name of every image of a .beton in its source; empty where it was not packed here."""
    names = Path(path).with_suffix(".names.txt")
    if not names.is_file():
        return []
    return [json.loads(line) for line in names.read_text(encoding="utf-8").splitlines()]


def read_packed(path: str | Path) -> Packed:
    """Describe an existing .beton, ours or FFCV's. Raises `BetonError` where it cannot be read.

    A file that FFCV wrote has no sidecar: its labels are called "0", "1", … (unless they are more than its
    images: then they are no classes) and its fingerprint is made of all records and up to 256 images.
    """
    path = Path(path).resolve()
    reader, facts = BetonReader(path), read_facts(path)
    if facts and facts.get("images") != len(reader):
        raise BetonError(f"{path}: holds {len(reader)} images, its .json says {facts.get('images')}; pack again")
    if facts:
        rejected = path.with_name(facts["rejected"]) if facts.get("rejected") else None
        return Packed(
            path,
            len(reader),
            tuple(facts.get("classes", ())),
            str(facts["fingerprint"]),
            rejected,
            int(facts.get("rejected_count", 0)),
        )
    classes = int(reader.metadata["label"].max(initial=-1)) + 1
    names = map(str, range(classes if classes <= len(reader) else 0))
    return Packed(path, len(reader), tuple(names), _fingerprint(reader))


def _fingerprint(reader: BetonReader) -> str:
    digest = hashlib.blake2b(reader.metadata[["mode", "width", "height", "size", "label"]].tobytes(), digest_size=16)
    for index in range(0, len(reader), -(-len(reader) // 256) or 1):
        digest.update(reader.payload(index))
    return digest.hexdigest()
