"""Reloads as a state machine: any sequence of writes, duplicates, faults, aborts, commits, reads and products, checked
after every step against what the weights must be."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_reload import MODES

from qtensor import IncompleteLoadError, QTensor, QTensorError, online_quant, online_reload, quantize
from qtensor.sessions.reload import ReloadSession
from support.helpers import assert_no_hooks, copy_unit, holder, same_bytes
from support.programs import LARGEST_ERROR, SCHEMES

SHAPES = [(40, 24), (300, 40), (2, 150, 24)]


class Reloading(RuleBasedStateMachine):
    """One weight and its bias. `committed` holds what the weight must be now, as (values, scales) of each unit;
    `full` the high-precision values that the open session has been given, `seen` where it has."""

    session: ReloadSession | None = None

    @initialize(
        scheme=st.sampled_from(SCHEMES),
        shape=st.sampled_from(SHAPES),
        mode=st.sampled_from(list(MODES)),
        seed=st.integers(0, 2**20),
    )
    def load(self, scheme: Any, shape: tuple[int, ...], mode: str, seed: int) -> None:
        self.scheme, self.mode = scheme, mode
        self.random = torch.Generator().manual_seed(seed)
        first = self.values(shape)
        self.model, name = holder(first)
        self.model.register_parameter("bias", torch.nn.Parameter(torch.zeros(shape[-2]).bfloat16()))
        with online_quant(scheme, self.model):
            getattr(self.model, name).data.copy_(first)
            self.model.bias.data.copy_(torch.ones(shape[-2]))
        self.param, self.bias = getattr(self.model, name), self.model.bias
        self.expected, self.expected_bias = quantize(first, scheme), torch.ones(shape[-2]).bfloat16()
        self.addresses = [self.param.qdata.data_ptr(), self.param.scale.data_ptr(), self.bias.data_ptr()]
        self.unit = scheme.format.unit_rows(shape[-2])

    def values(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.random).bfloat16()

    # Rules

    @precondition(lambda self: self.session is None)
    @rule(on_missing=st.sampled_from(["keep", "error", "zero"]))
    def begin(self, on_missing: str) -> None:
        self.session = online_reload(self.model, on_missing=on_missing, assert_identity=True, **MODES[self.mode])  # type: ignore[arg-type]
        self.full = self.expected.dequantize().clone()
        self.seen = torch.zeros(self.full.shape, dtype=torch.bool)
        self.partial: list[tuple[Any, ...]] = []
        self.new_bias: torch.Tensor | None = None

    @precondition(lambda self: self.session is not None)
    @rule()
    def begin_twice(self) -> None:
        with contextlib.suppress(QTensorError):
            online_reload(self.model)
            raise AssertionError("two sessions on one model")

    @precondition(lambda self: self.session is not None)
    @rule(data=st.data())
    def write_units(self, data: st.DataObject) -> None:
        """Whole units, at any time, as often as one likes: the last write wins."""
        self.write(self.units(data), self.values)

    @precondition(lambda self: self.session is not None)
    @rule(data=st.data())
    def begin_units(self, data: st.DataObject) -> None:
        """Columns of units that nobody has written to; the rest may come later, or never."""
        where = self.units(data)
        if not self.seen[where].any():
            cut = data.draw(st.integers(1, self.full.shape[-1] - 1))
            self.partial.append((*where, slice(cut, None)))
            self.write((*where, slice(None, cut)), self.values)

    @precondition(lambda self: self.session is not None and self.partial)
    @rule()
    def complete_units(self) -> None:
        where = self.partial.pop()
        if not self.seen[where].any():
            self.write(where, self.values)

    @precondition(lambda self: self.session is not None)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """A duplicate of units that were written whole."""
        where = self.units(data)
        if self.seen[where].all():
            self.write(where, lambda shape: self.full[where].clone())

    @precondition(lambda self: self.session is not None)
    @rule()
    def write_bias(self) -> None:
        self.new_bias = self.values(self.bias.shape)
        self.bias.data.copy_(self.new_bias)
        if self.mode == "per_weight":
            self.expected_bias = self.new_bias

    @precondition(lambda self: self.session is not None)
    @rule(data=st.data(), fault=st.sampled_from(["nan", "shape", "loader"]))
    def fail(self, data: st.DataObject, fault: str) -> None:
        """A write that fails ends the block; what that leaves is what an abort leaves."""
        assert self.session is not None
        where = self.units(data)
        source = self.values(self.full[where].shape)
        try:
            with self.session:
                if fault == "loader":
                    self.param.data[where].copy_(source)
                    raise KeyboardInterrupt
                if fault == "nan":
                    source[..., -1, -1] = float("nan")
                self.param.data[where].copy_(source if fault == "nan" else source[..., :-1])
                raise AssertionError("a bad source was accepted")
        except (QTensorError, KeyboardInterrupt):
            pass
        if fault == "loader":
            self.note(where, source)
        self.over(committed=False)

    @precondition(lambda self: self.session is not None)
    @rule()
    def abort(self) -> None:
        assert self.session is not None
        self.session.abort()
        self.over(committed=False)

    @precondition(lambda self: self.session is not None)
    @rule()
    def finish(self) -> None:
        assert self.session is not None
        if self.session.options.on_missing == "error" and not (self.seen.all() and self.new_bias is not None):
            with contextlib.suppress(IncompleteLoadError):
                self.session.finish()
                raise AssertionError("an incomplete reload was committed")
            return self.over(committed=False)
        if self.session.options.on_missing == "zero":
            self.full[~self.seen] = 0
            self.seen[...] = True
            self.new_bias = torch.zeros_like(self.expected_bias) if self.new_bias is None else self.new_bias
        with contextlib.suppress(UserWarning):
            self.session.finish()
        return self.over(committed=True)

    @precondition(lambda self: self.session is not None)
    @rule(data=st.data())
    def read_back(self, data: st.DataObject) -> None:
        """A loader's view shows what was written, or else what the weight was."""
        where = self.units(data)
        got = self.param.data[where].clone().float()
        if self.seen[where].all() or not self.seen[where].any():
            want = self.full[where].float()
            assert (got - want).abs().max() <= LARGEST_ERROR[self.scheme.format.element] * want.abs().max() + 0.02

    # What must hold

    @invariant()
    def live_values_are_the_committed_ones(self) -> None:
        if not hasattr(self, "param") or (self.session is not None and self.mode == "undo"):
            return  # an undo log writes in place; its promise is for the end
        assert all(map(same_bytes, self.param.parts(), self.expected.parts()))
        bias = self.bias.clone() if self.session is not None else self.bias
        assert torch.equal(bias, self.expected_bias)
        if self.param.dim() == 2:
            x = torch.ones(2, self.param.shape[1]).bfloat16()
            weight_only = self.expected.scheme.format
            assert weight_only == self.param.scheme.format
            assert torch.equal(torch.nn.functional.linear(x, self.param), torch.nn.functional.linear(x, self.expected))

    @invariant()
    def objects_and_addresses_stay(self) -> None:
        if hasattr(self, "param") and self.session is None:
            assert type(self.param) is QTensor
            assert type(self.bias) is torch.nn.Parameter
            now = [self.param.qdata.data_ptr(), self.param.scale.data_ptr(), self.bias.data_ptr()]
            assert now == self.addresses
            assert_no_hooks()

    def teardown(self) -> None:
        if self.session is not None:
            self.session.abort()

    # The oracle

    def units(self, data: st.DataObject) -> tuple[Any, ...]:
        """An index of some whole units: a run of rows, of one expert."""
        *lead, rows, _ = self.full.shape
        count = -(-rows // self.unit)
        a = data.draw(st.integers(0, count - 1))
        b = data.draw(st.integers(a + 1, count))
        run = slice(a * self.unit, min(b * self.unit, rows))
        return (data.draw(st.integers(0, lead[0] - 1)), run) if lead else (run,)

    def write(self, where: tuple[Any, ...], make: Any) -> None:
        source = make(self.full[where].shape)
        self.note(where, source)
        self.param.data[where].copy_(source)
        source.fill_(float("nan"))
        if self.mode == "per_weight":
            self.commit(require_whole=True)

    def note(self, where: tuple[Any, ...], source: torch.Tensor) -> None:
        self.full[where], self.seen[where] = source, True
        if self.mode == "per_weight":
            self.commit(require_whole=True)

    def over(self, committed: bool) -> None:
        self.session = None
        if committed:
            self.commit(require_whole=False)
            self.expected_bias = self.expected_bias if self.new_bias is None else self.new_bias

    def commit(self, require_whole: bool) -> None:
        """Units that were written to become the quantized `full`; all of a matrix, or (require_whole) none of it."""
        new = quantize(self.full, self.scheme)
        rows = self.full.shape[-2]
        matrices = self.seen.reshape(-1, *self.full.shape[-2:])
        for e, seen in enumerate(matrices):
            if require_whole and not seen.all():
                continue
            for first in range(0, rows, self.unit):
                last = min(first + self.unit, rows)
                if seen[first:last].any():
                    copy_unit(self.expected, new, e if self.full.dim() == 3 else None, first, last)


Reloading.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestReloading = Reloading.TestCase
