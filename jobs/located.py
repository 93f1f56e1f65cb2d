"""YAML whose every value knows its line, so that a mistake can be named by file and line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from pipeline.arguments import nearest
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
            self.fail(place, f"{_last(place)} must be a mapping of {', '.join(keys)}, as in {keys[0]}: …")
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


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of plain words: `on` and `no` are words, and a date is one too."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] not in ("bool", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|false)$"), list("tf"))


def read(written: bytes, name: str) -> Located:
    """Parse YAML; `name` is what errors call it.

    Raises:
        UserError: no YAML, a key that is given twice or is no word, or a value that holds itself.
    """
    lines: dict[Place, int] = {(): 1}
    try:
        text = written.decode("utf-8-sig")
        loader = _Loader(text)
    except UnicodeDecodeError as error:
        line = written.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: is no text in UTF-8; save it as that") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise UserError(f"{name}:{line}: holds the character {chr(error.character)!r}; delete it") from None
    try:
        node = loader.get_single_node()
        value = loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{name}:{_refusal(error, text)}") from None
    finally:
        loader.dispose()
    if node:
        _locate(node, (), lines, name)
    return Located(name, value, lines)


def _refusal(error: yaml.MarkedYAMLError, text: str) -> str:
    """The line that YAML's parser stopped at, what it has against it, where that began, and the way out."""
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    said = ", ".join(filter(None, (error.context, error.problem)))
    began = error.context_mark.line + 1 if error.context_mark else line
    shown = "".join(text.splitlines()[line - 1 : line])
    if "'\\t'" in said:
        way = "; indent with spaces, and put one after a colon"
    elif ": *" in shown:
        way = "; put what begins with * in quotes"
    else:
        way = f"; it began in line {began}" if began != line else ""
    return f"{line}: is not YAML: {said}{way}"


def plain(text: str) -> Any:
    """The value that a word of the command line stands for, as a YAML file would have it; else the word itself."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _locate(
    node: yaml.Node, place: Place, lines: dict[Place, int], name: str, around: tuple[yaml.Node, ...] = ()
) -> None:
    if node in around:
        line = node.start_mark.line + 1
        raise UserError(f"{name}:{line}: {_last(place)} holds itself, by the alias of what it stands in; write it out")
    around = (*around, node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner, line = (*place, key.value), key.start_mark.line + 1
            if key.tag.rsplit(":", 1)[1] not in ("str", "merge"):
                raise UserError(f"{name}:{line}: the key {key.value or '~'} is no word; keys are, as in run: pretrain")
            if inner in lines and key.value != "<<":
                where = f"in lines {lines[inner]} and {line}"
                raise UserError(f"{name}:{line}: {key.value} is given twice, {where}; keep one")
            lines[inner] = line
            _locate(value, inner, lines, name, around)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*place, i)] = value.start_mark.line + 1
            _locate(value, (*place, i), lines, name, around)


def _last(place: Place) -> str:
    """What a place is called: its key, of a list's entry its number too."""
    if not place:
        return "the file"
    return f"entry {place[-1] + 1} of {_last(place[:-1])}" if isinstance(place[-1], int) else place[-1]
