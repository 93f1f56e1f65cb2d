"""The words of a command line, read into a dataclass: help that shows what may be written, mistakes in one sentence."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pipeline.errors import UserError

SHOWN = {int: "INT", float: "FLOAT", str: "STR", bool: "{True,False}", tuple: "STR ...", int | str: "INT|INT..INT"}


def read(
    kind: Any,
    argv: Sequence[str],
    prog: str,
    *,
    default: Any = None,
    instead: Mapping[str, Any] | None = None,
    examples: str = "",
) -> Any:
    """A dataclass from a command line: fields marked `Positional` stand without their names, the others are options.

    Args:
        kind: the dataclass; what its docstrings say of it and of each field is the help.
        prog: what the user calls, such as "python -m pipeline.pack".
        default: an instance that holds what is left out; None takes the defaults of the fields.
        instead: types that take the place of those of fields; a dataclass makes options --FIELD.NAME.
        examples: stands below the description.

    Raises:
        UserError: names the first thing that is wrong, and the way out.
        SystemExit: help was asked for, and shown.
    """
    import docstring_parser
    import tyro

    instead = instead or {}
    said_of = {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(kind).params}
    types, members = {**get_type_hints(kind, include_extras=True), **instead}, []
    known = ["help"]
    for f in dataclasses.fields(kind):
        typed, known = types[f.name], [*known, f.name]
        if dataclasses.is_dataclass(typed):
            known += [f"{f.name}.{g.name}" for g in dataclasses.fields(typed)]
        elif f.name not in instead:
            nothing = getattr(default, f.name) if default else f.default
            typed = option(typed, said_of.get(f.name, ""), f.name, hint=nothing not in (None, "", ()))
        member = dataclasses.field(default=f.default, default_factory=f.default_factory)
        members.append((f.name, typed, member))
    _refuse_unknown(argv, known)
    shown: Any = dataclasses.make_dataclass(kind.__name__, members, frozen=True)
    if default:
        default = shown(**{f.name: getattr(default, f.name) for f in dataclasses.fields(kind)})
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Any = tyro.cli(
                shown,
                args=list(argv),
                prog=prog,
                description=f"{inspect.cleandoc(str(kind.__doc__))}\n\n{examples}".strip(),
                **({"default": default} if default else {}),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_sentence(said.getvalue())}; {prog} --help says what there is") from None
    return kind(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(kind)})


def option(kind: Any, text: str, name: str = "", *, hint: bool = False) -> Any:
    """A type whose help shows what may be written for it, and not that it may be left open.

    Args:
        text: what it is.
        name: of the field, which a positional one is called by.
        hint: whether the help shows the default, or that it has to be given.
    """
    import tyro

    bare, *marks = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    (mark,) = get_args(tyro.conf.Positional[str])[1:]
    kinds = [k for k in get_args(bare) if k is not type(None)] if type(None) in get_args(bare) else [bare]
    words = " ".join(map(_written, kinds))
    if mark in marks:
        several = words.endswith(" ...")
        words, hint = name.upper().removesuffix("S") + " ..." * several, hint and not several
        words = f"[{words}]" if type(None) in get_args(bare) else words
    about = tyro.conf.arg(
        metavar=None if bare is bool else words,
        help=" ".join(text.split()),
        help_behavior_hint=None if hint else "",
    )
    return Annotated[(bare, *marks, about)]


def nearest(word: str, known: Sequence[str]) -> str:
    """ "; did you mean …?" or "; there are …"."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def _written(kind: Any) -> str:
    """How a value of some type is written."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind):
        return " ".join(map(_written, get_args(kind)))
    return SHOWN.get(kind) or SHOWN[get_origin(kind)]


def _refuse_unknown(argv: Sequence[str], known: Sequence[str]) -> None:
    """Name the first unknown `--option` and the one that was probably meant."""
    for word in argv:
        if not word.startswith("--") or word == "--":
            continue
        name = word[2:].split("=", 1)[0].replace("-", "_")
        if name not in known and name.removeprefix("no_") not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "--help lists all options"
            raise UserError(f"{word.split('=', 1)[0]}: no such option; {hint}")


def _sentence(box: str) -> str:
    """What is said in the box that tyro draws about a mistake."""
    lines = [line.strip("│ ╭╮╰╯─") for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    if found := re.search(r"Error parsing ([\w.-]+):.*?(?:from \[|: )'(.*?)'(?: |\]|$)", text):
        return f"{found[1]} {found[2]}: is no value for it"
    if found := re.search(r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*?)\)", text):
        return f"{found[2]} {found[1]}: is none of {found[3].replace(chr(39), '').rstrip(',')}"
    if found := re.search(r"Missing value for argument '(.*?)'", text):
        return f"{found[1]}: needs a value"
    if found := re.search(r"Missing from .*?: ([A-Z]+|--[\w.-]+)", text):
        return f"{found[1]}: has to be given"
    if found := re.search(r"Unrecognized options: (\S+?)(,| |$)", text):
        return f"{found[1]}: is not understood"
    return re.split(r"Argument helptext|For full helptext", text)[0].strip()
