"""Searched scales: the choice that `formats.Search` defines, on values that are in registers anyway.

Errors are sums of integers, which no layout and no order changes. Where one comes from a product, either nothing but
exact steps follow that a compiler could fuse with it (4-bit elements, and powers of two), or `options` has the compiler
fuse nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ..formats import SEARCHES, WeightFormat
from .encode import (
    bf16_step,
    decode,
    decode_element,
    divide_or_zero,
    encode,
    encode_int,
    narrow,
    power_of_two,
    reciprocal_or_zero,
    widen,
)

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: the low bits of what is added to it are the integer.
_ROUND_BITS = tl.constexpr(0x4B400000)


def is_searched_here(fmt: WeightFormat) -> bool:
    """Whether the kernels know the format's search, for it may be somebody's own."""
    return fmt.search == SEARCHES.get(fmt.name)


def constants(fmt: WeightFormat) -> dict[str, object]:
    """The constexprs that tell the kernels a search; no candidates mean none."""
    if fmt.search is None:
        return {"CANDIDATES": (), "RESOLUTION": 1.0, "LIMIT": 1.0}
    return {"CANDIDATES": fmt.search.candidates, "RESOLUTION": fmt.search.resolution, "LIMIT": fmt.search.limit}


def options(fmt: WeightFormat) -> dict[str, bool]:
    """What a launch has to tell the compiler. Where it fuses by itself is Triton's to say otherwise."""
    fusible = fmt.search is not None and fmt.granularity in ("channel", "block")
    return {"enable_fp_fusion": False} if fusible else {}


@triton.jit
def rounded(x):
    """fp32 of size 2^22 or less → the nearest integer, half to even, as int32."""
    return (x + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS


@triton.jit
def without_nonfinite(value, dirty):
    """What was let through counts for nothing."""
    if dirty:
        value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
    return value


@triton.jit
def is_normal(scale):
    bits = scale.to(tl.int32, bitcast=True)
    return (bits >= 0x00800000) & (bits < 0x7F800000)


@triton.jit
def group_step(scale, whole, SCALE: tl.constexpr, CAST: tl.constexpr):
    """A stored scale (int32, or fp32) → what one unit of the elements is worth; `whole`: the global scale."""
    if SCALE == "e8m0":
        step = power_of_two(scale)
    elif SCALE == "e4m3":
        step = decode(scale.to(tl.uint8), CAST) * whole
    else:
        step = scale
    return step


@triton.jit
def distance(value, ELEMENT: tl.constexpr, UNIT: tl.constexpr):
    """From the value of the nearest 4-bit code, where `UNIT` is the number one."""
    if ELEMENT == "int4":
        return value - tl.maximum(tl.minimum((value + UNIT // 2) & -UNIT, 7 * UNIT), -8 * UNIT)
    span = tl.where(value < 2 * UNIT, UNIT // 2, tl.where(value < 4 * UNIT, UNIT, 2 * UNIT))
    return value - tl.minimum((value + span // 2) & -span, 6 * UNIT)


@triton.jit
def best_of_group(
    value, amax, plain, whole,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, CAST: tl.constexpr,
    CANDIDATES: tl.constexpr, RESOLUTION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Finite elements `[T, G]`, their amax and plain scale `[T, 1]` (of bfloat16 before it is rounded) → the scale to
    store."""
    exact = plain
    if SCALE == "bf16":
        plain = bf16_step(plain)
    plain_step = group_step(plain, whole, SCALE, CAST)
    UNIT: tl.constexpr = int(RESOLUTION)
    may = amax == amax
    if ELEMENT != "e4m3":
        inverse = reciprocal_or_zero(plain_step)
        size = value if ELEMENT == "int4" else tl.abs(value)
        fixed = rounded(size * inverse * (4.0 * RESOLUTION))
        most = amax * inverse * (4.0 * RESOLUTION)
        may = may & (most < 32767.5)
        most = rounded(tl.minimum(most, 32768.0))
    if ELEMENT == "int4":
        turn = tl.where(tl.max(fixed, 1, keep_dims=True) + tl.min(fixed, 1, keep_dims=True) > 0, -1, 1)
    best = plain
    for i in tl.static_range(len(CANDIDATES)):
        if SCALE == "fp32" or SCALE == "bf16":
            scale = exact * (CANDIDATES[i] if CANDIDATES[i] > 0 else -CANDIDATES[i])
            if SCALE == "bf16":
                scale = bf16_step(scale)
            there = is_normal(scale)
        else:
            scale = plain + CANDIDATES[i]
            there = (scale >= 1) & (scale <= (254 if SCALE == "e8m0" else 126))
            scale = tl.where(there, scale, 1)
        step = group_step(scale, whole, SCALE, CAST)
        if ELEMENT == "e4m3":
            scaled = value * power_of_two(254 - scale)
            there = there & (amax * power_of_two(254 - scale) <= LIMIT)
            off = rounded((scaled - decode_element(encode(scaled, CAST), ELEMENT, CAST)) * RESOLUTION)
        else:
            ratio = rounded(tl.minimum(tl.math.div_rn(plain_step, step) * 8192.0, 32767.0))
            there = there & (((most * ratio + 16384) >> 15) <= int(LIMIT * RESOLUTION))
            if (SCALE == "fp32" or SCALE == "bf16") and CANDIDATES[i] < 0:
                ratio *= turn
                scale *= turn.to(tl.float32)
            off = distance((fixed * ratio + 16384) >> 15, ELEMENT, UNIT)
        wide = step.to(tl.float64)
        error = tl.sum(off * off, axis=1, keep_dims=True).to(tl.float64) * (wide * wide)
        if i == 0:
            least = error
            may = may & there
        else:
            better = may & there & (error < least)
            least = tl.where(better, error, least)
            best = tl.where(better, scale, best)
    return best


@triton.jit
def total(off):
    """The squares of integers `[R, C]`, added up in 64 bits: `[R, 1]`. Those of 128 fit in 32."""
    square = off * off
    if off.shape[1] <= 128:
        return tl.sum(square, axis=1, keep_dims=True).to(tl.int64)
    some = tl.sum(tl.reshape(square, (off.shape[0], off.shape[1] // 128, 128)), axis=2)
    return tl.sum(some.to(tl.int64), axis=1, keep_dims=True)


@triton.jit
def channel_candidate(
    plain, amax, CANDIDATE: tl.constexpr, dtype: tl.constexpr, ELEMENT: tl.constexpr, CAST: tl.constexpr
):
    """The scale that a candidate of a row stands for. `plain` is that of fp8, which has a floor."""
    if ELEMENT == "int8":
        return widen(narrow(tl.math.div_rn(amax, 127.0) * CANDIDATE, dtype, CAST))
    return plain * CANDIDATE


@triton.jit
def channel_off(
    value, scale, dtype: tl.constexpr, RESOLUTION: tl.constexpr,
    ELEMENT: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """How far elements of rows are from the values of their codes: integers."""
    if ELEMENT == "int8":
        scaled = divide_or_zero(value, scale, FUSED)
        code = encode_int(widen(narrow(scaled, dtype, CAST)), -127.0, 127.0).to(tl.uint8)
    else:
        scaled = value * reciprocal_or_zero(scale)
        code = encode(scaled, CAST)
    return rounded((scaled - decode_element(code, ELEMENT, CAST)) * RESOLUTION)


@triton.jit
def channel_there(scale, amax, LIMIT: tl.constexpr, ELEMENT: tl.constexpr):
    if ELEMENT == "int8":
        largest = tl.math.div_rn(amax, tl.where(is_normal(scale), scale, 1.0))
    else:
        largest = amax * reciprocal_or_zero(scale)
    return is_normal(scale) & (largest <= LIMIT)


@triton.jit
def squared_step(scale):
    wide = scale.to(tl.float64)
    return wide * wide
