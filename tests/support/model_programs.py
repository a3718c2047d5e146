"""Random programs of a model's life, and the machine that runs one on a quantized model and on a plain one.

Inside the block: loads, writes, casts, moves, memory without values, initialisers, merges and deep copies. After it, in
any order: casts, moves, merges, saves, deep copies, and reloads with steps of their own. Every parameter then has the
plain one's dtype, device and values; the bytes of a quantized weight are those of `quantize(plain weight)`, or (and the
report says so) of the values before a cast that came too late. A merge is arithmetic on what the weight holds.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from qtensor import (
    CheckpointError,
    IncompleteLoadError,
    QTensor,
    QTensorError,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    int4_per_group,
    load_checkpoint,
    mxfp8,
    online_quant,
    online_reload,
    quantize,
    save_checkpoint,
)

from .helpers import same_bytes

Model = nn.Module
SCHEMES = (fp8_per_channel, fp8_per_tensor, fp8_per_block, mxfp8, int4_per_group)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 8, bias=False)


Step = Callable[[Model], Any]
CASTS: dict[str, Step] = {
    "cpu": lambda m: m.cpu(),
    "to cpu": lambda m: m.to("cpu"),
    "float": lambda m: m.float(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
}
MODULES = ("", "up", "down", "norm")
MERGES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add_": lambda w, d: w.add_(d),
    "sub_": lambda w, d: w.sub_(d, alpha=2),
    "mul_": lambda w, d: w.mul_(1.5),
    "data +=": lambda w, d: w.data.add_(d),
    "a row": lambda w, d: w[1].add_(d[1]),
    "columns": lambda w, d: w.data[..., 1:3].copy_(d[..., 1:3]),
    "set item": lambda w, d: w.__setitem__((..., slice(0, 2)), d[..., :2]),
}


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

    def cast(self, module: str, cast: Step) -> None:
        for name in self.below(module):
            for row, values in enumerate(self.model.get_parameter(name).data.cpu()):
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
        ours = (got.qdata[row].cpu(), got.scale[scheme.format.scale_rows(row.start, row.stop)].cpu())
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
            assert isinstance(param, nn.Parameter)
            assert torch.equal(param.cpu(), want.cpu())
            continue
        assert type(param) is QTensor
        height, inexact, values = param.scheme.format.unit_rows(len(want)), False, want.data.cpu()
        for first in range(0, len(want), height):
            rows = range(first, min(first + height, len(want)))
            older = [plain.older.get((name, row), []) for row in rows]
            dtypes = [old.dtype for old in older[0]]
            before = [
                torch.stack([old[i] for old in older]) for i in range(len(dtypes)) if all(len(o) > i for o in older)
            ]
            found = unit_is_one_of(param, slice(rows.start, rows.stop), [values[rows.start : rows.stop], *before])
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


WHOLE_MERGES = ("add_", "sub_", "mul_", "data +=")
"""Those that a session takes for nothing else: a part that is written opens what shares its scale again."""
LOADING = ("write", "write", "load", "cast", "cast", "empty", "meta", "reset", "copy", "move", "merge")
RELOADING = ("write", "load", "cast", "merge")
FINISHED = ("cast", "move", "merge", "save", "copy", "reload", "reload")


class Life:
    """One program, as it is drawn. there: another device, where there is one."""

    def __init__(self, draw: Any, scheme: Any, there: torch.device | None) -> None:
        self.draw, self.scheme, self.there = draw, scheme, there
        self.plain, self.values = Plain(Net()), torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        self.model: Model = self.plain.model
        self.late: set[str] = set()
        self.is_copy = self.no_session = self.in_place = False

    def run(self, constructed: bool) -> None:
        outside = None if constructed else copy.deepcopy(self.plain.model)
        session = online_quant(self.scheme) if outside is None else online_quant(self.scheme, outside)
        with contextlib.suppress(IncompleteLoadError), session:
            self.model = outside if outside is not None else Net()
            for _ in range(self.draw(st.integers(1, 8))):
                before = id(self.model)
                self.step(LOADING)
                if id(self.model) != before and outside is not None:
                    self.model, self.is_copy = outside, False
                    break  # The session is of the model it was given.
        report = session.report()
        if missing := self.plain.missing():
            if self.is_copy and not any(bool(covered.any()) for covered in self.plain.covered.values()):
                return  # A copy that nobody writes to is not being loaded.
            assert report.state == "aborted"
            assert set(report.missing) == missing
            return
        assert report.state == "finished"
        self.late = {layer.name for layer in report.layers if layer.cast_from}
        assert_as_plain(self.model, self.plain, self.late)
        for _ in range(self.draw(st.integers(0, 4))):
            self.no_session, self.in_place = True, False
            self.step(FINISHED)
            assert_as_plain(self.model, self.plain, self.late)

    def step(self, kinds: tuple[str, ...]) -> None:
        """One step of a program, on both models."""
        kind = self.draw(st.sampled_from(kinds))
        module = self.draw(st.sampled_from(MODULES))
        {
            "write": self.write,
            "load": self.load,
            "cast": self.cast,
            "move": self.move,
            "empty": self.empty,
            "meta": self.empty_by_meta,
            "reset": self.reset,
            "merge": self.merge,
            "copy": self.copy,
            "save": self.save,
            "reload": self.reload,
        }[kind](module)

    def write(self, module: str) -> None:
        name = self.draw(st.sampled_from(sorted(self.plain.covered)))
        for where in pieces(self.draw, self.plain.covered[name]):
            value = torch.randn(self.plain.covered[name][where].shape, generator=self.values)
            self.plain.write(name, where, value)
            self.model.get_parameter(name).data[where].copy_(value)

    def load(self, module: str) -> None:
        plain = self.plain
        state = {n: torch.randn(plain.covered[n].shape, generator=self.values) for n in plain.below(module)}
        for name, value in state.items():
            plain.write(name, tuple(slice(0, n) for n in value.shape), value)
        with swapping(self.draw(st.booleans())):
            self.model.load_state_dict(state, strict=False)

    def cast(self, module: str) -> None:
        stays = {name: cast for name, cast in CASTS.items() if "cpu" not in name and "device" not in name}
        casts = stays if self.in_place else CASTS
        self.becomes(module, casts[self.draw(st.sampled_from(sorted(casts)))])

    def move(self, module: str) -> None:
        if self.there is not None:
            there = self.draw(st.sampled_from([self.there, torch.device("cpu")]))
            dtype = self.draw(st.sampled_from([None, torch.float16, torch.bfloat16]))
            self.becomes(module, lambda m: m.to(there) if dtype is None else m.to(there, dtype))

    def becomes(self, module: str, how: Step) -> None:
        self.plain.cast(module, how)
        if self.no_session:  # and no report
            self.late |= set(self.plain.covered)
        with swapping(self.draw(st.booleans())):
            how(self.model.get_submodule(module))

    def empty_by_meta(self, module: str) -> None:
        for m in (self.plain.model, self.model):
            m.get_submodule(module).to("meta")
        self.empty(module)

    def empty(self, module: str) -> None:
        where = self.draw(st.sampled_from([self.there or "cpu", "cpu"]))
        self.plain.vacate(module)
        for m in (self.plain.model, self.model):
            m.get_submodule(module).to_empty(device=where)

    def reset(self, module: str) -> None:
        """Of a weight that is loaded an initialiser changes nothing; a plain model has other values then."""
        if not any(bool(self.plain.covered[name].any()) for name in self.plain.below(module)):
            for m in self.model.get_submodule(module).modules():
                if hasattr(m, "reset_parameters"):
                    m.reset_parameters()

    def merge(self, module: str) -> None:
        """Arithmetic on the values that the weight holds, be they exact or quantized."""
        name = self.draw(st.sampled_from(sorted(self.plain.covered)))
        if not bool(self.plain.covered[name].all()):
            return
        ours, theirs = self.model.get_parameter(name), self.plain.model.get_parameter(name)
        held = ours.data.to("cpu", copy=True)
        held = held.dequantize() if isinstance(held, QTensor) else held
        delta = torch.randn(held.shape, generator=self.values).to(held.dtype) / 8
        # A part of a weight on the second device, which is a tensor class, can only be read.
        kinds = sorted(MERGES) if self.no_session and ours.device.type == "cpu" else WHOLE_MERGES
        how = MERGES[self.draw(st.sampled_from(kinds))]
        with torch.no_grad():
            how(held, delta)
            how(ours, delta.to(ours.device))
        self.plain.write(name, tuple(slice(0, n) for n in theirs.shape), held.to(theirs.device))

    def copy(self, module: str) -> None:
        if all(p.device.type == "cpu" for p in self.plain.model.parameters()):
            self.model, self.is_copy = copy.deepcopy(self.model), True

    def save(self, module: str) -> None:
        """By torch.save, or to a folder, and into another model."""
        if any(p.device.type != "cpu" for p in self.model.parameters()):
            return
        fresh = Net()
        if self.draw(st.booleans()):
            file = io.BytesIO()
            torch.save(self.model.state_dict(), file)
            file.seek(0)
            fresh.load_state_dict(torch.load(file), assign=True)
            fresh.requires_grad_(False)  # PyTorch has them as those of the fresh model; who trains cannot merge.
        else:
            for name, param in self.plain.model.named_parameters():
                fresh.get_parameter(name).data = torch.empty_like(param)
            with tempfile.TemporaryDirectory() as folder:
                if self.scheme.format.granularity == "group":
                    with pytest.raises(CheckpointError, match="has no short ones"):
                        save_checkpoint(self.model, folder)
                    return
                save_checkpoint(self.model, folder)
                load_checkpoint(fresh, folder)
        self.model = fresh

    def reload(self, module: str) -> None:
        self.no_session, self.in_place = False, True
        with online_reload(self.model, atomic=self.draw(st.booleans())) as session:
            if self.there is not None and self.draw(st.booleans()):
                here = next(self.model.parameters()).device
                other = torch.device("cpu") if here == self.there else self.there
                with pytest.raises(QTensorError, match="cannot be moved"):
                    self.model.to(other)
            for _ in range(self.draw(st.integers(0, 4))):
                self.step(RELOADING)
        self.late |= {layer.name for layer in session.report().layers if layer.cast_from}
