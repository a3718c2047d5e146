"""Numbers in and out of fp32 inside a kernel (kernels/triton/encode.py), on chips with and without fp8 units."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from qtensor.kernels import SOURCE_DTYPES
from qtensor.kernels.triton import encode, launch
from support.gpu.driver import simulated_gpu
from support.kernel_cases import assert_equal, canonical

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
N = 1024


@triton.jit
def encode_kernel(x, out, N: tl.constexpr, CAST: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, encode.encode(encode.widen(tl.load(x + at)), CAST))


@triton.jit
def decode_kernel(code, out, CAST: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out + at, encode.narrow(encode.decode(tl.load(code + at), CAST), out.dtype.element_ty, CAST))


@triton.jit
def divide_kernel(x, y, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, encode.divide(tl.load(x + at), tl.load(y + at), True))


@triton.jit
def divide_or_zero_kernel(x, y, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, encode.divide_or_zero(tl.load(x + at), tl.load(y + at), True))


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def cast(request: pytest.FixtureRequest) -> Iterator[str]:
    with simulated_gpu(request.param):
        yield launch.cast("cuda", request.param)


@triton.jit
def encode_e2m1_kernel(x, out, N: tl.constexpr, CAST: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    low, high = tl.load(x + 2 * at), tl.load(x + 2 * at + 1)
    if CAST == "e2m1x2":
        byte = encode.encode_e2m1_pairs(low, high)
    else:
        byte = (encode.encode_e2m1(low) | (encode.encode_e2m1(high) << 4)).to(tl.uint8)
    tl.store(out + at, byte)


@pytest.mark.parametrize("arch", [90, 100], ids=["sm_90", "sm_100"])
def test_encode_e2m1(arch: int) -> None:
    """Every code, every midpoint, and the fp32 numbers next to them; and of all magnitudes."""
    codes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([7.0, 1e30, math.inf])])
    bits = (points.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)).clamp(0, 0x7F800000)
    x = torch.cat([bits.flatten().view(torch.float32), torch.logspace(-44, 38, 2 * N - 7 * len(points))])
    x = torch.cat([x, -x])
    out = torch.empty(len(x) // 2, dtype=torch.uint8)
    with simulated_gpu(arch):
        encode_e2m1_kernel[(len(out) // N,)](x, out, N=N, CAST=launch.cast("cuda", arch))
    assert_equal(out, pack_e2m1(x))


def pack_e2m1(x: torch.Tensor) -> torch.Tensor:
    """As the format says: to the nearest value, of two that are as near the one with an even code."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    distance = (x.double().abs().clamp_max(6.0)[:, None] - values).abs()
    near = distance == distance.min(1, keepdim=True).values
    even = torch.arange(8) % 2 == 0
    code = torch.where((near & even).any(1), (near & even).int().argmax(1), near.int().argmax(1))
    code = code | (torch.signbit(x).long() << 3)
    return (code[::2] | (code[1::2] << 4)).to(torch.uint8)


def check_encode(x: torch.Tensor, cast: str) -> None:
    padded = torch.nn.functional.pad(x, (0, -len(x) % N))
    out = torch.empty(len(padded), dtype=torch.uint8)
    encode_kernel[(len(padded) // N,)](padded, out, N=N, CAST=cast)
    expected = padded.float().clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    assert_equal(canonical(out.view(torch.float8_e4m3fn)), canonical(expected))


def test_encode_every_bf16_and_fp16(cast: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    check_encode(every.view(torch.bfloat16), cast)
    check_encode(every.view(torch.float16), cast)


def test_encode_dense_fp32(cast: str) -> None:
    check_encode(torch.arange(0, 2**32, 4099, dtype=torch.int64).to(torch.int32).view(torch.float32), cast)
    # Every code, every midpoint between codes, and the fp32 numbers next to them.
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([464.0, 480.0, 1e30])])
    bits = (points.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)).clamp_min(0)
    near = bits.flatten().view(torch.float32)
    check_encode(torch.cat([near, -near]), cast)


def test_decode_every_code(cast: str) -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    for dtype in SOURCE_DTYPES:
        out = torch.empty(256, dtype=dtype)
        decode_kernel[(1,)](codes, out, CAST=cast)
        assert_equal(out, codes.view(torch.float8_e4m3fn).to(dtype))


def divided(x: torch.Tensor, y: torch.Tensor, kernel: Any = divide_kernel) -> torch.Tensor:
    out = torch.empty_like(x)
    with simulated_gpu(90):
        kernel[(len(x) // N,)](x, y, out, N=N)
    return out


def test_divide_rounds_as_ieee_does() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 64 * N
    y = torch.rand(6 * n, generator=generator).add_(0.5) * 2.0 ** torch.randint(-17, 100, (6 * n,)).float()
    # Quotients at and around the midpoints of e4m3, where a wrong last bit would change the byte, and arbitrary ones.
    codes = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    target = points[torch.randint(len(points), (3 * n,), generator=generator)]
    near = (target * y[: 3 * n]).view(torch.int32) + torch.randint(-2, 3, (3 * n,), dtype=torch.int32)
    x = torch.cat([near.view(torch.float32), torch.randn(3 * n, generator=generator) * y[3 * n :] * 100])
    out, expected = divided(x, y), torch.from_numpy(np.divide(x.numpy(), y.numpy()))
    normal = expected.abs() >= 2.0**-30  # Anything smaller encodes to zero.
    assert_equal(out[normal], expected[normal])
    assert (out[~normal].abs() < 2.0**-29).all()


def test_divide_by_any_scale() -> None:
    """Down to the smallest subnormal number and up to the largest scale of int4, and by none."""
    generator = torch.Generator().manual_seed(1)
    exponent = torch.randint(-149, 125, (32 * N,), generator=generator).float()
    y = (torch.rand(32 * N, generator=generator) + 1) * 2.0**exponent
    x = y * (torch.randn(32 * N, generator=generator) * 3).clamp(-7, 7)
    y[::100] = 0.0
    expected = torch.from_numpy(np.where(y.numpy() == 0, np.float32(0), np.divide(x.numpy(), np.where(y == 0, 1, y))))
    found = divided(x, y, divide_or_zero_kernel)
    visible = expected.abs() > 2.0**-20  # Smaller ones round to zero.
    assert_equal(found[visible], expected[visible])
    assert (found[~visible].abs() < 2.0**-19).all()


def test_divide_by_infinity_and_nan() -> None:
    x = torch.tensor([1.0, -2.0, 0.0, math.inf, math.nan, 3.0, math.nan, 5.0]).repeat(N // 8)
    y = torch.tensor([math.inf, math.inf, math.inf, math.inf, math.inf, math.nan, 2.0, 4.0]).repeat(N // 8)
    assert_equal(divided(x, y), x / y)
