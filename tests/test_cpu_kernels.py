"""The numba kernels against the plain-torch reference: equal bytes for every input, from any number of threads."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="the numba kernels need the optional extra 'cpu'")

from qtensor.kernels import FORMATS, FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, Backend, NonFinite, Parts
from qtensor.kernels.audit import Audit
from qtensor.kernels.cpu import rows
from qtensor.kernels.cpu.fused import is_fused
from qtensor.kernels.cpu.numba_backend import NUMBA
from qtensor.kernels.formats import SOURCE_DTYPES, WeightFormat
from qtensor.kernels.recipes import RECIPES
from qtensor.kernels.reference import TORCH
from support.first_use import timer

LOOPS = [fmt for fmt in FORMATS.values() if is_fused(fmt)]
formats = pytest.mark.parametrize("fmt", LOOPS, ids=lambda f: f.name)
dtypes = pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def quantized(
    backend: Backend, source: torch.Tensor, fmt: WeightFormat, audit: Audit | None = None, origin: int = 0
) -> Parts:
    parts = Parts.of(tuple(source.shape), fmt)
    backend.quantize_into(source, parts, fmt, audit, origin)
    return parts


def assert_same_bytes(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


def assert_same_values(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bytes, except that one NaN is as good as another."""
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    nan = got.isnan()
    assert_same_bytes(got.masked_fill(nan, 0.0), want.masked_fill(nan, 0.0))


def assert_same_codes(got: torch.Tensor, want: torch.Tensor, source: torch.dtype) -> None:
    """Equal bytes. The sign of a NaN does not count for fp16, where torch's own cast to fp32 sometimes drops it."""
    if source == torch.float16:
        got, want = (torch.where(q.float().isnan(), 0x7F, q.view(torch.uint8)) for q in (got, want))
    assert_same_bytes(got, want)


def assert_same_quantization(source: torch.Tensor, fmt: WeightFormat, refuse: bool = True) -> None:
    got_audit, want_audit = Audit(refuse, measure_sqnr=True), Audit(refuse, measure_sqnr=True)
    got, want = quantized(NUMBA, source, fmt, got_audit), quantized(TORCH, source, fmt, want_audit)
    assert_same_bytes(got[1], want[1])
    assert_same_codes(got[0], want[0], source.dtype)
    assert got_audit.signal == pytest.approx(want_audit.signal, rel=1e-9, nan_ok=True)
    assert got_audit.noise == pytest.approx(want_audit.noise, rel=1e-9, nan_ok=True)


# Values the rounding, the clamp and the scale floors turn on.
EDGES = [0.0, -0.0, 1e-45, 1e-38, 5e-7, 2.0**-10, 2.0**-9, 2.0**-6, 1e-4, 1.0, 415.9, 447.9, 448.0, 464.0, 1e4, 3e38]


@st.composite
def matrices(draw: st.DrawFn, nonfinite: bool = False) -> torch.Tensor:
    """2-D or 3-D sources of any dtype: plain, a slice of columns, every other row, or transposed."""
    rows = draw(st.sampled_from([0, 1, 2, 3, 127, 128, 129, 200, 256]))
    cols = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 127, 128, 129, 300]))
    experts = draw(st.sampled_from([None, None, 1, 3]))
    dtype = draw(st.sampled_from(SOURCE_DTYPES))
    layout = draw(st.sampled_from(["plain", "columns", "rows", "transposed"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    lead = () if experts is None else (experts,)
    shape = {
        "plain": (*lead, rows, cols),
        "columns": (*lead, rows, cols + 5),
        "rows": (*lead, 2 * rows, cols),
        "transposed": (*lead, cols, rows),
    }[layout]
    magnitude = draw(st.sampled_from([0.0, 1e-42, 1e-5, 0.02, 1.0, 500.0, 1e30]))
    values = torch.randn(shape, generator=generator) * magnitude
    edges = draw(st.lists(st.sampled_from(EDGES), max_size=8))
    if nonfinite:
        edges += draw(st.lists(st.sampled_from([float("nan"), float("inf")]), min_size=1, max_size=3))
    if values.numel():
        flat = values.view(-1)
        for value in edges:
            where = int(torch.randint(values.numel(), (), generator=generator))
            flat[where] = value if draw(st.booleans()) else -value
    limit = torch.finfo(dtype).max
    finite = values.clamp(-limit, limit)
    values = torch.where(values.isfinite(), finite, values).to(dtype)
    if layout == "columns":
        return values[..., 3 : 3 + cols]
    if layout == "rows":
        return values[..., ::2, :]
    return values.mT if layout == "transposed" else values


@formats
@relaxed
@given(source=matrices())
def test_quantize_equals_the_reference(fmt: WeightFormat, source: torch.Tensor) -> None:
    assert_same_quantization(source, fmt)
    # Without sums to measure, a small source takes a shorter way.
    for got, want in zip(quantized(NUMBA, source, fmt), quantized(TORCH, source, fmt), strict=True):
        assert_same_bytes(got, want)


@formats
@relaxed
@given(source=matrices(nonfinite=True))
def test_nonfinite_values_that_are_kept(fmt: WeightFormat, source: torch.Tensor) -> None:
    assert_same_quantization(source, fmt, refuse=False)


@formats
@relaxed
@given(source=matrices(nonfinite=True), origin=st.integers(0, 2**40))
def test_nonfinite_values_are_refused_before_anything_is_stored(
    fmt: WeightFormat, source: torch.Tensor, origin: int
) -> None:
    if source.isfinite().all():
        return
    qdata = torch.zeros(source.shape, dtype=fmt.dtype)
    scale = torch.full(fmt.scale_shape(tuple(source.shape)), -1.0)
    with pytest.raises(NonFinite) as refused:
        NUMBA.quantize_into(source, Parts(qdata, scale), fmt, Audit(), origin)
    flat = source.flatten()
    first = int((~flat.isfinite()).nonzero()[0])
    assert refused.value.index == origin + first
    assert str(refused.value.value) == str(float(flat[first]))
    assert not qdata.view(torch.uint8).any()
    assert (scale == -1.0).all()


@formats
@relaxed
@given(source=matrices(), padding=st.integers(0, 3))
def test_destinations_inside_a_larger_weight(fmt: WeightFormat, source: torch.Tensor, padding: int) -> None:
    """qdata and scale may be views: rows of a bigger matrix, with columns left and right untouched."""
    shape = (*source.shape[:-1], source.shape[-1] + 2 * padding)
    weight = torch.zeros(shape, dtype=fmt.dtype)
    scale_shape = fmt.scale_shape(tuple(source.shape))
    scales = torch.full((*scale_shape[:-1], scale_shape[-1] + 2 * padding), -1.0)
    qdata, scale = weight.narrow(-1, padding, source.shape[-1]), scales.narrow(-1, padding, scale_shape[-1])
    NUMBA.quantize_into(source, Parts(qdata, scale), fmt)
    want_qdata, want_scale = quantized(TORCH, source, fmt)
    assert_same_bytes(qdata, want_qdata)
    assert_same_bytes(scale, want_scale)
    outside = torch.ones(shape, dtype=torch.bool)
    outside.narrow(-1, padding, source.shape[-1]).fill_(False)
    assert not weight.view(torch.uint8)[outside].any()


@formats
@dtypes
def test_a_large_weight_shared_among_threads(fmt: WeightFormat, dtype: torch.dtype) -> None:
    source = (torch.randn(1000, 1111, generator=torch.Generator().manual_seed(0)) * 0.03).to(dtype)
    assert_same_quantization(source, fmt)
    assert_same_quantization(source.mT, fmt)
    assert_same_quantization(source[:896].view(7, 128, 1111), fmt)


@formats
@dtypes
@pytest.mark.parametrize("shape", [(128, 48, 20), (30, 128, 100), (2 * rows.PIECE // 40 + 1, 40)], ids=str)
def test_many_short_rows(fmt: WeightFormat, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """They are scanned together, and quantized by the loop for pieces."""
    source = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.03).to(dtype)
    for got, want in zip(quantized(NUMBA, source, fmt), quantized(TORCH, source, fmt), strict=True):
        assert_same_bytes(got, want)
    source[-1, ..., 3] = source[-2, ..., 7] = float("nan")
    parts = Parts.of(shape, fmt).map(torch.zeros_like)
    with pytest.raises(NonFinite) as refused:
        NUMBA.quantize_into(source, parts, fmt)
    assert refused.value.index == int(source.isnan().flatten().nonzero()[0])
    assert not any(part.view(torch.uint8).any() for part in parts)


@formats
def test_rows_by_address_are_for_the_formats_own_formula(fmt: WeightFormat) -> None:
    parts = Parts.of((256, 64), fmt)
    assert NUMBA.pieces(parts, fmt, Audit()) is not None
    assert NUMBA.pieces(parts, replace(fmt, recipe=next(filter(None, RECIPES["torchao"].values()))), Audit()) is None
    assert NUMBA.pieces(parts, fmt, Audit(measure_sqnr=True)) is None
    assert NUMBA.pieces(parts, fmt, Audit(refuse_nonfinite=False)) is None
    assert NUMBA.pieces(Parts(parts.qdata.mT.contiguous().mT, *parts[1:]), fmt, Audit()) is None


@dtypes
def test_encode_is_exact_for_every_value(dtype: torch.dtype) -> None:
    """All 65,536 bf16 and fp16 values, a dense sample of fp32, at scales that put them everywhere in the range."""
    if dtype == torch.float32:
        sample = torch.arange(-(2**31), 2**31, 4093, dtype=torch.int64).to(torch.int32)
        # Both sides of every rounding threshold: e4m3 codes and the midpoints between them, one step around each.
        thresholds = torch.arange(0, 0x43F00000, 1 << 19, dtype=torch.int32)
        around = torch.cat([thresholds - 1, thresholds, thresholds + 1])
        values = torch.cat([sample, around, around | -(2**31)]).view(torch.float32)
    else:
        values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    for amax in (448.0, 7.0, 3e-3, 1e-38):
        rows = values[values.abs() <= amax].unsqueeze(0)
        rows = torch.cat([rows, torch.full((1, 1), amax, dtype=dtype)], 1)
        for fmt in LOOPS:
            assert_same_quantization(rows, fmt)
    for fmt in LOOPS:
        assert_same_quantization(values.unsqueeze(0), fmt, refuse=False)


@formats
@dtypes
def test_dequantize_every_code(fmt: WeightFormat, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    qdata = codes.repeat(300, 3)[:, :700]
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(fmt.scale_shape((300, 700)), generator=generator) * 3.0
    scale.view(-1)[0] = 1e-41
    for weight in (qdata, qdata.t().contiguous().t()):
        assert_same_values(
            NUMBA.dequantize(Parts(weight, scale), fmt, dtype), TORCH.dequantize(Parts(weight, scale), fmt, dtype)
        )
    big = scale * 1e30
    assert_same_values(NUMBA.dequantize(Parts(qdata, big), fmt, dtype), TORCH.dequantize(Parts(qdata, big), fmt, dtype))


@formats
@dtypes
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5, 1), (200, 130), (2, 129, 257)], ids=str)
def test_dequantize_shapes(fmt: WeightFormat, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    qdata, scale = quantized(TORCH, torch.randn(shape), fmt)
    want = TORCH.dequantize(Parts(qdata, scale), fmt, dtype)
    assert_same_values(NUMBA.dequantize(Parts(qdata, scale), fmt, dtype), want)
    out = torch.zeros((*shape[:-1], shape[-1] + 2), dtype=dtype)[..., 1:-1]
    assert NUMBA.dequantize(Parts(qdata, scale), fmt, dtype, out) is out
    assert_same_values(out, want)
    transposed = torch.zeros(shape, dtype=dtype).mT.contiguous().mT
    assert_same_values(NUMBA.dequantize(Parts(qdata, scale), fmt, dtype, transposed), want)


@formats
@relaxed
@given(x=matrices(), poison=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]))
def test_activations_equal_the_reference(fmt: WeightFormat, x: torch.Tensor, poison: float | None) -> None:
    x = x.flatten(0, 1) if x.dim() == 3 else x
    if poison is not None and x.numel():
        x = x.clone()
        x[x.shape[0] // 2, x.shape[1] // 2] = poison
    got, want = NUMBA.quantize_activation(x, fmt), TORCH.quantize_activation(x, fmt)
    assert_same_values(got[1], want[1])
    # A NaN makes its token's scale NaN, and what sign x / NaN has is not defined.
    assert_same_values(got[0].float(), want[0].float())


def test_wrong_arguments_are_named() -> None:
    qdata, scale = torch.empty(2, 3, dtype=torch.float8_e4m3fn), torch.empty(2, 1)
    with pytest.raises(ValueError, match=r"source is \[3, 2\] but qdata is \[2, 3\]"):
        NUMBA.quantize_into(torch.zeros(3, 2), Parts(qdata, scale), FP8_PER_CHANNEL)
    with pytest.raises(TypeError, match="float64"):
        NUMBA.quantize_into(torch.zeros(2, 3, dtype=torch.float64), Parts(qdata, scale), FP8_PER_CHANNEL)
    with pytest.raises(TypeError, match="not torch"):
        NUMBA.quantize_into(torch.zeros(2, 3), Parts(qdata.view(torch.int8), scale), FP8_PER_CHANNEL)


def test_unaligned_source() -> None:
    """A file mapping may hand out elements at odd addresses."""
    source = torch.randn(64, 64).bfloat16()
    raw = bytearray(1 + source.numel() * 2)
    raw[1:] = source.view(torch.uint8).numpy().tobytes()
    odd = torch.frombuffer(raw, dtype=torch.bfloat16, offset=1, count=source.numel()).view(64, 64)
    assert odd.data_ptr() % 2 == 1
    want = quantized(TORCH, source, FP8_PER_CHANNEL)[0]
    assert_same_bytes(quantized(NUMBA, odd, FP8_PER_CHANNEL)[0], want)


def test_eight_threads_at_once() -> None:
    work = []
    for i in range(8):
        fmt = (FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_PER_BLOCK)[i % 3]
        source = torch.randn(1024 + i, 700, generator=torch.Generator().manual_seed(i)).bfloat16()
        work.append((source, fmt, *quantized(TORCH, source, fmt)))
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(source: torch.Tensor, fmt: WeightFormat, qdata: torch.Tensor, scale: torch.Tensor) -> None:
        try:
            start.wait()
            for _ in range(20):
                got = quantized(NUMBA, source, fmt)
                assert_same_bytes(got[0], qdata)
                assert_same_bytes(got[1], scale)
                NUMBA.linear(source[:2], got, fmt)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_quantizes_too() -> None:
    """The parent's pool is in use when the child starts; the child exits 0 when its bytes are right."""
    source = torch.randn(1024, 1024).bfloat16()
    qdata, _ = quantized(NUMBA, source, FP8_PER_CHANNEL)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            again = quantized(NUMBA, source, FP8_PER_CHANNEL)[0]
            # Compared by numpy: torch's own parallel loops hang in a child forked after they were used.
            code = 0 if (again.view(torch.uint8).numpy() == qdata.view(torch.uint8).numpy()).all() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_a_folder_for_the_compiled_code(tmp_path: Path) -> None:
    """Installed read-only, and no home to write to: it compiles in memory. A fresh process, started by spawn."""
    assert importlib.util.find_spec("qtensor") is not None
    code = (
        "import torch, numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "from qtensor.kernels import FP8_PER_CHANNEL as f, quantize_into\n"
        "q, s = torch.empty(2, 8, dtype=f.dtype), torch.empty(2, 1)\n"
        "quantize_into(torch.full((2, 8), 3.0), q, s, f, backend='numba')\n"
        "assert (q.float() == 448).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)


def test_no_thread_works_on_when_a_call_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever interrupts it, and then its wait for the others: what they write would come after a rollback."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # Some come where Python drops them.
    caller, helped, stopped = threading.get_ident(), 0, 0
    working: list[object] = []

    def work(start: int, stop: int) -> None:
        nonlocal helped
        if threading.get_ident() == caller:
            time.sleep(1e-4)
            return
        working.append(start)
        time.sleep(5e-4)
        working.remove(start)
        helped += 1

    for i in range(200):
        try:
            with timer(1e-4 * (i % 20), TimeoutError, again=2e-4):
                rows.share(16, 16 * rows.PIECE, work)
        except TimeoutError:
            stopped += 1
        assert working == []
    assert helped > 100
    assert stopped > 50
