"""Blocks of a text file that programs write, so that no figure is copied by hand: README's tables."""

from pathlib import Path

from pipeline.errors import UserError


def around(file: Path, name: str) -> tuple[str, str]:
    """A file's text down to its marker `<!-- name -->`, and from `<!-- /name -->` on.

    Raises:
        UserError: the file cannot be read, or has no such pair of markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write {file}: cannot be read ({error.strerror})") from error
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise UserError(f"--write {file}: needs one line {start} and, below it, one line {end}")
    return text[: text.index(start) + len(start)], text[text.index(end) :]


def inside(file: Path, name: str) -> str:
    """What stands between the markers of block `name`.

    Raises:
        UserError: as `around`.
    """
    before, after = around(file, name)
    return file.read_text(encoding="utf-8")[len(before) : -len(after)]


def write(file: Path, name: str, text: str) -> None:
    """Put `text` between the markers of block `name`; the rest of the file stays."""
    before, after = around(file, name)
    file.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")
