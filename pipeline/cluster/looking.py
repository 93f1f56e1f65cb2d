"""One pass of backbones over a packed set, shared out over the workers of a cluster."""

import copy
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster.copies import facts, fetch
from pipeline.cluster.machines import amounts, connect, free, machines, placement, takes
from pipeline.cluster.witness import first_line
from pipeline.data.packed import Packed, read_packed
from pipeline.data.preparation import progress_bar

if TYPE_CHECKING:
    from torch import nn

    from objectives.views import View
    from pipeline.evaluation.features import Look, Pass

SHARES = 4  # for each worker: so much of its part a lost machine costs, and the others wait for a slow one
PATIENCE = 20.0  # seconds in which room for a worker must be free; what ended a moment ago still counts as busy


def looking(engine: str, workers: int | None) -> "Look":
    """What makes passes over images for an evaluation.

    Args:
        engine: "local" is `look`, in this process; so is "ray" where no cluster is there and one worker is enough, or
            where no worker has room: this process may be what holds it, as the entry point of a job. Else the cluster's
            workers share out every pass, each on a GPU, or on its part of the CPU cores.
        workers: how many; None takes one for each GPU, or for each machine, of the cluster that is there.

    Raises:
        UserError: a cluster that is named but does not answer, or has no room for so many.
    """
    from pipeline.evaluation.features import look

    if engine == "local" or not connect(workers or 1):
        return look
    workers = workers or machines()
    device, threads = placement(workers, workers)
    needs = takes(threads, cuda=device == "cuda")
    until = time.monotonic() + PATIENCE
    while not free(needs):
        if time.monotonic() > until:
            print(
                f"no machine of the cluster has {amounts(needs)} free: features are extracted in this process",
                flush=True,
            )
            return look
        time.sleep(0.5)
    print(f"features are extracted by {workers} worker{'s' * (workers > 1)} of {amounts(needs)}", flush=True)
    return partial(shared_out, workers, (device, threads))


def shared_out(
    workers: int,
    place: tuple[str, int],
    backbones: "Mapping[str, nn.Module]",
    path: str | Path,
    views: "Sequence[View]",
    *,
    batch_size: int = 256,
    limit: int | None = None,
    **options: Any,
) -> "dict[str, Pass]":
    """As `look`, by tasks on the connected cluster; their batches are those of one process.

    The backbones go to each machine once, and the packed set where it is not. Ray gives the share of a worker that is
    lost to another, three times.

    Args:
        workers: shares that are worked on at once.
        place: device and CPU cores of each, in place of the device in `options`, which is this process's.
    """
    import ray

    from pipeline.evaluation.features import batches_of, joined

    device, threads = place
    packed, needs = read_packed(path), takes(threads, cuda=device == "cuda")
    images = min(packed.images, limit or packed.images)
    shares = min(SHARES * workers, batches_of(images, views, batch_size))
    options |= {"batch_size": batch_size, "limit": limit, "device": device}
    weights = ray.put({name: copy.deepcopy(backbone).cpu() for name, backbone in backbones.items()})
    here, known = ray.get_runtime_context().get_node_id(), facts(str(packed.path))
    task = ray.remote(_look).options(
        num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), memory=needs.get("memory"), scheduling_strategy="SPREAD"
    )
    parts: list[dict[str, Pass]] = []
    running: list[Any] = []
    numbers = iter(range(shares))
    with progress_bar("extracting features", "images") as progress:
        try:
            while len(parts) < shares:
                for k in islice(numbers, workers - len(running)):
                    running.append(task.remote(weights, packed, here, known, views, threads, (k, shares), options))
                (done,), running = ray.wait(running)
                parts.append(ray.get(done))
                progress(sum(len(next(iter(part.values())).which) for part in parts), images)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"{path}: its features could not be extracted ({first_line(error)})") from error
        finally:
            for one in running:
                ray.cancel(one, force=True)
    return joined(parts, path)


def _look(
    backbones: "Mapping[str, nn.Module]",
    packed: Packed,
    driver: str,
    known: tuple[int, str],
    views: "Sequence[View]",
    threads: int,
    share: tuple[int, int],
    options: dict[str, Any],
) -> "dict[str, Pass]":
    """One share of a pass, in a worker."""
    import torch

    from pipeline.device import placed
    from pipeline.evaluation.features import look_at

    os.environ["LOCAL_WORLD_SIZE"] = str(max(1, len(os.sched_getaffinity(0)) // threads))  # the loader's threads
    torch.set_num_threads(threads)
    there = {name: placed(backbone, options["device"]) for name, backbone in backbones.items()}
    return look_at(there, fetch(packed, driver, known).path, views, share=share, **options)
