"""Weights that arrive quantized: whatever order, slices and repetitions their parts come in, the result is that of the
matrix decoded as a whole and quantized, byte for byte; or, where it is moved, the very numbers that the source has."""

from __future__ import annotations

import contextlib
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from math import inf
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import (
    CheckpointError,
    IncompleteLoadError,
    LossySourceError,
    QTensorError,
    WeightDtypeError,
    online_quant,
    online_reload,
    quantize,
)
from qtensor.schemes.scheme import SCHEMES
from qtensor.sources import families
from support.helpers import assert_oracle, same_bytes
from support.sources import FORMS, Tensors, source_of, whole

slow_data = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
NAMES = sorted(SCHEMES)
LOSSLESS = {
    ("fp8 tensor", "fp8_per_tensor"),
    ("fp8 tensor", "fp8_per_channel"),
    ("fp8 tensor", "fp8_per_block"),
    ("fp8 channel", "fp8_per_channel"),
    ("fp8 blocks", "fp8_per_block"),
    ("fp8 ue8m0 blocks", "fp8_per_block"),
    ("fp8 ue8m0 blocks", "mxfp8"),
    ("fp8 blocks of powers of two", "fp8_per_block"),
    ("fp8 blocks of powers of two", "mxfp8"),
    ("mxfp8", "mxfp8"),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8"),
    ("mxfp4", "nvfp4"),
    ("mxfp4 blocks", "mxfp4"),
    ("mxfp4 blocks", "mxfp8"),
    ("mxfp4 blocks", "nvfp4"),
    ("nvfp4 of ModelOpt", "nvfp4"),
    ("int8 channel", "int8_per_channel"),
    ("int8 words", "int8_per_channel"),
    ("int4 channel", "int8_per_channel"),
    ("torchao fp8", "fp8_per_channel"),
    ("torchao int8", "int8_per_channel"),
}
MOVED = {("nvfp4", "nvfp4"), ("bitsandbytes int8", "int8_per_channel")}


def layer(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(cols, rows, bias=False, dtype=dtype)


def named(parts: Tensors) -> Tensors:
    return {name.replace("*", "weight"): tensor for name, tensor in parts.items()}


def outcome(session: Any) -> str:
    """What the report says became of the numbers of the one weight."""
    return str(session.report().layers[0].source.rpartition(": ")[2])


def assert_arrived(weight: Any, parts: Tensors, became: str = "requantized") -> None:
    """What must have become of a matrix of those parts."""
    expected = whole(parts, weight.dtype, tuple(weight.shape))
    if became == "lossless":
        assert same_bytes(weight.dequantize(), expected)
    elif became == "moved":
        assert torch.allclose(weight.dequantize().float(), expected.float(), rtol=2**-7, atol=0)
    else:
        assert_oracle(weight, expected, weight.scheme)


def expected_outcome(form: str, scheme: str) -> str:
    pair = (form, SCHEMES[scheme].name)
    return "lossless" if pair in LOSSLESS else "moved" if pair in MOVED else "requantized"


@pytest.mark.parametrize(("form", "scheme"), list(product(FORMS, NAMES)), ids=str)
def test_every_source_becomes_every_scheme(form: str, scheme: str) -> None:
    rows, cols = 224, 288
    parts = FORMS[form].parts(rows, cols)
    with online_quant(scheme) as session:
        model = nn.Sequential(layer(rows, cols))
        model.load_state_dict({f"0.{name}": tensor for name, tensor in named(parts).items()})
    became, report = expected_outcome(form, scheme), session.report().layers[0]
    assert report.source == f"{source_of(parts)}: {became}"
    assert (report.sqnr == inf) == (became == "lossless")
    assert_arrived(model[0].weight, parts, became)
    assert model[0].weight.scheme == SCHEMES[scheme]


@pytest.mark.parametrize(("form", "scheme"), list(product(FORMS, NAMES)), ids=str)
def test_a_lossy_pair_is_refused_where_loss_is(form: str, scheme: str) -> None:
    model = nn.Sequential(layer(224, 288))
    state = {f"0.{name}": tensor for name, tensor in named(FORMS[form].parts(224, 288)).items()}
    session = online_quant(scheme, model, strict_source="lossless")
    if expected_outcome(form, scheme) == "lossless":
        with session:
            model.load_state_dict(state)
    else:
        with pytest.raises(LossySourceError, match=r"^0\.weight: .* is not the same numbers in"), session:
            model.load_state_dict(state)


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


@pytest.mark.parametrize("order", ["values first", "scales first"])
def test_a_loader_that_assigns_parts_one_by_one(order: str) -> None:
    parts = FORMS["fp8 blocks"].parts(300, 256)
    with online_quant("fp8", source={}):
        model = layer(300, 256)
        for _ in range(2 if order == "values first" else 1):
            if order == "values first":
                model.weight.data[:130].copy_(parts["*"][:130])
                model.weight.data[130:].copy_(parts["*"][130:])
            model.weight_scale_inv = nn.Parameter(parts["*_scale_inv"])
            if order == "scales first":
                model.weight = nn.Parameter(parts["*"], requires_grad=False)
    assert sorted(model._parameters) == ["bias", "weight"]
    assert_arrived(model.weight, parts)


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
    assert session.report().layers[0].source == f"{source_of(parts)}: requantized"


@pytest.mark.parametrize("told", [False, True])
def test_zero_points_that_come_after_another_weight_have_to_be_foretold(told: bool) -> None:
    """Until then a matrix is held; all of them to the end of a load would be a second model."""
    form = FORMS["int4 groups, zero points"]
    parts = form.parts(64, 256)
    refused = pytest.raises(CheckpointError, match=r"zero_point, of which .* came too late: hand it over with")
    with contextlib.nullcontext() if told else refused, online_quant("fp8", source=form.config if told else {}):
        model = nn.Sequential(layer(64, 256), layer(8, 8))
        for part in ["*_scale", "*_shape", "*_packed", "other", "*_zero_point"]:
            if part == "other":
                model[1].weight.data.copy_(torch.ones(8, 8))
            else:
                setattr(model[0], part.replace("*", "weight"), nn.Parameter(parts[part], requires_grad=False))
    if told:
        wanted = source_of(parts, dict(form.config))
        needed = {name: parts[name] for name, spec in wanted.parts((64, 256)).items() if spec.needed}
        assert_oracle(model[0].weight, wanted.decode(needed, (64, 256), torch.bfloat16), SCHEMES["fp8"])


def test_threads_that_take_turns_with_weights_do_not_wait_for_each_other() -> None:
    """Whoever goes on to another weight lets go of the one before, which another thread may be writing."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    each = [FORMS["fp8 channel"].parts(8, 8, seed) for seed in range(2)]
    with online_quant("fp8", source={}) as session:
        model = nn.Sequential(*(layer(8, 8) for _ in each))
        collectors = [session._work.incoming.of(linear.weight._armed) for linear in model]

        def send(first: int) -> None:
            for turn in range(400):
                i, row = (first + turn) % 2, turn % 7
                collectors[i].write("*", each[i]["*"][row : row + 1], ((row, row + 1), (0, 8)), (8, 8))

        for collector, parts in zip(collectors, each, strict=True):
            collector.write("*_scale", parts["*_scale"])
        threads = [Thread(target=send, args=(first,), daemon=True) for first in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        sys.setswitchinterval(interval)
        assert not any(thread.is_alive() for thread in threads)
        for collector, parts in zip(collectors, each, strict=True):
            collector.write("*", parts["*"])
    for linear, parts in zip(model, each, strict=True):
        assert_arrived(linear.weight, parts, "lossless")


def test_a_loader_that_registers_buffers() -> None:
    parts = FORMS["mxfp4"].parts(300, 256)
    with online_quant("fp8"):
        model = layer(300, 256)
        model.register_buffer("running_mean", torch.ones(3))
        for name, tensor in named(parts).items():
            model.register_buffer(name, tensor)
    assert list(model._buffers) == ["running_mean"]
    assert_arrived(model.weight, parts)


def test_a_state_dict_in_several_files() -> None:
    parts = named(FORMS["fp8 blocks"].parts(300, 256))
    with online_quant("fp8") as session:
        model = layer(300, 256)
        for name in ("weight", "weight_scale_inv"):
            model.load_state_dict({name: parts[name]}, strict=False)
    assert_arrived(model.weight, FORMS["fp8 blocks"].parts(300, 256))
    assert session.report().peak_staged_bytes == 300 * 256


def test_values_meet_their_scales_and_nothing_is_held() -> None:
    """Law 9."""
    parts = FORMS["fp8 blocks"].parts(512, 256)
    with online_quant("fp8", source={}) as session:
        model = layer(512, 256)
        model.weight_scale_inv = nn.Parameter(parts["*_scale_inv"])
        for start in range(0, 512, 128):
            model.weight.data[start : start + 128].copy_(parts["*"][start : start + 128])
    assert session.report().peak_staged_bytes == parts["*_scale_inv"].nbytes


def test_experts_that_are_stored_the_other_way_round() -> None:
    """gpt-oss: `[E, N, K / 32, 16]` on disk is `[E, K, N]` in the model."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(3, 64, 96, dtype=torch.bfloat16))

    each = [FORMS["mxfp4 blocks"].parts(96, 64, seed) for seed in range(3)]
    state = {name.replace("*", "gate_up_proj"): torch.stack([parts[name] for parts in each]) for name in each[0]}
    with online_quant("fp8", targets=["gate_up_proj"]):
        model = Experts()
        model.load_state_dict(state)
    full = torch.stack([whole(parts, torch.bfloat16, (96, 64)).T for parts in each])
    assert_oracle(model.gate_up_proj, full, SCHEMES["fp8"])


def fault(what: str) -> tuple[Tensors, str]:
    parts = named(FORMS["fp8 blocks"].parts(300, 256))
    if what == "no scale":
        del parts["weight_scale_inv"]
        return parts, "weight: the source is torch.float8_e4m3fn, which has no meaning"
    if what == "no values":
        del parts["weight"]
        return parts, r"weight: weight_scale_inv \(float32 \[3, 2\]\) arrived"
    if what == "another shape":
        parts["weight_scale_inv"] = parts["weight_scale_inv"][:2]
        return parts, r"weight: its scales are \[2, 2\]"
    if what == "another matrix":
        parts["weight"], parts["weight_scale_inv"] = parts["weight"][:256], parts["weight_scale_inv"][:2]
        return parts, r"weight: weight is float8_e4m3fn \[256, 256\]; of a weight \[300, 256\]"
    if what == "NaN":
        parts["weight"].view(torch.uint8)[7, 9] = 0x7F
        return parts, r"weight: nan at index \[7, 9\]"
    parts["weight_scale_inv"][1, 1] = float("nan")
    return parts, r"weight: its scale \[1, 1\] is nan"


@pytest.mark.parametrize("scheme", ["fp8", "fp8_per_block"])
@pytest.mark.parametrize(
    "what", ["no scale", "no values", "another shape", "another matrix", "NaN", "a scale that is NaN"]
)
def test_what_means_nothing_is_refused_by_name_and_the_model_loads_again(what: str, scheme: str) -> None:
    state, says = fault(what)
    model = layer(300, 256)
    with pytest.raises(QTensorError, match=rf"^{says}"), online_quant(scheme, model):
        model.load_state_dict(state, strict=False)
    good = FORMS["fp8 blocks"].parts(300, 256)
    with online_quant(scheme, model) as session:
        model.load_state_dict(named(good))
    assert_arrived(model.weight, good, outcome(session))


def test_an_unknown_tensor_beside_a_weight_is_still_unexpected() -> None:
    model = layer(128, 64)
    with pytest.raises(RuntimeError, match="weight_zero_something"), online_quant("fp8", model):
        model.load_state_dict({"weight": torch.randn(128, 64), "weight_zero_something": torch.ones(1)})


@pytest.mark.parametrize("scheme", ["fp8", "fp8_per_block", "nvfp4"])
@pytest.mark.parametrize("atomic", [True, False])
def test_a_reload_takes_parts_too(scheme: str, atomic: bool) -> None:
    """A trainer that sends fp8 blocks; and one that leaves out a scale changes nothing."""
    old, new = (named(FORMS["fp8 blocks"].parts(300, 256, seed)) for seed in (1, 2))
    with online_quant(scheme):
        model = nn.Sequential(layer(300, 256))
        model.load_state_dict({f"0.{name}": t for name, t in old.items()})
    before, weight = [part.clone() for part in model[0].weight.parts()], model[0].weight
    with pytest.raises(QTensorError, match=r"^0\.weight"), online_reload(model, atomic=atomic):
        model.load_state_dict({"0.weight": new["weight"]}, strict=False)
    assert all(same_bytes(a, b) for a, b in zip(before, model[0].weight.parts(), strict=True))
    with online_reload(model, atomic=atomic) as session:
        model.load_state_dict({f"0.{name}": t for name, t in new.items()})
    assert model[0].weight is weight
    assert_arrived(weight, FORMS["fp8 blocks"].parts(300, 256, 2), outcome(session))


def test_parts_may_come_from_several_threads() -> None:
    each = [FORMS["fp8 blocks"].parts(300, 256, seed) for seed in range(6)]
    with online_quant("fp8") as session:
        model = nn.Sequential(*(layer(300, 256) for _ in each))
        incoming = session._work.incoming
        jobs = [(i, name) for i in range(len(each)) for name in each[i]]
        with ThreadPoolExecutor(4) as pool:

            def send(job: tuple[int, str]) -> None:
                i, name = job
                incoming.of(model[i].weight._armed).write(name, each[i][name])

            list(pool.map(send, jobs))
    for i, parts in enumerate(each):
        assert_arrived(model[i].weight, parts)


def test_pytorchs_own_function_is_back_when_the_session_is_over() -> None:
    before = nn.Module._load_from_state_dict
    for _ in range(2):
        with online_quant("fp8"):
            model = layer(8, 8)
            model.load_state_dict({"weight": torch.ones(8, 8)})
            assert nn.Module._load_from_state_dict is not before
        assert nn.Module._load_from_state_dict is before


def test_the_loss_of_a_second_quantization_is_measured_against_the_source() -> None:
    parts = FORMS["fp8 blocks"].parts(256, 256)
    with online_quant("mxfp4", measure_sqnr=True) as session:
        model = layer(256, 256)
        model.load_state_dict(named(parts))
    values, error = whole(parts, torch.bfloat16, (256, 256)).double(), model.weight.dequantize().double()
    expected = 10 * torch.log10(values.square().sum() / (values - error).square().sum())
    assert session.report().layers[0].sqnr == pytest.approx(float(expected), abs=0.1)


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
