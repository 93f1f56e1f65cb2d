"""A checkpoint as it lies in a run's folder: one file, or an index and the parts that several workers wrote of it.

Every file is what `torch.save` makes, a zip archive with a checksum (CRC-32) of each tensor. An index `….pt` is the
state with `parts`, the names of files beside it, and in place of every tensor an empty one of its shape and type; a
part holds tensors by the keys that lead to them. torch's own distributed checkpoints would do neither: they carry no
checksum that is looked at, and their index is a pickle, which executes what it holds.
"""

import io
import re
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Keys = tuple[str | int, ...]
PART = re.compile(r"(\d{12})\.[0-9a-f-]+\.\d+-of-\d+\.part$")
"""How the name of a part ends: images seen, which attempt and layout it is of, the worker's number."""


def read(name: str, fetch: Callable[[str], bytes]) -> Any:
    """The state of a checkpoint, whole and on the CPU; nothing that its files hold is ever executed.

    Args:
        name: of the checkpoint's file, without its folder.
        fetch: the bytes of a file in that folder; what it raises is passed on, but that a part is not there.

    Raises:
        ValueError: a torn, damaged, missing or foreign file; it says which one and why, in one line.
    """
    state = _opened(fetch(name))
    if not isinstance(state, dict) or not isinstance(state.get("parts"), list):
        return state
    tensors: dict[Keys, Tensor] = {}
    for part in state.pop("parts"):
        try:
            if not PART.fullmatch(part):
                raise ValueError("has a foreign name")
            tensors |= _opened(fetch(part))
        except FileNotFoundError:
            raise ValueError(f"its part {part} is missing") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"its part {part}: {error}") from None

    def put(keys: Keys, outline: Tensor) -> Tensor:
        found = tensors.get(keys)
        if found is None or found.shape != outline.shape or found.dtype != outline.dtype:
            raise ValueError(f"its parts do not hold {'.'.join(map(str, keys))}")
        return found

    return mapped(state, put)


def mapped(state: Any, change: Callable[[Keys, Tensor], Any], keys: Keys = ()) -> Any:
    """A nest of dicts, lists and tuples with `change(keys, tensor)` in place of every tensor."""
    if isinstance(state, Tensor):
        return change(keys, state)
    if isinstance(state, dict):
        return {key: mapped(value, change, (*keys, key)) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(mapped(value, change, (*keys, i)) for i, value in enumerate(state))
    return state


def _opened(content: bytes) -> Any:
    try:
        if torn := zipfile.ZipFile(io.BytesIO(content)).testzip():
            raise ValueError(f"the checksum of {torn} is wrong")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError((str(error) or type(error).__name__).splitlines()[0][:120]) from None
