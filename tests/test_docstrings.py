"""Public docstrings are read by a standard parser (Google style), and name the arguments and errors that there are."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qtensor

griffe = pytest.importorskip("griffe", reason="griffe comes with the docs extra")

API = (Path(__file__).parents[1] / "docs/api.md").read_text(encoding="utf-8")
PACKAGES = ("qtensor", "qtensor.checkpoint", "qtensor.convert", "qtensor.kernels", "qtensor.integrations.vllm")


def public() -> Iterator[tuple[str, Any]]:
    """Every public function and class, and the methods that the API page shows, by a name for people."""
    seen = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            found = getattr(module, name)
            if (inspect.isclass(found) or inspect.isfunction(found)) and id(found) not in seen:
                seen.add(id(found))
                yield f"{package}.{name}", found
    for name, members in re.findall(r"^::: qtensor\.(\w+)\n    options:\n      members: \[(.*)\]$", API, re.MULTILINE):
        for member in filter(None, members.split(", ")):
            found = inspect.getattr_static(getattr(qtensor, name), member)
            if inspect.isfunction(found):
                yield f"qtensor.{name}.{member}", found


PUBLIC = dict(public())


def sections(found: Any) -> dict[str, Any]:
    text = inspect.getdoc(found) or ""
    parsed = griffe.Docstring(text).parse("google", warnings=True, warn_unknown_params=False)
    return {section.kind.value: section.value for section in parsed}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_standard_parser_reads_it(name: str, caplog: pytest.LogCaptureFixture) -> None:
    found = PUBLIC[name]
    assert inspect.getdoc(found), f"{name} has no docstring"
    with caplog.at_level(logging.WARNING):
        parts = sections(found)
    # A docstring that is parsed alone has no signature to take types from.
    told = [r.getMessage() for r in caplog.records if "No type or annotation" not in r.getMessage()]
    assert told == []
    assert "text" in parts


@pytest.mark.parametrize("name", [n for n, f in PUBLIC.items() if inspect.isfunction(f)])
def test_arguments_are_those_of_the_signature(name: str) -> None:
    arguments = [p for p in inspect.signature(PUBLIC[name]).parameters if p != "self"]
    documented = [p.name for p in sections(PUBLIC[name]).get("parameters", ())]
    # One argument may be told in the sentence; where there is a list it is whole.
    if documented or len(arguments) > 1:
        assert documented == arguments


@pytest.mark.parametrize("name", [n for n, f in PUBLIC.items() if inspect.isfunction(f)])
def test_errors_are_under_raises(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    raised = {r.annotation for r in sections(PUBLIC[name]).get("raises", ())}
    errors = {n for n in dir(qtensor.errors) if n.endswith("Error")} | {"UnsupportedBackend", "NonFinite"}
    assert raised <= errors | {"RuntimeError"}
    before = text.partition("Raises:")[0]
    assert "Raises" not in before, "errors belong under Raises:"


def test_the_rules_notice() -> None:
    """The rules above, on a docstring that breaks them."""

    def wrong(a: int, b: int) -> None:
        """Does it.

        Args:
            a: One of them.
            c: It is not there.
        """

    documented = [p.name for p in sections(wrong)["parameters"]]
    assert documented != list(inspect.signature(wrong).parameters)
