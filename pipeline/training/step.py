"""One optimiser step: an objective, its optimiser, the batch that it is shown, the randomness of that place."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import backbones
import objectives
from backbones.batch_norm import synchronise
from objectives.contract import Objective
from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.data.photometric import Photometrics
from pipeline.device import placed, precision_of
from pipeline.errors import UserError
from pipeline.training import measure, optimiser
from pipeline.training.health import Care
from pipeline.training.run_folder import RunFolder


class Stepper:
    """An objective, its optimiser, and the step that trains them; the randomness of a step is a hash of its place.

    Calling it with a batch takes one step and returns loss, scalars and gradient norm, and the learning rate.
    """

    def __init__(self, config: Config, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.objective = placed(build(config), device)
        self.opt = optimiser.build(self.objective.parameter_groups(), config, device)
        self.photometrics = Photometrics(self.objective.views, config.seed)
        self.half = precision_of(config, device) == "bf16"
        self.model = prepare(self.objective, config, world)
        self.backbones = [module for module in self.objective.modules() if isinstance(module, backbones.Backbone)]

    def __call__(self, batch: Batch, seen: int, planned: int, care: Care) -> tuple[dict[str, Tensor], float]:
        config, objective, progress = self.config, self.objective, seen / planned
        head = self.half and care.fp32_head(seen)
        torch.manual_seed(step_seed(config.seed, seen, self.rank))
        for part, sync in parts(batch, config.accumulate, self.model):
            views = [view.to(self.device, non_blocking=True) for view in part.views]
            views = self.photometrics(views, part.index, part.epoch)
            with sync:
                with (
                    torch.autocast(self.device.type, torch.bfloat16, enabled=self.half and not head),
                    in_bf16(self.backbones if head else [], self.device.type),
                ):
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


@contextlib.contextmanager
def in_bf16(modules: Iterable[nn.Module], device: str) -> Iterator[None]:
    """Within it, these backbones alone compute in bf16, and give float32 to what comes after them."""

    def enter(module: nn.Module, images: Any) -> None:
        torch.set_autocast_dtype(device, torch.bfloat16)
        torch.set_autocast_enabled(device, True)

    def leave(module: nn.Module, images: Any, features: backbones.Features | None) -> backbones.Features | None:
        torch.set_autocast_enabled(device, False)
        if features is None:  # it raised
            return None
        layers, summaries = (tuple(one.float() for one in some) for some in (features.layers, features.summaries))
        return backbones.Features(features.pooled.float(), features.cells.float(), layers, summaries)

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


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
