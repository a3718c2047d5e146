"""The table of packages in docs/design.md is the order of imports: only from packages above, and never in a circle."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

from support.processes import ROOT, in_forks

PLACES = {
    "qtensor": ROOT / "qtensor",
    "qtensor.kernels": ROOT / "kernels",
    "qtensor.integrations": ROOT / "integrations",
}
ENTRANCES = {"qtensor", "qtensor.__main__", "qtensor.quantized"}
"""The package itself gathers what users import, from everywhere; the others are names that must not move."""
LONGEST = 400
"""Lines of a file, unless the paragraph at its top says why it is one file."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in PLACES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def order() -> list[str]:
    """The table's packages and files, the lowest first."""
    table = (ROOT / "docs/design.md").read_text(encoding="utf-8").partition("## Packages")[2]
    return [name.removesuffix(".py").removesuffix("/") for name in re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)]


def imported(module: str) -> Iterator[str]:
    """The modules of the package that a module imports: in functions and for type checkers, too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - max(node.level - 1, 0)] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        yield from (name for name in names if name in MODULES and name not in ENTRANCES)


def test_every_file_is_in_the_table() -> None:
    assert sorted(order()) == sorted({m.split(".")[1] for m in MODULES if m not in ENTRANCES})


def test_imports_go_up_the_table() -> None:
    height = {name: i for i, name in enumerate(order())}
    height["integrations"] = height["checkpoint"] + 0.5  # type: ignore[assignment]
    down = [
        f"{module} imports {other}"
        for module in MODULES
        if module not in ENTRANCES
        for other in imported(module)
        if height[other.split(".")[1]] > height[module.split(".")[1]]
    ]
    assert down == []


def test_no_two_files_import_each_other() -> None:
    graph = {module: set(imported(module)) - {module} for module in MODULES if module not in ENTRANCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' imports '.join(reversed(error.args[1]))}")


def test_only_callers_looks_at_the_stack() -> None:
    looks = re.compile(r"_getframe|currentframe|inspect\.(stack|trace)|walk_stack|extract_stack")
    assert [m for m, path in MODULES.items() if looks.search(path.read_text(encoding="utf-8"))] == ["qtensor.callers"]


def test_gradients_are_switched_where_no_interrupt_comes_between() -> None:
    """`interrupts.without_grad`. The demo's own forward pass is a user's."""
    guard = re.compile(r"torch\.no_grad\(|set_grad_enabled")
    found = [m for m, path in MODULES.items() if guard.search(path.read_text(encoding="utf-8"))]
    assert sorted(set(found) - {"qtensor.cli.demo"}) == ["qtensor.interrupts"]


def test_long_files_say_why() -> None:
    long = {}
    for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        top = ast.get_docstring(ast.parse(text)) or ""
        if text.count("\n") > LONGEST and "one file because" not in " ".join(top.split()):
            long[str(path.relative_to(ROOT))] = text.count("\n")
    assert long == {}


def import_alone(module: str) -> str | None:
    """Import a module in a process that has nothing of qtensor, without what `import qtensor` would bring along."""
    assert not any(name.partition(".")[0] == "qtensor" for name in sys.modules)
    package = ModuleType("qtensor")
    package.__path__ = [str(ROOT / "qtensor"), str(ROOT)]
    sys.modules["qtensor"] = package
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module}: {type(error).__name__}: {error}"
    return None


def test_every_file_can_be_imported_first() -> None:
    """And so in any order. Those of the vLLM plugin need vLLM; tests/vllm/test_surroundings.py imports them."""
    alone = sorted(m for m in MODULES if m not in ENTRANCES and not m.startswith("qtensor.integrations."))
    assert [problem for problem in in_forks(import_alone, alone, ("torch", "numpy")) if problem] == []


def test_no_two_files_of_tests_have_one_name() -> None:
    """Modules of their names alone: a new process would import the other one, from whichever folder is first."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
