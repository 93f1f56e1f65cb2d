"""Notes how near each objective is to independent computations, for the table of `tables.py`."""

from collections.abc import Generator

import pytest
from objective_checks import PARITY


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """What a test compared travels with its report, also from another process."""
    PARITY.clear()
    try:
        yield
    finally:
        objective = item.path.stem.removeprefix("test_")
        item.user_properties += [("parity", (objective, *compared)) for compared in PARITY]
