"""A run's checkpoints: written beside the training, checked when they are read, kept by a rule.

A checkpoint is one file that torch writes, a zip archive with a checksum (CRC-32) of every tensor in it. It appears
whole or not at all, and one that was damaged later is found out before anything is taken from it.
"""

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.errors import OUT_OF_MEMORY, UserError
from pipeline.training.run_folder import RunFolder

INDEX = "checkpoints/index.json"
STARVED = 2  # writes in a row without memory for them, after which a process is better ended


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a new one is whole; the newest that was well always does.

    Args:
        last: so many of the newest.
        every: images; the first one at or after each multiple of it. 0 keeps none for that.
        best: the one with the highest online k-NN accuracy.
    """

    last: int = 2
    every: float = 0.0
    best: bool = True

    def spared(self, found: list[int], facts: dict[int, dict[str, Any]]) -> set[int]:
        """Those of the checkpoints `found` that stay, given what is known of each."""
        spared = set(found[-self.last :])
        well = [n for n in found if facts.get(n, {}).get("well", True)]
        spared |= set(well[-1:])
        if self.every:
            intervals = [int(n / self.every) for n in found]
            spared |= {n for n, now, before in zip(found, intervals, [0, *intervals]) if now > before}
        measured = {n: facts[n]["knn_top1"] for n in found if "knn_top1" in facts.get(n, {})}
        if self.best and measured:
            spared.add(max(measured, key=lambda n: (measured[n], n)))
        return spared


class Checkpoints:
    """Writes checkpoints in a thread of its own, one after the other.

    Training waits while the state is copied, and where the one before is still being written. A write that fails (a
    full disk, a server that does not answer) ends nothing: `trouble` says so until one succeeds. Only a process
    that time and again has no memory for it is better ended, while little is lost: `save` raises.

    Attributes:
        trouble: a sentence on the last write, None where it succeeded.
        held: seconds that training waited, all together.
    """

    def __init__(self, folder: RunFolder, keep: Keep) -> None:
        self.folder, self.keep = folder, keep
        self.trouble: str | None = None
        self.held = 0.0
        self._facts = read_facts(folder)
        self._writer = ThreadPoolExecutor(1, "checkpoint")  # one thread for all: a new one would take memory, too
        self._under_way: Future[None] | None = None
        self._starved = 0

    def save(self, seen: int, state: dict[str, Any], **facts: Any) -> None:
        """Begin to write the state at `seen` images.

        Args:
            facts: `well`, whether the run was; `knn_top1`, where it was measured.

        Raises:
            MemoryError: the last `STARVED` could not be written for lack of it.
        """
        started = time.perf_counter()
        self.wait()
        if self._starved >= STARVED:
            raise MemoryError(self.trouble)
        copy = copied(state)
        self.held += time.perf_counter() - started
        self._under_way = self._writer.submit(self._write, seen, copy, facts)

    def wait(self) -> None:
        """Until the checkpoint under way is written, or has failed."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def drop_after(self, seen: int) -> None:
        """Remove those of more than `seen` images: training goes another way from there."""
        self.wait()
        for later in self.folder.checkpoints():
            if later > seen:
                self.folder.remove(f"checkpoints/{later:012d}.pt")
                self._facts.pop(later, None)
        self._index()

    def _write(self, seen: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
        try:
            try:
                self.folder.save_checkpoint(seen, state)
            except (OSError, RuntimeError):  # a full disk, perhaps: all but the newest good one make room
                spared = Keep(last=1, best=False).spared(self.folder.checkpoints(), self._facts)
                if not self._clean(spared):
                    raise
                self.folder.save_checkpoint(seen, state)
            self._facts[seen] = facts
            self._index()
            self._clean(self.keep.spared(self.folder.checkpoints(), self._facts))
            self.trouble, self._starved = None, 0
        except Exception as error:
            kept = self.folder.checkpoints()
            good = f"the last good one is at {kept[-1]:,} images" if kept else "there is none yet"
            why = str(error) or type(error).__name__
            self._starved = self._starved + 1 if OUT_OF_MEMORY.search(f"{type(error).__name__}: {why}") else 0
            self.trouble = f"no checkpoint could be written at {seen:,} images ({why}); {good}"

    def _index(self) -> None:
        found = set(self.folder.checkpoints())
        self._facts = {n: facts for n, facts in self._facts.items() if n in found}
        self.folder.write_json(INDEX, {str(n): facts for n, facts in sorted(self._facts.items())})

    def _clean(self, spared: set[int]) -> bool:
        """Remove all but the spared ones; whether there was any to remove."""
        surplus = [n for n in self.folder.checkpoints() if n not in spared]
        for n in surplus:
            self.folder.remove(f"checkpoints/{n:012d}.pt")
        return bool(surplus)


def read_facts(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """What is known of each checkpoint, by images seen: `well`, `knn_top1`."""
    if not folder.exists(INDEX):
        return {}
    return {int(n): facts for n, facts in json.loads(folder.read(INDEX)).items()}


def newest(folder: RunFolder, *, well: bool = False) -> tuple[int, dict[str, Any] | None, list[str]]:
    """The newest sound checkpoint: images seen, its state, and a sentence on each damaged one that was passed over.

    Damaged files are renamed to `….pt.damaged`. Without any checkpoint: 0 and None.

    Args:
        well: pass over those that were taken while a vital sign was outside its range, too.

    Raises:
        UserError: every checkpoint is damaged.
    """
    facts = read_facts(folder)
    said: list[str] = []
    for seen in reversed(folder.checkpoints()):
        if well and not facts.get(seen, {}).get("well", True):
            continue
        try:
            return seen, folder.load_checkpoint(seen), said
        except UserError as error:
            folder.rename(f"checkpoints/{seen:012d}.pt", f"checkpoints/{seen:012d}.pt.damaged")
            said.append(f"warning: {error}; it is left aside as {seen:012d}.pt.damaged, and the one before is taken")
    if said:
        raise UserError(f"{folder.address}: every checkpoint is damaged ({'; '.join(said)}); give a new --run")
    return 0, None, said


def copied(state: Any) -> Any:
    """A state that shares no memory with the one that trains, on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state
