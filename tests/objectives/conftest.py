"""Prints the grid of `test_matrix.py` at the end of a test run."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    grid: dict[tuple[str, str], str] = {}
    for outcome, said in (("passed", "ok"), ("failed", "fails")):
        for report in terminalreporter.getreports(outcome):
            grid |= {tuple(cell): said for key, cell in report.user_properties if key == "cell"}
    if not grid:
        return
    rows, columns = (sorted({key[i] for key in grid}) for i in (0, 1))
    terminalreporter.section("every objective on every kind of backbone")
    terminalreporter.line(" " * 14 + "".join(f"{column[:12]:>13}" for column in columns))
    for row in rows:
        terminalreporter.line(f"{row:14}" + "".join(f"{grid.get((row, c), '–'):>13}" for c in columns))
