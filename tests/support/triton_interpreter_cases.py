"""The cases of test_triton_kernels.py, to be run with TRITON_INTERPRET=1.

Directly: TRITON_INTERPRET=1 pytest tests/support/triton_interpreter_cases.py

Bytes are compared exactly, except that any NaN byte equals any other: the sign of a NaN is not promised.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from qtensor.kernels import (
    FORMATS,
    FP8_PER_BLOCK,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    SOURCE_DTYPES,
    Audit,
    NonFinite,
    Parts,
    WeightFormat,
)
from qtensor.kernels.reference import TORCH
from qtensor.kernels.triton import TRITON, activation, encode, launch, per_channel, per_tensor
from support.kernel_contract import assert_gives_the_references_results

FUSED = launch.target(torch.device("cpu"))["FUSED"]
few = settings(
    max_examples=100 if os.environ.get("QTENSOR_ENDURANCE") else 12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)

VALUES = ("normal", "zeros", "subnormal", "edges", "huge", "one outlier")


def make_values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "zeros":
        x = torch.zeros(shape) * x.sign()
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).tiny * 0.25
    elif kind == "edges":
        grid = torch.tensor([448.0, -448.0, 464.0, 432.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 2.0**-6, 0.0, -0.0, 17.0])
        x = grid[torch.randint(len(grid), shape, generator=generator)]
    elif kind == "huge":
        x = x.clamp(-1, 1) * torch.finfo(dtype).max
    elif kind == "one outlier" and x.numel():
        x.view(-1)[seed % x.numel()] = 1e4
    return x.to(dtype)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, reached by other strides."""
    if layout == "column slice":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), 77.0, dtype=x.dtype)
        wide[..., 2 : 2 + x.shape[-1]] = x
        return wide[..., 2 : 2 + x.shape[-1]]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every other":
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, ::2]
    return x


sizes = st.sampled_from([1, 2, 3, 16, 17, 127, 128, 129, 200])
shapes = st.one_of(
    st.tuples(sizes, sizes),
    st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 130]), st.sampled_from([1, 5, 16, 130])),
    st.sampled_from([(0, 4), (4, 0), (0, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)]),
)
sources = st.builds(
    lambda shape, kind, dtype, seed, layout: lay_out(make_values(kind, shape, dtype, seed), layout),
    shapes,
    st.sampled_from(VALUES),
    st.sampled_from(SOURCE_DTYPES),
    st.integers(0, 2**20),
    st.sampled_from(["contiguous", "column slice", "transposed", "every other"]),
)


def destination(shape: tuple[int, ...], fmt: WeightFormat) -> tuple[Parts, torch.Tensor]:
    """Parts with values and scales as row ranges of larger tensors, and the larger values."""
    *lead, rows, _ = shape
    big = torch.full((*lead, rows + 3, fmt.qdata_shape(shape)[-1]), 0x55, dtype=torch.uint8)
    scale = torch.full(fmt.scale_shape(shape), 9.0).to(fmt.scale_dtype)
    if fmt.granularity in ("channel", "group"):
        scale = torch.full((*lead, rows + 3, scale.shape[-1]), 9.0).to(fmt.scale_dtype)[..., 1 : 1 + rows, :]
    whole = fmt.global_scale_shape(shape)
    whole_scale = None if whole is None else torch.full(whole, 9.0)
    return Parts(big[..., 1 : 1 + rows, :].view(fmt.dtype), scale, whole_scale), big


def canonical(codes: torch.Tensor) -> torch.Tensor:
    raw = codes.view(torch.uint8)
    if codes.dtype != torch.float8_e4m3fn:
        return raw
    return torch.where(raw & 0x7F == 0x7F, 0x7F, raw)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if actual.dtype == torch.float8_e4m3fn:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_equal_parts(actual: Parts, expected: Parts) -> None:
    assert_equal(canonical(actual.qdata.contiguous()), canonical(expected.qdata))
    for ours, wanted in zip(actual[1:], expected[1:], strict=True):
        assert_equal(ours, wanted)


def check(source: torch.Tensor, fmt: WeightFormat, refuse: bool = True) -> None:
    expected, _ = destination(source.shape, fmt)
    actual, around = destination(source.shape, fmt)
    old, new = Audit(refuse, measure_sqnr=True), Audit(refuse, measure_sqnr=True)
    TORCH.quantize_into(source, expected, fmt, old)
    TRITON.quantize_into(source, actual, fmt, new)
    new.verify()
    assert_equal_parts(actual, expected)
    assert (around[..., 0, :] == 0x55).all(), "wrote before its rows"
    assert (around[..., -2:, :] == 0x55).all(), "wrote past its rows"
    if math.isfinite(old.signal) and old.signal > 1e-30:
        assert math.isclose(new.signal, old.signal, rel_tol=1e-5)
        assert math.isclose(new.noise, old.noise, rel_tol=1e-4, abs_tol=1e-12 * old.signal)


@formats
def test_contract(fmt: WeightFormat) -> None:
    assert_gives_the_references_results(TRITON, fmt)


@formats
@few
@given(source=sources)
def test_quantize(fmt: WeightFormat, source: torch.Tensor) -> None:
    check(source, fmt)


@formats
@few
@given(source=sources, data=st.data())
def test_non_finite(fmt: WeightFormat, source: torch.Tensor, data: st.DataObject) -> None:
    if source.numel() == 0:
        return
    for _ in range(data.draw(st.integers(1, 3))):
        where = tuple(data.draw(st.integers(0, n - 1)) for n in source.shape)
        source[where] = data.draw(st.sampled_from([math.nan, -math.nan, math.inf, -math.inf]))
    check(source, fmt, refuse=False)

    parts, _ = destination(source.shape, fmt)
    audit = Audit()
    TRITON.quantize_into(source, parts, fmt, audit, 1000)
    first = int((~torch.isfinite(source.reshape(-1))).nonzero()[0])
    with pytest.raises(NonFinite) as refused:
        audit.verify()
    assert refused.value.index == 1000 + first
    assert str(refused.value.value) == str(float(source.reshape(-1)[first])).replace("-nan", "nan")
    audit.verify()  # reported once
    with pytest.raises(NonFinite):
        TRITON.quantize_into(source, parts, fmt)


@formats
def test_every_row_of_infinities_and_zeros(fmt: WeightFormat) -> None:
    source = torch.zeros(4, 130)
    source[1], source[2, 3], source[3, 129] = math.inf, -math.inf, math.nan
    check(source, fmt, refuse=False)


def test_rows_too_long_for_one_pass() -> None:
    for cols in (4097, 2 * 8192 + 5):
        source = make_values("one outlier", (3, cols), torch.bfloat16, 4000)
        source[1, cols - 1], source[2, 5] = math.inf, math.nan
        (expected, _), (actual, _) = (destination(source.shape, FP8_PER_CHANNEL) for _ in range(2))
        TORCH.quantize_into(source, expected, FP8_PER_CHANNEL, Audit(False))
        per_channel.quantize(source, actual, FP8_PER_CHANNEL, Audit(False), 0, one_pass_cols=4096)
        assert_equal_parts(actual, expected)
        check(source, FP8_PER_TENSOR, refuse=False)
        check(source, FP8_PER_BLOCK, refuse=False)
        check_activation(source, FP8_PER_CHANNEL, one_pass_cols=4096)


def test_amax_accumulates_write_by_write() -> None:
    source = make_values("normal", (60, 40), torch.bfloat16, 5)
    amax = torch.zeros(1)
    for rows in (slice(40, 60), slice(0, 10), slice(5, 40), slice(0, 10)):
        per_tensor.accumulate_amax(source[rows], amax, Audit(), 0)
    assert amax.item() == source.abs().max().item()
    (expected, _), (actual, _) = (destination(source.shape, FP8_PER_TENSOR) for _ in range(2))
    TORCH.quantize_into(source, expected, FP8_PER_TENSOR)
    per_tensor.scale_and_cast(source, amax, actual, Audit())
    assert_equal_parts(actual, expected)


@formats
def test_offsets_beyond_32_bits(fmt: WeightFormat) -> None:
    far = 2**31 + 64  # Never touched but for two matrices, so it costs address space alone.
    x = torch.empty(far + 1000, dtype=torch.bfloat16).as_strided((2, 3, 40), (far, 40, 1))
    stored = fmt.qdata_shape((2, 3, 40))
    q = torch.empty(far + 1000, dtype=torch.uint8).as_strided(stored, (far, 40, 1)).view(fmt.dtype)
    x.copy_(make_values("normal", (2, 3, 40), torch.bfloat16, 1))
    expected, _ = destination((2, 3, 40), fmt)
    actual = Parts(q, *Parts.of((2, 3, 40), fmt)[1:])
    TORCH.quantize_into(x, expected, fmt)
    TRITON.quantize_into(x, actual, fmt)
    assert_equal_parts(actual, expected)
    assert_equal(*(backend.dequantize(actual, fmt, torch.float32) for backend in (TRITON, TORCH)))


def check_activation(x: torch.Tensor, fmt: WeightFormat, one_pass_cols: int = 16384) -> None:
    expected, expected_scale = TORCH.quantize_activation(x, fmt)
    group = fmt.block[1] if fmt.granularity == "block" else max(x.shape[1], 1)
    actual, scale = activation.quantize(x, group, one_pass_cols)
    assert_equal(canonical(actual), canonical(expected.contiguous()))
    assert_equal(scale, expected_scale)


@pytest.mark.parametrize("fmt", [FP8_PER_CHANNEL, FP8_PER_BLOCK], ids=["token", "group"])
@few
@given(source=sources, poison=st.sampled_from([None, math.nan, math.inf, -math.inf]), seed=st.integers(0, 1000))
def test_activation(fmt: WeightFormat, source: torch.Tensor, poison: float | None, seed: int) -> None:
    if source.dim() != 2 or source.shape[1] == 0:
        return
    if poison is not None and source.numel():
        source[seed % source.shape[0], seed % source.shape[1]] = poison
    check_activation(source, fmt)


@formats
@few
@given(shape=shapes, dtype=st.sampled_from(SOURCE_DTYPES), seed=st.integers(0, 1000), into=st.booleans())
def test_dequantize(fmt: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype, seed: int, into: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    qdata = torch.randint(0, 256, fmt.qdata_shape(shape), generator=generator, dtype=torch.uint8).view(fmt.dtype)
    scale = torch.rand(fmt.scale_shape(shape), generator=generator) * 10.0 ** (seed % 9 - 4)
    if fmt.scale_dtype != torch.float32:
        scale = torch.randint(0, 127, scale.shape, generator=generator, dtype=torch.uint8).view(fmt.scale_dtype)
    whole = fmt.global_scale_shape(shape)
    parts = Parts(qdata, scale, None if whole is None else torch.full(whole, 9.0))
    out = torch.empty((*shape[:-1], shape[-1] + 3), dtype=dtype)[..., 1 : 1 + shape[-1]] if into else None
    if out is None and fmt.per_byte == 2:
        out = torch.empty(shape, dtype=dtype)
    actual = TRITON.dequantize(parts, fmt, dtype, out)
    assert_equal(actual, TORCH.dequantize(parts, fmt, dtype, torch.empty(shape, dtype=dtype)))


def test_refuses_what_it_cannot_do() -> None:
    parts = Parts.of((2, 2), FP8_PER_CHANNEL)
    with pytest.raises(TypeError, match="float64"):
        TRITON.quantize_into(torch.zeros(2, 2, dtype=torch.float64), parts, FP8_PER_CHANNEL)
    other = WeightFormat("fp8_e5m2", torch.float8_e5m2, 57344.0, "channel")
    with pytest.raises(TypeError, match="e5m2"):
        TRITON.quantize_into(torch.zeros(2, 2), parts, other)


@triton.jit
def loop_kernel(out, n):
    for i in range(n):
        tl.store(out, i)


try:
    loop_kernel[(1,)](torch.zeros(1, dtype=torch.int32), 2)
except Exception as error:
    why = f"this Triton's interpreter does not work with NumPy {np.__version__}: {error}"
    pytest.skip(why, allow_module_level=True)


@triton.jit
def encode_kernel(x, out, N: tl.constexpr, CAST: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, encode.encode(encode.widen(tl.load(x + at)), CAST))


@triton.jit
def decode_kernel(code, out, CAST: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out + at, encode.narrow(encode.decode(tl.load(code + at), CAST), out.dtype.element_ty, CAST))


@triton.jit
def divide_kernel(x, y, out, N: tl.constexpr, FUSED: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, encode.divide(tl.load(x + at), tl.load(y + at), FUSED))


def check_encode(x: torch.Tensor) -> None:
    n = 1 << 16
    padded = torch.nn.functional.pad(x, (0, -len(x) % n))
    out = torch.empty(len(padded), dtype=torch.uint8)
    encode_kernel[(len(padded) // n,)](padded, out, N=n, CAST="integer")
    expected = padded.float().clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    assert_equal(canonical(out.view(torch.float8_e4m3fn)), canonical(expected))


def test_encode_every_bf16_and_fp16() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    check_encode(every.view(torch.bfloat16))
    check_encode(every.view(torch.float16))


def test_encode_dense_fp32() -> None:
    sample = torch.arange(0, 2**32, 2003, dtype=torch.int64).to(torch.int32).view(torch.float32)
    check_encode(sample)
    # Every code, every midpoint between codes, and the fp32 numbers next to them.
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([464.0, 480.0, 1e30])])
    bits = (points.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)).clamp_min(0)
    near = bits.flatten().view(torch.float32)
    check_encode(torch.cat([near, -near]))


def test_decode_every_code() -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    for dtype in SOURCE_DTYPES:
        out = torch.empty(256, dtype=dtype)
        decode_kernel[(1,)](codes, out, CAST="interpreter")
        assert_equal(out, codes.view(torch.float8_e4m3fn).to(dtype))


@pytest.mark.skipif(not FUSED, reason="this Triton's interpreter rounds an fma twice")
def test_divide_rounds_as_ieee_does() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 1 << 16
    y = torch.rand(12 * n, generator=generator).add_(0.5) * 2.0 ** torch.randint(-17, 100, (12 * n,)).float()
    # Quotients at and around the midpoints of e4m3, where a wrong last bit would change the byte, and arbitrary ones.
    codes = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    target = points[torch.randint(len(points), (6 * n,), generator=generator)]
    near = (target * y[: 6 * n]).view(torch.int32) + torch.randint(-2, 3, (6 * n,), dtype=torch.int32)
    x = torch.cat([near.view(torch.float32), torch.randn(6 * n, generator=generator) * y[6 * n :] * 100])
    out = torch.empty_like(x)
    divide_kernel[(12,)](x, y, out, N=n, FUSED=True)
    expected = torch.from_numpy(np.divide(x.numpy(), y.numpy()))
    normal = expected.abs() >= 2.0**-30  # Anything smaller encodes to zero.
    assert_equal(out[normal], expected[normal])
    assert (out[~normal].abs() < 2.0**-29).all()


def test_divide_by_infinity_and_nan() -> None:
    x = torch.tensor([1.0, -2.0, 0.0, math.inf, math.nan, 3.0, math.nan, 5.0])
    y = torch.tensor([math.inf, math.inf, math.inf, math.inf, math.inf, math.nan, 2.0, 4.0])
    out = torch.empty(8)
    divide_kernel[(1,)](x, y, out, N=8, FUSED=True)
    assert_equal(out, x / y)
