"""A run's checkpoints: written beside the training, checked when they are read, kept by a rule.

A checkpoint is one file that torch writes, a zip archive with a checksum (CRC-32) of every tensor in it. Where several
workers have enough to write, each writes a part of it to a file of its own, and rank 0, once it sees them all, the file
by which the checkpoint counts. So it appears whole or not at all, and one that was damaged later is found out before
anything is taken from it. No worker's thread waits for another in a collective: those belong to the training.
"""

import contextlib
import errno
import json
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch.distributed as dist

from objectives.checkpoint import mapped
from pipeline.errors import OUT_OF_MEMORY, UserError
from pipeline.training.run_folder import RunFolder
from pipeline.training.shares import Share, on_cpu
from pipeline.training.storage import everyone

INDEX = "checkpoints/index.json"
KNOWN: dict[str, type] = {"well": bool, "knn_top1": float}  # of a checkpoint: in the index, and in itself
FULL = (errno.ENOSPC, errno.EDQUOT)
STARVED = 2  # writes in a row without memory for them, after which a process is better ended
PATIENCE = 30.0  # seconds that the run itself waits for parts to appear: file servers may be late to show them
POLL = 0.2  # seconds between two looks for them


class Unfinished(Exception):
    """The others' parts of a checkpoint did not come."""


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
        return spared | set(_best(found, facts) if self.best else [])


def expendable(found: list[int], facts: dict[int, dict[str, Any]]) -> list[int]:
    """Those of the checkpoints `found` that are given up on a full disk, in that order: the oldest first, the best one
    last, the newest that was well never."""
    well = [n for n in found if facts.get(n, {}).get("well", True)]
    best = _best(found, facts)
    return sorted(set(found) - set((well or found)[-1:]), key=lambda n: (n in best, n))


def _best(found: list[int], facts: dict[int, dict[str, Any]]) -> list[int]:
    """The one with the highest online k-NN accuracy, if that was measured of any."""
    measured = {n: facts[n]["knn_top1"] for n in found if "knn_top1" in facts.get(n, {})}
    return [max(measured, key=lambda n: (measured[n], n))] if measured else []


class Checkpoints:
    """Writes checkpoints, or a worker's parts of them, in a thread of its own, one after the other.

    Training waits while the state is copied, and where the one before is still being written. A write that fails (a
    full disk, a server that does not answer) ends nothing: `trouble` says so until one succeeds. Only a process
    that time and again has no memory for it is better ended, while little is lost: `save` raises.

    Args:
        keep: by which rank 0 removes others once a checkpoint is whole.
        rank: this worker's.

    Attributes:
        trouble: a sentence on the last write, None where it succeeded.
        held: seconds that training waited, all together.
    """

    def __init__(self, folder: RunFolder, keep: Keep, rank: int = 0) -> None:
        self.folder, self.keep, self.rank = folder, keep, rank
        self.trouble: str | None = None
        self.held = 0.0
        self._facts = read_facts(folder)
        self._waits = Event()  # somebody, for the write under way
        self._lost: str | None = None  # why a part of it will not come
        self._writer = ThreadPoolExecutor(1, "checkpoint")  # one thread for all: a new one would take memory, too
        self._under_way: Future[None] | None = None
        self._starved = 0

    def save(self, seen: int, state: dict[str, Any], share: Share | None = None, **facts: Any) -> None:
        """Begin to write the state at `seen` images, or this worker's share of it.

        Args:
            share: where several workers write; all of them call this.
            facts: `well`, whether the run was; `knn_top1`, where it was measured.

        Raises:
            MemoryError: the last `STARVED` could not be written for lack of it.
        """
        started = time.perf_counter()
        self.wait()
        if self._starved >= STARVED:
            raise MemoryError(self.trouble)
        part = share.tensors(state) if share else {}
        rest = share.index(state) if share else mapped(state, lambda _, tensor: on_cpu(tensor))
        self.held += time.perf_counter() - started
        self._waits.clear()
        self._lost = None
        self._under_way = self._writer.submit(self._write, seen, rest, share, part, facts)

    def wait(self) -> None:
        """Until the write under way has come to its end, or has failed."""
        self._waits.set()
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def settle(self) -> None:
        """Until the checkpoint under way is whole, or has failed: what all ranks do together, in the training's thread.

        Rank 0 hears of a part that could not be written.
        """
        started = time.perf_counter()
        if dist.is_initialized() and dist.get_world_size() > 1:
            if self.rank:
                self.wait()
            troubles = everyone(self.trouble if self.rank else None)
            self._lost = next((f"worker {rank}: {why}" for rank, why in enumerate(troubles) if why), None)
        self.wait()
        self.held += time.perf_counter() - started

    @property
    def known(self) -> list[int]:
        """Images seen at each checkpoint that was written, or found at the start; the folder itself may not answer."""
        return sorted(self._facts)

    def drop_after(self, seen: int) -> None:
        """Remove those of more than `seen` images: training goes another way from there."""
        self.wait()
        for later in self.folder.checkpoints():
            if later > seen:
                self.folder.remove_checkpoint(later)
                self._facts.pop(later, None)
        self._index()

    def _write(
        self, seen: int, rest: dict[str, Any], share: Share | None, part: dict[Any, Any], facts: dict[str, Any]
    ) -> None:
        try:
            if share:
                self._put(seen, lambda: self.folder.save_state(f"checkpoints/{share.file}", part))
            if self.rank == 0:
                self._await(share)
                self._put(seen, lambda: self.folder.save_checkpoint(seen, {**rest, "facts": facts}))
                self._facts[seen] = facts
                self._clean(seen)
                self._index()
            self.trouble, self._starved = None, 0
        except Exception as error:
            system = next(
                (one for one in _chain(error) if isinstance(one, OSError)), error
            )  # torch's words are its own
            why = str(system) or type(system).__name__
            starved = not isinstance(error, Unfinished) and OUT_OF_MEMORY.search(f"{type(error).__name__}: {why}")
            self._starved = self._starved + 1 if starved else 0
            kept = max(self.known, default=None)
            good = f"the last good one is at {kept:,} images" if kept is not None else "there is none yet"
            self.trouble = why if self.rank else f"no checkpoint could be written at {seen:,} images ({why}); {good}"

    def _put(self, seen: int, write: Callable[[], object]) -> None:
        """Write; on a full disk, and there alone, after others have made room, one at a time until it suffices."""
        while True:
            try:
                write()
                return
            except (OSError, RuntimeError) as error:
                full = any(isinstance(one, OSError) and one.errno in FULL for one in _chain(error))
                if not full or not self._make_room(seen):
                    raise

    def _make_room(self, seen: int) -> bool:
        """Remove what came of no checkpoint before `seen` images, else one that is expendable; whether there is any."""
        if self.folder.remove_strays(seen):
            return True
        facts = read_facts(self.folder) if self.rank else self._facts
        given_up = expendable(self.folder.checkpoints(), facts)[:1]
        for n in given_up:
            self.folder.remove_checkpoint(n)
            self._facts.pop(n, None)
        return bool(given_up)

    def _await(self, share: Share | None) -> None:
        """Wait until every part is there."""
        patience = PATIENCE
        while missing := sorted(set(share.files if share else ()) - self.folder.parts().keys()):
            if self._lost:
                raise Unfinished(self._lost)
            if patience < 0:
                raise Unfinished(f"{missing[0]} does not appear; do all nodes share the run's folder?")
            patience -= POLL * self._waits.is_set()
            time.sleep(POLL)

    def _index(self) -> None:
        found = set(self.folder.checkpoints())
        self._facts = {n: facts for n, facts in self._facts.items() if n in found}
        with contextlib.suppress(OSError):  # a full disk: the next checkpoint writes it
            self.folder.write_json(INDEX, {str(n): facts for n, facts in sorted(self._facts.items())})

    def _clean(self, seen: int) -> None:
        """Remove all that are not to be kept, and what came of none before `seen` images."""
        found = self.folder.checkpoints()
        for n in set(found) - self.keep.spared(found, self._facts):
            self.folder.remove_checkpoint(n)
        self.folder.remove_strays(seen)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the one in whose handling it arose, and so on."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def read_facts(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """What is known of each checkpoint, by images seen: `well`, `knn_top1`.

    Raises:
        ValueError: the index is damaged.
    """
    if not folder.exists(INDEX):
        return {}
    index = json.loads(folder.read(INDEX))
    if not isinstance(index, dict):
        raise ValueError("no object")
    for facts in index.values():
        if not isinstance(facts, dict) or any(
            not isinstance(value, KNOWN.get(key, ())) for key, value in facts.items()
        ):
            raise ValueError("no facts of a checkpoint")
    return {int(n): facts for n, facts in index.items()}


def newest(
    folder: RunFolder, *, well: bool = False, rather_not: Collection[int] = ()
) -> tuple[int, dict[str, Any] | None, list[str]]:
    """The newest sound checkpoint: images seen, its state, and a sentence on each damaged one that was passed over.

    The files of a damaged one are renamed to `….damaged`. Without any checkpoint: 0 and None.

    Args:
        well: pass over those that were taken while a vital sign was outside its range, too.
        rather_not: take these only if there is no other.

    Raises:
        UserError: every checkpoint is damaged.
    """
    facts = read_facts(folder) if well else {}
    said: list[str] = []
    for seen in sorted(folder.checkpoints(), key=lambda n: (n not in rather_not, n), reverse=True):
        if well and not (facts[seen] if seen in facts else folder.facts_of(seen)).get("well", True):
            continue
        try:
            return seen, folder.load_checkpoint(seen), said
        except UserError as error:
            for file in folder.files_of(seen):
                folder.rename(file, f"{file}.damaged")
            said.append(f"warning: {error}; it is left aside as {seen:012d}.pt.damaged, and the one before is taken")
    if said:
        raise UserError(f"{folder.address}: every checkpoint is damaged ({'; '.join(said)}); give a new --run")
    return 0, None, said
