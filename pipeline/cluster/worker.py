"""In every worker: the training loop with its links to the hub, and the heart that beats beside it."""

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.cluster.copies import fetch
from pipeline.cluster.machines import WATCHER, room
from pipeline.data.packed import Packed
from pipeline.errors import UserError
from pipeline.training.display import Status
from pipeline.training.group import doing

if TYPE_CHECKING:
    from pipeline.training.run_folder import RunFolder

BEAT = 0.5  # seconds between two words of a worker with the driver


class Left(Exception):
    """Raised by rank 0 once its group has left a checkpoint, so that Ray forms another."""


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """The training loop of one Ray Train worker."""
    import ray.train
    import ray.train.collective

    from pipeline.config import Config
    from pipeline.training.links import Links
    from pipeline.training.run_folder import RunFolder
    from pipeline.training.worker import Job, work

    plain, hub = settings["job"], settings["hub"]
    job = Job(**{**plain, "config": Config(**plain["config"]), "train": Packed(**plain["train"]),
                 "val": Packed(**plain["val"]) if plain["val"] else None})  # fmt: skip
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    heart = Heart(hub, rank, world, RunFolder(job.run), settings["takes"], job.config.group[0])
    driver, facts = settings["driver"], settings["facts"]
    try:
        val = fetch(job.val, driver, facts[1], hub.say.remote) if job.val and rank == 0 else None
        job = dataclasses.replace(job, train=fetch(job.train, driver, facts[0], hub.say.remote), val=val)
    except UserError as error:
        ray.get(hub.give_up.remote(str(error)))  # the driver ends the run: the other workers wait below
        raise
    ray.train.collective.barrier()  # however long a node's copy takes, no collective of torch's waits for it
    heart.watch()
    tracker = None
    if rank == 0:
        from pipeline.tracking import Tracker

        required = job.config.tracking == "required"
        tracker = Tracker(*settings["tracking"], run=job.run, required=required, say=hub.say.remote)

    def exchange(status: Status) -> bool:
        return heart.exchange(status) or (tracker is not None and tracker.lost)

    links = Links(exchange, tracker.log, tracker.rewind) if tracker else Links(exchange)
    if rank == 0 and (step := job.config.batch_of(world)) < int(job.config.batch_size or 0):
        hub.say.remote(
            f"{world} workers share {step} of the {job.config.batch_size} images of a batch: as many to each"
        )
    try:
        result = work(job, links) | {"unrecorded": tracker is not None and tracker.lost}
    except UserError as error:  # the others may wait for this one: the driver ends the run
        ray.get(hub.refuse.remote(str(error)))
        raise
    except FloatingPointError as error:
        return {"nonfinite": str(error)}
    finally:
        heart.close()
        if tracker:
            tracker.close()
    if rank == 0 and result["stopped"] and heart.leaving in ("resize", "preemption") and not result["unrecorded"]:
        ray.get(hub.left.remote())
        raise Left(heart.leaving)
    return result | {"taken": heart.leaving == "taken"}


class Heart:
    """Speaks to the hub in the background, so that no step waits for it: of every worker that it lives and what it
    does, of rank 0 the status in exchange for the wish to leave.

    Made in the thread that trains.

    Args:
        takes: what each worker reserves of its machine.
        fewest: workers without which the run cannot go on.
    """

    def __init__(
        self, hub: Any, rank: int, world: int, folder: "RunFolder", takes: Mapping[str, float], fewest: int
    ) -> None:
        self.hub, self.rank, self.world = hub, rank, world
        self._takes, self._fewest = takes, fewest
        self.leaving = ""
        self._reached = _reached(folder) if rank == 0 else 0
        self._name = f"worker {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._trains = threading.get_ident()
        self._status: dict[str, Any] | None = None
        self._lock = threading.Lock()  # a message must neither be lost between two statuses nor told twice
        self._began = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def exchange(self, status: Status) -> bool:
        """Leave a status to be sent; whether the group was asked to leave at the last beat."""
        with self._lock:
            messages = (self._status or {}).get("messages", [])
            self._status = {**dataclasses.asdict(status), "messages": [*messages, *status.messages]}
        status.messages = []
        return bool(self.leaving)

    def watch(self) -> None:
        """From now on, look out for a notice that a machine of this group is about to be taken away."""
        if os.environ.get(WATCHER) != "0":
            threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Send the last status and end."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        import ray

        last = False
        while not last:
            last = self._ended.wait(BEAT)
            with self._lock:
                status, self._status = self._status, None
            self.hub.hear.remote(self.rank, self._name, doing(self._trains))
            if status is None:
                continue
            if not self._began:
                self._began = True
                self.hub.began.remote(self.world, status["seen"], self._reached)
            self.leaving = ray.get(self.hub.beat.remote(status))

    def _watch(self) -> None:
        import ray.train

        while not self._ended.wait(4 * BEAT):
            notice = ray.train.get_preemption_info()  # all ranks ask as often, and get rank 0's answer
            if notice and self.rank == 0:
                ranks = ", ".join(map(str, notice.preempted_ranks))
                left = f" in {notice.deadline_ms / 1000 - time.time():.0f} s" if notice.deadline_ms else ""
                others = room(self._takes, without=notice.preempted_node_ids)
                enough = others >= self._fewest
                then = (
                    "others go on" if enough else f"the run ends, whose {self._fewest} workers have room for {others}"
                )
                self.hub.leave.remote(
                    "preemption" if enough else "taken",
                    f"the machine of worker {ranks} will be taken away{left}: a checkpoint, and {then}",
                )


def _reached(folder: "RunFolder") -> int:
    """Images to which the metrics file has come, beyond the newest checkpoint too."""
    from pipeline.training.run_folder import MetricsFile

    return max((int(row["images"]) for row in MetricsFile.rows_of(folder)[0]), default=0)
