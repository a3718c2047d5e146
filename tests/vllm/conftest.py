"""These tests run real vLLM. Where it is not installed they are not collected; `make test-vllm` has an environment.

What they find out goes into tables, which pytest prints at its end; docs/vllm.md shows those of `make test-vllm-full`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

_found = importlib.util.find_spec("vllm")
if _found is None or _found.origin is None:  # This folder itself can pass for an empty package of that name.
    collect_ignore_glob = ["test_*.py"]

_tables: dict[str, dict[str, dict[str, str]]] = {}


@pytest.fixture(scope="session")
def record() -> Callable[[str, str, str, str], None]:
    """record(table, row, column, text): one cell of a table that is printed when all tests are over."""

    def note(table: str, row: str, column: str, text: str) -> None:
        _tables.setdefault(table, {}).setdefault(row, {})[column] = text

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for title, rows in _tables.items():
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        terminalreporter.write_sep("=", title)
        terminalreporter.write_line(f"| | {' | '.join(columns)} |")
        terminalreporter.write_line("| --- " * (len(columns) + 1) + "|")
        for row, cells in rows.items():
            terminalreporter.write_line(f"| {row} | {' | '.join(cells.get(column, '–') for column in columns)} |")
