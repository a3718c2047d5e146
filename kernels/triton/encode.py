"""Numbers in and out of fp32 inside a kernel: codes of e4m3fn, e2m1, int8 and int4, e8m0 scales, bf16, exact division.

`CAST`, a constexpr, says how fp32 becomes e4m3fn on the target:

satfinite    NVIDIA from compute capability 8.9: cvt.rn.satfinite.e4m3x2.f32, two elements an instruction
e2m1x2       NVIDIA from 10.0: that, and cvt.rn.satfinite.e2m1x2.f32 for pairs of 4-bit elements (`encode_e2m1_pairs`)
clamp        AMD gfx950 and gfx12: the hardware converts to OCP e4m3fn, but saturating is left to us
integer      everything else: sm_80 has no fp8; gfx942 only the fnuz format, whose bytes differ (bias 8, no -0)
interpreter  as integer; and since Triton's CPU interpreter truncates fp32 → bf16, that rounding is done on integers too

All of them give the same byte for every finite input: that of torch's round-to-nearest-even cast after a clamp to ±448.
NaN becomes a NaN byte; its sign is not promised.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def widen(x):
    """bf16, fp16 or fp32 → fp32, subnormals kept."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr, CAST: tl.constexpr):
    """fp32 → `dtype` (bf16, fp16 or fp32), round to nearest even."""
    if CAST == "interpreter" and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def restore(x, dtype: tl.constexpr, CAST: tl.constexpr):
    """As `narrow`, and within the range of `dtype`: rounding up near its end makes infinity of a finite weight."""
    limit = 65504.0 if dtype == tl.float16 else 3.3895313892515355e38 if dtype == tl.bfloat16 else 3.4028234663852886e38
    return narrow(tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL), dtype, CAST)


@triton.jit
def encode(x, CAST: tl.constexpr):
    """fp32 → e4m3fn code as uint8."""
    if CAST == "satfinite" or CAST == "e2m1x2":
        # In so many words, because Triton before 3.9 goes through a truncated fp16 on compute capability 8.9.
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,r,r,r,r",
            [x],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    if CAST == "clamp":
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Round the 23 mantissa bits to 3 and move the exponent bias from 127 to 7, in one addition and one shift.
    normal = (magnitude + (0x7FFFF - (120 << 23)) + ((magnitude >> 20) & 1)) >> 20
    # Below 2^-6 the codes count steps of 2^-9, which is the last place of an fp32 near 2^14.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode(code, CAST: tl.constexpr):
    """e4m3fn code as uint8 → fp32."""
    if CAST == "satfinite" or CAST == "e2m1x2" or CAST == "clamp":
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = code.to(tl.int32)
    magnitude = wide & 0x7F
    bits = (magnitude << 20) | ((wide & 0x80) << 24)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120 restores the exponent bias
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def divide(x, y, FUSED: tl.constexpr):
    """x / y rounded to nearest even, for x of any shape and few distinct y > 0; x is infinite only where y is.

    One reciprocal per y and five multiply-adds per x, in place of a dozen instructions and a branch per x: the
    quotient is corrected by its exact remainder twice, and by Markstein's theorem the second correction rounds as
    IEEE division does, for quotients that are normal numbers; a smaller one is far below the last e4m3 step.
    """
    if not FUSED:
        return tl.math.div_rn(x, y)
    reciprocal = tl.math.div_rn(1.0, y)
    # x / inf is 0, not the NaN that inf * 0 would make of the remainder.
    divisor = tl.where(y == float("inf"), 0.0, y)
    quotient = x * reciprocal
    # Remainder and reciprocal are both taken with their sign turned, so that a quotient of -0 plus a correction of 0
    # stays -0. Not by a minus: Triton before 3.8 computes 0 - x, which is never -0.
    turned = reciprocal * -1.0
    quotient = tl.fma(tl.fma(quotient, divisor, -x), turned, quotient)
    return tl.fma(tl.fma(quotient, divisor, -x), turned, quotient)


@triton.jit
def bring_within(x, scale, POWER: tl.constexpr = False):
    """Make infinities finite, yet large enough that their quotient by `scale` still saturates. NaN stays.
    POWER: the scale is a power of two, by which infinity may be divided; the largest fp32 is four times the largest."""
    limit = scale * 460.0
    if not POWER:
        limit = tl.minimum(limit, 3.4028234663852886e38)
    return tl.clamp(x, limit * -1.0, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reciprocal_or_zero(scale):
    """1 / scale; 0 where that is not finite."""
    inverse = tl.math.div_rn(1.0, scale)
    return tl.where(inverse < float("inf"), inverse, 0.0)


@triton.jit
def divide_or_zero(x, y, FUSED: tl.constexpr):
    """As `divide`, for any y >= 0 that is finite: 0 where y is 0."""
    # The reciprocal of a tiny y is infinite, and remainders of it are not exact. A power of two changes no quotient.
    larger = tl.where(y < 5.421010862427522e-20, 1.8446744073709552e19, 1.0)  # 2^-64, 2^64
    larger = tl.where(y == 0.0, 0.0, larger)  # Else a large x would become infinite, and times 0 NaN.
    x *= larger
    divisor = tl.where(y == 0.0, 1.0, y * larger)
    if not FUSED:
        return tl.where(y == 0.0, 0.0, tl.math.div_rn(x, divisor))
    reciprocal = tl.where(y == 0.0, 0.0, tl.math.div_rn(1.0, divisor))
    quotient = x * reciprocal
    turned = reciprocal * -1.0
    quotient = tl.fma(tl.fma(quotient, divisor, -x), turned, quotient)
    return tl.fma(tl.fma(quotient, divisor, -x), turned, quotient)


@triton.jit
def without_nan(x):
    """0 for NaN, which the 4-bit and integer formats do not have."""
    return tl.where(x == x, x, 0.0)


@triton.jit
def encode_int(x, LOWEST: tl.constexpr, LIMIT: tl.constexpr):
    """fp32, no NaN → signed integer in the low bits of int32, others above it: clamp, round half to even."""
    # 1.5 * 2^23: one unit in the last place is 1, and the sum's low bits are the integer's.
    return (tl.minimum(tl.maximum(x, LOWEST), LIMIT) + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def encode_e2m1(x):
    """fp32, no NaN → e2m1 code as int32."""
    magnitude = tl.minimum(tl.abs(x), 6.0)
    # Codes count steps of 0.5 below 2, of 1 below 4, of 2 above: the last places of an fp32 near 2^22, 2^23 and 2^24.
    # Each binade begins two codes above its count of steps; that even number may lie in those places beforehand.
    binade = tl.maximum(magnitude.to(tl.int32, bitcast=True), 0x3F800000) >> 23
    near = binade * ((1 << 23) + 2) + ((22 << 23) - 254)
    count = (magnitude + near.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return (count & 7) | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def encode_e2m1_pairs(low, high):
    """Where CAST is "e2m1x2": fp32, no NaN, of the same shape → bytes of two e2m1 codes each, the first one low."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b8 first, second, third, fourth;
        cvt.rn.satfinite.e2m1x2.f32 first, $5, $1;
        cvt.rn.satfinite.e2m1x2.f32 second, $6, $2;
        cvt.rn.satfinite.e2m1x2.f32 third, $7, $3;
        cvt.rn.satfinite.e2m1x2.f32 fourth, $8, $4;
        mov.b32 $0, {first, second, third, fourth};
        }""",
        "=r,r,r,r,r,r,r,r,r",
        [low, high],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def encode_element(x, ELEMENT: tl.constexpr, CAST: tl.constexpr, LOWEST: tl.constexpr = -7.0):
    """fp32, in units of the scale → code as uint8; a 4-bit one in the low bits of int32, where packing it is cheap. NaN
    is for e4m3 alone. LOWEST: of int4."""
    if ELEMENT == "e2m1":
        code = encode_e2m1(x)
    elif ELEMENT == "int4":
        code = encode_int(x, LOWEST, 7.0) & 0xF
    elif ELEMENT == "int8":
        code = encode_int(x, -127.0, 127.0).to(tl.uint8)
    else:
        code = encode(x, CAST)
    return code


@triton.jit
def decode_element(code, ELEMENT: tl.constexpr, CAST: tl.constexpr):
    """Code as uint8 → fp32."""
    if ELEMENT == "e2m1":
        wide = code.to(tl.int32)
        # Sign, exponent and mantissa in place, short of 2^126 for the exponent's bias.
        bits = ((wide & 7) << 22) | ((wide & 8) << 28)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    if ELEMENT == "int4":
        wide = code.to(tl.int32)
        return tl.where(wide > 7, wide - 16, wide).to(tl.float32)
    if ELEMENT == "int8":
        return code.to(tl.int8, bitcast=True).to(tl.float32)
    return decode(code, CAST)


@triton.jit
def integer(x):
    """fp32 of size 2^22 or less → the nearest integer, half to even, as int32."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def word_of_range(largest, below, dtype: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr):
    """fp32 largest element, and how far the lowest is below 0, both at least 0 → scale and zero point (int32) of a
    scale word, for a weight of `dtype`."""
    half = tl.where(tl.maximum(largest, below) > 8.507059173023462e37, 0.5, 1.0)  # 2^126
    step = tl.math.div_rn(largest * half + below * half, half * 15.0)
    bits = widen(narrow(step, dtype, CAST)).to(tl.int32, bitcast=True)
    if dtype == tl.float32:
        bits += 8
    step = (bits & -16).to(tl.float32, bitcast=True)
    zero = integer(tl.minimum(divide_or_zero(below, step, FUSED) - 8.0, 7.0))
    return step, tl.where(step == 0.0, 0, zero)


@triton.jit
def encode_from_zero(x, zero):
    """fp32, in units of the scale, no NaN, and its zero point → 4-bit code in the low bits of int32."""
    return tl.minimum(tl.maximum(integer(tl.minimum(tl.maximum(x, -64.0), 64.0)) + zero, -8), 7) & 0xF


@triton.jit
def word_step(word):
    return (word & -16).to(tl.float32, bitcast=True)


@triton.jit
def word_zero(word):
    """The zero point of a scale word, as fp32."""
    return ((word << 28) >> 28).to(tl.float32)


@triton.jit
def bf16_step(step):
    """fp32, not negative → fp32 that bfloat16 holds: the nearest, half to even, and 0 only of 0."""
    bits = step.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where((rounded == 0) & (bits != 0), 0x10000, rounded).to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(step):
    """fp32 that bfloat16 holds → its bits, int16."""
    return (step.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def of_bf16_bits(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """Biased exponent (int32, 0 to 254) → fp32 power of two; 0 gives 2^-127."""
    return tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)
