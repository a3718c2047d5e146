"""Other tools' arithmetic, as `recipes.Recipe` says, in place of our own formulas in the kernels that quantize.

RECIPE, a constexpr, has a recipe's fields: what amax becomes, the smallest integer, whether a scale of 0 stays and
divides as 1 does ("one"), how a power of two is found ("above", else "nearest"), whether quotients are rounded to the
source's dtype, and whether those that are 0 lose their sign. It is empty for our own formulas, whose machine code is
what it would be without this file.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ..formats import WeightFormat
from .encode import divide_or_zero, encode, integer, narrow, power_of_two, widen


def constants(fmt: WeightFormat) -> dict[str, object]:
    """The constexpr that tells the kernels a recipe."""
    own = fmt.recipe
    if own is None:
        return {"RECIPE": ()}
    is_one, is_above = own.empty == "one", own.power == "above"
    return {"RECIPE": (own.levels, fmt.lowest, is_one, is_above, own.rounds, own.drops_sign)}


@triton.jit
def through(x, dtype: tl.constexpr, CAST: tl.constexpr):
    """fp32 → fp32, rounded to `dtype`."""
    return widen(narrow(x, dtype, CAST))


@triton.jit
def or_epsilon(scale, dtype: tl.constexpr):
    epsilon = 0.0009765625 if dtype == tl.float16 else 0.0078125 if dtype == tl.bfloat16 else 1.1920928955078125e-07
    return tl.where(scale == 0.0, epsilon, scale)


@triton.jit
def recipe_scale(amax, dtype: tl.constexpr, CAST: tl.constexpr, RECIPE: tl.constexpr):
    """fp32 amax → the scale to store in fp32."""
    scale = through(tl.math.div_rn(amax, RECIPE[0]), dtype, CAST)
    return scale if RECIPE[2] else or_epsilon(scale, dtype)


@triton.jit
def divisor_of(scale, RECIPE: tl.constexpr):
    """A scale in fp32 → what elements are divided by."""
    if len(RECIPE) > 0:
        scale = tl.where(scale == 0.0, 1.0, scale)
    return scale


@triton.jit
def recipe_exponent(amax, dtype: tl.constexpr, RECIPE: tl.constexpr):
    """fp32 amax → biased exponent of its group's scale, as int32."""
    if RECIPE[3]:
        bits = tl.math.div_rn(amax, RECIPE[0]).to(tl.int32, bitcast=True)
        return tl.where(bits <= 0x400000, 0, (bits + 0x7FFFFF) >> 23)
    LESS: tl.constexpr = 8 if RECIPE[0] == 256.0 else 2
    # Rounding is of the dtype's own bits, and fp16 holds no power of two for what it rounds to 0.
    normal = tl.maximum(amax, 6.103515625e-05) if dtype == tl.float16 else amax
    exponent = tl.maximum(((normal.to(tl.int32, bitcast=True) + 0x200000) >> 23) - LESS, 0)
    if dtype == tl.float16:
        exponent = tl.where(amax < 0.75 * 6.103515625e-05, 127, exponent)
    return exponent


@triton.jit
def divisor_of_power(exponent, RECIPE: tl.constexpr):
    step = power_of_two(exponent)
    if RECIPE[2]:
        step = tl.where(exponent == 0, 1.0, step)
    return step


@triton.jit
def recipe_code(amax, gain, dtype: tl.constexpr, CAST: tl.constexpr, RECIPE: tl.constexpr):
    """fp32 amax → its group's scale in e4m3, beside the matrix's gain."""
    scale = through(tl.math.div_rn(amax, RECIPE[0]), dtype, CAST)
    code = encode(tl.minimum(gain * scale, 448.0), CAST)
    return tl.where(code == 0, 0x20, code).to(tl.uint8)  # 0.125


@triton.jit
def finite_or_zero(step):
    """What nothing is many steps of: a range may be infinite."""
    return tl.where(step < float("inf"), step, 0.0)


@triton.jit
def recipe_word(
    largest, below, dtype: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr, RECIPE: tl.constexpr
):  # fmt: skip
    """As `encode.word_of_range`."""
    scale = through(tl.math.div_rn(through(largest + below, dtype, CAST), RECIPE[0]), dtype, CAST)
    step = or_epsilon(scale, dtype)
    quotient = through(divide_or_zero(below, finite_or_zero(step), FUSED), dtype, CAST)
    # Where nothing is left of a scale, anything below 0 is infinitely many steps below it.
    zero = tl.where(scale == 0.0, tl.where(below > 0.0, 7.0, 0.0), through(quotient - 8.0, dtype, CAST))
    bits = step.to(tl.int32, bitcast=True) & -16
    return bits.to(tl.float32, bitcast=True), integer(tl.minimum(tl.maximum(zero, -8.0), 7.0))


@triton.jit
def recipe_units(x, divisor, dtype: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr, RECIPE: tl.constexpr):
    """Elements divided by positive numbers, and rounded as the recipe says."""
    scaled = divide_or_zero(x, divisor, FUSED)
    if RECIPE[4]:
        scaled = through(scaled, dtype, CAST)
    if RECIPE[5]:
        # Halved, because neither a quotient of 2^-150, which is rounded to 0, nor its divisor times that is a number.
        half: tl.constexpr = 3.7778931862957162e22  # 2^75
        scaled = tl.where(tl.abs(x) * half <= divisor * (1.0 / half), 0.0, scaled)
    return scaled


@triton.jit
def recipe_units_of_power(x, divisor, dtype: tl.constexpr, RECIPE: tl.constexpr):
    """The same for powers of two: rounding changes nothing but what is too small for any code, which may become 0."""
    bits = divisor.to(tl.int32, bitcast=True)
    inverse = ((254 << 23) - tl.where(bits == 0x400000, 0, bits)).to(tl.float32, bitcast=True)
    scaled = x * inverse
    if RECIPE[5]:
        # The bits of half of the dtype's smallest number, if that is what quotients are rounded to: 2^-25, 2^-134.
        half = 0x33000000 if dtype == tl.float16 and RECIPE[4] else 0x8000 if dtype == tl.bfloat16 and RECIPE[4] else 0
        scaled = tl.where((scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF) <= half, 0.0, scaled)
    return scaled


@triton.jit
def recipe_units_from_zero(x, step, zero, dtype: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr):
    """Elements by the step and the zero point of a scale word."""
    scaled = divide_or_zero(x, finite_or_zero(step), FUSED)
    # fp32 has scales of which nothing is left in a scale word: quotients are infinite, or 0.
    ends = tl.where(x > 0.0, 64.0, tl.where(x < 0.0, -64.0, 0.0))
    scaled = tl.where(step == 0.0, ends, through(scaled, dtype, CAST))
    return through(scaled + zero.to(tl.float32), dtype, CAST)
