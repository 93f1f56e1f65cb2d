"""Parquet files with an image in every row."""

import contextlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from pipeline.data.columns import IMAGE_COLUMNS, LABEL_COLUMNS, LABEL_LENGTH, as_label
from pipeline.data.containers import Files
from pipeline.data.listing import Item, Payload
from pipeline.data.magic import HEAD, begins_as_image
from pipeline.data.remote import fetch, is_local, said
from pipeline.data.workers import LARGEST_FILE, Extent, Unreadable
from pipeline.errors import UserError
from pipeline.redaction import bare

_ROWS = 1024  # of labels, read at a time


class ParquetSource(Files):
    """Parquet files with one row per image. Keys are `file.parquet/row`."""

    def identity(self) -> Iterator[str]:
        """Those of the files, and of the images of this machine that their rows name."""
        from pyarrow import types

        yield from super().identity()
        for path in self.paths if is_local(self.files) else ():
            with self._opened(path) as file:
                column = self._image_column(file.schema_arrow)
                kind = file.schema_arrow.field(column).type
                struct = types.is_struct(kind)
                if kind.get_field_index("path") < 0 if struct else _holds(kind) == "bytes":
                    continue
                for batch in file.iter_batches(batch_size=_ROWS, columns=[f"{column}.path" if struct else column]):
                    names = batch.column(0).field("path") if struct else batch.column(0)
                    for named in names.to_pylist():
                        with contextlib.suppress(OSError, ValueError):  # reported when it is read
                            facts = os.stat(_beside(path, named or ""))
                            yield f"{facts.st_size} {facts.st_mtime_ns}"

    @cached_property
    def items(self) -> list[Item]:
        found: list[Item] = []
        for path, name in zip(self.paths, self.names):
            with self._opened(path) as file:
                schema = file.schema_arrow
                self._image_column(schema)
                column = next((c for c in LABEL_COLUMNS if c in schema.names), None)
                names, rows = _huggingface_names(schema.metadata, column), file.metadata.num_rows
            if column is None:
                found += [Item(f"{name}/{row}") for row in range(rows)]
                continue
            with self._opened(path, column) as file:
                labels = self._labels(path, file, column)
                found += [Item(f"{name}/{row}", label=as_label(value, names)) for row, value in enumerate(labels)]
        return found

    def _labels(self, path: str, file: Any, column: str) -> Iterator[Any]:
        """The values of a column, each text held once however often it stands in it."""
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            values = batch.column(0)
            if hasattr(values, "dictionary"):
                if values.dictionary.nbytes > LABEL_LENGTH * (len(values.dictionary) + 1):
                    raise UserError(f"{path}: the labels in its column {column} are texts of over {LABEL_LENGTH} bytes")
                known = values.dictionary.to_pylist()
                yield from (None if index is None else known[index] for index in values.indices.to_pylist())
            else:
                yield from values.to_pylist()

    def payloads(self, wanted: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        first = 0  # index of the file's first row
        remaining = list(reversed(wanted))
        for path in self.paths:
            with self._opened(path) as file:
                column = self._image_column(file.schema_arrow)
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if remaining and remaining[-1] < first + rows:
                        yield from self._rows(path, file, column, group, first, remaining)
                    first += rows

    def _rows(
        self, path: str, file: Any, column: str, group: int, first: int, remaining: list[int]
    ) -> Iterator[tuple[int, Payload]]:
        for batch in file.iter_batches(batch_size=1, row_groups=[group], columns=[column]):
            if remaining and remaining[-1] == first:
                if batch.nbytes > LARGEST_FILE:
                    yield remaining.pop(), Unreadable(f"too large: {batch.nbytes / 1e9:.1f} GB")
                else:
                    yield remaining.pop(), self._payload(path, batch.column(0)[0].as_py())
            first += 1

    def _payload(self, path: str, value: Any) -> Payload:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return _image_or_head(value)
        if not value:
            return Unreadable("empty: no image in this row")
        place = _beside(path, value)
        if is_local(self.files):
            return Extent(place)
        return next(fetch(self.files, [(0, place)]))[1]

    @contextlib.contextmanager
    def _opened(self, path: str, column: str | None = None) -> Iterator[Any]:
        """A file; a column of texts that is named is read as numbers of texts."""
        import pyarrow
        from pyarrow import parquet

        try:
            texts = [column] if column else None
            with self.files.open(path, "rb") as raw, parquet.ParquetFile(raw, read_dictionary=texts) as file:
                yield file
        except (pyarrow.ArrowException, MemoryError) as error:
            raise UserError(f"{path}: a parquet file that cannot be read ({said(error)})") from error

    def _image_column(self, schema: Any) -> str:
        """The column of images: one of the usual names, else the first that holds bytes."""
        kinds = {field.name: _holds(field.type) for field in schema}
        named = [name for usual in IMAGE_COLUMNS for name in schema.names if name.lower() == usual and kinds[name]]
        found = [*named, *(name for name, kind in kinds.items() if kind == "bytes")]
        if not found:
            raise UserError(f"{self.address}: no column of images among {', '.join(schema.names)}; name it 'image'")
        return found[0]


def _beside(path: str, named: str) -> str:
    """Where the image lies that a row of the file at `path` names."""
    return posixpath.join(posixpath.dirname(bare(path)), named)


def _holds(kind: Any) -> str:
    """Whether a column of this Arrow type may hold images: "bytes", "path", or "" for neither."""
    from pyarrow import types

    if types.is_struct(kind):
        return "bytes" if "bytes" in {kind.field(n).name for n in range(kind.num_fields)} else ""
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    return "path" if types.is_string(kind) or types.is_large_string(kind) else ""


def _huggingface_names(metadata: Mapping[bytes, bytes] | None, column: str | None) -> list[str]:
    """The names of a ClassLabel column, which `datasets` writes into the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return list(features[column].get("names") or ())
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


def _image_or_head(content: bytes) -> Payload:
    """The bytes of a file, only its beginning where that is no image: what refuses it needs no more."""
    return content if begins_as_image(content[:HEAD]) else content[:HEAD]
