"""Other tools' arithmetic, as `recipes.Recipe` says, in place of the formulas of `encoders`: each recipe is a constant
of the loops that are compiled for it.

Most recipes divide and round the quotient to the source's type, so elements pass through more instructions than those
of our formulas do; what finds amax, and what walks along rows, is the same.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from numba import types  # type: ignore[attr-defined]

from ..formats import LOWEST, ZERO_BITS
from ..recipes import OWN
from .encoders import BLOCK, E8M0, IN_FP32, NV, ZEROED, Encoder
from .instructions import (
    BF16,
    CHUNK,
    E4M3,
    FLOAT,
    FP16,
    FP32,
    I8,
    I32,
    INT4,
    INT8,
    LANES,
    int64,
    intrinsic,
    splat,
    vector,
)

_EPSILON = {BF16: 2.0**-7, FP16: 2.0**-10, FP32: 2.0**-23}
_HALF_OF_SMALLEST = {BF16: 134, FP16: 25, FP32: 150}  # 2 to minus these, which become 0; all that is more does not.


class RecipeEncoder(Encoder):
    """Writes what quantizes by a recipe.

    Args:
        number: Of the recipe, in `recipes.OWN`.
    """

    def __init__(
        self, context: Any, builder: Any, number: int, dtype: int, element: int, scale: int, group: int
    ) -> None:
        super().__init__(context, builder, dtype, element, scale, group)
        self.recipe = OWN[number]
        self.has_short_scales = scale != NV
        if scale == NV:
            self.divides, self.kept = True, 2

    # Scales.

    def scales(self, amax: Any, gain: Any) -> tuple[Any, Any]:
        b, recipe = self.b, self.recipe
        if self.scale == E8M0:
            exponent = self.exponent(amax)
            factor = self.inverse_power(exponent)
            if recipe.empty == "one":
                factor = b.select(b.icmp_signed("==", exponent, splat(I32, 0)), splat(FLOAT, 1.0), factor)
            return b.trunc(exponent, vector(I8)), factor
        scale = self.through(b.fdiv(amax, splat(FLOAT, recipe.levels)))
        if self.scale == NV:
            matrix = self.broadcast(self.load(gain, FLOAT, 4))
            codes = self.e4m3(b.fmul(matrix, scale))
            codes = b.select(b.icmp_signed("==", codes, splat(I32, 0)), splat(I32, 0x20), codes)  # of 0.125
            return b.trunc(codes, vector(I8)), b.fdiv(self.from_e4m3(codes), matrix)
        if recipe.empty == "epsilon":
            return (self.as_stored(self.or_epsilon(scale)),) * 2
        return scale, b.select(b.fcmp_ordered("==", scale, splat(FLOAT, 0.0)), splat(FLOAT, 1.0), scale)

    def or_epsilon(self, scale: Any) -> Any:
        is_zero = self.b.fcmp_ordered("==", scale, splat(FLOAT, 0.0))
        return self.b.select(is_zero, splat(FLOAT, _EPSILON[self.dtype]), scale)

    def exponent(self, amax: Any) -> Any:
        """The codes of e8m0 scales."""
        b, recipe = self.b, self.recipe
        if recipe.power == "above":
            return self.power_above(b.fdiv(amax, splat(FLOAT, recipe.levels)))
        less = int(recipe.levels).bit_length() - 1
        if self.dtype != FP16:
            return self.nearest_power(amax, less)
        code = self.nearest_power(self.at_least(amax, 2.0**-14), less)
        return b.select(b.fcmp_ordered("<", amax, splat(FLOAT, 0.75 * 2.0**-14)), splat(I32, 127), code)

    def words_of_range(self, largest: Any, below: Any) -> tuple[Any, Any, Any]:
        b = self.b
        scale = self.through(b.fdiv(self.through(b.fadd(largest, below)), splat(FLOAT, self.recipe.levels)))
        zero = self.through(b.fadd(splat(FLOAT, LOWEST), self.through(b.fdiv(below, scale))))
        zero = self.without_nan(zero)
        for limit, order in ((7.0, ">"), (LOWEST, "<")):
            zero = b.select(b.fcmp_ordered(order, zero, splat(FLOAT, limit)), splat(FLOAT, limit), zero)
        zero = self.call(f"llvm.rint.v{LANES}f32", zero.type, zero)
        step = b.and_(b.bitcast(self.or_epsilon(scale), vector(I32)), splat(I32, ~ZERO_BITS))
        bits = b.and_(b.fptosi(zero, vector(I32)), splat(I32, ZERO_BITS))
        return b.or_(step, bits), b.bitcast(step, vector(FLOAT)), zero

    def without_nan(self, value: Any) -> Any:
        return self.b.select(self.b.fcmp_unordered("uno", value, value), splat(FLOAT, 0.0), value)

    def block_scale(self, amax: Any) -> tuple[Any, Any]:
        return self.scales(amax, None)

    # Elements.

    def scaled_block(self, source: Any, codes: Any, factor: Any) -> None:
        factors = [factor, self.b.fdiv(splat(FLOAT, 1.0), factor)]
        with self.b.if_else(self.are_usual(factor)) as usual_or_not:
            for case, exactly in zip(usual_or_not, (False, True), strict=True):
                with case:
                    for column in range(0, BLOCK, CHUNK):
                        here = self.b.add(source, int64(column * self.size))
                        self.encode(here, factors, self.b.add(codes, int64(column)), exactly)

    def encode(self, source: Any, factors: list[Any], codes: Any, exactly: bool) -> None:
        even, odd = (self.code(value, factors, exactly) for value in self.pairs(self.words(source)))
        self.store_codes(even, odd, codes)

    def code(self, value: Any, factors: list[Any], exactly: bool) -> Any:
        b, recipe = self.b, self.recipe
        through = self.through if exactly else self.through_quotient
        if not self.divides:  # Nothing is lost by a power of two, but for what is too small for any code.
            scaled = b.fmul(value, factors[0])
        else:
            scaled = b.fdiv(value, factors[0]) if exactly else self.divided(value, *factors[:2])
            scaled = through(scaled) if recipe.rounds else scaled
        if self.scale == ZEROED:  # fp32 has scales of which nothing is left in a scale word.
            scaled = through(b.fadd(self.without_nan(scaled) if exactly else scaled, factors[2]))
        if self.element in (INT8, INT4):
            largest = 127.0 if self.element == INT8 else 7.0
            return self.integers(scaled, largest, recipe.lowest or -largest)
        if recipe.drops_sign:
            value = b.select(self.vanishes(value, scaled, factors[0]), splat(FLOAT, 0.0), value)
        if self.element == E4M3:
            return self.e4m3(scaled, value)
        sign = b.and_(b.lshr(b.bitcast(value, vector(I32)), splat(I32, 28)), splat(I32, 8))
        return b.or_(self.e2m1(self.magnitude(scaled)), sign)

    def magnitude(self, value: Any) -> Any:
        bits = self.b.and_(self.b.bitcast(value, vector(I32)), splat(I32, 0x7FFFFFFF))
        return self.b.bitcast(bits, vector(FLOAT))

    def vanishes(self, value: Any, scaled: Any, factor: Any) -> Any:
        """Whether a quotient, rounded, is 0. `divided` is not exact for such small ones."""
        b, places = self.b, _HALF_OF_SMALLEST[self.dtype if self.recipe.rounds else FP32]
        if self.divides:
            limit = b.fmul(factor, splat(FLOAT, 2.0 ** (75 - places)))
            return b.fcmp_ordered("<=", b.fmul(self.magnitude(value), splat(FLOAT, 2.0**75)), limit)
        return b.fcmp_ordered("<=", self.magnitude(scaled), splat(FLOAT, 2.0**-places if places < 150 else 0.0))


@intrinsic(prefer_literal=True)
def recipe_row(typing_context, number, dtype, element, scale, group, source, codes, scales, cols, gain):
    """As `encoders.quantize_row`, by a recipe."""
    numbers = [kind.literal_value for kind in (number, dtype, element, scale, group)]

    def emit(context, builder, signature, args):
        encoder = RecipeEncoder(context, builder, *numbers)
        (encoder.row_of_groups if encoder.group else encoder.row)(*args[5:])
        return context.get_dummy_value()

    return types.void(number, dtype, element, scale, group, *[types.int64] * 5), emit


def _of_e4m3(method: str, number: Any, dtype: Any) -> Any:
    numbers = number.literal_value, dtype.literal_value

    def emit(context, builder, signature, args):
        getattr(RecipeEncoder(context, builder, *numbers, E4M3, IN_FP32, 0), method)(*args[2:])
        return context.get_dummy_value()

    return emit


@intrinsic(prefer_literal=True)
def recipe_block_scales(typing_context, number, dtype, found, count, scales, factors):
    """As `encoders.block_scales`, by a recipe: factors are to be divided by."""
    return types.void(number, dtype, *[types.int64] * 4), _of_e4m3("block_scales", number, dtype)


@intrinsic(prefer_literal=True)
def recipe_scaled_row(typing_context, number, dtype, source, codes, cols, factors, step):
    """As `encoders.scaled_row`, by a recipe: divided by factors."""
    return types.void(number, dtype, *[types.int64] * 5), _of_e4m3("scaled_row", number, dtype)
