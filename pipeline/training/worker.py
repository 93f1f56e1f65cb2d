"""One training process: from a job (plain data) to a trained, exported and measured backbone.

The same function runs alone (`--engine local`) and on every Ray Train worker.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import backbones
import objectives
from backbones.batch_norm import synchronise
from objectives.contract import Objective
from pipeline import config as configuration
from pipeline.config import Config
from pipeline.data.loader import Batch, Loader, make_loader
from pipeline.data.packed import Packed
from pipeline.data.photometric import Photometrics
from pipeline.errors import UserError
from pipeline.training import measure, optimiser
from pipeline.training.checkpoints import newest
from pipeline.training.health import Care, Health, Intervention, Unwell
from pipeline.training.links import Links
from pipeline.training.recorder import Recorder
from pipeline.training.run_folder import MetricsFile, RunFolder

RELOADS = 3  # times in a row that a loader which failed is begun anew


@dataclass(frozen=True)
class Job:
    """What a run is, as plain data: every worker gets the same.

    Args:
        config: resolved.
        run: address of the run folder.
        train, val: packed sets, on this machine's disk; without `val` nothing is measured.
        device: "cuda" or "cpu".
        threads: CPU threads for each worker.
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
        torch.set_num_threads(job.threads)
        if self.rank == 0 and not self.folder.exists("config.yaml"):
            raise UserError(
                f"{self.folder.address}: the nodes do not share it; give --storage an address that all can reach"
            )
        self.train_set, self.val_set = job.train, job.val
        self.step_images = config.batch_of(self.world)
        self.stepper = Stepper(config, self.device, self.rank, self.world)
        self.loader = make_loader(
            self.train_set.path, self.stepper.objective.views, batch_size=self.step_images // self.world,
            seed=config.seed, rank=self.rank, world=self.world, threads=job.threads, backend=config.loader,
        )  # fmt: skip
        self.planned = config.planned(self.loader.images)
        self.seen, self.stop = 0, False
        self.row: dict[str, float] = {}
        self.bundle: Intervention | None = None
        self.ill_rows: list[dict[str, float]] = []

        self.seen, said = self.restore()
        self.care = Care.read(self.folder)
        self.health = Health(
            self.stepper.objective.vital_signs, self.step_images, float(config.warmup or 0.0) * self.planned,
            heal=config.heal,
        )  # fmt: skip
        self.recall()
        self.recorder: Recorder | None = None
        if self.rank == 0:
            self.recorder = Recorder(self.folder, config, links, self.health, seen=self.seen, planned=self.planned,
                                     batch_size=self.step_images, said=said)  # fmt: skip
            self.knn = measure.OnlineKnn(config, self.train_set, self.val_set, self.device, self.planned)

    def train(self) -> None:
        """Take steps until all images are seen or the run is asked to stop.

        Raises:
            Unwell: the run has fallen ill.
        """
        batches = Batches(self.loader)
        while self.seen < self.planned and not self.stop:
            if self.bundle and self.seen == self.bundle.begins:
                self.keep_bundle()
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
                values, lr = self.stepper(batch, seen, self.planned, self.care)
                means, self.stop = self.agree(values)
                self.row = {"images": self.seen, **means, "lr": lr}
                self.health.check(self.row, self.seen)
                if self.recorder:
                    self.recorder.step(self.row, seconds=time.perf_counter() - started, waited=waited)
            elif self.recorder:
                self.recorder.skip(self.seen)
            self.measure()

    def agree(self, values: dict[str, Tensor]) -> tuple[dict[str, float], bool]:
        """The mean of each value over all ranks, and whether rank 0 was asked to stop: one small reduction a step."""
        asked = float(self.recorder.asked_to_stop()) if self.recorder else 0.0
        packed = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        packed = torch.cat([packed, packed.new_tensor([asked])])
        if self.world > 1:
            dist.all_reduce(packed)
        *sums, asked = packed.tolist()
        return {name: value / self.world for name, value in zip(values, sums)}, asked > 0

    def measure(self) -> None:
        """Rank 0's online k-NN and checkpoints, where they are due."""
        if self.recorder is None:
            return
        if self.knn.due(self.seen) and not self.stop:
            self.recorder.knn(self.knn(self.stepper.objective.backbone, self.seen), self.seen)
        if self.seen >= self.planned or self.stop or self.recorder.checkpoint_due():
            self.recorder.checkpoint(self.snapshot())

    def finish(self) -> dict[str, Any]:
        """What the run came to, on rank 0; at its end its backbone is exported and measured."""
        self.loader.close()
        if self.recorder is None:
            return {}
        self.recorder.checkpoints.wait()
        self.recorder.complain()
        with contextlib.suppress(OSError):
            self.recorder.file.flush()
        self.links.exchange(self.recorder.status)
        kept = self.folder.checkpoints()
        result = {**self.recorder.summary(), "stopped": self.stop, "loader": self.loader.backend,
                  "checkpoint": self.folder.path(f"checkpoints/{kept[-1]:012d}.pt") if kept else None,
                  "checkpoint_images": kept[-1] if kept else 0, "interventions": len(self.care.done)}  # fmt: skip
        if not self.stop:
            result |= measure.finish(self.config, self.folder, self.stepper.objective.backbone, self.train_set,
                                     self.val_set, self.device)  # fmt: skip
        return result

    def close(self) -> None:
        """End what runs beside the training."""
        self.loader.close()
        if self.recorder:
            self.recorder.checkpoints.wait()

    def restore(self, *, well: bool = False) -> tuple[int, list[str]]:
        """Put everything back to the newest sound checkpoint, or to the beginning where there is none.

        Returns:
            Images seen, and sentences on damaged checkpoints that were passed over.

        Raises:
            UserError: every checkpoint is damaged.
        """
        seen, state, trouble = 0, None, None
        said: list[str] = []
        if self.rank == 0:
            try:
                seen, state, said = newest(self.folder, well=well)
            except UserError as error:
                trouble = str(error)
        if self.world > 1:
            told: list[Any] = [seen, trouble]
            dist.broadcast_object_list(told)
            seen, trouble = told
            if self.rank and seen:
                state = self.folder.load_checkpoint(seen)
        if trouble:
            raise UserError(trouble)
        if state is None:
            self.stepper.begin(anew=self.seen > 0)
            self.loader.load_state({"epoch": 0, "position": 0})
        else:
            self.stepper.load(state)
            self.loader.load_state(state["loader"])
        return seen, said

    def recall(self) -> None:
        """Bring the judge of health to where training stands."""
        self.health.recall([row for row in MetricsFile.read(self.folder, until=self.seen) if "loss" in row])

    def heal(self, unwell: Unwell) -> None:
        """Go back to the last checkpoint taken in good health, with one thing changed.

        Raises:
            FloatingPointError: everything has been tried, or `--no-heal` forbids it.
        """
        if self.recorder:
            self.recorder.checkpoints.wait()
            self.ill_rows = [*self.recorder.file.rows(), self.row]
        back, said = self.restore(well=True)
        chosen = self.care.treat(unwell, back, half=self.stepper.half) if self.config.heal else None
        if chosen is None:
            tried = f"; tried in vain: {', '.join(one.change for one in self.care.done)}" if self.care.done else ""
            kept = f"the last good checkpoint is at {back:,} images" if back else "there is no checkpoint yet"
            raise FloatingPointError(
                f"{unwell.sentence}{tried}; {kept}; a lower --lr or --precision fp32 is the usual way out"
            )
        self.seen, self.bundle = back, chosen
        self.recall()
        if self.recorder:
            self.care.write(self.folder)
            self.recorder.checkpoints.drop_after(back)
            self.recorder.rewind(back)
            self.recorder.say(*said, chosen.line())

    def keep_bundle(self) -> None:
        """Keep what reproduces the illness that is being treated: `python -m pipeline.replay` does."""
        chosen, self.bundle = self.bundle, None
        if self.recorder is None or chosen is None:
            return
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
        except (OSError, RuntimeError) as error:
            self.recorder.say(f"warning: no replay bundle could be written ({error})")
            return
        self.recorder.say(f"python -m pipeline.replay {self.folder.path(name)} reproduces it")

    def snapshot(self) -> dict[str, Any]:
        """All that continuing exactly takes."""
        return {**self.stepper.state(), "loader": self.loader.state(), "images_seen": self.seen,
                "config": configuration.dump(self.config)}  # fmt: skip


class Stepper:
    """An objective, its optimiser, and the step that trains them; the randomness of a step is a hash of its place.

    Calling it with a batch takes one step and returns loss, scalars and gradient norm, and the learning rate.
    """

    def __init__(self, config: Config, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.objective = build(config).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.opt = optimiser.build(self.objective.parameter_groups(), config, device)
        self.photometrics = Photometrics(self.objective.views, config.seed)
        self.half = measure.precision(config, device) == "bf16"
        self.model = prepare(self.objective, config, world)

    def __call__(self, batch: Batch, seen: int, planned: int, care: Care) -> tuple[dict[str, Tensor], float]:
        config, objective, progress = self.config, self.objective, seen / planned
        half = self.half and not care.fp32(seen)
        torch.manual_seed(step_seed(config.seed, seen, self.rank))
        for part, sync in parts(batch, config.accumulate, self.model):
            views = [view.to(self.device, non_blocking=True) for view in part.views]
            views = self.photometrics(views, part.index, part.epoch)
            with sync:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                    labels = (part.label.to(self.device),) if objective.labelled else ()
                    loss, scalars = self.model(views, progress, *labels)
                (loss / config.accumulate).backward()
        objective.after_backward(progress)
        norm = optimiser.clip(objective, config.clip or 0.0)
        lr = optimiser.set_rates(self.opt, config, progress, care.lr_scale(seen))
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        objective.after_step(min(seen + len(batch.index) * self.world, planned) / planned)
        return {"loss": loss, **scalars, "grad_norm": norm}, lr

    def begin(self, *, anew: bool) -> None:
        """Start from `--init`'s weights, or those drawn from the seed, which it has until it was trained (`anew`)."""
        if anew:
            fresh = build(self.config).to(self.device)
            self.objective.load_state_dict(fresh.state_dict())
            self.opt.load_state_dict(optimiser.build(fresh.parameter_groups(), self.config, self.device).state_dict())
        if self.config.init:
            warm_start(self.config.init, self.objective)

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that it holds."""
        return {"objective": self.objective.state_dict(), "optimiser": self.opt.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.objective.load_state_dict(state["objective"])
        self.opt.load_state_dict(state["optimiser"])


def build(config: Config) -> Objective:
    """The configured objective around a fresh backbone, every weight drawn from the seed.

    Raises:
        UserError: they make no sense together, or at this image size.
    """
    torch.manual_seed(config.seed)
    kind = objectives.objective(config.objective)
    try:
        return kind(measure.fresh_backbone(config), image_size=config.image_size, **config.options)
    except ValueError as error:
        raise UserError(str(error)) from error


def prepare(objective: Objective, config: Config, world: int) -> nn.Module:
    """The module that trains: compiled and spread over the ranks as configured."""
    objective.train()
    torch.set_float32_matmul_precision("high")
    if config.compile:
        for module in objective.modules():
            if isinstance(module, backbones.Backbone):
                module.compile()
    if world == 1:
        return objective
    synchronise(objective)
    return nn.parallel.DistributedDataParallel(objective)


class Batches:
    """Batches without end. Where the loader fails it is begun anew at its place, a few times in a row."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self._batches = loader, iter(loader)

    def __next__(self) -> Batch:
        for attempt in range(RELOADS + 1):
            try:
                return next(self._batches)
            except UserError:  # trying again would not help
                raise
            except Exception as error:
                if attempt == RELOADS:
                    raise RuntimeError(f"the loader failed {RELOADS + 1} times in a row: {error}") from error
                self._batches = iter(self.loader)
        raise AssertionError


def device_of(name: str) -> torch.device:
    """This process's device: "cpu", or the current one of "cuda"."""
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def parts(batch: Batch, count: int, model: nn.Module) -> Iterator[tuple[Batch, Any]]:
    """Split a batch into `count` parts; gradients travel between the ranks with the last one only."""
    for i, (index, label, *views) in enumerate(
        zip(batch.index.chunk(count), batch.label.chunk(count), *(v.chunk(count) for v in batch.views))
    ):
        last = i == count - 1 or not isinstance(model, nn.parallel.DistributedDataParallel)
        yield Batch(views, index, label, batch.epoch), contextlib.nullcontext() if last else model.no_sync()  # type: ignore[operator]


def step_seed(seed: int, seen: int, rank: int) -> int:
    """A seed for one step of one rank: no random state outlives a step, so none needs to be saved."""
    return (seed * 1_000_003 + seen) * 1_009 + rank


def warm_start(address: str, objective: Objective) -> None:
    """Load the backbone and objective of another run's newest checkpoint; optimiser and place in the data begin anew.

    Raises:
        UserError: there is no checkpoint, or it is of another backbone, objective, or image size.
    """
    folder = RunFolder(address)
    found = folder.checkpoints()
    if not found:
        raise UserError(f"--init {address}: holds no checkpoint (looked for {folder.path('checkpoints')}/*.pt)")
    try:
        objective.load_state_dict(folder.load_checkpoint(found[-1])["objective"])
    except RuntimeError as error:
        raise UserError(
            f"--init {address}: is of another backbone, objective or image size "
            f"({str(error).splitlines()[-1].strip()[:150]})"
        ) from None
