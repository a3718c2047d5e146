"""Products of a few rows, laid out beforehand: the bits of those that are not, from whatever the weight holds now."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="the numba kernels need the optional extra 'cpu'")

import numba
from test_cpu_products import activations, exact, quantized

from qtensor.kernels import FORMATS, WeightFormat
from qtensor.kernels.cpu import laying, layouts, mixtures, orders, prepared, products, routing, rows, vectors, words
from qtensor.kernels.cpu.numba_backend import NUMBA

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
relaxed = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def activate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@formats
@relaxed
@given(data=st.data())
def test_bits_are_those_of_products(fmt: WeightFormat, data: st.DataObject) -> None:
    height = data.draw(st.sampled_from([1, 3, 4, 5, 64, 130, 300]))
    cols = data.draw(st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 128, 205, 1030]))
    parts = quantized(fmt, (height, cols), height * cols)
    count = data.draw(st.sampled_from([1, 2, 3, 4, 5, 6, 16, 17, 33, 49, 64, 65]))
    x = data.draw(activations(count, cols))
    bias = data.draw(st.sampled_from([None, torch.linspace(-1, 1, height)]))
    bias = None if bias is None else bias.to(x.dtype)
    found = prepared.linear(x, parts, fmt, bias)
    few = count <= prepared.most_rows(fmt) or (
        bias is None and vectors.has_tiles() and count <= prepared._MOST_IN_TILES
    )
    served = x.dtype == torch.bfloat16 and x.stride(1) == 1 and few
    assert (found is not None) == served
    if found is not None:
        assert torch.equal(found, products.linear(x, parts, fmt, bias))


def integers_of(x: torch.Tensor, order: orders.Order) -> torch.Tensor:
    """x `[M, K]` as `words.WordLayout` writes it, by torch: bytes of integers and of their scales."""
    width = len(order.columns)
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % width)).view(x.shape[0], -1, width)[:, :, order.columns]
    x = x.float().reshape(*x.shape[:2], 4, 16, 2)
    size = x.abs().view(torch.int32)
    most = size.amax((2, 4), keepdim=True)
    exponent = most.bitwise_and(0x7F800000).clamp_min(15 << 23)
    scale = torch.where(most >= 0x7F800000, most, exponent - (14 << 23)).view(torch.float32)
    codes = (x * ((268 << 23) - exponent).view(torch.float32)).round()
    codes = torch.where(most >= 0x7F800000, torch.where(size == 0x7F800000, x.sign(), 0.0), codes)
    both = codes.to(torch.int16).flatten(2), scale.flatten(2).contiguous()
    return torch.cat([part.view(torch.uint8) for part in both], -1).flatten(1)


@pytest.mark.parametrize("number", [orders.WORDED, orders.WORDED_QUARTERS])
@relaxed
@given(data=st.data())
def test_integers_of_x(number: int, data: st.DataObject) -> None:
    if not words.has_words():
        pytest.skip("this chip does not multiply pairs of integers")
    x = data.draw(activations(data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 127, 128, 129, 300]))))
    x = x.bfloat16()
    for value in data.draw(st.lists(st.sampled_from([math.inf, -math.inf, math.nan, 3e38, 1e-38, 0.0]), max_size=5)):
        x[data.draw(st.integers(0, x.shape[0] - 1)), data.draw(st.integers(0, x.shape[1] - 1))] = value
    order = orders.ORDERS[number]
    found, wanted = laying.laid_out(x, number), integers_of(x, order)
    assert torch.equal(found[:, : wanted.shape[1]], wanted)


@formats
def test_bits_of_infinity_nan_and_the_smallest(fmt: WeightFormat) -> None:
    """Each changes what it does in exact products; the signs of infinity are kept."""
    parts = quantized(fmt, (9, 300), 3)
    x = torch.randn(4, 300).bfloat16()
    x[0, ::7], x[1, 5], x[1, 200], x[2, 17] = 0, float("inf"), -float("inf"), float("nan")
    x[3] = torch.tensor([1e-40, -1e-30, 3e38, 1e-36, 0]).repeat(60).bfloat16()
    found, wanted = prepared.linear(x, parts, fmt, None), products.linear(x, parts, fmt, None)
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    x[1, 200] = 0
    x[2, 17] = -float("inf")
    found = prepared.linear(x, parts, fmt, None)
    assert found is not None
    weight = exact(parts, fmt, 300)
    for row, column, sign in ((1, 5, 1), (2, 17, -1)):
        clear = weight[:, column] != 0
        assert torch.equal(found[row, clear].double(), sign * weight[clear, column] * float("inf"))


@formats
def test_new_values_are_seen(fmt: WeightFormat) -> None:
    """In every part, in place, as a reload writes them; and another weight at the same address."""
    xs = [torch.randn(count, 96).bfloat16() for count in (3, 20)]
    parts, other = quantized(fmt, (40, 96), 1), quantized(fmt, (40, 96), 2, size=0.3)
    for _ in range(2):
        for part, new in zip(parts, other, strict=True):
            part.view(torch.uint8).copy_(new.view(torch.uint8))
            for x in xs:
                assert torch.equal(NUMBA.linear(x, parts, fmt), products.linear(x, parts, fmt, None))
        other = quantized(fmt, (40, 96), 3)


def test_weights_of_all_sizes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory that they share, and with more of them than are kept."""
    monkeypatch.setattr(prepared, "_MOST_KEPT", 3)
    monkeypatch.setattr(prepared, "_kept", {})
    weights = [(f, quantized(f, shape, 1)) for f in FORMATS.values() for shape in ((8, 32), (500, 1000), (33, 70))]
    for _ in range(2):
        for fmt, parts in weights:
            for count in (2, 16, 40) if vectors.has_tiles() else (2,):
                x = torch.randn(count, parts.qdata.shape[1] * fmt.per_byte).bfloat16()
                found = prepared.linear(x, parts, fmt, None)
                assert found is not None
                assert torch.equal(found, products.linear(x, parts, fmt, None))
            assert len(prepared._kept) <= 3


def test_numbers_of_threads_and_threads_at_once() -> None:
    fmt = FORMATS["nvfp4"]
    weights = [quantized(fmt, (700, 300), i) for i in range(4)]
    xs = [torch.randn(count, 300).bfloat16() for count in (2, 3, 16, 50)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            wanted = [products.linear(x, w, fmt, None) for x, w in zip(xs, weights, strict=True)]
            assert all(torch.equal(NUMBA.linear(x, w, fmt), y) for x, w, y in zip(xs, weights, wanted, strict=True))
            with ThreadPoolExecutor(4) as pool:
                for _ in range(20):
                    found = pool.map(lambda pair: NUMBA.linear(*pair, fmt), zip(xs, weights, strict=True))
                    assert all(map(torch.equal, found, wanted))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("without", ["fork", "openmp"])
def test_where_there_is_no_team_to_enter(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child has none of its parent's threads; other systems have no entry point."""
    monkeypatch.setattr(rows, *(("_forked", True) if without == "fork" else ("_openmp", lambda: None)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    fmt = FORMATS["mxfp8"]
    parts, x = quantized(fmt, (300, 200), 1), torch.randn(2, 200).bfloat16()
    assert prepared.linear(x, parts, fmt, None) is None
    assert torch.equal(NUMBA.linear(x, parts, fmt), products.linear(x, parts, fmt, None))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert prepared.linear(x, parts, fmt, None) is not None


def test_gradients_take_the_other_way() -> None:
    fmt = FORMATS["fp8_per_channel"]
    parts, x = quantized(fmt, (8, 32), 1), torch.randn(2, 32).bfloat16()
    bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    NUMBA.linear(x, parts, fmt, bias).sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        assert prepared.linear(x, parts, fmt, bias) is not None


@formats
@relaxed
@given(data=st.data())
def test_mixtures(fmt: WeightFormat, data: st.DataObject) -> None:
    """Within fp32's rounding of the exact sum, and one rounding to bfloat16."""
    experts, hidden, inner = data.draw(st.sampled_from([(4, 64, 32), (5, 70, 34), (9, 130, 16)]))
    tokens, each = data.draw(st.sampled_from([1, 2, 4, 7])), data.draw(st.integers(1, 3))
    first, second = (
        quantized(fmt, (experts, 2 * inner, hidden), experts),
        quantized(fmt, (experts, hidden, inner), inner),
    )
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(experts, generator=generator)[:each] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, each, generator=generator)
    between = data.draw(st.sampled_from([None, activate]))
    found = mixtures.experts(x, first, second, fmt, ids, weights, inner, between)
    bound = mixtures.Bound(first, second, fmt, hidden, inner, between)(x, ids, weights)
    assert (bound is None) if found is None else torch.equal(bound, found)
    most = int(ids.flatten().bincount().max())
    assert (found is not None) == (most <= 2 * mixtures.AT_ONCE)
    if found is None:
        return
    up, down = exact(first, fmt, hidden), exact(second, fmt, inner)
    hidden_states = [[activate((x[t].double() @ up[e].T)[None])[0] for e in ids[t]] for t in range(tokens)]
    terms = [
        [
            weights[t, j].double() * (h @ down[e].T)
            for j, (e, h) in enumerate(zip(ids[t], hidden_states[t], strict=True))
        ]
        for t in range(tokens)
    ]
    wanted = torch.stack([torch.stack(own).sum(0) for own in terms])
    size = torch.stack([torch.stack(own).abs().sum(0) for own in terms])
    assert ((found.double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 2.0**-14 * (size + size.mean())).all()


def test_the_exponential_is_exact_to_two_units_in_the_last_place() -> None:
    """From -87 to 88.3; beyond, it is next to nothing and infinity; and NaN is NaN."""
    exp = numba.vectorize(["float32(float32)"])(routing.exp.py_func)
    x = np.linspace(-87, 88.3, 1_000_001, dtype=np.float32)
    wanted = np.exp(x.astype(np.float64))
    assert np.max(np.abs(exp(x) - wanted) / np.spacing(wanted.astype(np.float32))) <= 2
    assert exp(np.float32(0)) == 1
    assert exp(np.float32("inf")) == exp(np.float32(90)) == np.inf
    assert 0 <= exp(np.float32("-inf")) < 1e-37
    with np.errstate(invalid="ignore"):
        assert np.isnan(exp(np.float32("nan")))


@formats
@relaxed
@given(data=st.data())
def test_a_bound_weight_is_what_it_was_bound_to(fmt: WeightFormat, data: st.DataObject) -> None:
    """The bits of `linear`, of whatever the weight holds; None where that says None, and when a part lies elsewhere."""
    height, cols = data.draw(st.sampled_from([(1, 33), (64, 128), (130, 205)]))
    parts = quantized(fmt, (height, cols), 1)
    bound = prepared.Bound(parts, fmt, cols)
    x = data.draw(activations(data.draw(st.sampled_from([1, 4, 17, 65])), cols))
    bias = data.draw(st.sampled_from([None, torch.linspace(-1, 1, height).to(x.dtype)]))
    for seed in (1, 2):
        for part, new in zip(parts, quantized(fmt, (height, cols), seed), strict=True):
            part.copy_(new)
        found, wanted = bound(x, bias), prepared.linear(x, parts, fmt, bias)
        if x.shape[0] <= prepared.most_rows(fmt):
            assert (found is None) if wanted is None else torch.equal(found, wanted)
        else:
            assert found is None
    part = data.draw(st.sampled_from(list(parts)))
    kept, part.data = part.data, part.data.clone()
    assert bound(x, bias) is None
    del kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    """What was worked out for them is worked out anew."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fmt = FORMATS["int8_per_channel"]
        parts, x = quantized(fmt, (2000, 512), 1), torch.randn(2, 512).bfloat16()
        bound = prepared.Bound(parts, fmt, 512)
        assert bound(x) is not None
        child = os.fork()
        if not child:
            torch.set_num_threads(2)
            found = bound(x) is None and prepared.linear(x, parts, fmt, None) is None
            os._exit(0 if found else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_mixtures_of_other_kinds_are_declined() -> None:
    fmt = FORMATS["int8_per_channel"]
    first, second = quantized(fmt, (4, 64, 32), 1), quantized(fmt, (4, 32, 32), 2)
    x, ids, weights = torch.randn(2, 32).bfloat16(), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.rand(2, 2)

    def mixture(**changed: torch.Tensor) -> torch.Tensor | None:
        given = {"x": x, "ids": ids, "weights": weights} | changed
        return mixtures.experts(given["x"], first, second, fmt, given["ids"], given["weights"], 32, activate)

    assert mixture() is not None
    assert mixture(x=x.float()) is None
    assert mixture(ids=ids.long()) is None
    assert mixture(ids=torch.full_like(ids, -1)) is None
    assert mixture(ids=torch.full_like(ids, 4)) is None
    assert mixture(weights=weights.bfloat16()) is None
    assert mixture(x=x[:0], ids=ids[:0], weights=weights[:0]) is None
    assert mixture(x=x.repeat(9, 1), ids=ids.repeat(9, 1), weights=weights.repeat(9, 1)) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_terms_are_combined(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not there add nothing; several threads take rows in turn."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(routing, "_PIECE", 64)
    terms, weights = torch.randn(50, 96).bfloat16(), torch.rand(40, 3)
    where = torch.randint(-1, 50, (40, 3))
    where[7] = -1
    out = torch.full((40, 96), float("nan"), dtype=torch.bfloat16)
    routing.combine_into(out, terms, where, weights)
    wanted = (terms[where.clamp_min(0)].double() * (weights.double() * (where >= 0)).unsqueeze(-1)).sum(1)
    assert ((out.double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_are_rounded(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To nearest even, NaN and infinity included, each row by its step: what torch rounds to."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(layouts, "_PIECE", 64)
    bits = torch.randint(-(2**31), 2**31, (30, 70), dtype=torch.int64).to(torch.int32)
    bits[0, :3] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF])  # Two ties, and what rounds to infinity.
    sums, steps = bits.view(torch.float32), torch.rand(30, 1) + 0.5
    steps[0] = 1
    for bias in (None, torch.randn(70).bfloat16()):
        out = torch.empty(30, 70, dtype=torch.bfloat16)
        layouts.round_into(out, sums, steps, bias)
        wanted = sums * steps + (0 if bias is None else bias.float())
        torch.testing.assert_close(out, wanted.bfloat16(), rtol=0 if bias is None else 2**-8, atol=0, equal_nan=True)
