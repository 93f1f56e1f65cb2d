"""Two processes that talk to each other as two ranks of a run do."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank_of_two(rank: int, port: int, folder: Path, work: Callable[[int], object]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(folder: Path, work: Callable[[int], object]) -> list:
    """What `work(rank)` gives on each of the two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_of_two, (port, folder, work), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
