"""Prints at the end of a test run the grid of `test_matrix.py`, and how near each objective is to independent ones."""

from collections.abc import Iterator
from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    print_grid(terminalreporter)
    print_parity(terminalreporter)


def properties(terminalreporter: pytest.TerminalReporter, key: str) -> Iterator[tuple[str, Any]]:
    """An outcome, and what a test with that outcome recorded under `key`."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            yield from ((outcome, value) for name, value in report.user_properties if name == key)


def print_grid(terminalreporter: pytest.TerminalReporter) -> None:
    said = {
        ("step", "passed"): "ok",
        ("step", "failed"): "fails",
        ("bf16", "passed"): "bf16",
        ("bf16", "failed"): "BF16!",
    }
    grid: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for outcome, (objective, backbone, what) in properties(terminalreporter, "cell"):
        grid.setdefault((objective, backbone), set()).add((what, outcome))
    if not grid:
        return
    rows, columns = (sorted({key[i] for key in grid}) for i in (0, 1))
    terminalreporter.section("every objective on every kind of backbone: a step, and bf16 where it was run")
    terminalreporter.line(" " * 14 + "".join(f"{column[:12]:>13}" for column in columns))
    for row in rows:
        cells = (" ".join(word for key, word in said.items() if key in grid.get((row, c), ())) for c in columns)
        terminalreporter.line(f"{row:14}" + "".join(f"{cell or '–':>13}" for cell in cells))


def print_parity(terminalreporter: pytest.TerminalReporter) -> None:
    largest: dict[tuple[str, str], dict[str, float]] = {}
    for _, (objective, what, oracle, error) in properties(terminalreporter, "parity"):
        errors = largest.setdefault((objective, oracle), {})
        errors[what] = max(error, errors.get(what, 0.0))
    if not largest:
        return
    terminalreporter.section("largest relative error against independent computations")
    terminalreporter.line(f"{'objective':14}{'oracle':24}{'loss':>10}{'gradient':>10}")
    for (objective, oracle), errors in sorted(largest.items()):
        cells = (f"{errors[what]:.1e}" if what in errors else "–" for what in ("loss", "gradient"))
        terminalreporter.line(f"{objective:14}{oracle:24}" + "".join(f"{cell:>10}" for cell in cells))
