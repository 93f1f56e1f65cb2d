"""Prints the grid of `test_matrix.py` at the end of a test run."""

import sys

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    grid = getattr(sys.modules.get("test_matrix"), "GRID", {})
    if not grid:
        return
    rows, columns = (list(dict.fromkeys(key[i] for key in grid)) for i in (0, 1))
    terminalreporter.section("every objective on every kind of backbone")
    terminalreporter.line(" " * 14 + "".join(f"{column[:12]:>13}" for column in columns))
    for row in rows:
        terminalreporter.line(f"{row:14}" + "".join(f"{grid.get((row, c), '–'):>13}" for c in columns))
