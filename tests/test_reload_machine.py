"""Reloads as a state machine: any sequence of writes, duplicates, faults, interrupts, aborts, commits, reads, products,
on two models whose sessions overlap as they like, checked after every step against what the weights must be."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qtensor import (
    IncompleteLoadError,
    NonFiniteWeightError,
    QTensorError,
    online_reload,
    quantize,
    write_low_rank,
)
from support.helpers import assert_no_hooks
from support.interrupts import InOperation
from support.programs import SCHEMES, largest_error
from support.refits import by_offsets, packed
from support.reloaded import MODES, SHAPES, Subject

subjects = st.tuples(
    st.sampled_from(SCHEMES), st.sampled_from(SHAPES), st.sampled_from(list(MODES)), st.integers(0, 2**20)
)


class Reloading(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.models: list[Subject] = []

    @initialize(made=st.lists(subjects, min_size=1, max_size=2))
    def load(self, made: list[tuple[Any, ...]]) -> None:
        self.models = [Subject(*what) for what in made]

    @property
    def open(self) -> list[Subject]:
        return [m for m in self.models if m.session is not None]

    @property
    def writable(self) -> list[Subject]:
        """Those whose weight the session is for."""
        return [m for m in self.open if m.takes_weight]

    @property
    def closed(self) -> list[Subject]:
        return [m for m in self.models if m.session is None]

    # Rules

    @precondition(lambda self: self.closed)
    @rule(
        data=st.data(),
        on_missing=st.sampled_from(["keep", "error", "zero"]),
        only=st.sampled_from([None, None, None, "weight", "bias"]),
    )
    def begin(self, data: st.DataObject, on_missing: str, only: str | None) -> None:
        data.draw(st.sampled_from(self.closed)).begin(on_missing, only)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def begin_twice(self, data: st.DataObject) -> None:
        with contextlib.suppress(QTensorError):
            online_reload(data.draw(st.sampled_from(self.open)).model)
            raise AssertionError("two sessions on one model")

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def write_units(self, data: st.DataObject) -> None:
        """Whole units, at any time, as often as one likes: the last write wins."""
        it = data.draw(st.sampled_from(self.writable))
        where = it.units(data)
        it.write(where, it.values(it.full[where].shape))

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def begin_units(self, data: st.DataObject) -> None:
        """Columns of units that nobody has written to; the rest may come later, or never."""
        it = data.draw(st.sampled_from(self.writable))
        where = it.units(data)
        if not it.seen[where].any():
            cut = data.draw(st.integers(1, it.full.shape[-1] - 1))
            it.partial.append((*where, slice(cut, None)))
            begun = (*where, slice(None, cut))
            it.write(begun, it.values(it.full[begun].shape))

    @precondition(lambda self: any(it.partial for it in self.writable))
    @rule(data=st.data())
    def complete_units(self, data: st.DataObject) -> None:
        it = data.draw(st.sampled_from([it for it in self.writable if it.partial]))
        where = it.partial.pop()
        if not it.seen[where].any():
            it.write(where, it.values(it.full[where].shape))

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """A duplicate of units that were written whole."""
        it = data.draw(st.sampled_from(self.writable))
        where = it.units(data)
        if it.seen[where].all():
            it.write(where, it.full[where].clone())

    @precondition(lambda self: self.writable)
    @rule(data=st.data(), bad=st.sampled_from([False, False, True]))
    def write_bucket(self, data: st.DataObject, bad: bool) -> None:
        """What a trainer packs: several parts in one flat buffer of bytes, unpacked by views, which is used again. In a
        bad one a part has an infinity: the parts before it are not taken either."""
        it = data.draw(st.sampled_from(self.writable))
        assert it.session is not None
        places = [it.units(data) for _ in range(data.draw(st.integers(1, 3)))]
        parts = {str(n): it.values(it.full[where].shape) for n, where in enumerate(places)}
        spoilt = data.draw(st.integers(0, len(places) - 1)) if bad else -1
        if bad:
            parts[str(spoilt)][..., 0, -1] = float("inf")
        bucket = packed(parts)
        with contextlib.suppress(NonFiniteWeightError), it.session if bad else contextlib.nullcontext():
            for n, (where, (_, part)) in enumerate(zip(places, by_offsets(bucket, parts), strict=True)):
                if n != spoilt:
                    it.note(where, part.clone())
                it.param.data[where].copy_(part)
            assert not bad
        bucket.fill_(0xFF)
        if bad:
            it.over(committed=False)

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def write_update(self, data: st.DataObject) -> None:
        """A low-rank update of some units, of numbers whose sums are exact, and no zeros, whose signs are chance."""
        it = data.draw(st.sampled_from(self.writable))
        where = it.units(data)
        rows, cols = it.full[where].shape
        base = it.values((rows, cols)).round() * 2 + 1
        b, a = (it.values(shape).round() for shape in ((rows, 2), (2, cols)))
        it.note(where, (base.float() + 0.5 * (b.float() @ a.float())).bfloat16())
        write_low_rank(it.param.data[where], base, b, a, scaling=0.5)

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def write_quantized(self, data: st.DataObject) -> None:
        """All of a weight, quantized by the trainer already: its bytes are taken."""
        it = data.draw(st.sampled_from(self.writable))
        source = it.values(it.full.shape)
        it.note((...,), source)
        it.param.data.copy_(quantize(source, it.scheme))

    @precondition(lambda self: self.writable)
    @rule(data=st.data(), of=st.sampled_from([torch.bfloat16, torch.float32]))
    def write_all(self, data: st.DataObject, of: torch.dtype) -> None:
        """All of a weight, or a stack, in one call."""
        it = data.draw(st.sampled_from(self.writable))
        source = torch.randn(it.full.shape, generator=it.random).to(of)
        it.note((...,), source)
        it.param.data.copy_(source)
        source.fill_(float("nan"))

    @precondition(lambda self: any(it.only for it in self.open))
    @rule(data=st.data(), swallowed=st.booleans())
    def write_excluded(self, data: st.DataObject, swallowed: bool) -> None:
        """A write to what a selective reload is not for ends it, at once or when its end comes."""
        it = data.draw(st.sampled_from([it for it in self.open if it.only]))
        assert it.session is not None
        param = it.bias if it.takes_weight else it.param
        try:
            with it.session, contextlib.suppress(QTensorError if swallowed else ()):
                param.data.copy_(it.values(param.shape))
            raise AssertionError("a write to another weight was accepted")
        except QTensorError as error:
            assert "only" in str(error)  # noqa: PT017
        it.over(committed=False)

    @precondition(lambda self: any(it.takes_bias for it in self.open))
    @rule(data=st.data())
    def write_bias(self, data: st.DataObject) -> None:
        it = data.draw(st.sampled_from([it for it in self.open if it.takes_bias]))
        it.new_bias = it.values(it.bias.shape)
        it.bias.data.copy_(it.new_bias)
        if it.mode == "per_weight":
            it.expected_bias = it.new_bias

    @precondition(lambda self: self.writable)
    @rule(data=st.data(), fault=st.sampled_from(["nan", "shape", "loader"]))
    def fail(self, data: st.DataObject, fault: str) -> None:
        """A write that fails ends the block; what that leaves is what an abort leaves."""
        it = data.draw(st.sampled_from(self.writable))
        where = it.units(data)
        source = it.values(it.full[where].shape)
        assert it.session is not None
        try:
            with it.session:
                if fault == "loader":
                    it.param.data[where].copy_(source)
                    raise KeyboardInterrupt
                if fault == "nan":
                    source[..., -1, -1] = float("nan")
                it.param.data[where].copy_(source if fault == "nan" else source[..., :-1])
                raise AssertionError("a bad source was accepted")
        except (QTensorError, KeyboardInterrupt):
            pass
        if fault == "loader":
            it.note(where, source)
        it.over(committed=False)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), step=st.sampled_from(["write", "finish", "commit", "abort"]), n=st.integers(1, 30))
    def interrupt(self, data: st.DataObject, step: str, n: int) -> None:
        """Ctrl-C in the n-th torch operation of a step, or right after it. It ends the session."""
        it = data.draw(st.sampled_from(self.open))
        assert it.session is not None
        with contextlib.suppress(KeyboardInterrupt, IncompleteLoadError, UserWarning), it.session:
            if step == "write" and it.takes_weight:
                where = it.units(data)
                source = it.values(it.full[where].shape)
                it.full[where], it.seen[where] = source, True
                with InOperation(n, KeyboardInterrupt):
                    it.param.data[where].copy_(source)
                raise KeyboardInterrupt
            if step != "abort" and it.session.options.on_missing == "zero":
                it.zero_the_rest()
            work = it.session._work
            late = InOperation(n % 5 + 1, KeyboardInterrupt, when=lambda: not work.undecided)
            with late if step == "commit" else InOperation(n, KeyboardInterrupt):
                it.session.abort() if step == "abort" else it.session.finish()
        it.stopped()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        it = data.draw(st.sampled_from(self.open))
        assert it.session is not None
        it.session.abort()
        it.over(committed=False)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        it = data.draw(st.sampled_from(self.open))
        assert it.session is not None
        if it.session.options.on_missing == "error" and not it.is_complete:
            with contextlib.suppress(IncompleteLoadError):
                it.session.finish()
                raise AssertionError("an incomplete reload was committed")
            return it.over(committed=False)
        if it.session.options.on_missing == "zero":
            it.zero_the_rest()
        with contextlib.suppress(UserWarning):
            it.session.finish()
        return it.over(committed=True)

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def read_back(self, data: st.DataObject) -> None:
        """A loader's view shows what was written, or else what the weight was."""
        it = data.draw(st.sampled_from(self.writable))
        where = it.units(data)
        got = it.param.data[where].clone().float()
        if it.seen[where].all() or not it.seen[where].any():
            want = it.full[where].float()
            assert (got - want).abs().max() <= largest_error(it.scheme) * want.abs().max() + 0.02

    # What must hold

    @invariant()
    def all_are_what_they_must_be(self) -> None:
        for it in self.models:
            it.check()
        if not self.open:
            assert_no_hooks()

    def teardown(self) -> None:
        for it in self.open:
            assert it.session is not None
            it.session.abort()


Reloading.TestCase.settings = settings(
    max_examples=1000 if os.environ.get("QTENSOR_ENDURANCE") else 30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestReloading = Reloading.TestCase
