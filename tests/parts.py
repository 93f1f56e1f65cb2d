"""Checkpoints that several workers write, all of them in this process."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipeline.training import shares
from pipeline.training.checkpoints import Checkpoints, Keep
from pipeline.training.run_folder import RunFolder


def state(value: float, size: int = 1000) -> dict[str, Any]:
    """A small state at `value` images, whose numbers tell which it is."""
    weights = {name: torch.full((size,), value + i) for i, name in enumerate("abcd")}
    moments = {i: {"step": torch.tensor(value), "exp_avg": torch.full((size,), -value)} for i in range(4)}
    optimiser = {"state": moments, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0, 1, 2, 3]}]}
    return {"objective": weights, "optimiser": optimiser, "config": "", "images_seen": int(value)}


def names(folder: RunFolder) -> list[str]:
    """All that lies in a run's checkpoints/."""
    return sorted(Path(path).name for path in folder.filesystem.ls(f"{folder.root}/checkpoints", detail=False))


def shared(state: dict[str, Any], seen: int, rank: int, workers: int, token: str = "5eed") -> shares.Share | None:
    """A worker's share of a state, however small that is."""
    with mock.patch.object(shares, "LEAST", 1):
        return shares.share(state, seen, token, rank, workers)


def write(folder: RunFolder, seen: int, state: dict[str, Any], workers: int) -> None:
    """A whole checkpoint in as many parts."""
    writers = [Checkpoints(folder, Keep(last=9), rank) for rank in range(workers)]
    for rank, writer in enumerate(writers):
        part = shared(state, seen, rank, workers)
        if part or not rank:
            writer.save(seen, state, part)
    for writer in reversed(writers):
        writer.wait()
        assert writer.trouble is None
