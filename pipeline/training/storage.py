"""Storage that does not answer where training cannot go on without it: it is waited for, then the run is kept here."""

import shlex
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch.distributed as dist

from objectives.checkpoint import mapped
from pipeline import config as configuration
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.training.health import Care
from pipeline.training.run_folder import RunFolder
from pipeline.training.shares import on_cpu

PATIENCE = 600.0  # seconds that it may be away
PAUSE = 5.0  # seconds between two attempts

T = TypeVar("T")


class StorageAway(Exception):
    """It was waited for in vain.

    Attributes:
        why: what it answered last, in a sentence.
    """

    def __init__(self, folder: RunFolder, why: str) -> None:
        self.why = f"{folder.address} does not answer ({why})"
        way = f"python -m pipeline.pretrain --resume {shlex.quote(folder.address)}"
        super().__init__(f"{self.why}; once it does, this continues the run: {way}")


def patiently(attempt: Callable[[], T], folder: RunFolder, tell: Callable[..., object] = print) -> T:
    """What `attempt` returns. All ranks call this, and try again together for as long as it fails on any of them.

    Args:
        attempt: reads or writes the run folder, and may be made again.
        tell: takes sentences for the user, returns whether the run is asked to stop: then it is not waited for.

    Raises:
        StorageAway: after `PATIENCE`.
        UserError: on any rank; waiting does not mend it.
        MemoryError: on this rank, likewise.
    """
    began, waited = time.monotonic(), False
    while True:
        trouble = None
        try:
            found = attempt()
        except MemoryError:
            raise
        except Exception as error:  # each kind of storage has its own
            trouble = (isinstance(error, UserError), str(error) or type(error).__name__)
        troubles = [one for one in everyone(trouble) if one]
        if not troubles:
            if waited:
                tell(f"{folder.address} answers again")
            return found
        mistake, why = max(troubles)
        if mistake:
            raise UserError(why)
        news = f"warning: {folder.address} does not answer ({why}); it is waited for, {PATIENCE / 60:g} minutes at most"
        asked = tell(*[] if waited else [news])
        if any(everyone(asked or time.monotonic() - began >= PATIENCE)):
            raise StorageAway(folder, why)
        waited = True
        time.sleep(PAUSE)


def everyone(mine: Any) -> list[Any]:
    """What every rank has, by rank."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [mine]
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def keep_here(folder: RunFolder, config: Config, care: Care, metrics: str, state: dict[str, Any]) -> RunFolder:
    """Write what stands for a run folder below the home folder of this machine: the run can go on from it.

    Args:
        folder: which does not answer.
        metrics: the content of `metrics.jsonl`.
        state: a checkpoint's.

    Raises:
        OSError: this disk takes nothing either.
    """
    name = f"{PurePosixPath(folder.address).name}-kept-at-{state['images_seen']}"
    kept = RunFolder(str(Path.home() / "ssl-runs" / name))
    kept.write("config.yaml", configuration.sealed(config))
    kept.write("metrics.jsonl", metrics)
    care.write(kept)
    kept.save_checkpoint(state["images_seen"], mapped(state, lambda _, tensor: on_cpu(tensor)))
    return kept
