"""What a caller has set for the whole process or block changes no result: engines load models under
`set_default_dtype(bfloat16)`, inside `with torch.device(...)`, in inference mode, with one thread."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtensor import Scheme, load_checkpoint, online_quant, online_reload, quantize, save_checkpoint
from qtensor.schemes.scheme import SCHEMES
from support.helpers import assert_oracle

ROOT = Path(__file__).parents[1]
FACTORIES = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "randn",
    "scalar_tensor",
    "tensor",
    "zeros",
}


@contextmanager
def setting(read: Callable[[], Any], change: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = read()
    change(value)
    try:
        yield
    finally:
        change(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def deterministic() -> AbstractContextManager[None]:
    """New memory is filled with NaN, too."""
    return setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "one thread": lambda: setting(torch.get_num_threads, torch.set_num_threads, 1),
    "deterministic": deterministic,
}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 96, bias=False, dtype=torch.bfloat16, device="cpu"))


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("scheme", dict.fromkeys(SCHEMES.values()), ids=lambda s: s.name)
def test_what_a_caller_has_set_changes_no_result(default: str, scheme: Scheme, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(96, 256, generator=generator).bfloat16() for _ in range(2))
    x = torch.randn(3, 256, generator=generator).bfloat16()
    expected = quantize(old, scheme)
    product = nn.functional.linear(x, expected)
    other = model()
    with DEFAULTS[default](), torch.no_grad():
        with online_quant(scheme, measure_sqnr=True) as session:
            staged, whole, filled = model(), model(), model()
            for columns in (slice(0, 77), slice(77, 256)):
                staged[0].weight[:, columns].copy_(old[:, columns])
            whole[0].weight.copy_(old)
            filled[0].weight.fill_(0.5)
        for given in (staged[0].weight, whole[0].weight):
            assert_oracle(given, old, scheme)
            assert torch.equal(given.dequantize(), expected.dequantize())
        assert_oracle(filled[0].weight, torch.full_like(old, 0.5), scheme)
        assert torch.equal(whole(x), product)
        save_checkpoint(whole, tmp_path)
        load_checkpoint(other, tmp_path)
        assert torch.equal(other(x), product)
        with online_reload(whole):
            whole[0].weight.copy_(new)
    assert all(row.sqnr > 10 for row in session.report().layers)
    assert_oracle(whole[0].weight, new, scheme)


def test_every_new_tensor_names_its_device_and_dtype() -> None:
    silent = []
    for path in sorted(p for top in ("kernels", "qtensor", "integrations") for p in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
                made, given = ast.unparse(node.func).removeprefix("torch."), {k.arg for k in node.keywords}
                if made in FACTORIES and not {"device", "dtype"} <= given:
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert silent == []
