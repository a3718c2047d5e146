"""What a search of scales measures: the errors of a chunk's elements with one candidate, squared, as integers' sums.

Of 8-bit elements they are found in floats, of 4-bit ones in integers of 16 bits; each sum is of the squares of an even
column and the odd one beside it, or of others, since sums of integers have no order. See `formats.Search`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from ..formats import E4M3_MAX, LOWEST, SEARCHES
from .encoders import _ROUND, E8M0, IN_BF16, IN_FP32, NV, Encoder
from .instructions import (
    BF16,
    CHUNK,
    E2M1,
    E4M3,
    FLOAT,
    I8,
    I16,
    I32,
    INT4,
    INT8,
    LANES,
    chip_features,
    splat,
    vector,
)

_BY_KIND = {
    (E2M1, NV): "nvfp4",
    (E2M1, E8M0): "mxfp4",
    (E4M3, E8M0): "mxfp8",
    (INT4, IN_FP32): "int4_per_group",
    (INT4, IN_BF16): "int4_per_group_32",
    (INT8, IN_FP32): "int8_per_channel",
    (E4M3, IN_FP32): "fp8_per_channel",
}


def _nearest_e2m1(value: float) -> float:
    """The number that is nearest to all between this multiple of a quarter and the next."""
    return min((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), key=lambda number: abs(number - value - 0.125))


class Measurer(Encoder):
    """An encoder that knows the candidates of its format's search, and writes what measures one."""

    def __init__(self, context: Any, builder: Any, dtype: int, element: int, scale: int, group: int) -> None:
        super().__init__(context, builder, dtype, element, scale, group)
        search = SEARCHES[_BY_KIND[element, scale]]
        self.candidates, self.resolution, self.limit = search.candidates, search.resolution, search.limit
        self.lowest = LOWEST
        features = chip_features() if platform.machine() in ("x86_64", "AMD64") else ()
        self.has_short_vectors, self.has_dots = "+avx512bw" in features, "+avx512vnni" in features
        self.has_byte_tables = "+avx512vbmi" in features
        self.has_fma = not features or "+fma" in features
        # Elements are counted from the start on, but for powers of two, the largest of whose inverses would be infinite
        # so, and for integers of sources whose quotients may be halfway between two numbers of theirs.
        counts = scale == IN_FP32 and (element == E4M3 or (element == INT8 and dtype == BF16))
        self.is_counted = counts and self.has_fma and self.has_short_vectors

    def squares(self, total: Any, magnitudes: list[Any], factors: list[Any], exactly: bool) -> Any:
        """Added to a total. Of e4m3, by an inverse, or what `counting` makes of it; of int8, by `factors` as in
        `encode`."""
        b = self.b
        if self.element == E4M3:
            scaled = [b.fmul(value, factors[-1]) for value in magnitudes]
        elif exactly:
            scaled = [b.fdiv(value, factors[0]) for value in magnitudes]
        else:
            scaled = [self.divided(value, *factors) for value in magnitudes]
        if self.is_counted and self.element == E4M3:
            return self.add_squares(total, self.rounded([self.missed_e4m3(value) for value in scaled]))
        if self.is_counted and not exactly:
            return self.add_squares(total, self.missed_integers(scaled))
        if self.element == E4M3 and self.has_fma:
            errors = [self.missed_e4m3(value) for value in scaled]
        else:
            errors = [b.fsub(value, self.nearest(value)) for value in scaled]
        return self.add_squares(total, self.halves([self.counted(error, self.resolution) for error in errors]))

    def fixed_squares(self, total: Any, fixed: Any, ratio: Any) -> Any:
        """Added to a total, of 4-bit elements: 32 X of `formats.Search`, and M in each."""
        b, unit = self.b, int(self.resolution)
        if self.has_short_vectors:
            value = self.call("llvm.x86.avx512.pmul.hr.sw.512", vector(I16, CHUNK), fixed, ratio)
        else:
            wide = vector(I32, CHUNK)
            product = b.add(b.mul(b.sext(fixed, wide), b.sext(ratio, wide)), splat(I32, 1 << 14, CHUNK))
            value = b.trunc(b.ashr(product, splat(I32, 15, CHUNK)), vector(I16, CHUNK))
        if self.has_byte_tables and unit == (512 if self.element == INT4 else 1024):
            near = self.nearest_of_bytes(value)
        elif self.element == INT4:
            near = b.and_(b.add(value, splat(I16, unit // 2, CHUNK)), splat(I16, -unit, CHUNK))
            for which, end in (("smin", 7), ("smax", int(LOWEST))):
                limit = splat(I16, end * unit, CHUNK)
                near = self.call(f"llvm.{which}.v{CHUNK}i16", vector(I16, CHUNK), near, limit)
        elif self.has_short_vectors:  # By how often a quarter of one is in it, since all borders are such quarters.
            quarters = self.call(
                f"llvm.umin.v{CHUNK}i16",
                vector(I16, CHUNK),
                b.lshr(value, splat(I16, (unit // 4).bit_length() - 1, CHUNK)),
                splat(I16, CHUNK - 1, CHUNK),
            )
            table = ir.Constant(vector(I16, CHUNK), [int(_nearest_e2m1(at / 4) * unit) for at in range(CHUNK)])
            near = self.call("llvm.x86.avx512.permvar.hi.512", vector(I16, CHUNK), table, quarters)
        else:
            # Codes are half of one apart below 2, one below 4, then two.
            step, half = splat(I16, -2 * unit, CHUNK), splat(I16, unit, CHUNK)
            for span, below in ((unit, 4), (unit // 2, 2)):
                is_below = b.icmp_signed("<", value, splat(I16, below * unit, CHUNK))
                step = b.select(is_below, splat(I16, -span, CHUNK), step)
                half = b.select(is_below, splat(I16, span // 2, CHUNK), half)
            near = b.and_(b.add(value, half), step)
            near = self.call(f"llvm.smin.v{CHUNK}i16", vector(I16, CHUNK), near, splat(I16, 6 * unit, CHUNK))
        return self.add_squares(total, b.sub(value, near))

    def nearest_of_bytes(self, value: Any) -> Any:
        """What the nearest code of 4-bit elements stands for, in units of `resolution`, by the upper byte of a value,
        its quarters or, of int4, its halves: all borders are such, and no number has a lower byte. Values of 16 and
        more get some number."""
        b, count = self.b, 2 * CHUNK
        if self.element == E2M1:
            numbers = [int(4 * _nearest_e2m1(at / 4)) for at in range(count)]
        else:  # Indices wrap: those of the upper half are below zero.
            signed = (at - count * (at >= CHUNK) for at in range(count))
            numbers = [2 * max(int(LOWEST), min(7, (at + 1) // 2)) for at in signed]
        table = ir.Constant(vector(I8, count), numbers)
        indices = b.bitcast(value, vector(I8, count))
        found = self.call("llvm.x86.avx512.permvar.qi.512", vector(I8, count), table, indices)
        upper = ir.Constant(ir.VectorType(ir.IntType(1), count), [0, 1] * CHUNK)
        return b.bitcast(b.select(upper, found, splat(I8, 0, count)), vector(I16, CHUNK))

    def counting(self, factor: Any, sign: int = 1) -> Any:
        """The inverse of a step, in what makes multiples of the resolution, where that is what `squares` takes; with -1
        the step."""
        return self.b.fmul(factor, splat(FLOAT, self.resolution**sign)) if self.is_counted else factor

    def rounded(self, values: list[Any], pack: str = "packssdw") -> Any:
        """Two vectors, rounded to integers of 16 bits, in one; in some order. "packusdw": without a sign."""
        name, mask = "llvm.x86.avx512.mask.cvtps2dq.512", ir.Constant(I16, -1)
        both = [self.call(name, vector(I32), v, splat(I32, 0), mask, ir.Constant(I32, 4)) for v in values]
        return self.call(f"llvm.x86.avx512.{pack}.512", vector(I16, CHUNK), *both)

    def missed_e4m3(self, value: Any) -> Any:
        """What the nearest number of four significant bits misses, with either sign; in units of the value.

        2^20 times a value, less the value, is rounded to the places that its code has; the sum of both would have
        others just below a power of two. Where two are as near, their squares are the same. Codes below 2^-6 have fewer
        bits, but nothing below 2^-3 misses a code by half of the resolution.
        """
        near = value
        if self.scale == E8M0:  # Other candidates clip nothing.
            is_below = self.b.fcmp_ordered("<", value, splat(FLOAT, E4M3_MAX))
            near = self.b.select(is_below, value, splat(FLOAT, E4M3_MAX))
        moved = self.b.fmul(near, splat(FLOAT, 2.0**20 - 1))
        if near is value:
            return self.fma(value, splat(FLOAT, 1 - 2.0**20), moved)
        return self.b.fsub(value, self.fma(near, splat(FLOAT, 2.0**20), self.b.fneg(moved)))

    def missed_integers(self, scaled: list[Any]) -> Any:
        """Of multiples of the resolution, two vectors, in what the codes miss; in some order. The code is of the value
        rounded to bfloat16."""
        b, unit = self.b, self.resolution
        near = []
        for value in scaled:
            # As `through_quotient` does it with 2^16, and in units of one.
            moved = b.fmul(value, splat(FLOAT, (2.0**16 - 1) / unit))
            near.append(self.fma(value, splat(FLOAT, 2.0**16 / unit), b.fneg(moved)))
        codes = self.call(f"llvm.smin.v{CHUNK}i16", vector(I16, CHUNK), self.rounded(near), splat(I16, 127, CHUNK))
        codes = b.shl(codes, splat(I16, int(unit).bit_length() - 1, CHUNK))
        return b.sub(self.rounded(scaled, "packusdw"), codes)

    def nearest(self, value: Any) -> Any:
        """What the code of a magnitude stands for, in e4m3 or int8."""
        b = self.b
        if self.element == INT8:
            value = self.through_quotient(value)
            value = b.select(b.fcmp_ordered("<", value, splat(FLOAT, 127.0)), value, splat(FLOAT, 127.0))
            return b.fsub(b.fadd(value, splat(FLOAT, _ROUND)), splat(FLOAT, _ROUND))
        if self.scale == E8M0:  # Other candidates clip nothing.
            value = b.select(b.fcmp_ordered("<", value, splat(FLOAT, E4M3_MAX)), value, splat(FLOAT, E4M3_MAX))
        binade = b.and_(b.bitcast(value, vector(I32)), splat(I32, 0x7F800000))
        binade = self.extreme([binade, splat(I32, 0x3C800000)])  # 2^-6
        near = b.bitcast(b.add(binade, splat(I32, 20 << 23)), vector(FLOAT))  # One last place is the codes' distance.
        return b.fsub(b.fadd(value, near), near)

    def counted(self, value: Any, times: float) -> Any:
        """Times a power of two, rounded, in the low 16 bits of each lane."""
        fmuladd = f"llvm.fmuladd.v{LANES}f32"
        moved = self.call(fmuladd, vector(FLOAT), value, splat(FLOAT, times), splat(FLOAT, _ROUND))
        return self.b.bitcast(moved, vector(I32))

    def halves(self, values: list[Any]) -> Any:
        """The low halves of two vectors, lane by lane beside each other."""
        even, odd = values
        both = self.b.or_(self.b.and_(even, splat(I32, 0xFFFF)), self.b.shl(odd, splat(I32, 16)))
        return self.b.bitcast(both, vector(I16, CHUNK))

    def add_squares(self, total: Any, short: Any) -> Any:
        b = self.b
        if self.has_dots:
            words = b.bitcast(short, vector(I32))
            return self.call("llvm.x86.avx512.vpdpwssd.512", vector(I32), total, words, words)
        if self.has_short_vectors:
            return b.add(total, self.call("llvm.x86.avx512.pmaddw.d.512", vector(I32), short, short))
        both = b.bitcast(short, vector(I32))
        even, odd = b.ashr(b.shl(both, splat(I32, 16)), splat(I32, 16)), b.ashr(both, splat(I32, 16))
        return b.add(total, b.add(b.mul(even, even), b.mul(odd, odd)))
