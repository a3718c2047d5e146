"""Casts, moves and memory without values, while a model is loaded: the result is a plain model's, quantized at the end.

Random programs of loads, casts, moves, to_empty, reset_parameters and deep copies run on a model inside the block, and
on a plain one. Every parameter then has the plain one's dtype, device and values; the bytes of a quantized weight are
those of `quantize(plain weight)`, or (and the report says so) of the values before a cast that came too late.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import (
    IncompleteLoadError,
    QTensor,
    WeightDtypeError,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    online_quant,
    online_reload,
    quantize,
)
from qtensor.lazy.lazy_tensor import LiveQTensor
from support.helpers import assert_oracle, same_bytes

Model = nn.Module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 8, bias=False)


CASTS: dict[str, Callable[[Model], Any]] = {
    "cpu": lambda m: m.cpu(),
    "to cpu": lambda m: m.to("cpu"),
    "float": lambda m: m.float(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
}
MODULES = ("", "up", "down", "norm")


@contextlib.contextmanager
def swapping(on: bool) -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(on)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Plain:
    """The plain model, and of each parameter: what was written, and what its units held before each late cast."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.covered = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
        self.older: dict[tuple[str, int], list[torch.Tensor]] = {}

    def write(self, name: str, where: tuple[slice, ...], value: torch.Tensor) -> None:
        self.model.get_parameter(name).data[where].copy_(value)
        self.covered[name][where] = True
        for row in range(*where[0].indices(len(self.covered[name]))):
            self.older.pop((name, row), None)

    def vacate(self, module: str) -> None:
        for name in self.below(module):
            self.covered[name].zero_()
            self.older = {key: old for key, old in self.older.items() if key[0] != name}

    def cast(self, module: str, cast: Callable[[Model], Any]) -> None:
        for name in self.below(module):
            for row, values in enumerate(self.model.get_parameter(name).data):
                if bool(self.covered[name][row].all()):
                    self.older.setdefault((name, row), []).append(values.clone())
        cast(self.model.get_submodule(module))

    def below(self, module: str) -> list[str]:
        return [name for name in self.covered if name.startswith(f"{module}." if module else "")]

    def missing(self) -> set[str]:
        return {name for name, covered in self.covered.items() if not bool(covered.all())}


def unit_is_one_of(got: QTensor, row: slice, candidates: list[torch.Tensor]) -> int | None:
    """Which of some values these rows of a weight were quantized from."""
    scheme = got.scheme
    for i, values in enumerate(candidates):
        want = quantize(values, scheme)
        ours = (got.qdata[row], got.scale[scheme.format.scale_rows(row.start, row.stop)])
        if all(same_bytes(a, b) for a, b in zip(ours, want.parts(), strict=False)):
            return i
    return None


def assert_as_plain(model: Model, plain: Plain, late: set[str]) -> None:
    """late: the weights that were cast when they were quantized, as the report has it."""
    assert [n for n, _ in model.named_parameters()] == list(plain.covered)
    for name, param in model.named_parameters():
        want = plain.model.get_parameter(name)
        assert (param.dtype, param.device, param.shape) == (want.dtype, want.device, want.shape)
        if not isinstance(param, QTensor):
            assert type(param) is nn.Parameter
            assert torch.equal(param, want)
            continue
        height, inexact = param.scheme.format.unit_rows(len(want)), False
        for first in range(0, len(want), height):
            rows = range(first, min(first + height, len(want)))
            older = [plain.older.get((name, row), []) for row in rows]
            dtypes = [values.dtype for values in older[0]]
            before = [torch.stack([old[i] for old in older]) for i in range(len(dtypes)) if all(len(o) > i for o in older)]
            found = unit_is_one_of(param, slice(rows.start, rows.stop), [want.data[rows.start : rows.stop], *before])
            assert found is not None, (name, first)
            inexact |= found > 0
        assert not inexact or name in late


def pieces(draw: Any, covered: torch.Tensor) -> list[tuple[slice, ...]]:
    """What to write next. A part of a unit that is quantized already re-opens all of it: then it is all, in pieces."""
    every = tuple(slice(0, n) for n in covered.shape)
    first = draw(st.integers(0, covered.shape[-1] - 1))
    if bool(covered.any()):
        return [(*every[:-1], slice(first, None)), (*every[:-1], slice(0, first))]
    rows = draw(st.integers(1, len(covered)))
    return [(slice(0, rows), *every[1:-1], slice(first, None))[-covered.dim() :]]


def step(draw: Any, model: Model, plain: Plain, values: torch.Generator) -> Model:
    """One step of a program, on both models."""
    kind = draw(st.sampled_from(("write", "write", "load", "cast", "cast", "empty", "meta", "reset", "copy")))
    module = draw(st.sampled_from(MODULES))
    if kind == "write":
        name = draw(st.sampled_from(sorted(plain.covered)))
        for where in pieces(draw, plain.covered[name]):
            value = torch.randn(plain.covered[name][where].shape, generator=values)
            plain.write(name, where, value)
            model.get_parameter(name).data[where].copy_(value)
    elif kind == "load":
        state = {n: torch.randn(plain.covered[n].shape, generator=values) for n in plain.below(module)}
        for name, value in state.items():
            plain.write(name, tuple(slice(0, n) for n in value.shape), value)
        with swapping(draw(st.booleans())):
            model.load_state_dict(state, strict=False)
    elif kind == "cast":
        cast = CASTS[draw(st.sampled_from(sorted(CASTS)))]
        plain.cast(module, cast)
        with swapping(draw(st.booleans())):
            cast(model.get_submodule(module))
    elif kind in ("empty", "meta"):
        plain.vacate(module)
        for m in (plain.model.get_submodule(module), model.get_submodule(module)):
            if kind == "meta":
                m.to("meta")
            m.to_empty(device="cpu")
    elif kind == "reset":
        # Of a weight that is loaded an initialiser changes nothing; a plain model has other values then.
        if not any(bool(plain.covered[name].any()) for name in plain.below(module)):
            for m in model.get_submodule(module).modules():
                if hasattr(m, "reset_parameters"):
                    m.reset_parameters()
    elif kind == "copy":
        return copy.deepcopy(model)
    return model


@settings(max_examples=150, phases=[Phase.generate])
@given(st.data(), st.sampled_from((fp8_per_channel, fp8_per_tensor, fp8_per_block)), st.booleans())
def test_any_program_ends_as_the_plain_one_quantized(data: st.DataObject, scheme: Any, constructed: bool) -> None:
    plain, values = Plain(Net()), torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    outside = None if constructed else copy.deepcopy(plain.model)
    is_copy = False
    session = online_quant(scheme) if outside is None else online_quant(scheme, outside)
    with contextlib.suppress(IncompleteLoadError), session:
        model = outside if outside is not None else Net()
        for _ in range(data.draw(st.integers(1, 8))):
            copied = step(data.draw, model, plain, values)
            if copied is not model:
                if outside is not None:
                    break  # The session is of the model it was given.
                model, is_copy = copied, True
    report = session.report()
    if missing := plain.missing():
        if is_copy:
            return  # Nobody knows of a copy that no model holds, until it is complete.
        assert report.state == "aborted"
        assert set(report.missing) == missing
        return
    assert report.state == "finished"
    assert_as_plain(model, plain, set(plain.covered) if is_copy else {la.name for la in report.layers if la.cast_from})
    for cast in data.draw(st.lists(st.sampled_from(sorted(CASTS)), max_size=2)):
        plain.cast("", CASTS[cast])
        CASTS[cast](model)
    with online_reload(model):
        model.cpu().to(device="cpu").type(model.up.weight.dtype)
        model.up.to(model.up.weight.dtype)
    assert_as_plain(model, plain, set(plain.covered))
