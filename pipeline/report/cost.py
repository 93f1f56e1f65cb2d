"""What a backbone costs: its size, its speed, and what its pretraining took."""

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from backbones.contract import Backbone
from backbones.cost import multiply_adds, parameters
from pipeline.evaluation.images import IN_CACHE, evaluating
from pipeline.evaluation.judge import Judged

BATCH = 256
"""Images at a time on a GPU; on a CPU it is `IN_CACHE`, as the evaluation itself takes them."""
LEAST_SECONDS = 1.0
"""For which the speed of inference is measured."""


@dataclass(frozen=True)
class Cost:
    """What a backbone and its pretraining took.

    parameters        of the backbone
    multiply_adds     for one image of the evaluation
    inference         images/s, frozen, on the device and in the precision of the comparison
    memory            peak bytes of the CUDA allocator meanwhile, weights included; None on a CPU, which keeps no count
    images_seen       in pretraining, every repetition counted
    compute           multiply-adds of one forward pass of the backbone over all views it saw, masks not deducted
    training          images/s of pretraining on `device`, by the run's summary; None without one of this checkpoint
    training_memory   peak bytes of one process of it, of the GPU where there was one; None likewise
    seconds           that `images_seen` took at this speed
    workers           that shared it; None where their number changed
    """

    parameters: int
    multiply_adds: int
    inference: float
    memory: int | None
    images_seen: int
    compute: float
    training: float | None
    training_memory: int | None
    seconds: float | None
    device: str
    workers: int | None

    def hours(self) -> float | None:
        """Hours of pretraining times the GPUs, or processors, that spent them; None where that is not known."""
        return None if self.seconds is None or self.workers is None else self.workers * self.seconds / 3600


def cost(one: Judged, size: int, device: torch.device, precision: Literal["fp32", "bf16"]) -> Cost:
    """What a run took, from its shapes, its summary, and a second of its backbone, which is on `device`."""
    per_view: dict[Any, int] = {shape: multiply_adds(one.backbone, shape) for shape in {v.size for v in one.views}}
    summary = one.summary()
    if summary.get("images_seen") != one.seen:
        summary = {}
    rate = summary.get("images_per_second")
    fewest, most = one.config.group
    inference, memory = infer(one.backbone, size, device, precision)
    return Cost(
        parameters=parameters(one.backbone),
        multiply_adds=multiply_adds(one.backbone, size),
        inference=inference,
        memory=memory,
        images_seen=one.seen,
        compute=float(one.seen) * sum(per_view[view.size] for view in one.views),
        training=rate,
        training_memory=summary.get("peak_memory"),
        seconds=one.seen / rate if rate else None,  # a summary's own seconds are those since the last resume
        device=str(summary.get("device", "")),
        workers=most if fewest == most else None,
    )


def infer(
    backbone: Backbone, size: int, device: torch.device, precision: Literal["fp32", "bf16"]
) -> tuple[float, int | None]:
    """Images/s of a backbone on `device`, by its median batch, and the peak bytes of the CUDA allocator meanwhile."""
    cuda = device.type == "cuda"
    images = torch.randn(BATCH if cuda else IN_CACHE, backbone.in_channels, size, size, device=device)
    # Others' tensors are on the device, too; the backbone's own weights count.
    others = torch.cuda.memory_allocated(device) - sum(t.nbytes for t in backbone.state_dict().values()) if cuda else 0
    seconds: list[float] = []
    with evaluating({"": backbone}), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        backbone(images)  # what is chosen or compiled at the first is chosen now
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        while sum(seconds) < LEAST_SECONDS:
            begun = time.perf_counter()
            backbone(images)
            if cuda:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begun)
    median = sorted(seconds)[len(seconds) // 2]
    return len(images) / median, torch.cuda.max_memory_allocated(device) - others if cuda else None
