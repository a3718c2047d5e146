"""Every error is a `QTensorError`, docs/errors.md has it, and whoever lacks an optional package gets the pip line."""

from __future__ import annotations

import ast
import builtins
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import qtensor
from qtensor import (
    Coverage,
    LoadReport,
    MissingExtraError,
    QTensorError,
    Scheme,
    kernels,
    online_quant,
    quantize_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from qtensor.checkpoint import quantize_on_ray
from qtensor.cli.main import main

ROOT = Path(__file__).parents[1]


def exceptions() -> dict[str, set[str]]:
    """Every exception class that the sources define, the vLLM plugin's included, with all it derives from."""
    bases: dict[str, list[str]] = {}
    for folder in ("qtensor", "kernels", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = [ast.unparse(base).rpartition(".")[2] for base in node.bases]

    def ancestors(name: str) -> set[str]:
        return {name}.union(*map(ancestors, bases.get(name, [])))

    foreign = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    return {name: ancestors(name) for name in bases if ancestors(name) & foreign}


def test_every_error_is_a_qtensor_error():
    found = exceptions()
    assert {"ConfigError", "UnsupportedBackend", "NonFinite"} <= found.keys()
    assert [name for name, above in found.items() if "QTensorError" not in above] == []


def test_every_error_is_in_the_docs():
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    assert [name for name in exceptions() if not re.search(rf"\b{name}\b", text)] == []


def test_every_public_error_is_exported():
    found = {name for name, value in vars(qtensor.errors).items() if isinstance(value, type)}
    assert found <= set(qtensor.__all__)


@pytest.mark.parametrize(
    ("missing", "extra", "act"),
    [
        ("matplotlib", "plot", lambda folder: LoadReport().plot(folder / "x.png")),
        ("huggingface_hub", "checkpoint", lambda folder: save_checkpoint(nn.Linear(2, 2), folder / "x")),
        ("ray", "ray", lambda folder: quantize_on_ray(folder, folder / "x", "fp8")),
    ],
)
def test_a_missing_package_is_named_with_its_pip_line(tmp_path, monkeypatch, missing, extra, act):
    for module in [missing, *(name for name in sys.modules if name.startswith(missing + "."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"needs {missing}: pip install 'qtensor-online\[{extra}\]'") as found:
        act(tmp_path)
    assert isinstance(found.value, QTensorError)
    assert isinstance(found.value, ImportError)
    assert not list(tmp_path.iterdir())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith(missing) for requirement in extras[extra])


def test_the_command_says_what_its_completion_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    assert "--print-completion needs shtab: pip install 'qtensor-online[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "act",
    [
        lambda: online_quant("fp7"),
        lambda: online_quant("fp8", on_missing="ignore"),
        lambda: online_quant("fp8", on_nonfinite="ignore"),
        lambda: online_quant("fp8", progress="yes"),
        lambda: verify_checkpoint(".", workers=0),
        lambda: quantize_checkpoint(".", "no-such-folder", "fp8", workers=0),
        lambda: Scheme(kernels.MXFP4),
        lambda: Coverage((4, 4)).add(((0, 5), (0, 4))),
        lambda: Coverage((4, 4)).add_mask(torch.ones(2, 2, dtype=torch.bool).numpy()),
        lambda: kernels.quantize_activation(torch.ones(1, 128), kernels.FP8_PER_CHANNEL, backend="cuda"),
    ],
)
def test_a_bad_argument_is_a_qtensor_error(act):
    with pytest.raises(QTensorError):
        act()
