"""The table of rooms in docs/design.md is the order of the house: every file is in it, and imports only go up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = {
    "qtensor": ROOT / "qtensor",
    "qtensor.kernels": ROOT / "kernels",
    "qtensor.integrations": ROOT / "integrations",
}
ENTRANCE = "qtensor"
"""The package itself: it gathers what users import, from everywhere, and has the version."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in PLACES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def rooms() -> list[list[str]]:
    """The rows of the table, each a list of files and folders."""
    table = (ROOT / "docs/design.md").read_text(encoding="utf-8").partition("## Rooms")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return [re.findall(r"`(\w+(?:\.py|/))`", row) for row in rows]


def room_of(module: str) -> str:
    """What the table calls the module: a folder, or a file."""
    name = module.split(".")[1]
    return f"{name}/" if any(m.startswith(f"qtensor.{name}.") for m in MODULES) else f"{name}.py"


def imported(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, in functions too; not what only type checkers see."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - max(node.level - 1, 0)] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        yield from (name for name in names if name in MODULES and name != ENTRANCE)


MODULES = modules()


def test_every_file_is_in_one_room() -> None:
    listed = [name for row in rooms() for name in row]
    assert sorted(listed) == sorted({room_of(m) for m in MODULES if m != ENTRANCE})


def test_imports_go_up_the_table() -> None:
    height = {name: i for i, row in enumerate(rooms()) for name in row}
    down = [
        f"{module} imports {other}"
        for module in MODULES
        if module != ENTRANCE
        for other in imported(module)
        if height[room_of(other)] > height[room_of(module)]
    ]
    assert down == []
