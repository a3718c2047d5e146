"""Any program of parts that arrive: orders, slices, repetitions, stacks, faults. The result is that of the matrix
decoded as a whole and quantized, byte for byte; or, where it is moved, the very numbers that the source has."""

from __future__ import annotations

import contextlib
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtensor import CheckpointError, IncompleteLoadError, QTensorError, WeightDtypeError, online_quant, quantize
from qtensor.sources import families
from support.arriving import NAMES, assert_arrived, expected_outcome, layer, outcome, slow_data
from support.helpers import same_bytes
from support.sources import FORMS, Tensors, source_of, specs_of, whole


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy[list[tuple[tuple[int, int], ...]]]:
    """A part cut along one of its dimensions, anywhere."""
    if not shape or shape == (1,):
        return st.just([tuple((0, n) for n in shape)])

    def cut(drawn: tuple[int, list[int]]) -> list[tuple[tuple[int, int], ...]]:
        dim, cuts = drawn
        edges = sorted({0, shape[dim], *(c for c in cuts if c < shape[dim])})
        rest = [(0, n) for n in shape]
        return [(*rest[:dim], (a, b), *rest[dim + 1 :]) for a, b in pairwise(edges)]

    cuts = st.lists(st.integers(1, max(shape)), max_size=3)
    return st.tuples(st.integers(0, len(shape) - 1), cuts).map(cut)


def all_of(part: torch.Tensor) -> st.SearchStrategy[list[tuple[tuple[int, int], ...]]]:
    return st.just([tuple((0, n) for n in part.shape)])


@slow_data
@given(st.data(), st.sampled_from(sorted(FORMS)), st.sampled_from(NAMES))
def test_any_order_of_any_slices_equals_the_oracle(data: st.DataObject, form: str, scheme: str) -> None:
    """And the other way round: nothing is complete before all of it came."""
    multiple, even = FORMS[form].multiple, FORMS[form].rows
    rows, cols = even * data.draw(st.integers(1, 300 // even)), multiple * data.draw(st.integers(1, 300 // multiple))
    parts = FORMS[form].parts(rows, cols, data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    # A text of unknown length comes whole.
    pieces = [
        (n, b) for n, t in parts.items() for b in data.draw(boxes(tuple(t.shape)) if "state" not in n else all_of(t))
    ]
    program = data.draw(st.permutations(pieces))
    lost = data.draw(st.none() | st.sampled_from(pieces))
    # Of the largest part, what comes again after its unit is whole opens the unit again; the others stay held.
    largest = max(parts, key=lambda name: parts[name].numel())
    small_pieces = [piece for piece in program[:-1] if piece[0] != largest]
    if lost is None and small_pieces:
        program = [*data.draw(st.lists(st.sampled_from(small_pieces), max_size=2)), *program]
    model = layer(rows, cols, dtype)
    session = online_quant(scheme, model, source=FORMS[form].config)
    incoming = session._work.incoming.of(model.weight._armed)

    def send(piece: Any) -> None:
        name, box = piece
        given = parts[name][tuple(slice(*span) for span in box)].clone()
        incoming.write(name, given, box, tuple(parts[name].shape))
        given.reshape(-1).view(torch.uint8).fill_(0x55)

    def run() -> None:
        with session:
            for piece in (p for p in program if p != lost):
                send(piece)

    if lost is None:
        run()
        small = rows <= 128 or cols <= 128  # Blocks of one column or row are per tensor, or channel, as well.
        assert small or outcome(session) == expected_outcome(form, scheme)
        assert_arrived(model.weight, parts, outcome(session))
        assert session.report().timeline[-1].staged_bytes == 0
    else:
        with pytest.raises((IncompleteLoadError, CheckpointError, WeightDtypeError), match=r"^weight: "):
            run()


@slow_data
@given(st.data(), st.sampled_from(sorted(FORMS)), st.sampled_from(NAMES))
def test_a_second_version_wins(data: st.DataObject, form: str, scheme: str) -> None:
    """Law 3: parts of another version may have come before, as long as all of the last one comes again."""
    even = FORMS[form].rows
    rows, cols = even * data.draw(st.integers(1, 200 // even)), 32 * data.draw(st.integers(1, 5))
    stale, parts = (FORMS[form].parts(rows, cols, seed) for seed in (1, 2))
    model = layer(rows, cols)
    with online_quant(scheme, model, source=FORMS[form].config) as session:
        incoming = session._work.incoming.of(model.weight._armed)
        for name in data.draw(st.permutations(sorted(stale))):
            incoming.write(name, stale[name])
        for name in data.draw(st.permutations(sorted(parts))):
            incoming.write(name, parts[name])
    assert_arrived(model.weight, parts, outcome(session))


@slow_data
@given(st.data(), st.lists(st.sampled_from(sorted(FORMS)), min_size=1, max_size=3), st.sampled_from(NAMES))
def test_what_is_held_is_the_bytes_of_units_that_are_not_whole(
    data: st.DataObject, forms: list[str], scheme: str
) -> None:
    """Of several weights whose parts come in any order, as they may lie in a file: values that met their scales are let
    go of, and so are all parts of a matrix that is whole."""
    shapes = [(FORMS[form].rows * data.draw(st.integers(1, 160 // FORMS[form].rows)), 160) for form in forms]
    each = [FORMS[form].parts(*shape, i) for i, (form, shape) in enumerate(zip(forms, shapes, strict=True))]
    model = nn.Sequential(*(layer(*shape) for shape in shapes))
    with online_quant(scheme, model, source={}) as session:
        matrices, pieces = [], []
        for i, (linear, parts, shape) in enumerate(zip(model, each, shapes, strict=True)):
            collector = session._work.incoming.of(linear.weight._armed)
            collector.expect(specs_of(parts))
            matrices.append(Arriving(collector, parts, shape, linear.weight._armed.decided()))
            for name, part in parts.items():
                cut = boxes(tuple(part.shape)) if "state" not in name else all_of(part)
                pieces += [(i, name, box) for box in data.draw(cut)]
        for i, name, box in data.draw(st.permutations(pieces)):
            matrices[i].write(name, box)
            assert sum(m.collector._held for m in matrices) <= sum(m.open_bytes() for m in matrices)
        assert all(m.collector._held == 0 for m in matrices)
    for linear, parts, reported in zip(model, each, session.report().layers, strict=True):
        assert_arrived(linear.weight, parts, reported.source.rpartition(": ")[2])


class Arriving:
    """A matrix whose parts arrive, and which of their elements did."""

    def __init__(self, collector: Any, parts: Tensors, shape: tuple[int, int], scheme: Any) -> None:
        self.collector, self.parts, self.rows = collector, parts, shape[0]
        source = source_of(parts, shape=shape)
        self.specs = {name: spec for name, spec in source.parts(shape).items() if spec.needed and name in parts}
        self.seen = {name: torch.zeros(parts[name].shape, dtype=torch.bool) for name in self.specs}
        together = scheme.format.needs_whole_matrix or source.moves(scheme.format) == "matrix"
        self.unit = self.rows if together else source.unit(shape)
        self.values = max(self.specs, key=lambda name: parts[name].numel())

    def write(self, name: str, box: Any) -> None:
        at = tuple(slice(*span) for span in box)
        self.collector.write(name, self.parts[name][at], box, tuple(self.parts[name].shape))
        if name in self.seen:
            self.seen[name][at] = True

    def open_bytes(self) -> int:
        """What came of units that lack something; and parts beside the values, until all is there."""
        if all(bool(part.all()) for part in self.seen.values()):
            return 0
        found = {name: int(part.sum()) for name, part in self.seen.items()}
        for start in range(0, self.rows, self.unit):
            cut = {name: spec.cut(self.seen[name], start, start + self.unit) for name, spec in self.specs.items()}
            if all(bool(part.all()) for part in cut.values()):
                found[self.values] -= cut[self.values].numel()
        return sum(count * self.parts[name].itemsize for name, count in found.items())


STACKS = sorted(form for form in FORMS if "bitsandbytes" not in form)


class Experts(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16))


@slow_data
@given(st.data(), st.sampled_from(STACKS), st.sampled_from(NAMES))
def test_any_order_of_any_slices_of_a_stack_equals_the_oracle(data: st.DataObject, form: str, scheme: str) -> None:
    """Matrix by matrix, and nothing is complete before all of it came."""
    multiple, even = FORMS[form].multiple, FORMS[form].rows
    count, rows = data.draw(st.integers(2, 3)), even * data.draw(st.integers(1, 160 // even))
    cols = multiple * data.draw(st.integers(1, 160 // multiple).filter(lambda n: multiple * n != rows))
    each = [FORMS[form].parts(rows, cols, seed) for seed in range(count)]
    parts = {name: torch.stack([own[name] for own in each]) for name in each[0]}
    pieces = [(name, box) for name, part in parts.items() for box in data.draw(boxes(tuple(part.shape)))]
    lost = data.draw(st.none() | st.sampled_from(pieces))
    model = Experts(count, rows, cols)
    session = online_quant(scheme, model, source=FORMS[form].config or {}, targets=["weight"])
    incoming = session._work.incoming.of(model.weight._armed)

    def run() -> None:
        with session:
            for name, box in data.draw(st.permutations(pieces)):
                if (name, box) != lost:
                    given = parts[name][tuple(slice(*span) for span in box)].clone()
                    incoming.write(name, given, box, tuple(parts[name].shape))

    if lost is not None:
        with pytest.raises((IncompleteLoadError, CheckpointError, WeightDtypeError), match=r"^weight: "):
            run()
        return
    run()
    assert session.report().timeline[-1].staged_bytes == 0
    for e, own in enumerate(each):
        values, found = whole(own, torch.bfloat16, (rows, cols)), model.weight[e]
        expected = quantize(values, scheme)
        if not all(same_bytes(a, b) for a, b in zip(found.parts(), expected.parts(), strict=True)):
            assert outcome(session) != "requantized" or expected_outcome(form, scheme) != "requantized"
            assert torch.allclose(found.dequantize().float(), values.float(), rtol=2**-7, atol=0)


def poison(data: st.DataObject, parts: Tensors) -> str | None:
    """Make a part mean nothing, somewhere. Returns which; None if it has no such values."""
    floats = [n for n, t in parts.items() if t.is_floating_point() and n != "*.quant_map" and "nested" not in n]
    name = data.draw(st.sampled_from(floats)) if floats else None
    if name is None or parts[name].dtype == torch.float8_e8m0fnu:
        return None
    part = parts[name] = parts[name].clone()
    at = data.draw(st.integers(0, part.numel() - 1))
    part.reshape(-1, 1).view(torch.uint8)[at] = 0x7F if part.itemsize == 1 else 0xFF  # NaN of any dtype
    return name


@slow_data
@given(st.data(), st.sampled_from(sorted(FORMS)), st.sampled_from(NAMES))
def test_what_means_nothing_is_refused_in_any_order_and_good_parts_load_after_it(
    data: st.DataObject, form: str, scheme: str
) -> None:
    rows, cols = 96, 160
    good = FORMS[form].parts(rows, cols)
    bad = dict(good)
    if poison(data, bad) is None:
        return
    model = layer(rows, cols)
    for parts in (bad, good):
        refused = pytest.raises(QTensorError, match=r"^weight: ") if parts is bad else contextlib.nullcontext()
        with refused, online_quant(scheme, model, source=FORMS[form].config or {}) as session:
            incoming = session._work.incoming.of(model.weight._armed)
            for name in data.draw(st.permutations(sorted(parts))):
                incoming.write(name, parts[name])
    assert_arrived(model.weight, good, outcome(session))


GROWING = ["int8 zero points", "int4 groups, zero points", "int3 groups, another order"]


@slow_data
@given(st.data(), st.sampled_from(GROWING), st.sampled_from(NAMES))
def test_zero_points_and_orders_may_come_last_where_nobody_told_of_them(
    data: st.DataObject, form: str, scheme: str
) -> None:
    """What was decoded without them is decoded again, in a stack of matrices, too."""
    shape, parts = (96, 160), FORMS[form].parts(96, 160)
    pieces = [(name, box) for name, part in parts.items() for box in data.draw(boxes(tuple(part.shape)))]
    with online_quant(scheme, source={}) as session:
        model = nn.Sequential(layer(*shape), layer(8, 8))
        incoming = session._work.incoming.of(model[0].weight._armed)
        for name, box in data.draw(st.permutations(pieces)):
            incoming.write(name, parts[name][tuple(slice(*span) for span in box)], box, tuple(parts[name].shape))
        model[1].weight.data.copy_(torch.ones(8, 8))
        assert incoming._held == 0
    assert_arrived(model[0].weight, parts)
    assert session.report().layers[0].source == f"{source_of(parts, shape=shape)}: requantized"


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16]


@slow_data
@given(
    st.dictionaries(
        st.sampled_from(families.part_names()),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.sampled_from([0, 1, 2, 16, 32, 33]), max_size=4)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([(32, 32), (32, 0), (0, 32)]),
)
def test_parts_of_any_dtype_and_shape_are_taken_or_refused_by_name(parts: Any, shape: tuple[int, int]) -> None:
    """What a stranger's file may hold."""
    with warnings.catch_warnings(), contextlib.suppress(QTensorError):
        warnings.simplefilter("ignore")
        with online_quant("fp8", source={}) as session:
            model = layer(*shape)
            collector = session._work.incoming.of(model.weight._armed)
            for name, (dtype, size) in parts.items():
                collector.write(name, torch.zeros(size, dtype=torch.float32).to(dtype))
