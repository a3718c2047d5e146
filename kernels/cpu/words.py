"""Weights and x as 16-bit integers, for products of a few rows of x: e2m1, int4 and int8 have integers for codes, and
x in bfloat16 is rounded to such.

As integers, eight columns, those that a lane sums, share a scale, a power of two, with which the largest takes 15 bits.
So a bfloat16 of at least 2^-7 of it is exact, and what is smaller is at most 2^-15 of it away. Infinity is 1 with an
infinite scale, beside zeros; NaN makes NaN of the scale.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba.core import cgutils

from ..formats import ZERO_BITS
from .decoders import DOUBLE, E2M1_VALUES, ZEROED, Decoder
from .instructions import (
    CHUNK,
    E2M1,
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    INT4,
    INT8,
    LANES,
    Instructions,
    chip_features,
    chip_name,
    int64,
    splat,
    vector,
)

WORDS_SIZE = 2 * DOUBLE + 4 * LANES  # Bytes of a double stripe of x: its scales, a float each lane, follow.
WORD_UNITS = {E2M1: 0.5, INT8: 1.0, INT4: 1.0}
_INTEGERS = {
    E2M1: [sign * int(2 * value) for sign in (1, -1) for value in E2M1_VALUES],
    INT4: [*range(8), *range(-8, 0)],
}

_BITS, _SHARE = 14, 2  # of integers: bits after the largest's first, and words of a vector that share a scale
_INFINITY = 0x7F800000
_LEAST = (127 - 112) << 23  # Smaller ones have its scale.
_INVERSE = 2 * 127 + _BITS  # less the largest's exponent: that of what makes integers of x, as float32 stores it


@functools.cache
def has_words() -> bool:
    """Whether numba compiles for a chip that multiplies pairs of 16-bit integers twice as fast as those of bfloat16."""
    return {"+avx512vnni", "+avx512bw"} <= set(chip_features()) and not chip_name().startswith("znver")


class WordDecoder(Decoder):
    """Writes what decodes weights to integers, and what multiplies them."""

    def words(self, address: Any, zero: Any) -> list[Any]:
        """The four vectors of a double stripe as 16-bit integers, in units of `WORD_UNITS`: of `QUARTERS` for elements
        that share a byte, else in order. zero: See `table_of`."""
        b, wide = self.b, vector(I16, CHUNK)
        if self.element == INT8:
            loads = (self.load(b.add(address, int64(at)), vector(I8, CHUNK)) for at in range(0, DOUBLE, CHUNK))
            return [b.sext(codes, wide) for codes in loads]
        raw, table = self.load(address, wide), self.table_of(_INTEGERS[self.element], zero)
        indices = [raw, *(b.lshr(raw, splat(I16, by, CHUNK)) for by in (4, 8, 12))]
        return [self.call("llvm.x86.avx512.permvar.hi.512", wide, table, index) for index in indices]

    def zero_of(self, row: Any, stripe: Any) -> Any:
        """The four bits of the zero point of a double stripe; None where there is none."""
        if self.scale != ZEROED:
            return None
        index = self.b.lshr(stripe, int64((self.group // DOUBLE).bit_length() - 1))
        word = self.load(self.at(row, index, 4), I32, 4)
        return self.b.zext(self.b.and_(word, ir.Constant(I32, ZERO_BITS)), I64)

    def table_of(self, values: list[int], zero: Any, of: Callable[[int], int] = int) -> Any:
        """A vector that holds, twice, 16 bits for each of 16 codes. Of codes with a zero point, whose four bits are
        given, `of(value - zero point)`: one of sixteen tables in memory."""
        kind = vector(I16, CHUNK)
        if zero is None:
            return ir.Constant(kind, [of(value) for value in values] * 2)
        tables = [[of(value - zero) for value in values] * 2 for zero in _INTEGERS[INT4]]
        name = f"zero_points_{hashlib.sha256(repr(tables).encode()).hexdigest()[:16]}"
        found = self.b.module.globals.get(name)
        if found is None:
            content = ir.Constant(ir.ArrayType(kind, len(tables)), [ir.Constant(kind, table) for table in tables])
            found = cgutils.global_constant(self.b.module, name, content)
            found.align = 64
        return self.load(self.at(self.b.ptrtoint(found, I64), zero, 64), kind, 64)

    def word_sums(self, weights: list[Any], x: list[Any]) -> Any:
        """Of each lane, the products of its words, summed as integers; as float32."""
        b, total = self.b, None
        binding.initialize_native_asmparser()
        for weight, of_x in zip(weights, x, strict=True):
            if total is None:
                total = self.call("llvm.x86.avx512.pmaddw.d.512", vector(I32), weight, of_x)
                continue
            # By hand: LLVM makes two instructions of its own function for this one, to wait for fewer others.
            kind = ir.FunctionType(total.type, [total.type, weight.type, of_x.type])
            total = b.asm(kind, "vpdpwssd $3, $2, $0", "=v,0,v,v", [total, weight, of_x], False)
        return b.sitofp(total, vector(FLOAT))


class WordLayout(Instructions):
    """Writes what makes integers of a double stripe of x."""

    def words(self, floats: list[list[Any]], target: Any) -> None:
        """A double stripe as integers and their scales; floats: of each vector of words, two vectors, which come from
        bfloat16 (more bits could round up to one integer too many)."""
        b, found = self.b, []
        for half in zip(*floats, strict=True):
            sizes = [b.and_(b.bitcast(x, vector(I32)), splat(I32, 0x7FFFFFFF)) for x in half]
            most = functools.reduce(self._larger, sizes)
            most = self._larger(most, self.shuffle(most, most, [lane ^ 1 for lane in range(LANES)]))
            exponent = self._larger(b.and_(most, splat(I32, _INFINITY)), splat(I32, _LEAST))
            endless = b.icmp_unsigned(">=", most, splat(I32, _INFINITY))
            scale = b.select(endless, most, b.sub(exponent, splat(I32, _BITS << 23)))
            inverse = b.bitcast(b.sub(splat(I32, _INVERSE << 23), exponent), vector(FLOAT))
            codes = []
            for x, size in zip(half, sizes, strict=True):
                whole = b.fptosi(self.call("llvm.rint.v16f32", x.type, b.fmul(x, inverse)), vector(I32))
                sign = b.or_(b.ashr(b.bitcast(x, vector(I32)), splat(I32, 31)), splat(I32, 1))
                one = b.select(b.icmp_signed("==", size, splat(I32, _INFINITY)), sign, splat(I32, 0))
                codes.append(b.select(endless, one, whole))
            found.append((codes, scale))
        (lower, first), (upper, second) = found
        for at, halves in enumerate(zip(lower, upper, strict=True)):
            both = b.trunc(self.shuffle(*halves, list(range(2 * LANES))), vector(I16, 2 * LANES))
            self.store(both, b.add(target, int64(4 * LANES * at)), 4)
        lanes = self.shuffle(first, second, [lane * _SHARE for lane in range(LANES)])
        self.store(lanes, b.add(target, int64(2 * DOUBLE)), 4)

    def _larger(self, a: Any, b: Any) -> Any:
        return self.call("llvm.umax.v16i32", a.type, a, b)
