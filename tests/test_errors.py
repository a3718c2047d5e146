"""Every error is a `QTensorError`, docs/errors.md has it, and whoever lacks an optional package gets the pip line."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qtensor
from qtensor import (
    ConfigError,
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


# Options of every function --------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8))


def loaded() -> nn.Module:
    model = small()
    with online_quant("fp8", model):
        model.load_state_dict(small().state_dict())
    return model


FUNCTIONS: dict[Callable[..., Any], Callable[[Path], tuple[Any, ...]]] = {
    qtensor.online_quant: lambda folder: ("fp8", small()),
    qtensor.online_reload: lambda folder: (loaded(),),
    qtensor.quantize: lambda folder: (torch.ones(8, 8), "fp8"),
    qtensor.load_checkpoint: lambda folder: (small(), save_checkpoint(small(), folder / "source")),
    qtensor.save_checkpoint: lambda folder: (small(), folder / "saved"),
    qtensor.verify_checkpoint: lambda folder: (save_checkpoint(small(), folder / "source"),),
    qtensor.quantize_checkpoint: lambda folder: (
        save_checkpoint(small(), folder / "source"),
        folder / "converted",
        "fp8",
    ),
    qtensor.QTensorConfig: lambda folder: (),
}
"""And the arguments that have no default: they are the business of other tests."""
WRONG = (object(), -1.5, 0, "nonsense", [object()], {"a": object()}, {3: 4}, b"bytes")


def options() -> list[tuple[Callable[..., Any], str]]:
    return [
        (function, name)
        for function in FUNCTIONS
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
        and name != "model"
        and (function, name) != (qtensor.online_quant, "scheme")  # It is among the arguments above.
    ]


@pytest.mark.parametrize(("function", "option"), options(), ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_an_option_that_cannot_be_is_a_config_error(tmp_path, function, option):
    """`object()` can be none; of the others some are good for something."""
    for i, value in enumerate(WRONG):
        arguments = FUNCTIONS[function](tmp_path / str(i))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made, said = function(*arguments, **{option: value}), ""
            except ConfigError as error:
                made, said = None, str(error)
        assert option in said or repr(value) in said if said else i > 0, f"{option}={value!r}: {said}"
        if hasattr(made, "abort"):
            made.abort()
