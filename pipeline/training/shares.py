"""How several workers share the writing of one checkpoint: who writes which tensors, into which file.

All hold the same state, so each can write a part of it, and a whole one takes as long as the largest part. What
comes of it is read by `objectives.checkpoint`.
"""

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from objectives.checkpoint import Keys, mapped

LEAST = 256 << 20  # bytes to a share: less is written in a second or two, and not worth waiting for one another


@dataclass(frozen=True)
class Share:
    """What one worker writes of a checkpoint that several write.

    Args:
        files: the names of all parts, by rank.
        rank: whose this share is.
        keys: of the tensors in it.
    """

    files: tuple[str, ...]
    rank: int
    keys: frozenset[Keys]

    @property
    def file(self) -> str:
        """The name of this part."""
        return self.files[self.rank]

    def tensors(self, state: dict[str, Any]) -> dict[Keys, Tensor]:
        """A copy of this share of a state, on the CPU."""
        return {keys: on_cpu(tensor) for keys, tensor in tensors_of(state).items() if keys in self.keys}

    def index(self, state: dict[str, Any]) -> dict[str, Any]:
        """What stands for the whole: all of a state that is no tensor, and the parts."""
        bases = {dtype: torch.zeros((), dtype=dtype) for dtype in {t.dtype for t in tensors_of(state).values()}}
        return {**mapped(state, lambda _, t: bases[t.dtype].expand(t.shape)), "parts": list(self.files)}


def share(
    state: dict[str, Any], seen: int, token: str, rank: int, world: int, buffers: Collection[str] = ()
) -> Share | None:
    """A worker's share in the checkpoint of a state at `seen` images; None where it is too small for one to each.

    A small state is the first worker's alone, who then writes it to one file.

    Args:
        token: tells this attempt from others at the same place; the same on all ranks.
        buffers: of the objective; the first worker's, which DDP gives to all, are those that count.
    """
    shares = divide(state, world, {("objective", name) for name in buffers})
    if len(shares) == 1 or rank >= len(shares):
        return None
    layout = sorted(repr((keys, tuple(t.shape), t.dtype)) for keys, t in tensors_of(state).items())
    attempt = f"{token}-{zlib.crc32(repr(layout).encode()):08x}"  # of another state no part is taken
    files = [f"{seen:012d}.{attempt}.{i + 1}-of-{len(shares)}.part" for i in range(len(shares))]
    return Share(tuple(files), rank, frozenset(shares[rank]))


def divide(state: dict[str, Any], workers: int, first: Collection[Keys] = ()) -> list[set[Keys]]:
    """The keys of a state's tensors in shares for as many of the workers as have `LEAST` bytes to write.

    No two shares differ by more than the largest tensor, unless those that are to be the `first` worker's are more.
    """
    sizes = {keys: tensor.nbytes for keys, tensor in tensors_of(state).items()}
    count = max(1, min(workers, sum(sizes.values()) // LEAST))
    shares: list[set[Keys]] = [set(first) & set(sizes), *(set() for _ in range(count - 1))]
    loads = [sum(sizes[keys] for keys in one) for one in shares]
    for keys in sorted(sizes.keys() - shares[0], key=lambda keys: (-sizes[keys], repr(keys))):
        lightest = loads.index(min(loads))
        shares[lightest].add(keys)
        loads[lightest] += sizes[keys]
    return shares


def tensors_of(state: Any) -> dict[Keys, Tensor]:
    """Every tensor of a nest of dicts, lists and tuples, by the keys that lead to it."""
    found: dict[Keys, Tensor] = {}
    mapped(state, found.setdefault)
    return found


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory with the tensor."""
    return tensor.detach().to("cpu", copy=True)
