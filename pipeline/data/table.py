"""Tables of paths and labels."""

import csv
import io
import os
import posixpath
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby

import fsspec

from pipeline.data.columns import LABEL_COLUMNS, PATH_COLUMNS
from pipeline.data.listing import Item, Payload, Source, is_image_name
from pipeline.data.remote import fetch, is_local, said
from pipeline.data.workers import Extent, Unreadable
from pipeline.errors import UserError
from pipeline.redaction import bare

TABLE_SUFFIXES = (".csv", ".tsv")
_TABLE_SIZE = 4 << 30  # bytes of a .csv or .tsv: a hundred million lines


class TableSource(Source):
    """A table with a column of paths (relative to the table, absolute, or addresses) and perhaps one of labels.

    With a header, columns are found by their usual names; without, the first is the path and the second the label.
    """

    def __init__(self, address: str, files: fsspec.AbstractFileSystem, path: str) -> None:
        super().__init__(address)
        self.files, self.path = files, path

    def identity(self) -> Iterator[str]:
        return (f"{item.key} {item.size} {item.version} {item.label}" for item in self.items)

    @cached_property
    def items(self) -> list[Item]:
        if (size := int(self.files.info(self.path).get("size") or 0)) > _TABLE_SIZE:
            raise UserError(f"{self.address}: {size / 1e9:.0f} GB are no table of paths")
        text = self.files.cat_file(self.path).decode("utf-8-sig", "surrogateescape")
        first, _, _ = text.partition("\n")
        delimiter = max(",;\t|", key=first.count)
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
        except csv.Error as error:
            raise UserError(f"{self.address}: is no table ({error})") from None
        path, label, header = self._columns(rows[0] if rows else [])
        return [self._item(row, path, label) for row in rows[header:]]

    def _columns(self, first: Sequence[str]) -> tuple[int, int | None, int]:
        """(column of the path, column of the label, rows of header)."""
        names = [cell.strip().lower() for cell in first]
        path = next((names.index(usual) for usual in PATH_COLUMNS if usual in names), None)
        if path is not None:
            label = next((names.index(usual) for usual in LABEL_COLUMNS if usual in names), None)
            return path, label, 1
        if names and is_image_name(names[0]):
            return 0, 1 if len(names) > 1 else None, 0
        raise UserError(f"{self.address}: no column of paths among {', '.join(names) or 'none'}; name it 'path'")

    def _item(self, row: Sequence[str], path: int, label: int | None) -> Item:
        key = row[path].strip() if path < len(row) else ""
        if not key:
            return Item("", skip="unreadable: a row without a path")
        size, changed = 0, ""
        if self._is_here(key):
            try:
                facts = os.stat(self._place(key))
                size, changed = facts.st_size, str(facts.st_mtime_ns)
            except OSError:
                pass  # reported when it is read
        given = row[label].strip() if label is not None and label < len(row) else ""
        return Item(key, size, changed, None if given in ("", "-1") else given)

    def payloads(self, wanted: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        for here, group in groupby(wanted, key=lambda index: self._is_here(self.items[index].key)):
            places = ((index, self._place(self.items[index].key)) for index in group)
            if here:
                yield from ((index, Extent(place)) for index, place in places)
            else:
                yield from self._fetch(places)

    def _fetch(self, places: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Payload]]:
        for scheme, group in groupby(places, key=lambda place: place[1].partition("://")[0]):
            indexed = list(group)
            try:
                files = self.files if "://" not in indexed[0][1] else fsspec.filesystem(scheme)
            except (ImportError, ValueError) as error:
                yield from ((index, Unreadable(f"unreadable: {said(error)}")) for index, _ in indexed)
                continue
            if is_local(files) and not is_local(self.files):
                yield from ((index, Unreadable("refused: a remote table names a file here")) for index, _ in indexed)
            else:
                yield from fetch(files, indexed)

    def _is_here(self, key: str) -> bool:
        return is_local(self.files) and "://" not in key

    def _place(self, key: str) -> str:
        return key if "://" in key else posixpath.join(posixpath.dirname(bare(self.path)), key)
