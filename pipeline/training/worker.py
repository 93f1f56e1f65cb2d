"""One training process: from a job (plain data) to a trained, exported and measured backbone.

The same function runs alone (`--engine local`) and on every Ray Train worker.
"""

import dataclasses
import socket
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from objectives.contract import TooFewImages
from pipeline import config as configuration
from pipeline.config import Config
from pipeline.data.loader import make_loader
from pipeline.data.packed import Packed
from pipeline.device import device_of, peak_memory, threads_on
from pipeline.errors import UserError
from pipeline.training import measure
from pipeline.training.batches import Batches
from pipeline.training.checkpoints import Checkpoints, Keep, newest
from pipeline.training.health import Care, Health, Intervention, Unwell
from pipeline.training.links import Links
from pipeline.training.recorder import Recorder
from pipeline.training.run_folder import MetricsFile, RunFolder
from pipeline.training.shares import share
from pipeline.training.step import Stepper, step_seed
from pipeline.training.storage import StorageAway, everyone, keep_here, patiently

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What a run is, as plain data: every worker gets the same.

    Args:
        config: resolved.
        run: address of the run folder.
        train, val: packed sets, on this machine's disk; without `val` nothing is measured.
        device: "cuda" or "cpu".
        threads: cores for each worker.
    """

    config: Config
    run: str
    train: Packed
    val: Packed | None
    device: str
    threads: int


def work(job: Job, links: Links) -> dict[str, Any]:
    """Train to the end, or until asked to stop; rank 0 returns its part of `summary.json`, the others nothing.

    Raises:
        FloatingPointError: the run fell ill, and all that is tried then was tried, or `--no-heal` forbids it.
        StorageAway: the run folder does not answer, where training cannot begin or go back without it.
        UserError: the run folder cannot be reached from here, or the data does not fit the configuration.
    """
    training = Training(job, links)
    try:
        while True:
            try:
                training.train()
                return training.finish()
            except Unwell as unwell:
                training.heal(unwell)
    finally:
        training.close()


class Training:
    """One rank of a run: all that it holds, and its steps."""

    def __init__(self, job: Job, links: Links) -> None:
        config, self.folder = job.config, RunFolder(job.run)
        self.config, self.links = config, links
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = device_of(job.device)
        torch.set_num_threads(threads_on(job.threads))
        if not patiently(lambda: self.rank or self.folder.exists("config.yaml"), self.folder):
            raise UserError(
                f"{self.folder.address}: the nodes do not share it; give --storage an address that all can reach"
            )
        self.train_set, self.val_set = job.train, job.val
        self.step_images = config.batch_of(self.world)
        self.stepper = Stepper(config, self.device, self.rank, self.world)
        self.loader = make_loader(
            self.train_set.path, self.stepper.objective.views, batch_size=self.step_images // self.world,
            seed=config.seed, rank=self.rank, world=self.world, threads=job.threads, backend=config.loader,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        self.loader.waiting = self.await_data
        self.late = False
        self.planned = config.planned(self.loader.images)
        self.seen, self.stop, self.due = 0, False, False
        self.row: dict[str, float] = {}
        self.bundle: Intervention | None = None
        self.ill_rows: list[dict[str, float]] = []
        self.recorder: Recorder | None = None

        self.seen, said = self.restore()
        self.care = self.patiently(lambda: Care.read(self.folder))
        self.health = Health(
            self.stepper.objective.vital_signs, self.step_images, float(config.warmup or 0.0) * self.planned,
            heal=config.heal,
        )  # fmt: skip
        self.knn = measure.OnlineKnn(config, self.train_set, self.val_set, self.device, self.planned)
        self.recall()
        if self.rank == 0:
            self.recorder = Recorder(self.folder, config, links, self.health, seen=self.seen, planned=self.planned,
                                     batch_size=self.step_images, said=said)  # fmt: skip
        self.checkpoints = self.recorder.checkpoints if self.recorder else Checkpoints(self.folder, Keep(), self.rank)

    def train(self) -> None:
        """Take steps until all images are seen or the run is asked to stop.

        Raises:
            Unwell: the run has fallen ill.
            UserError: the objective cannot learn from such a batch.
        """
        batches = Batches(self.loader, self.recorder.say if self.recorder else print)
        if 0 < self.seen < self.planned and not self.stop:
            self.due = True  # perhaps
            self.measure()  # what was due where the run was stopped
        while self.seen < self.planned and not self.stop:
            if self.bundle and self.seen == self.bundle.begins:
                chosen, self.bundle = self.bundle, None
                said = self.keep_bundle(chosen)
                if self.recorder:
                    self.recorder.say(said)
            started, seen = time.perf_counter(), self.seen
            try:
                batch = next(batches)
            except Exception:
                if self.recorder:  # what was learnt until here is well
                    self.recorder.checkpoint(self.snapshot())
                raise
            waited = time.perf_counter() - started
            self.seen = min(seen + self.step_images, self.planned)  # of another group's steps a part may be left
            if not self.care.skips(seen):
                try:
                    values, lr = self.stepper(batch, seen, self.planned, self.care)
                except TooFewImages as error:
                    raise UserError(f"--batch-size {self.config.batch_size}: {error}") from error
                means, self.stop, self.due, black = self.agree(values)
                self.row = {"images": self.seen, **means, "lr": lr}
                self.health.check(self.row, self.seen)
                if self.recorder:
                    self.recorder.decode_errors(black, self.train_set.path)
                    self.recorder.step(self.row, seconds=time.perf_counter() - started, waited=waited)
            else:
                self.due = True  # perhaps
                if self.recorder:
                    self.recorder.skip(self.seen)
            self.measure()

    def await_data(self, seconds: float) -> None:
        """Name the file from which no batch has come for `--timeout` minutes; it is waited for further."""
        late = seconds > 60 * self.config.timeout
        if late and not self.late and self.recorder:
            self.recorder.say(f"warning: no batch has come from {self.train_set.path} for {seconds:.0f} s: is its disk "
                              "well? Training waits for it")  # fmt: skip
            self.links.exchange(self.recorder.status)
        self.late = late

    def agree(self, values: dict[str, Tensor]) -> tuple[dict[str, float], bool, bool, int]:
        """The mean of each value over all ranks, whether rank 0 was asked to stop, whether it may have a checkpoint
        taken, and how often any rank could not decode an image: one small reduction a step."""
        asked = due = False
        if self.recorder:
            asked = self.recorder.asked_to_stop()
            due = self.knn.due(self.seen) or self.recorder.checkpoint_due()
        packed = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        packed = torch.cat([packed, packed.new_tensor([asked, due, sum(self.loader.decode_errors.values())])])
        if self.world > 1:
            dist.all_reduce(packed)
        *sums, stop, may, black = packed.tolist()
        return {name: value / self.world for name, value in zip(values, sums)}, stop > 0, may > 0, int(black)

    def measure(self) -> None:
        """Rank 0's online k-NN, and a checkpoint of all ranks, where they are due."""
        if self.recorder and self.knn.due(self.seen) and not self.stop:
            top1 = self.knn(self.stepper.objective.backbone, self.seen, self.recorder.asked_to_stop)
            if top1 is not None:
                self.recorder.knn(top1, self.seen)
        last = self.seen >= self.planned or self.stop
        if last or self.due:
            self.checkpoint(last or bool(self.recorder and self.recorder.checkpoint_due()))

    def checkpoint(self, due: bool) -> None:
        """Begin to write a checkpoint, each rank its share of it, if it is `due` to rank 0."""
        token = [uuid.uuid4().hex[:8] if due else ""]  # names the attempt
        if self.world > 1:
            dist.broadcast_object_list(token)
        if not token[0]:
            return
        self.checkpoints.settle()
        state = self.snapshot()
        buffers = [name for name, _ in self.stepper.objective.named_buffers()]
        part = share(state, self.seen, token[0], self.rank, self.world, buffers)
        if self.recorder:
            self.recorder.checkpoint(state, part)
        elif part:
            self.checkpoints.save(self.seen, state, part)

    def finish(self) -> dict[str, Any]:
        """What the run came to, on rank 0; at its end its backbone is exported and measured.

        Where storage does not take the end of it, in time, or at once when asked to stop, the run is kept here.
        """
        self.loader.close()
        self.checkpoints.settle()
        if self.recorder:
            self.recorder.complain()
        kept, away = self.folder, ""
        try:
            found = self.patiently(self.write_end)
        except StorageAway as error:
            kept, found, away = *self.kept_here(), error.why
        if self.recorder is None:
            return {}
        self.tell()
        result = {**self.recorder.summary(), "stopped": self.stop or bool(away), "loader": self.loader.backend,
                  "checkpoint": kept.path(f"checkpoints/{found:012d}.pt") if found else None,
                  "checkpoint_images": found, "interventions": len(self.care.done), "run": kept.address, "away": away,
                  "peak_memory": peak_memory(self.device)}  # fmt: skip
        if not result["stopped"]:
            if self.val_set and self.train_set.classes:
                images = self.train_set.images + self.val_set.images
                self.tell(f"trained; accuracy is measured now, on {images:,} images")
            result |= measure.finish(self.config, self.stepper.objective.backbone, self.train_set, self.val_set,
                                     self.device)  # fmt: skip
        return result

    def write_end(self) -> int:
        """Have in the run folder what it lacks of the run until here; returns the images at its newest checkpoint."""
        if any(everyone(self.checkpoints.trouble)) and not self.stop:
            self.checkpoint(True)
            self.checkpoints.settle()
        if self.checkpoints.trouble:
            raise OSError(self.checkpoints.trouble)
        if self.recorder is None:
            return 0
        self.recorder.settle()
        if not self.stop:
            measure.export(self.stepper.objective.backbone, self.folder)
        return max(self.folder.checkpoints(), default=0)

    def kept_here(self) -> tuple[RunFolder, int]:
        """A run folder on this machine in place of one that is away, and the images at its newest checkpoint; where
        this machine takes nothing either, the one that is away."""
        if self.recorder:
            try:
                kept = keep_here(self.folder, self.config, self.care, self.recorder.file.content, self.snapshot())
            except Exception as error:
                self.recorder.say(f"warning: nor can it be kept on this machine ({error})")
            else:
                self.recorder.say(f"warning: {self.folder.address} is away: the run is kept in {kept.address} on "
                                  f"{socket.gethostname()}")  # fmt: skip
                return kept, self.seen
        return self.folder, max(self.checkpoints.known, default=0)

    def tell(self, *sentences: str) -> bool:
        """Tell the user at once; whether the run is asked to stop."""
        if self.recorder is None:
            if sentences and self.rank == 0:
                print(*sentences, sep="\n", flush=True)
            return False
        self.recorder.say(*sentences)
        return self.recorder.asked_to_stop()

    def patiently(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, on all ranks together, as soon as storage answers all of them."""
        return patiently(attempt, self.folder, self.tell)

    def close(self) -> None:
        """End what runs beside the training."""
        self.loader.close()
        self.checkpoints.wait()

    def restore(self, *, well: bool = False, rather_not: Collection[int] = ()) -> tuple[int, list[str]]:
        """Put everything back to the newest sound checkpoint, or to the beginning where there is none; arguments as of
        `newest`.

        Returns:
            Images seen, and sentences on damaged checkpoints that were passed over.

        Raises:
            StorageAway: the run folder does not answer.
            UserError: every checkpoint is damaged.
        """
        none: tuple[int, dict[str, Any] | None, list[str]] = (0, None, [])
        seen, state, said = self.patiently(
            lambda: none if self.rank else newest(self.folder, well=well, rather_not=rather_not)
        )
        seen = everyone(seen)[0]
        if seen and self.world > 1:
            state = self.patiently(lambda: self.folder.load_checkpoint(seen) if self.rank else state)
        if state is None:
            self.stepper.begin(anew=self.seen > 0)
            self.loader.load_state({"epoch": 0, "position": 0})
        else:
            self.stepper.load(state)
            self.loader.load_state(state["loader"])
        return seen, said

    def recall(self) -> None:
        """Bring the judge of health and the online k-NN to where training stands."""
        rows = self.patiently(lambda: MetricsFile.read(self.folder, until=self.seen))
        self.health.recall([row for row in rows if {"loss", "grad_norm"} <= row.keys()])
        self.knn.recall(rows)

    def heal(self, unwell: Unwell) -> None:
        """Go back to the last checkpoint taken in good health, with one thing changed.

        For a NaN any sound checkpoint is: its loss was finite. Where a collapse comes again, it had begun before that
        checkpoint: the one before is taken.

        Raises:
            FloatingPointError: everything has been tried, or `--no-heal` forbids it.
            StorageAway: the checkpoint cannot be had.
        """
        self.checkpoints.settle()
        if self.recorder:
            self.ill_rows = [*self.recorder.file.rows(), self.row]
        back, said = self.restore(well=unwell.cause != "nonfinite", rather_not=self.care.in_vain(unwell.cause))
        chosen = self.care.treat(unwell, back, half=self.stepper.half) if self.config.heal else None
        self.seen = back
        if chosen is None:
            replay = self.keep_bundle(unwell.answered(back, "end"))
            tried = f"; tried in vain: {', '.join(one.change for one in self.care.done)}" if self.care.done else ""
            kept = f"the last good checkpoint is at {back:,} images" if back else "there is no checkpoint yet"
            raise FloatingPointError(
                f"{unwell.sentence}{tried}; {kept}; a lower --lr or --precision fp32 is the usual way out; {replay}"
            )
        self.bundle = chosen
        self.recall()
        if self.recorder:
            self.recorder.treated(self.care)
        self.patiently(lambda: self.checkpoints.drop_after(back) if self.recorder else None)
        if self.recorder:
            self.recorder.rewind(back)
            self.recorder.say(*said, self.care.said())

    def keep_bundle(self, chosen: Intervention) -> str:
        """Keep what reproduces the illness that `chosen` answers, from here; a sentence that says how, on rank 0."""
        if self.recorder is None:
            return ""
        state = self.snapshot() | {
            "bundle": {
                **dataclasses.asdict(chosen),
                "planned": self.planned,
                "world": self.world,
                "indices": self.loader.upcoming().tolist(),
                "step_seed": step_seed(self.config.seed, self.seen, 0),
                "rows": [row for row in self.ill_rows if "loss" in row and row["images"] > self.seen],
                "before": [dataclasses.asdict(one) for one in self.care.done if one is not chosen],
                "train": {key: str(value) for key, value in dataclasses.asdict(self.train_set).items()},
            }
        }
        name = f"bundles/{chosen.cause}-{chosen.until:012d}-{chosen.change}.pt"
        try:
            self.folder.save_state(name, state)
        except Exception as error:  # each kind of storage has its own
            return f"warning: no replay bundle could be written ({error})"
        return f"python -m pipeline.replay {self.folder.path(name)} reproduces it"

    def snapshot(self) -> dict[str, Any]:
        """All that continuing exactly takes."""
        train = {"fingerprint": self.train_set.fingerprint, "images": self.train_set.images,
                 "classes": len(self.train_set.classes)}  # fmt: skip
        return {**self.stepper.state(), "loader": self.loader.state(), "images_seen": self.seen, "train": train,
                "interventions": self.care.listed, "config": configuration.dump(self.config)}  # fmt: skip
