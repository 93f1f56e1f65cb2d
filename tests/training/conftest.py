"""What tests of run folders and checkpoints have in common."""

import uuid

import pytest

from pipeline.training import checkpoints
from pipeline.training.run_folder import RunFolder


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """A run folder without checkpoints, on a disk and at an address."""
    return RunFolder(str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def quick(monkeypatch):
    """What is waited for in vain is so for a moment only."""
    monkeypatch.setattr(checkpoints, "POLL", 0.01)
    monkeypatch.setattr(checkpoints, "PATIENCE", 0.05)
