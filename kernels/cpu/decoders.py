"""Stored weights as vectors of 16 floats: what decodes them, and what multiplies them with a few rows of x.

32 columns at a time are decoded in registers, for up to four rows of x, and summed in fp32. AVX-512's table look-ups in
registers are a chip's own, and used where there are any.

This is one file because what decodes and what uses it are instructions of the same loops, in the same registers.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[attr-defined]
from numba.core import cgutils

from ..formats import ZERO_BITS, WeightFormat
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

# Scales: one for each row; of groups in float32, of one byte, words that hold a zero point, too, or in bfloat16.
PER_ROW, FLOATS, BYTES, ZEROED, SHORTS = range(5)
SCALE_BYTES = {PER_ROW: 4, FLOATS: 4, BYTES: 1, ZEROED: 4, SHORTS: 2}

STRIPE = 64  # Columns that are decoded together for the tile unit.
DOUBLE = 2 * STRIPE
AHEAD = 4  # Rows that are fetched beforehand; chips do so by themselves within a page of memory only.

# What a decoded element is to be multiplied with: a code's bits, shifted into a float16, are this much too small.
UNITS = {E4M3: 2.0**8, E2M1: 2.0**14, INT8: 1.0, INT4: 1.0}
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TABLES = {
    E2M1: [sign * value / UNITS[E2M1] for sign in (1.0, -1.0) for value in E2M1_VALUES],
    INT4: [float(value) for value in (*range(8), *range(-8, 0))],
}


def interleaved(fmt: WeightFormat) -> bool:
    """Whether a decoded chunk comes as its even columns, then its odd ones: two elements share a byte."""
    return fmt.per_byte == 2


class Decoder(Instructions):
    """Writes vector instructions for weights of one element format and one kind of scale."""

    def __init__(self, context: Any, builder: Any, element: int, scale: int, group: int) -> None:
        super().__init__(context, builder)
        self.element, self.scale, self.group = element, scale, group
        self.per_byte = 1 if element in (E4M3, INT8) else 2
        self.looks_up = self.per_byte == 2 and "+avx512f" in chip_features()
        self.bytes = CHUNK // self.per_byte

    def codes(self, address: Any) -> Any:
        """The stored elements of a chunk."""
        return self.load(address, vector(I8, self.bytes))

    def decode(self, codes: Any, factors: Any = None, zeros: Any = None) -> list[Any]:
        """The two vectors of a chunk, in units of `UNITS`, less a zero point, times a factor (the same in all lanes);
        NaN codes of e4m3 give ±480. See `interleaved`."""
        b = self.b
        if zeros is not None and not self.looks_up:
            values = [b.fsub(value, zeros) for value in self.decode(codes)]
            return values if factors is None else [b.fmul(value, factors) for value in values]
        if factors is not None and not self.looks_up:
            return [b.fmul(value, factors) for value in self.decode(codes)]
        if self.element in (E4M3, INT8):
            halves = [self.shuffle(codes, codes, list(range(at, at + LANES))) for at in (0, LANES)]
            if self.element == INT8:
                return [b.sitofp(b.sext(half, vector(I32)), vector(FLOAT)) for half in halves]
            # The seven magnitude bits are a float16's with a smaller exponent bias. The shift of the sign-extended
            # code puts the sign where it belongs and a copy of it in bit 14, which the mask clears.
            wide = [b.shl(b.sext(half, vector(I16)), splat(I16, 7)) for half in halves]
            return [self.from_half(b.and_(bits, splat(I16, 0xBF80 - 0x10000))) for bits in wide]
        if self.looks_up:
            wide = b.zext(codes, vector(I32))
            both = [wide, b.lshr(wide, splat(I32, 4))]
            table = ir.Constant(vector(FLOAT), _TABLES[self.element])
            if zeros is not None:
                table = b.fsub(table, zeros)
            if factors is not None:  # One product of the table instead of two of what it has.
                table = b.fmul(table, factors)
            # Reads the low four bits of each index.
            return [self.call("llvm.x86.avx512.permvar.sf.512", vector(FLOAT), table, index) for index in both]
        if self.element == INT4:
            wide = b.zext(codes, vector(I32))
            top = [b.shl(wide, splat(I32, shift)) for shift in (28, 24)]
            return [b.sitofp(b.ashr(bits, splat(I32, 28)), vector(FLOAT)) for bits in top]
        wide = b.zext(codes, vector(I16))
        found = []
        for sign, magnitude in ((12, 9), (8, 5)):
            bits = b.and_(b.shl(wide, splat(I16, magnitude)), splat(I16, 0x0E00))
            negative = b.and_(b.shl(wide, splat(I16, sign)), splat(I16, -0x8000))
            found.append(self.from_half(b.or_(bits, negative)))
        return found

    def factors(self, row: Any, table: Any, chunk: Any, last: Any) -> Any:
        """The scales of a chunk's vectors (both have the same), from the scales of its row, of which `last` is the
        last."""
        b = self.b

        def up_to_last(index: Any) -> Any:
            return b.select(b.icmp_signed("<", index, last), index, last)

        if self.group == LANES:  # Even and odd columns alike: 8 of the first group, 8 of the second.
            first = b.mul(chunk, int64(2))
            both = [up_to_last(first), up_to_last(b.add(first, int64(1)))]
            return self.shuffle(*(self.broadcast(self.factor(row, table, i)) for i in both), [0] * 8 + [LANES] * 8)
        index = b.lshr(chunk, int64((self.group // CHUNK).bit_length() - 1))
        return self.broadcast(self.factor(row, table, up_to_last(index)))

    def factor(self, row: Any, table: Any, index: Any) -> Any:
        if self.scale == FLOATS:
            return self.load(self.at(row, index, 4), FLOAT, 4)
        if self.scale == SHORTS:
            bits = self.b.zext(self.load(self.at(row, index, 2), I16, 2), I32)
            return self.b.bitcast(self.b.shl(bits, ir.Constant(I32, 16)), FLOAT)
        if self.scale == ZEROED:
            word = self.load(self.at(row, index, 4), I32, 4)
            return self.b.bitcast(self.b.and_(word, ir.Constant(I32, ~ZERO_BITS)), FLOAT)
        code = self.b.zext(self.load(self.b.add(row, index), I8), I64)
        return self.load(self.at(table, code, 4), FLOAT, 4)

    def zeros(self, row: Any, chunk: Any) -> Any:
        """The zero point of a chunk's vectors; None where there is none."""
        if self.scale != ZEROED:
            return None
        b = self.b
        index = b.lshr(chunk, int64((self.group // CHUNK).bit_length() - 1))
        word = self.load(self.at(row, index, 4), I32, 4)
        zero = b.ashr(b.shl(word, ir.Constant(I32, 28)), ir.Constant(I32, 28))
        return self.broadcast(b.sitofp(zero, FLOAT))

    def chunks(
        self, cols: Any, codes: list[Any], step: Callable[[Any, list[Any], Any], None], width: int = CHUNK
    ) -> None:
        """step(chunk, addresses of its codes, None) for whole chunks of rows that begin at `codes`, then for what is
        left of them, copied to where zeros follow, with the number of its columns."""
        b, size = self.b, width // self.per_byte
        whole = b.udiv(cols, int64(width))
        with cgutils.for_range(b, whole) as loop:
            step(loop.index, [self.at(row, loop.index, size) for row in codes], None)
        left = b.urem(cols, int64(width))
        with b.if_then(b.icmp_signed(">", left, int64(0)), likely=False):
            count = b.udiv(b.add(left, int64(self.per_byte - 1)), int64(self.per_byte))
            copies = []
            for row in codes:
                copy = cgutils.alloca_once(b, vector(I8, size))
                b.store(splat(I8, 0, size), copy)
                target = b.ptrtoint(copy, I64)
                with cgutils.for_range(b, count) as loop:
                    source = b.add(self.at(row, whole, size), loop.index)
                    self.store(self.load(source, I8), b.add(target, loop.index))
                copies.append(target)
            step(whole, copies, left)

    def last_group(self, cols: Any) -> Any:
        return self.b.sdiv(self.b.sub(cols, int64(1)), int64(max(self.group, 1)))

    def dots(self, rows: int, batch: int, codes: Any, scales: Any, table: Any, xs: Any, cols: Any, out: Any) -> None:
        """out[m][r] = Σ_k weight[r][k] * x[m][k], fp32, for weight rows at `codes` and rows of x at `xs`."""
        b = self.b
        # Few sums would wait for one another: two each hide the latency of an addition.
        split = 2 if rows * batch <= 8 else 1
        zero = splat(FLOAT, 0.0)
        sums = [[[cgutils.alloca_once(b, zero.type) for _ in range(split)] for _ in range(batch)] for _ in range(rows)]
        for pointer in (p for row in sums for of_x in row for p in of_x):
            b.store(zero, pointer)
        seen = [cgutils.alloca_once(b, vector(I8, self.bytes)) for _ in range(rows if self.element == E4M3 else 0)]
        for pointer in seen:
            b.store(splat(I8, 0, self.bytes), pointer)
        last = self.last_group(cols)
        ahead = b.mul(b.sub(codes[1], codes[0]), int64(AHEAD))

        def step(chunk: Any, addresses: list[Any], left: Any) -> None:
            weights = []
            for r in range(rows):
                raw = self.codes(addresses[r])
                if left is None:
                    self.prefetch(b.add(addresses[r], ahead))
                if seen:
                    self.see(raw, seen[r])
                if self.scale == PER_ROW:
                    weights.append(self.decode(raw))
                    continue
                factors = self.factors(scales[r], table, chunk, last)
                if self.group == LANES:
                    weights.append([b.fmul(value, factors) for value in self.decode(raw)])
                else:
                    weights.append(self.decode(raw, factors, self.zeros(scales[r], chunk)))
            for m in range(batch):
                for v in range(2):
                    x = self.load(b.add(self.at(xs[m], chunk, 4 * CHUNK), int64(4 * LANES * v)), zero.type, 4)
                    for r in range(rows):
                        pointer = sums[r][m][v % split]
                        name = f"llvm.fmuladd.v{LANES}f32"
                        b.store(self.call(name, zero.type, weights[r][v], x, b.load(pointer)), pointer)

        self.chunks(cols, codes, step)
        unit = ir.Constant(FLOAT, UNITS[self.element])
        for r in range(rows):
            factor = self.b.fmul(self.load(scales[r], FLOAT, 4), unit) if self.scale == PER_ROW else unit
            if seen:  # A NaN code decodes to a number above, and NaN times anything is NaN.
                factor = b.select(self.has_nan(seen[r]), ir.Constant(FLOAT, float("nan")), factor)
            self.store_totals(sums[r], factor, [out[m][r] for m in range(batch)])

    def decoded(self, dtype: int, codes: Any, scales: Any, table: Any, cols: Any, out: Any) -> None:
        """The values of one row times their scales, rounded once to the type of `out`."""
        b = self.b
        last = self.last_group(cols)
        size = 4 if dtype == FP32 else 2
        narrow = vector(I32 if dtype == FP32 else I16, CHUNK)
        buffer = cgutils.alloca_once(b, narrow)
        row_factor = self.broadcast(self.load(scales, FLOAT, 4)) if self.scale == PER_ROW else None
        unit = splat(FLOAT, UNITS[self.element])

        def step(chunk: Any, addresses: list[Any], left: Any) -> None:
            raw = self.codes(addresses[0])
            values = self.decode(raw, zeros=self.zeros(scales, chunk))
            if self.element == E4M3:
                magnitude = b.and_(raw, splat(I8, 0x7F, self.bytes))
                is_nan = b.icmp_unsigned("==", magnitude, splat(I8, 0x7F, self.bytes))
                for v in range(2):
                    here = self.shuffle(is_nan, is_nan, list(range(v * LANES, v * LANES + LANES)))
                    values[v] = b.select(here, splat(FLOAT, float("nan")), values[v])
            factors = self.factors(scales, table, chunk, last) if row_factor is None else row_factor
            values = [b.fmul(b.fmul(value, unit), factors) for value in values]
            packed = self.packed([self.restored(value, dtype) for value in values], dtype)
            target = self.at(out, chunk, size * CHUNK)
            if left is None:
                self.store(packed, target, size)
                return
            b.store(packed, buffer)
            source = b.ptrtoint(buffer, I64)
            with cgutils.for_range(b, left) as loop:
                kind = narrow.element
                self.store(self.load(self.at(source, loop.index, size), kind), self.at(target, loop.index, size))

        self.chunks(cols, [codes], step)

    def store_totals(self, sums: Any, factor: Any, out: Any) -> None:
        """The sum of each vector (or two) of sums, times a factor."""
        for pointers, address in zip(sums, out, strict=True):
            total = self.b.load(pointers[0])
            for pointer in pointers[1:]:
                total = self.b.fadd(total, self.b.load(pointer))
            name = f"llvm.vector.reduce.fadd.v{LANES}f32"
            total = self.call(name, FLOAT, ir.Constant(FLOAT, 0.0), total, fastmath=("reassoc",))
            self.store(self.b.fmul(total, factor), address, 4)

    def see(self, raw: Any, seen: Any) -> None:
        """Keep the largest magnitudes among codes of e4m3."""
        lanes = raw.type.count
        magnitude = self.b.and_(raw, splat(I8, 0x7F, lanes))
        self.b.store(self.call(f"llvm.umax.v{lanes}i8", raw.type, self.b.load(seen), magnitude), seen)

    def has_nan(self, seen: Any) -> Any:
        value = self.b.load(seen)
        largest = self.call(f"llvm.vector.reduce.umax.v{value.type.count}i8", I8, value)
        return self.b.icmp_unsigned("==", largest, ir.Constant(I8, 0x7F))

    def restored(self, value: Any, dtype: int) -> Any:
        """Within the type's range: rounding up near its end would make infinity of a finite weight. NaN stays."""
        b = self.b
        largest = {BF16: 0x7F7F0000, FP16: 0x477FE000, FP32: 0x7F7FFFFF}[dtype]
        limit = b.bitcast(splat(I32, largest), value.type)
        value = b.select(b.fcmp_ordered(">", value, limit), limit, value)
        limit = b.bitcast(splat(I32, largest - 2**31), value.type)
        return b.select(b.fcmp_ordered("<", value, limit), limit, value)

    def packed(self, values: list[Any], dtype: int) -> Any:
        """Two vectors of fp32, rounded to nearest even, as a chunk in the order of its columns."""
        b = self.b
        pairs = [lane + source for lane in range(LANES) for source in (0, LANES)]
        order = list(range(CHUNK)) if self.bytes == CHUNK else pairs
        if dtype == FP32:
            return self.shuffle(*(b.bitcast(value, vector(I32)) for value in values), order)
        if dtype == FP16:
            halves = (b.bitcast(b.fptrunc(value, vector(HALF)), vector(I16)) for value in values)
            return self.shuffle(*halves, order)
        upper = []
        for value in values:
            bits = b.bitcast(value, vector(I32))
            odd = b.and_(b.lshr(bits, splat(I32, 16)), splat(I32, 1))
            rounded = b.add(b.add(bits, splat(I32, 0x7FFF)), odd)
            nan = b.fcmp_unordered("uno", value, value)
            upper.append(b.bitcast(b.select(nan, splat(I32, 0x7FC00000), rounded), vector(I16, CHUNK)))
        return self.shuffle(*upper, [2 * lane + 1 for lane in order])  # bfloat16 is the upper half of float32


@intrinsic(prefer_literal=True)
def decode_row(typing_context, element, scale, group, dtype, codes, scales, table, cols, out):
    """One row of `cols` columns into `out`."""
    numbers, to = [kind.literal_value for kind in (element, scale, group)], dtype.literal_value

    def emit(context, builder, signature, args):
        Decoder(context, builder, *numbers).decoded(to, *args[4:])
        return context.get_dummy_value()

    return types.void(element, scale, group, dtype, *[types.int64] * 5), emit
