"""Labels from a table of one's own, for images that are packed already: classes, several at once, or quantities."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import torch
from torch import Tensor

from pipeline.data.packed import Packed, read_names
from pipeline.data.parts import ordered
from pipeline.data.remote import given
from pipeline.errors import UserError
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.redaction import hide, redact


@dataclass(frozen=True)
class Table:
    """A table of labels: its address without credentials, the columns beside the path, and what they say of each path
    (stripped text, empty where nothing is known)."""

    address: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """A readable name: the last part of the address."""
        return Path(self.address.split("?")[0]).stem

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of a table of one column; none where there are more."""
        if len(self.columns) > 1:
            return ()
        return ordered(row[0] or None for row in self.rows.values())

    @property
    def numbers(self) -> dict[str, tuple[float, ...]]:
        """What stands in the columns as numbers, NaN where nothing does; empty where a cell is none."""
        try:
            return {path: tuple(float(cell or "nan") for cell in row) for path, row in self.rows.items()}
        except ValueError:
            return {}

    def of(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Of every image of a packed set its class, int64 [N], -1 for none, and its numbers, float64 [N, columns].

        Raises:
            UserError: the table knows none of these images.
        """
        names = read_names(packed.path)
        if not any(name in self.rows for name in names):
            raise UserError(
                f"--labels {self.address}: knows none of the {packed.images:,} images; it says "
                f"{next(iter(self.rows))!r} where they are called like {names[0] if names else '(nothing)'!r}"
            )
        number = {name: i for i, name in enumerate(self.classes)}
        nothing = (math.nan,) * len(self.columns)
        classes = [number.get(self.rows[name][0], -1) if number and name in self.rows else -1 for name in names]
        numbers = self.numbers
        return torch.tensor(classes), torch.tensor([numbers.get(name, nothing) for name in names], dtype=torch.float64)


def read(address: str) -> Table:
    """A CSV or TSV, here or at any fsspec address: its first row names its columns, its first column holds paths.

    Paths are those of the images in their source, as `rejected.csv` and a report name them.

    Raises:
        UserError: it cannot be read, or is no such table.
    """
    try:
        with fsspec.open(given(address), "rb") as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--labels {hide(address)}: cannot be read ({redact(str(error))})") from None
    address = hide(address)
    first, _, _ = text.partition("\n")
    lines = [
        line for line in csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=first.count)) if line
    ]
    if len(lines) < 2 or len(lines[0]) < 2:
        raise UserError(f"--labels {address}: needs a first row that names its columns, the first of paths, and rows")
    columns = tuple(cell.strip() for cell in lines[0][1:])
    rows = {}
    for count, line in enumerate(lines[1:], 2):
        if len(line) != len(columns) + 1:
            raise UserError(f"--labels {address}: row {count} has {len(line)} cells, the first row {len(columns) + 1}")
        rows[line[0].strip()] = tuple(cell.strip() for cell in line[1:])
    return Table(address, columns, rows)


def refuse(table: Table, protocols: Sequence[str]) -> None:
    """Raise `UserError` where a table cannot be what a protocol measures."""
    for protocol in protocols:
        if protocol in ("multilabel", "regression") and not table.numbers:
            raise UserError(f"--labels {table.address}: {protocol} needs numbers in every column beside the path")
        if protocol == "multilabel":
            odd = {x for row in table.numbers.values() for x in row if not math.isnan(x)} - {0.0, 1.0}
            if odd:
                raise UserError(f"--labels {table.address}: multilabel needs 0 and 1, not {min(odd):g}")
        if PROTOCOLS[protocol].labels and len(table.columns) > 1:
            raise UserError(
                f"--labels {table.address}: has {len(table.columns)} columns beside the path, so no image has one "
                f"class; {protocol} needs one, --protocols multilabel or regression take several"
            )
