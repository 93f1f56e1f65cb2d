"""YAML whose every value knows its line, so that a mistake can be named by file and line."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from pipeline.errors import UserError

Place = tuple[str | int, ...]
"""The keys and positions that lead to a value: ("matrix", "backbone", 1)."""


@dataclass(frozen=True)
class Located:
    """What a YAML file holds: `value` as plain data, the line of each key and list entry, and what the command line
    `given` in the place of some."""

    name: str
    value: Any
    lines: Mapping[Place, int]
    given: Mapping[Place, str] = field(default_factory=dict)

    def fail(self, place: Place, message: str) -> NoReturn:
        """Raise a `UserError` that begins with the file and the line of a place, or of the nearest thing around it, or
        with the word of the command line that gave it."""
        while place and place not in self.lines and place not in self.given:
            place = place[:-1]
        raise UserError(f"{self.given.get(place) or f'{self.name}:{self.lines.get(place, 1)}'}: {message}")

    def known(self, place: Place, keys: Sequence[str]) -> Mapping[str, Any]:
        """The mapping at a place, none of whose keys is unknown; empty where nothing is there."""
        value = self.at(place)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fail(place, f"{place[-1] if place else 'the file'} must be a mapping of {', '.join(keys)}")
        for key in value:
            if key not in keys:
                self.fail((*place, key), f"unknown key {key!r}{nearest(str(key), keys)}")
        return value

    def at(self, place: Place) -> Any:
        """The value at a place, None where nothing is."""
        value = self.value
        for key in place:
            inside = isinstance(value, Mapping) and key in value
            if not inside and not (isinstance(value, list) and isinstance(key, int) and key < len(value)):
                return None
            value = value[key]
        return value


def nearest(word: str, known: Sequence[str]) -> str:
    """ "; did you mean …?" or "; there are …"."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of plain words: `on` and `no` are words, and a date is one too."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] not in ("bool", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|false)$"), list("tf"))


def read(text: str, name: str) -> Located:
    """Parse YAML; `name` is what errors call it.

    Raises:
        UserError: no YAML, or a key that is given twice.
    """
    loader = _Loader(text)
    lines: dict[Place, int] = {(): 1}
    try:
        node = loader.get_single_node()
        value = loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        star = any(": *" in written for written in text.splitlines()[line - 1 : line])
        quote = "; put what begins with * in quotes" if star else ""
        raise UserError(f"{name}:{line}: is not YAML: {error.problem or error.context}{quote}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: is not YAML: {str(error).splitlines()[0]}") from None
    finally:
        loader.dispose()
    if node:
        _locate(node, (), lines, name)
    return Located(name, value, lines)


def plain(text: str) -> Any:
    """The value that a word of the command line stands for, as a YAML file would have it; else the word itself."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _locate(node: yaml.Node, place: Place, lines: dict[Place, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            if inner in lines and key.value != "<<":
                where = f"in lines {lines[inner]} and {key.start_mark.line + 1}"
                raise UserError(f"{name}:{key.start_mark.line + 1}: {key.value} is given twice, {where}; keep one")
            lines[inner] = key.start_mark.line + 1
            _locate(value, inner, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*place, i)] = value.start_mark.line + 1
            _locate(value, (*place, i), lines, name)
