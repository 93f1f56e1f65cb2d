"""Columns of tables by their usual names, and what is a label in them."""

from collections.abc import Sequence
from typing import Any

PATH_COLUMNS = ("path", "image_path", "filepath", "file_path", "file_name", "filename", "file", "image", "img", "url")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "picture", "image_bytes", "bytes", *PATH_COLUMNS)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "cls", "fine_label", "y")
LABEL_LENGTH = 1000  # characters; longer texts are none


def as_label(value: Any, names: Sequence[str] = ()) -> str | None:
    """A label as text; None for what is none: missing, empty, -1, or a structure. `names`: of integer labels."""
    if isinstance(value, float):
        if value != value:  # not a number
            return None
        value = int(value) if value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value).strip() or None if isinstance(value, (str, float, bool)) else None
    if value == -1:
        return None
    return names[value] if 0 <= value < len(names) else str(value)
