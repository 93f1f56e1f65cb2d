"""Fixtures every test may use: the real image sets beside the checkout, and a quiet process environment."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["tests.objectives.tables"]  # from here: with -n the process that prints loads no deeper conftest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`shared_data("cifar10")` is the folder of that real image set; the test is skipped where it is absent."""
    extracted: dict[str, Path] = {}

    def find(name: str) -> Path:
        archives = [p for p in (SHARED / f"{name}.tar.gz", SHARED / f"{name}.tar") if p.is_file()]
        if not archives:
            pytest.skip(f"the image set {name} is not beside this checkout")
        if name not in extracted:
            folder = tmp_path_factory.mktemp(name)
            with tarfile.open(archives[0]) as tar:
                tar.extractall(folder, filter="data")
            extracted[name] = folder / name if (folder / name).is_dir() else folder
        return extracted[name]

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a cluster begins first: it takes longest, and the other process has the rest to do beside it."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
