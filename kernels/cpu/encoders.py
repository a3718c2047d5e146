"""What quantizes finite sources: rows as vector instructions.

Of some hundred columns at a time the largest magnitudes of groups are found, the scales that follow are stored, and the
elements, which are in the nearest cache by now, are encoded. A scale for a whole row takes two passes over it, one for
blocks of 128 x 128 two over 128 rows. The formulas are `formats.WeightFormat`'s, for finite
sources. 32 elements at a time come as their even columns and their odd ones: in bfloat16, that is a shift and a mask,
and two nibbles that share a byte meet in a lane.

This is one file because amax, scales and codes are instructions of one loop, in the same registers.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[attr-defined]
from numba.core import cgutils

from ..formats import BLOCK_FLOOR, CHANNEL_FLOOR, E2M1_MAX, E4M3_MAX, LEVELS, LOWEST, ZERO_BITS, WeightFormat
from .instructions import (
    BF16,
    CHUNK,
    E2M1,
    E4M3,
    FLOAT,
    FP16,
    FP32,
    HALF,
    I8,
    I16,
    I32,
    I64,
    INT4,
    INT8,
    LANES,
    Instructions,
    chip_features,
    int64,
    intrinsic,
    splat,
    vector,
)

# How a group's scale is stored: a power of two, e4m3 beside a gain, as it is, with a zero point, or in bfloat16.
E8M0, NV, IN_FP32, ZEROED, IN_BF16 = range(5)


def scale_kind(fmt: WeightFormat) -> int:
    if fmt.has_e8m0_scale:
        return E8M0
    if fmt.has_zero_point:
        return ZEROED
    if fmt.has_global_scale:
        return NV
    return IN_BF16 if fmt.scale_dtype == torch.bfloat16 else IN_FP32


_MAGNITUDE = 0x7FFFFFFF
BLOCK = 128
_ROUND = 1.5 * 2.0**23  # The low bits of a float32 added to this are the integer nearest to it, half to even.
_AHEAD = 4096  # Bytes; chips fetch by themselves what comes next in a page of memory.
# Scales between which a quotient follows from the inverse by multiplications, see `divided`.
_DIVISORS = 2.0**-60, 2.0**60


def _signed(bits: int) -> int:
    return bits - (bits >> 31 << 32)


class Encoder(Instructions):
    """Writes vector instructions that quantize a source of one type to one element format.

    Args:
        scale: E8M0, NV, IN_FP32, ZEROED or IN_BF16.
        group: Columns that share a scale; 0 for the whole row.
    """

    def __init__(self, context: Any, builder: Any, dtype: int, element: int, scale: int, group: int) -> None:
        super().__init__(context, builder)
        self.dtype, self.element, self.scale, self.group = dtype, element, scale, group
        self.size = 4 if dtype == FP32 else 2
        self.per_byte = 1 if element in (E4M3, INT8) else 2
        self.divides = scale in (IN_FP32, ZEROED, IN_BF16)
        self.kept = {IN_FP32: 2, IN_BF16: 2, ZEROED: 3}.get(scale, 1)  # Vectors that `encode` takes for groups.
        self.scale_size = {IN_FP32: 4, ZEROED: 4, IN_BF16: 2}.get(scale, 1)
        self.has_short_scales = element == INT8  # Of no more bits than the source's type has.
        self.groups = min(LANES, 512 // group) if group else 1  # That are worked on together.
        self.lowest = -7.0  # Of int4.

    # Sources.

    def words(self, address: Any) -> list[Any]:
        """The bits of a chunk: 32 of 16 bits, or twice 16 of 32."""
        if self.dtype == FP32:
            return [self.load(self.b.add(address, int64(at)), vector(I32), 4) for at in (0, 64)]
        return [self.load(address, vector(I16, CHUNK), 2)]

    def pairs(self, words: list[Any]) -> list[Any]:
        """A chunk in fp32: its even columns, its odd ones."""
        b = self.b
        if self.dtype == BF16:
            both = b.bitcast(words[0], vector(I32))
            halves = [b.shl(both, splat(I32, 16)), b.and_(both, splat(I32, -0x10000))]
            return [b.bitcast(half, vector(FLOAT)) for half in halves]
        halves = [self.shuffle(words[0], words[-1], list(range(first, CHUNK, 2))) for first in (0, 1)]
        return [self.from_half(half) if self.dtype == FP16 else b.bitcast(half, vector(FLOAT)) for half in halves]

    def unsigned(self, words: list[Any]) -> list[Any]:
        mask = splat(I32, _MAGNITUDE) if self.dtype == FP32 else splat(I16, 0x7FFF, CHUNK)
        return [self.b.and_(word, mask) for word in words]

    def extreme(self, vectors: list[Any], which: str = "umax") -> Any:
        """Of each lane, among unsigned integers the largest, or the smallest ("umin")."""
        found, *rest = vectors
        for value in rest:
            found = self.call(f"llvm.{which}.v{value.type.count}i{value.type.element.width}", value.type, found, value)
        return found

    def largest(self, address: Any, columns: int) -> Any:
        """The largest magnitudes of so many elements, as the source's own bits, in 16 lanes."""
        b = self.b
        if columns == LANES and self.dtype != FP32:
            return b.zext(b.and_(self.load(address, vector(I16), 2), splat(I16, 0x7FFF)), vector(I32))
        if columns == LANES:
            return b.and_(self.load(address, vector(I32), 4), splat(I32, _MAGNITUDE))
        chunks = [self.words(b.add(address, int64(at * self.size))) for at in range(0, columns, CHUNK)]
        found = self.extreme([word for words in chunks for word in self.unsigned(words)])
        if self.dtype == FP32:
            return found
        both = b.bitcast(found, vector(I32))
        return self.extreme([b.and_(both, splat(I32, 0xFFFF)), b.lshr(both, splat(I32, 16))])

    def extremes(self, address: Any, columns: int) -> list[Any]:
        """Of so many elements, whole chunks, the largest, and what the lowest is below zero, as the source's own bits
        in 16 lanes; 0 where there are none on that side."""
        b = self.b
        words = [word for at in range(0, columns, CHUNK) for word in self.words(b.add(address, int64(at * self.size)))]
        kind = words[0].type
        sign, zero = (splat(kind.element, value, kind.count) for value in (-(1 << kind.element.width - 1), 0))
        # As signed integers, the bits of what is not negative order like floats, and all others are below zero.
        found = [
            functools.reduce(lambda a, c: self.call(f"llvm.smax.v{kind.count}{kind.element}", kind, a, c), side, zero)
            for side in (words, [b.xor(word, sign) for word in words])
        ]
        if self.dtype == FP32:
            return found
        both = [b.bitcast(value, vector(I32)) for value in found]
        return [self.extreme([b.and_(v, splat(I32, 0xFFFF)), b.lshr(v, splat(I32, 16))]) for v in both]

    def across(self, vectors: list[Any]) -> Any:
        """The largest lane of each vector, of as many as divide 16: those of the first come first, and repeat."""
        length = LANES
        while length > 1:
            half = length // 2
            low = [at for first in range(0, 2 * LANES, length) for at in range(first, first + half)]
            high = [at + half for at in low]
            pairs = zip(vectors[::2], vectors[1::2], strict=True) if len(vectors) > 1 else [(vectors[0],) * 2]
            vectors = [self.extreme([self.shuffle(a, b, low), self.shuffle(a, b, high)]) for a, b in pairs]
            length = half
        return vectors[0]

    def as_floats(self, magnitudes: Any) -> Any:
        """The source's own bits as fp32."""
        if self.dtype == FP16:
            return self.from_half(self.b.trunc(magnitudes, vector(I16)))
        bits = self.b.shl(magnitudes, splat(I32, 16)) if self.dtype == BF16 else magnitudes
        return self.b.bitcast(bits, vector(FLOAT))

    def through(self, value: Any) -> Any:
        """Rounded to the source's type."""
        b = self.b
        if self.dtype == FP32:
            return value
        if self.dtype == FP16:
            return b.fpext(b.fptrunc(value, vector(HALF)), vector(FLOAT))
        return self.through_bfloat(value)

    def through_bfloat(self, value: Any) -> Any:
        b = self.b
        bits = b.bitcast(value, vector(I32))
        odd = b.and_(b.lshr(bits, splat(I32, 16)), splat(I32, 1))
        rounded = b.add(b.add(bits, splat(I32, 0x7FFF)), odd)
        return b.bitcast(b.and_(rounded, splat(I32, -0x10000)), vector(FLOAT))

    def as_stored(self, scale: Any) -> Any:
        """Scales, not negative, as what is stored stands for: see `WeightFormat.stored`."""
        if self.scale != IN_BF16:
            return scale
        b = self.b
        rounded = b.bitcast(self.through_bfloat(scale), vector(I32))
        vanished = b.and_(b.icmp_signed("==", rounded, splat(I32, 0)), b.fcmp_ordered("!=", scale, splat(FLOAT, 0.0)))
        return b.bitcast(b.select(vanished, splat(I32, 0x10000), rounded), vector(FLOAT))

    def in_memory(self, scale: Any) -> Any:
        """What `scales` gives for 16 groups, as it is stored."""
        if self.scale != IN_BF16:
            return scale
        return self.b.trunc(self.b.lshr(self.b.bitcast(scale, vector(I32)), splat(I32, 16)), vector(I16))

    def through_quotient(self, value: Any) -> Any:
        """The same of a quotient of two such numbers, which is never halfway between two others, nor close to a power
        of two without being it; where what is below 2^-126 does not matter."""
        if self.dtype != BF16:
            return self.through(value)
        # 2^16 times a value, less the value, is rounded to the places that the result has.
        moved = self.b.fmul(value, splat(FLOAT, 2.0**16 - 1))
        return self.fma(value, splat(FLOAT, 2.0**16), self.b.fneg(moved))

    # Scales.

    def scales(self, amax: Any, gain: Any) -> tuple[Any, Any]:
        """What is stored for 16 groups, and what their elements are to be multiplied with, or divided by if the scale
        is a float. `gain` is the address of the matrix's gain and of its inverse."""
        b = self.b
        if self.scale == E8M0:
            if self.element == E2M1:
                exponent = self.nearest_power(amax, 2)
            else:
                exponent = self.power_above(b.fdiv(amax, splat(FLOAT, E4M3_MAX)))
            return b.trunc(exponent, vector(I8)), self.inverse_power(exponent)
        if self.scale == NV:
            matrix, inverse = (self.broadcast(self.load(b.add(gain, int64(at)), FLOAT, 4)) for at in (0, 4))
            codes = self.e4m3(b.fmul(matrix, b.fmul(amax, splat(FLOAT, 1.0 / E2M1_MAX))))
            inverse = b.fdiv(splat(FLOAT, 1.0), b.fmul(self.from_e4m3(codes), inverse))
            finite = b.icmp_signed("<", b.bitcast(inverse, vector(I32)), splat(I32, 0x7F800000))
            return b.trunc(codes, vector(I8)), b.select(finite, inverse, splat(FLOAT, 0.0))
        scale = b.fdiv(amax, splat(FLOAT, {INT8: 127.0, INT4: 7.0, E4M3: E4M3_MAX}[self.element]))
        if self.element == INT8:
            scale = self.through(scale)
        if self.element == E4M3:
            scale = self.at_least(scale, CHANNEL_FLOOR)
        scale = self.as_stored(scale)
        # What is divided by infinity is 0, as data is where the scale is 0.
        zero = b.fcmp_ordered("==", scale, splat(FLOAT, 0.0))
        return scale, b.select(zero, splat(FLOAT, float("inf")), scale)

    def nearest_power(self, amax: Any, less: int) -> Any:
        """The biased exponent of amax rounded to a power of two, up from 1.75 times one, less a number."""
        b = self.b
        up = b.add(b.bitcast(amax, vector(I32)), splat(I32, 0x200000))
        exponent = b.sub(b.lshr(up, splat(I32, 23)), splat(I32, less))
        return b.select(b.icmp_signed("<", exponent, splat(I32, 0)), splat(I32, 0), exponent)

    def power_above(self, value: Any) -> Any:
        """The biased exponent of the smallest power of two that is not below a value."""
        b = self.b
        bits = b.bitcast(value, vector(I32))
        exponent = b.lshr(b.add(bits, splat(I32, 0x7FFFFF)), splat(I32, 23))
        return b.select(b.icmp_signed("<=", bits, splat(I32, 0x400000)), splat(I32, 0), exponent)

    def inverse_power(self, exponent: Any) -> Any:
        """Dividing by a power of two is multiplying with its inverse, exactly; neither is a denormal here."""
        bits = self.b.shl(self.b.sub(splat(I32, 254), exponent), splat(I32, 23))
        return self.b.bitcast(bits, vector(FLOAT))

    def from_e4m3(self, codes: Any) -> Any:
        """The values of codes that are not negative, one in each lane of 32 bits. See `decoders.UNITS`."""
        b = self.b
        small = self.from_half(b.trunc(b.shl(codes, splat(I32, 7)), vector(I16)))
        return b.fmul(small, splat(FLOAT, 256.0))

    def words_of_range(self, largest: Any, below: Any) -> tuple[Any, Any, Any]:
        """Of 16 groups, the scale words, what elements are divided by, and zero points, as floats."""
        b = self.b
        most = b.select(b.fcmp_ordered(">", largest, below), largest, below)
        half = b.select(b.fcmp_ordered(">", most, splat(FLOAT, 2.0**126)), splat(FLOAT, 0.5), splat(FLOAT, 1.0))
        span = b.fadd(b.fmul(largest, half), b.fmul(below, half))
        step = b.bitcast(self.through(b.fdiv(span, b.fmul(half, splat(FLOAT, LEVELS)))), vector(I32))
        if self.dtype == FP32:
            step = b.add(step, splat(I32, (ZERO_BITS + 1) // 2))
        step = b.bitcast(b.and_(step, splat(I32, ~ZERO_BITS)), vector(FLOAT))
        empty = b.fcmp_ordered("==", step, splat(FLOAT, 0.0))
        factor = b.select(empty, splat(FLOAT, float("inf")), step)
        zero = self.call(f"llvm.rint.v{LANES}f32", step.type, b.fadd(splat(FLOAT, LOWEST), b.fdiv(below, factor)))
        zero = b.select(b.fcmp_ordered(">", zero, splat(FLOAT, 7.0)), splat(FLOAT, 7.0), zero)
        zero = b.select(empty, splat(FLOAT, 0.0), zero)
        bits = b.and_(b.fptosi(zero, vector(I32)), splat(I32, ZERO_BITS))
        return b.or_(b.bitcast(step, vector(I32)), bits), factor, zero

    def are_usual(self, factors: Any) -> Any:
        """Whether `divided` may take the inverses of all of them."""
        if platform.machine() in ("x86_64", "AMD64") and "+fma" not in chip_features():
            return ir.Constant(ir.IntType(1), 0)
        bits = self.b.and_(self.b.bitcast(factors, vector(I32)), splat(I32, _MAGNITUDE))
        low, high = (self.b.bitcast(splat(FLOAT, limit), vector(I32)) for limit in _DIVISORS)
        inside = self.b.and_(self.b.icmp_unsigned(">=", bits, low), self.b.icmp_unsigned("<=", bits, high))
        return self.call(f"llvm.vector.reduce.and.v{LANES}i1", ir.IntType(1), inside)

    def at_least(self, value: Any, floor: float) -> Any:
        low = splat(FLOAT, floor)
        return self.b.select(self.b.fcmp_ordered("<", value, low), low, value)

    def inverse(self, scale: Any) -> Any:
        """0 where the inverse is not finite."""
        b = self.b
        inverse = b.fdiv(splat(FLOAT, 1.0), scale)
        finite = b.icmp_unsigned("<", b.bitcast(inverse, vector(I32)), splat(I32, 0x7F800000))
        return b.select(finite, inverse, splat(FLOAT, 0.0))

    # Elements, in units of their scale.

    def divided(self, value: Any, divisor: Any, inverse: Any) -> Any:
        """The quotient, correctly rounded wherever it matters to what is rounded to an integer.

        With the inverse correctly rounded, a quotient that is off by no more than its last bit becomes the right one by
        adding the remainder times the inverse (Markstein, 1990); the first step makes such a one. For sizes of
        `_DIVISORS`, at which no remainder is lost.

        Of two numbers of 11 bits or less (`has_short_scales`, of 16-bit sources) the inverse's own error takes the
        place of both steps: such a quotient is 2^-35 of its size or more from the middle between two floats, and the
        sum before it is rounded less than 2^-45 from the quotient.
        """
        b = self.b
        if self.has_short_scales and self.dtype != FP32:  # What follows from the divisor alone leaves the loop.
            rest = b.fmul(self.fma(b.fneg(inverse), divisor, splat(FLOAT, 1.0)), inverse)
            return self.fma(value, inverse, b.fmul(value, rest))
        quotient = b.fmul(value, inverse)
        for _ in range(2):
            remainder = self.fma(b.fneg(quotient), divisor, value)
            quotient = self.fma(remainder, inverse, quotient)
        return quotient

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call(f"llvm.fma.v{LANES}f32", vector(FLOAT), a, b, c)

    def bounded(self, bits: Any, largest: float) -> Any:
        """The bits of fp32's magnitude, at most `largest`."""
        limit = self.b.bitcast(splat(FLOAT, largest), vector(I32))
        return self.extreme([self.b.and_(bits, splat(I32, _MAGNITUDE)), limit], "umin")

    def e4m3(self, value: Any, signed: Any = None) -> Any:
        """Codes, one in each lane of 32 bits; with the signs of other values, if they are given."""
        b = self.b
        bits = b.bitcast(value, vector(I32))
        clamped = self.bounded(bits, E4M3_MAX)
        # One unit in the last place of 2^14 is 2^-9, the spacing of subnormals.
        moved = b.bitcast(b.fadd(b.bitcast(clamped, vector(FLOAT)), splat(FLOAT, 2.0**14)), vector(I32))
        subnormal = b.sub(moved, splat(I32, 0x46800000))
        odd = b.and_(b.lshr(clamped, splat(I32, 20)), splat(I32, 1))
        rebias_and_round = splat(I32, _signed((0x7FFFF - (120 << 23)) % 2**32))
        normal = b.lshr(b.add(b.add(clamped, rebias_and_round), odd), splat(I32, 20))
        is_small = b.icmp_unsigned("<", clamped, splat(I32, 0x3C800000))  # 2^-6
        code = b.select(is_small, subnormal, normal)
        signs = bits if signed is None else b.bitcast(signed, vector(I32))
        return b.or_(code, b.and_(b.lshr(signs, splat(I32, 24)), splat(I32, 0x80)))

    def e2m1(self, magnitude: Any) -> Any:
        """Codes of magnitudes, in the lowest byte of each lane.

        Codes count steps of 0.5 below 2, of 1 below 4 and of 2: three lines, of which the lowest is the code. Each is
        rounded once, by being added to a number whose last place is 1.
        """
        lines = [
            self.call(f"llvm.fmuladd.v{LANES}f32", vector(FLOAT), magnitude, splat(FLOAT, slope), splat(FLOAT, at))
            for slope, at in ((2.0, _ROUND), (1.0, _ROUND + 2), (0.5, _ROUND + 4))
        ]
        lines.append(splat(FLOAT, _ROUND + 7))
        return self.extreme([self.b.bitcast(line, vector(I32)) for line in lines], "umin")

    def integers(self, value: Any, largest: float, lowest: float) -> Any:
        """Two's complement, in the lowest bits of each lane."""
        b = self.b
        for limit, order in ((splat(FLOAT, largest), "<"), (splat(FLOAT, lowest), ">")):
            value = b.select(b.fcmp_ordered(order, value, limit), value, limit)
        return b.bitcast(b.fadd(value, splat(FLOAT, _ROUND)), vector(I32))

    def bytes(self, values: list[Any]) -> Any:
        """A chunk of less than 2^15 in size as rounded int8, at most 127 in size: clamped while there are two in a
        lane."""
        b, kind = self.b, vector(I16, CHUNK)
        even, odd = (b.bitcast(b.fadd(value, splat(FLOAT, _ROUND)), vector(I32)) for value in values)
        both = b.bitcast(b.or_(b.and_(even, splat(I32, 0xFFFF)), b.shl(odd, splat(I32, 16))), kind)
        for which, end in (("smin", 127), ("smax", -127)):
            both = self.call(f"llvm.{which}.v{CHUNK}i16", kind, both, splat(I16, end, CHUNK))
        return b.trunc(both, vector(I8, CHUNK))

    def from_zero(self, value: Any, zero: Any) -> Any:
        """The same, a zero point added to the rounded value."""
        b = self.b
        for limit, order in ((7.0, "<"), (LOWEST, ">")):
            end = b.fsub(splat(FLOAT, limit), zero)
            value = b.select(b.fcmp_ordered(order, value, end), value, end)
        rounded = b.bitcast(b.fadd(value, splat(FLOAT, _ROUND)), vector(I32))
        return b.add(rounded, b.fptosi(zero, vector(I32)))

    def encode(self, source: Any, factors: list[Any], codes: Any, exactly: bool) -> None:
        """A chunk; `factors` are a vector, and its inverse, where it is divided by, and a zero point, where there is
        one. `exactly`: it is divided by."""
        b = self.b
        words = self.words(source)
        if not self.divides:
            self.store(self.multiplied(words, factors[0]), codes)
            return
        sources = values = self.pairs(words)
        if exactly:
            values = [b.fdiv(value, factors[0]) for value in values]
        else:
            values = [self.divided(value, *factors[:2]) for value in values]
        if self.per_byte == 1:
            if self.element == INT8:
                self.store(self.bytes([self.through_quotient(value) for value in values]), codes)
                return
            # `divided` loses the sign of zeros.
            even, odd = (self.e4m3(value, source) for value, source in zip(values, sources, strict=True))
        elif self.scale == ZEROED:
            even, odd = (self.from_zero(value, factors[2]) for value in values)
        else:
            even, odd = (self.integers(value, 7.0, self.lowest) for value in values)
        self.store_codes(even, odd, codes)

    def store_codes(self, even: Any, odd: Any, codes: Any) -> None:
        """Of even columns and of odd ones, in the lowest bits of each lane; above them integers have others."""
        b, bits = self.b, 8 // self.per_byte
        if self.element in (INT8, INT4):
            even = b.and_(even, splat(I32, (1 << bits) - 1))
        self.store(b.trunc(b.or_(even, b.shl(odd, splat(I32, bits))), vector(I16 if bits == 8 else I8)), codes)

    def multiplied(self, words: list[Any], factor: Any) -> Any:
        """The codes of a chunk times a factor, in e4m3 or e2m1."""
        b = self.b
        if self.element == E4M3:
            even, odd = (self.e4m3(b.fmul(value, factor)) for value in self.pairs(words))
            return b.bitcast(b.trunc(b.or_(even, b.shl(odd, splat(I32, 8))), vector(I16)), vector(I8, CHUNK))
        even, odd = (self.e2m1(b.fmul(value, factor)) for value in self.pairs(self.unsigned(words)))
        if self.dtype == FP32:
            low, high = (b.bitcast(value, vector(I32)) for value in self.pairs(words))
            low = b.lshr(low, splat(I32, 16))
        else:
            low = high = b.bitcast(words[0], vector(I32))
        low, high = b.lshr(low, splat(I32, 12)), b.lshr(high, splat(I32, 24))
        signs = b.or_(b.and_(low, splat(I32, 8)), b.and_(high, splat(I32, 0x80)))
        return b.trunc(b.or_(b.or_(even, b.shl(odd, splat(I32, 4))), signs), vector(I8))

    # Rows.

    def copy(self, source: Any, target: Any, count: Any) -> None:
        with cgutils.for_range(self.b, count) as loop:
            self.store(self.load(self.b.add(source, loop.index), I8), self.b.add(target, loop.index))

    def room(self, nbytes: int) -> Any:
        """The address of memory on the stack, zeros."""
        kind = vector(I8, nbytes) if nbytes <= 64 else ir.ArrayType(vector(I8, 64), nbytes // 64)
        memory = cgutils.alloca_once(self.b, kind)
        self.b.store(ir.Constant(kind, None), memory)
        return self.b.ptrtoint(memory, I64)

    def pieces(
        self,
        source: Any,
        codes: Any,
        cols: Any,
        columns: int,
        work: Callable[[Any, Any, Any, Any], None],
        ahead: Any = None,
    ) -> None:
        """work(index, address of the source, of codes, whether these are copies) for each `columns` of a row, the last
        with zeros behind it; `codes` may be None. What is `ahead` bytes on is fetched meanwhile."""
        b, nbytes = self.b, columns // self.per_byte
        whole, left = b.udiv(cols, int64(columns)), b.urem(cols, int64(columns))
        some = b.icmp_signed(">", left, int64(0))
        source_copy, codes_copy = self.room(columns * self.size), self.room(nbytes)
        with b.if_then(some, likely=False):
            self.copy(self.at(source, whole, columns * self.size), source_copy, b.mul(left, int64(self.size)))
        with cgutils.for_range(b, b.select(some, b.add(whole, int64(1)), whole)) as loop:
            is_last = b.icmp_signed("==", loop.index, whole)
            here = b.select(is_last, source_copy, self.at(source, loop.index, columns * self.size))
            for at in range(0, columns * self.size, 64):
                self.prefetch(b.add(here, b.add(ahead or int64(_AHEAD), int64(at))))
            out = None if codes is None else b.select(is_last, codes_copy, self.at(codes, loop.index, nbytes))
            work(loop.index, here, out, is_last)
        if codes is not None:
            with b.if_then(some, likely=False):
                used = b.udiv(b.add(left, int64(self.per_byte - 1)), int64(self.per_byte))
                self.copy(codes_copy, self.at(codes, whole, nbytes), used)

    def row_amax(self, source: Any, cols: Any) -> Any:
        """The largest magnitude of a row, in all lanes of fp32."""
        b = self.b
        found = cgutils.alloca_once(b, vector(I32))
        b.store(splat(I32, 0), found)

        def keep(_index: Any, here: Any, _codes: Any, _is_last: Any) -> None:
            b.store(self.extreme([b.load(found), self.largest(here, 8 * CHUNK)]), found)

        self.pieces(source, None, cols, 8 * CHUNK, keep)
        most = self.call(f"llvm.vector.reduce.umax.v{LANES}i32", I32, b.load(found))
        return self.as_floats(self.broadcast(most))

    def row(self, source: Any, codes: Any, scales: Any, cols: Any, gain: Any) -> None:
        """A row with one scale."""
        b = self.b
        amax = self.row_amax(source, cols)
        scale, factor = self.choose_for_row(source, cols, amax, *self.scales(amax, gain))
        self.store(b.extract_element(scale, ir.Constant(I32, 0)), scales, self.scale_size)
        factors = [factor, b.fdiv(splat(FLOAT, 1.0), factor)]
        with b.if_else(self.are_usual(factor)) as usual_or_not:
            for case, exactly in zip(usual_or_not, (False, True), strict=True):
                with case:
                    self.pieces(source, codes, cols, CHUNK, functools.partial(self.encode_piece, factors, exactly))

    def choose_for_row(self, source: Any, cols: Any, amax: Any, scale: Any, factor: Any) -> tuple[Any, Any]:
        """The scale of a row and its factor; `searching` has others than the plain ones."""
        return scale, factor

    def choose(self, source: Any, amax: Any, scale: Any, factor: Any, gain: Any) -> tuple[Any, Any]:
        """The same for the groups that are worked on together."""
        return scale, factor

    def encode_piece(
        self, factors: list[Any], exactly: bool, _index: Any, source: Any, codes: Any, _is_last: Any
    ) -> None:
        self.encode(source, factors, codes, exactly)

    def keep_block_amax(self, source: Any, cols: Any, found: Any) -> None:
        """Raise the largest magnitudes that `found` has, 16 int32 for each 128 columns, as the source's own bits."""

        def keep(index: Any, here: Any, _codes: Any, _is_last: Any) -> None:
            place = self.at(found, index, 64)
            largest = self.largest(here, BLOCK)
            self.store(self.extreme([self.load(place, vector(I32), 4), largest]), place, 4)

        self.pieces(source, None, cols, BLOCK, keep)

    def block_scales(self, found: Any, count: Any, scales: Any, factors: Any) -> None:
        """Of each block, the scale and its inverse, from what `keep_block_amax` has found."""
        b = self.b
        with cgutils.for_range(b, count) as loop:
            largest = self.load(self.at(found, loop.index, 64), vector(I32), 4)
            most = self.call(f"llvm.vector.reduce.umax.v{LANES}i32", I32, largest)
            chosen = self.block_scale(self.as_floats(self.broadcast(most)))
            for values, address in zip(chosen, (scales, factors), strict=True):
                one = b.extract_element(values, ir.Constant(I32, 0))
                self.store(one, self.at(address, loop.index, 4), 4)

    def block_scale(self, amax: Any) -> tuple[Any, Any]:
        """Of a block's amax: its scale, and what `scaled_row` takes."""
        scale = self.b.fdiv(self.at_least(amax, BLOCK_FLOOR), splat(FLOAT, E4M3_MAX))
        return scale, self.inverse(scale)

    def scaled_row(self, source: Any, codes: Any, cols: Any, factors: Any, step: Any) -> None:
        """The codes of a row times factors, one for each 128 columns, `step` bytes from one to the next."""

        def work(index: Any, here: Any, out: Any, _is_last: Any) -> None:
            factor = self.broadcast(self.load(self.b.add(factors, self.b.mul(index, step)), FLOAT, 4))
            self.scaled_block(here, out, factor)

        self.pieces(source, codes, cols, BLOCK, work)

    def scaled_block(self, source: Any, codes: Any, factor: Any) -> None:
        for column in range(0, BLOCK, CHUNK):
            words = self.words(self.b.add(source, int64(column * self.size)))
            self.store(self.multiplied(words, factor), self.b.add(codes, int64(column)))

    def row_of_groups(self, source: Any, codes: Any, scales: Any, cols: Any, gain: Any) -> None:
        b, columns = self.b, self.groups * self.group
        count = b.udiv(b.add(cols, int64(self.group - 1)), int64(self.group))
        stored = self.room(LANES * self.scale_size)
        memory = [self.room(64) for _ in range(self.kept)]

        def work(index: Any, here: Any, out: Any, is_last: Any) -> None:
            starts = [b.add(here, int64(g * self.group * self.size)) for g in range(self.groups)]
            zero = None
            if self.scale == ZEROED:
                sides = zip(*(self.extremes(start, self.group) for start in starts), strict=True)
                scale, factor, zero = self.words_of_range(*(self.as_floats(self.across(list(side))) for side in sides))
            else:
                found = [self.largest(start, self.group) for start in starts]
                amax = self.as_floats(self.across(found))
                scale, factor = self.choose(here, amax, *self.scales(amax, gain), gain)
            scale = self.in_memory(scale)
            first = b.mul(index, int64(self.groups))
            target = self.at(scales, first, self.scale_size)
            with b.if_else(is_last) as (partly, wholly):
                with partly:
                    self.store(scale, stored)
                    self.copy(stored, target, b.mul(b.sub(count, first), int64(self.scale_size)))
                with wholly:
                    self.store(self.shuffle(scale, scale, list(range(self.groups))), target, self.scale_size)
            kept = [factor, b.fdiv(splat(FLOAT, 1.0), factor), zero][: self.kept]
            for values, address in zip(kept, memory, strict=True):
                self.store(values, address)
            if not self.divides:
                self.encode_groups(here, memory, out, False)
                return
            with b.if_else(self.are_usual(factor)) as usual_or_not:
                for case, exactly in zip(usual_or_not, (False, True), strict=True):
                    with case:
                        self.encode_groups(here, memory, out, exactly)

        self.pieces(source, codes, cols, columns, work)

    def encode_groups(self, source: Any, memory: list[Any], codes: Any, exactly: bool) -> None:
        """`self.groups` groups, whose factors are at the addresses of `memory`."""
        b, at_once = self.b, max(1, CHUNK // self.group)
        with cgutils.for_range(b, int64(self.groups // at_once)) as loop:
            first = b.mul(loop.index, int64(at_once))
            if at_once == 2:  # Even and odd columns alike: 8 of the first group, 8 of the second.
                lanes = [0] * 8 + [1] * 8
                twos = [self.load(self.at(place, first, 4), vector(FLOAT, 2), 4) for place in memory]
                factors = [self.shuffle(two, two, lanes) for two in twos]
            else:
                factors = [self.broadcast(self.load(self.at(place, first, 4), FLOAT, 4)) for place in memory]
            for column in range(0, at_once * self.group, CHUNK):
                here = b.add(self.at(source, first, self.group * self.size), int64(column * self.size))
                out = b.add(self.at(codes, first, self.group // self.per_byte), int64(column // self.per_byte))
                self.encode(here, factors, out, exactly)


@intrinsic(prefer_literal=True)
def quantize_row(typing_context, dtype, element, scale, group, source, codes, scales, cols, gain):
    """One row of a finite source; see `Encoder`."""
    numbers = [kind.literal_value for kind in (dtype, element, scale, group)]

    def emit(context, builder, signature, args):
        encoder = Encoder(context, builder, *numbers)
        (encoder.row_of_groups if encoder.group else encoder.row)(*args[4:])
        return context.get_dummy_value()

    return types.void(dtype, element, scale, group, *[types.int64] * 5), emit


@intrinsic(prefer_literal=True)
def row_amax(typing_context, dtype, source, cols):
    """The bits of the largest magnitude of a row: they order like the values, with infinity and then NaN above."""
    kind = dtype.literal_value

    def emit(context, builder, signature, args):
        found = Encoder(context, builder, kind, E4M3, IN_FP32, 0).row_amax(*args[1:])
        return builder.zext(builder.extract_element(builder.bitcast(found, vector(I32)), ir.Constant(I32, 0)), I64)

    return types.int64(dtype, types.int64, types.int64), emit


def _of_e4m3(method: str, dtype: Any) -> Any:
    kind = dtype.literal_value

    def emit(context, builder, signature, args):
        getattr(Encoder(context, builder, kind, E4M3, IN_FP32, 0), method)(*args[1:])
        return context.get_dummy_value()

    return emit


@intrinsic(prefer_literal=True)
def keep_block_amax(typing_context, dtype, source, cols, found):
    """See `Encoder.keep_block_amax`."""
    return types.void(dtype, *[types.int64] * 3), _of_e4m3("keep_block_amax", dtype)


@intrinsic(prefer_literal=True)
def block_scales(typing_context, dtype, found, count, scales, factors):
    """See `Encoder.block_scales`."""
    return types.void(dtype, *[types.int64] * 4), _of_e4m3("block_scales", dtype)


@intrinsic(prefer_literal=True)
def scaled_row(typing_context, dtype, source, codes, cols, factors, step):
    """See `Encoder.scaled_row`."""
    return types.void(dtype, *[types.int64] * 5), _of_e4m3("scaled_row", dtype)
