"""One training process: from a job (plain data) to a trained, exported and measured backbone.

The same function runs alone (`--engine local`) and on every Ray Train worker.
"""

import contextlib
import math
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
from pipeline.training.links import Links
from pipeline.training.recorder import Recorder
from pipeline.training.run_folder import RunFolder


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
        FloatingPointError: the loss is no longer finite.
        UserError: the run folder cannot be reached from here, or the data does not fit the configuration.
    """
    config, folder = job.config, RunFolder(job.run)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(job.device, torch.cuda.current_device()) if job.device == "cuda" else torch.device("cpu")
    torch.set_num_threads(job.threads)
    if rank == 0 and not folder.exists("config.yaml"):
        raise UserError(f"{folder.address}: the nodes do not share it; give --storage an address that all can reach")

    train, val = job.train, job.val
    objective = build(config).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    opt = optimiser.build(objective.parameter_groups(), config, device)
    step_images = config.batch_of(world)
    loader = make_loader(
        train.path, objective.views, batch_size=step_images // world, seed=config.seed,
        rank=rank, world=world, threads=job.threads, backend=config.loader,
    )  # fmt: skip
    photometrics = Photometrics(objective.views, config.seed)
    planned = config.planned(loader.images)
    seen = restore(folder, objective, opt, loader)
    if config.init and not seen:
        warm_start(config.init, objective)
    recorder = None
    if rank == 0:
        recorder = Recorder(folder, config, links, objective.vital_signs,
                            seen=seen, planned=planned, batch_size=step_images)  # fmt: skip
        knn = measure.OnlineKnn(config, train, val, device, planned)
    model, autocast = prepare(objective, config, device, world)

    batches = iter(loader)
    stop = False
    while seen < planned and not stop:
        started, progress = time.perf_counter(), seen / planned
        batch = next(batches)
        waited = time.perf_counter() - started

        torch.manual_seed(step_seed(config.seed, seen, rank))
        for part, sync in parts(batch, config.accumulate, model):
            views = photometrics([v.to(device, non_blocking=True) for v in part.views], part.index, part.epoch)
            with sync:
                with autocast():
                    labels = (part.label.to(device),) if objective.labelled else ()
                    loss, scalars = model(views, progress, *labels)
                (loss / config.accumulate).backward()
        objective.after_backward(progress)
        norm = optimiser.clip(objective, config.clip or 0.0)
        lr = optimiser.set_rates(opt, config, progress)
        opt.step()
        opt.zero_grad(set_to_none=True)
        seen = min(seen + step_images, planned)  # other workers may have left a last step that is no whole one
        objective.after_step(seen / planned)

        row, stop = agree({"loss": loss, **scalars, "grad_norm": norm}, recorder, world)
        refuse_nonfinite(row, seen, folder)
        if recorder:
            recorder.step(seen, {**row, "lr": lr}, seconds=time.perf_counter() - started, waited=waited)
            if stop or seen >= planned or recorder.checkpoint_due():
                recorder.checkpoint(snapshot(objective, opt, loader, config, seen))
            if knn.due(seen) and not stop:
                recorder.knn(knn(objective.backbone, seen), seen)
    loader.close()
    if recorder is None:
        return {}
    recorder.file.flush()
    links.exchange(recorder.status)
    result = {**recorder.summary(), "stopped": stop, "checkpoint": folder.path(f"checkpoints/{seen:012d}.pt"),
              "loader": loader.backend}  # fmt: skip
    if not stop:
        result |= measure.finish(config, folder, objective.backbone, train, val, device)
    return result


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


def prepare(objective: Objective, config: Config, device: torch.device, world: int) -> tuple[nn.Module, Any]:
    """The callable that trains: compiled and spread over the ranks as configured, and its precision."""
    objective.train()
    torch.set_float32_matmul_precision("high")
    if config.compile:
        for module in objective.modules():
            if isinstance(module, backbones.Backbone):
                module.compile()
    if world > 1:
        synchronise(objective)
    model = nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
    half = measure.precision(config, device) == "bf16"
    return model, lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)


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


def agree(values: dict[str, Tensor], recorder: Recorder | None, world: int) -> tuple[dict[str, float], bool]:
    """The mean of each value over all ranks, and whether rank 0 was asked to stop: one small reduction a step."""
    asked = float(recorder.asked_to_stop()) if recorder else 0.0
    packed = torch.stack([v.detach().float().reshape(()) for v in values.values()])
    packed = torch.cat([packed, packed.new_tensor([asked])])
    if world > 1:
        dist.all_reduce(packed)
    *means, asked = packed.tolist()
    return {name: value / world for name, value in zip(values, means)}, asked > 0


def refuse_nonfinite(row: dict[str, float], seen: int, folder: RunFolder) -> None:
    """Raise where the loss is NaN or infinite; all ranks see the same loss and stop together."""
    if not math.isfinite(row["loss"]):
        kept = folder.checkpoints()
        resumable = f"the last good checkpoint is at {kept[-1]} images" if kept else "there is no checkpoint yet"
        raise FloatingPointError(
            f"the loss is {row['loss']} at {seen} images (gradient norm {row['grad_norm']:.3g}); {resumable}; "
            "a lower --lr or --precision fp32 is the usual way out"
        )


def snapshot(
    objective: Objective, opt: torch.optim.Optimizer, loader: Loader, config: Config, seen: int
) -> dict[str, Any]:
    """All that continuing exactly takes."""
    return {
        "objective": objective.state_dict(),
        "optimiser": opt.state_dict(),
        "loader": loader.state(),
        "images_seen": seen,
        "config": configuration.dump(config),
    }


def restore(folder: RunFolder, objective: Objective, opt: torch.optim.Optimizer, loader: Loader) -> int:
    """Put everything back to the newest checkpoint, if there is one; returns the images seen."""
    found = folder.checkpoints()
    if not found:
        return 0
    saved = folder.load_checkpoint(found[-1])
    objective.load_state_dict(saved["objective"])
    opt.load_state_dict(saved["optimiser"])
    loader.load_state(saved["loader"])
    return int(saved["images_seen"])


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
