"""The package runs nothing that a checkpoint holds and opens no connection: held by reading its whole source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("qtensor", "kernels", "integrations") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"}
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "socket",
    "urllib",
    "http",
    "requests",
}


def findings(source: str) -> Iterator[str]:
    """What in a source could run code from outside, or talk to it. torch.load is admitted with weights_only=True."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in FORBIDDEN_CALLS or (called == "torch.load" and keywords.get("weights_only") != "True"):
                yield f"line {node.lineno}: {called}"
            if keywords.get("shell") == "True" or keywords.get("trust_remote_code") == "True":
                yield f"line {node.lineno}: {called} with {keywords}"
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (f"line {node.lineno}: import {m}" for m in modules if m.split(".")[0] in FORBIDDEN_MODULES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_code_from_outside(path: Path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "import pickle",
        "from pickle import loads",
        "eval(name)",
        "exec(code)",
        "import urllib.request",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_danger_would_be_found(source: str) -> None:
    assert list(findings(source))


def test_the_safe_form_is_admitted() -> None:
    assert list(findings("torch.load(f, weights_only=True)\nre.compile(p)")) == []
