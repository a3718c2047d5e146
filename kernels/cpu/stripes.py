"""Stripes of 64 columns, decoded together by look-ups in tables that registers hold, to bfloat16: for the tile unit,
and for products of a few rows of x, which sum each group of columns before its scale counts.

bfloat16 holds every code of e4m3, e2m1, int8 and int4 exactly. Where the chip multiplies pairs of them as fast as it
multiplies single floats (AMD's since Zen 4; Intel's take twice as long), x in bfloat16 stays what it is; elsewhere, and
for other x, both are widened to float32. Either way sums are in float32.

Codes of e2m1, int8 and int4 are integers, too, and where pairs of bfloat16 are slow, those of 16-bit integers are not:
x in bfloat16 is rounded to such there, with a scale for eight columns (see `orders`), whose products are exact.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[attr-defined]
from numba.core import cgutils

from ..formats import WeightFormat
from .decoders import AHEAD, BYTES, DOUBLE, E2M1_VALUES, FLOATS, PER_ROW, SCALE_BYTES, SHORTS, STRIPE
from .instructions import (
    CHUNK,
    E2M1,
    E4M3,
    ELEMENTS,
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    INT4,
    INT8,
    LANES,
    BFloat,
    chip_features,
    chip_name,
    int64,
    intrinsic,
    splat,
    vector,
)
from .words import WORD_UNITS, WORDS_SIZE, WordDecoder, has_words

# How a few rows of x are multiplied: chunk by chunk, as `Decoder.dots` does, or by stripes, as float32, as pairs of
# bfloat16, or as pairs of 16-bit integers.
CHUNKS, SINGLES, PAIRS, WORDS = range(4)

# Stored powers of two up to these are scales that `quick_row` can subtract; see `_bfloat_bits`.
QUICK_SCALES = {E4M3: 245, E2M1: 252}
_PART = 2048  # Columns whose scales are made floats at a time,
MADE_FLOATS = BYTES, SHORTS  # which these are.
ONE = {16: 56, 32: 127}  # The code of a scale of 1, by group: of e4m3 and e8m0. A table has the matrix's gain there.


def _bfloat_bits(element: int, scaled: bool) -> list[int]:
    """The bits of bfloat16 of each code; of its magnitude only, for e4m3 and with a scale; of its lower seven bits, for
    int8, as if it were positive and then negative. `scaled`: times a power of two so large that scales need only
    divide, by a subtraction in which zero stays zero."""
    if element == E2M1:
        values = [value if scaled else sign * value for sign in (1.0, -1.0) for value in E2M1_VALUES]
    elif element == INT4:
        values = [float(value) for value in (*range(8), *range(-8, 0))]
    elif element == INT8:
        values = [float(value) for value in (*range(128), *range(-128, 0))]
    else:
        values = [(m & 7) * 2.0**-9 if m < 8 else (8 + (m & 7)) * 2.0 ** ((m >> 3) - 10) for m in range(127)] + [0.0]
    if scaled:
        values = [value * 2.0 ** (QUICK_SCALES[element] - 127) for value in values]
    bits = [int(np.float32(value).view(np.uint32)) >> 16 for value in values]
    return [*bits[:127], 0x7FC0] if element == E4M3 else bits


def _bfloat16(value: int) -> int:
    """The bits of a small integer, as a signed number."""
    bits = int(np.float32(value).view(np.uint32)) >> 16
    return bits - (bits >> 15 << 16)


def is_quick(element: int, scale: int, group: int) -> bool:
    """Whether `quick_row` can decode rows for the tile unit."""
    return element in (E4M3, E2M1) and (group == CHUNK or (element == E4M3 and scale == PER_ROW))


def subtrahends(fmt: WeightFormat) -> torch.Tensor:
    """For each code of e8m0, what `quick_row` takes from the bits of a bfloat16, twice: int32, seen as float32."""
    less = (QUICK_SCALES[ELEMENTS[fmt.element]] - torch.arange(256, dtype=torch.int32, device="cpu")).clamp_min(0) << 7
    return (less | less << 16).view(torch.float32)


@functools.cache
def has_pairs() -> bool:
    """Whether numba compiles for a chip that multiplies pairs of bfloat16 at full speed."""
    return {"+avx512bf16", "+avx512vbmi"} <= set(chip_features()) and chip_name().startswith("znver")


def way_of(fmt: WeightFormat, dtype: torch.dtype) -> int:
    """How a few rows of x are multiplied."""
    if dtype == torch.bfloat16 and has_pairs():
        return PAIRS
    if dtype == torch.bfloat16 and fmt.element != "e4m3" and has_words():
        return WORDS
    # Stripes of int8 take as many instructions as chunks.
    return SINGLES if fmt.element != "int8" and "+avx512vbmi" in chip_features() else CHUNKS


HALVES = [[16 * q + 8 * half + i for q in range(4) for i in range(8)] for half in range(2)]  # of the 16s of a stripe
EVEN_ODD = [list(range(STRIPE))[first::2] for first in range(2)]
QUARTERS = [list(range(DOUBLE))[first::4] for first in range(4)]  # of a double stripe


def width_of(element: int, scale: int) -> int:
    """See `StripeDecoder.width`."""
    return DOUBLE if element in (E2M1, INT4) or scale == FLOATS else STRIPE


class StripeDecoder(WordDecoder):
    """Writes what decodes stripes of weights, and what multiplies them."""

    def width(self) -> int:
        """Columns that are decoded together for a few rows of x: two stripes where they share a scale, or its lanes can
        be had so."""
        return width_of(self.element, self.scale)

    def values(self, address: Any, zero: Any = None) -> list[Any]:
        """The vectors of a stripe, in bits of bfloat16, without a scale: of `HALVES`; of a double one of `QUARTERS`,
        for elements that share a byte. zero: See `table_of`."""
        b, wide = self.b, vector(I16, STRIPE // 2)
        bits = _bfloat_bits(self.element, False)
        if self.per_byte == 2:
            raw = self.load(address, wide)
            if zero is None:
                entries = self.table_of(bits, None, lambda value: value - (value >> 15 << 16))
            else:
                entries = self.table_of([*range(8), *range(-8, 0)], zero, _bfloat16)
            # Reads the low five bits of each index; the table repeats after sixteen.
            indices = [raw, *(b.lshr(raw, splat(I16, by, 32)) for by in (4, 8, 12))]
            return [self.call("llvm.x86.avx512.permvar.hi.512", wide, entries, index) for index in indices]
        raw = self.load(address, vector(I8, STRIPE))
        low, high = (self.bytes_of(raw, [value >> shift & 0xFF for value in bits[:128]]) for shift in (0, 8))
        if self.element == E4M3:
            high = b.or_(high, b.and_(raw, splat(I8, -128, STRIPE)))
        else:
            others = [self.bytes_of(raw, [value >> shift & 0xFF for value in bits[128:]]) for shift in (0, 8)]
            negative = b.icmp_signed("<", raw, splat(I8, 0, STRIPE))
            low, high = (b.select(negative, *pair) for pair in zip(others, (low, high), strict=True))
        return self.unpacked(low, high)

    def wide_values(self, address: Any, zero: Any) -> list[Any]:
        """As `values`, of all columns that are decoded together."""
        values = self.values(address, zero)
        if self.width() == DOUBLE and self.per_byte == 1:
            values += self.values(self.b.add(address, int64(STRIPE)))
        return values

    def scaled_values(self, address: Any, scales: Any, table: Any, stripe: Any, last: Any, seen: Any) -> list[Any]:
        """As `values`, times powers of two that 32 columns share; see `TileDecoder.quick_row`."""
        b, wide = self.b, vector(I16, STRIPE // 2)
        bits = _bfloat_bits(self.element, True)
        raw = self.load(address, vector(I8, STRIPE // self.per_byte))
        if self.element == E4M3:
            self.see(raw, seen)
            low, high = (self.bytes_of(raw, [value >> shift & 0xFF for value in bits]) for shift in (0, 8))
            values = self.unpacked(low, high)
            signs = [b.and_(v, splat(I16, -0x8000, 32)) for v in self.unpacked(raw, raw)]
        else:
            codes = b.zext(raw, wide)
            both = [codes, b.lshr(codes, splat(I16, 4, 32))]
            entries = ir.Constant(wide, [value - (value >> 15 << 16) for value in bits * 2])
            values = [self.call("llvm.x86.avx512.permvar.hi.512", wide, entries, index) for index in both]
            signs = [b.and_(b.shl(codes, splat(I16, by, 32)), splat(I16, -0x8000, 32)) for by in (12, 8)]
        first = b.mul(stripe, int64(2))
        second = b.add(first, int64(1))
        both = []
        for index in (first, b.select(b.icmp_signed("<", second, last), second, last)):
            code = b.zext(self.load(b.add(scales, index), I8), I64)
            one = self.load(self.at(table, code, 4), I32, 4)
            lane = b.insert_element(ir.Constant(vector(I32), ir.Undefined), one, ir.Constant(I32, 0))
            both.append(self.shuffle(lane, lane, [0] * LANES))
        less = b.bitcast(self.shuffle(*both, [0] * 8 + [LANES] * 8), wide)
        values = [self.call("llvm.usub.sat.v32i16", wide, value, less) for value in values]
        return [b.or_(value, sign) for value, sign in zip(values, signs, strict=True)]

    def stripe_dots(
        self, way: int, rows: int, batch: int, codes: Any, scales: Any, table: Any, xs: Any, cols: Any, out: Any
    ) -> None:
        """As `Decoder.dots`, for x in the order of `layouts.ORDERS`."""
        b = self.b
        zero = splat(FLOAT, 0.0)
        # Few sums would wait for one another: two each hide the latency of an addition.
        split = 2 if rows * batch <= 8 and self.scale == PER_ROW and way != WORDS else 1
        sums = [[[cgutils.alloca_once(b, zero.type) for _ in range(split)] for _ in range(batch)] for _ in range(rows)]
        for pointer in (p for row in sums for of_x in row for p in of_x):
            b.store(zero, pointer)
        ahead = b.mul(b.sub(codes[1], codes[0]), int64(AHEAD))
        width = DOUBLE if way == WORDS else self.width()
        x_size = WORDS_SIZE if way == WORDS else width * (2 if way == PAIRS else 4)

        def part(codes: list[Any], factors: Any, xs: list[Any], cols: Any) -> None:
            def step(stripe: Any, addresses: list[Any], left: Any) -> None:
                vectors = width // (LANES if way == SINGLES else 2 * LANES)
                kind = zero.type if way == SINGLES else vector(I16, 32)
                places = [self.at(xs[m], stripe, x_size) for m in range(batch)]
                for r in range(rows):
                    if left is None:
                        self.prefetch(b.add(addresses[r], ahead))
                        if width == DOUBLE and self.per_byte == 1:
                            self.prefetch(b.add(addresses[r], b.add(ahead, int64(STRIPE))))
                    point = self.zero_of(scales[r], stripe)
                    if way == WORDS:
                        weights = self.words(addresses[r], point)
                    else:
                        weights = self.terms(way, self.wide_values(addresses[r], point))
                    by = None if self.scale == PER_ROW else factors(r, stripe)
                    for m in range(batch):
                        # x of several rows is read anew for each row of the weight, from the first cache: all of it
                        # beside a row of the weight and the sums is more than there are registers.
                        place = places[m] if batch == 1 else self.opaque(places[m])
                        x = [self.load(b.add(place, int64(64 * v)), kind, 64) for v in range(vectors)]
                        if way == WORDS:
                            own = self.word_sums(weights, x)
                            of_x = self.load(b.add(place, int64(2 * DOUBLE)), zero.type, 64)
                            factor = of_x if by is None else b.fmul(by, of_x)
                            pointer = sums[r][m][0]
                            total = self.add_product(SINGLES, own, factor, b.load(pointer))
                            b.store(total if batch == 1 else self.now(total), pointer)
                            continue
                        if by is None:
                            for v, (weight, of_x) in enumerate(zip(weights, x, strict=True)):
                                pointer = sums[r][m][v % split]
                                b.store(self.add_product(way, weight, of_x, b.load(pointer)), pointer)
                            continue
                        own = zero
                        for weight, of_x in zip(weights, x, strict=True):
                            own = self.add_product(way, weight, of_x, own)
                        total = self.add_product(SINGLES, own, by, b.load(sums[r][m][0]))
                        b.store(total if batch == 1 else self.now(total), sums[r][m][0])

            self.chunks(cols, codes, step, width)

        if self.scale in MADE_FLOATS:
            self.in_parts(part, rows, codes, scales, xs, cols, x_size)
        else:
            part(codes, lambda r, stripe: self.float_scale(scales[r], stripe), xs, cols)
        one = ir.Constant(FLOAT, 1.0)
        gain = self.load(b.add(table, int64(4 * ONE[self.group])), FLOAT, 4) if self.scale == BYTES else one
        for r in range(rows):
            factor = self.load(scales[r], FLOAT, 4) if self.scale == PER_ROW else gain
            if way == WORDS:
                factor = b.fmul(factor, ir.Constant(FLOAT, WORD_UNITS[self.element]))
            self.store_totals(sums[r], factor, [out[m][r] for m in range(batch)])

    def float_scale(self, row: Any, stripe: Any) -> Any:
        """The scale of a stripe (or a double one), of those of four bytes of its row."""
        index = self.b.lshr(stripe, int64((self.group // self.width()).bit_length() - 1))
        return self.broadcast(self.factor(row, None, index))

    def in_parts(self, part: Any, rows: int, codes: Any, scales: Any, xs: Any, cols: Any, x_size: int) -> None:
        """part(...) for some columns after another, whose scales are floats."""
        b = self.b
        count = _PART // self.group
        # Of each row, `count` floats.
        kept = cgutils.alloca_once(b, ir.ArrayType(FLOAT, rows * count))
        kept.align = 64
        kept_at = b.ptrtoint(kept, I64)
        groups = b.add(self.last_group(cols), int64(1))
        parts = b.udiv(b.add(cols, int64(_PART - 1)), int64(_PART))
        with cgutils.for_range(b, parts) as loop:
            first = b.mul(loop.index, int64(_PART))
            first_group = b.mul(loop.index, int64(count))
            there = b.sub(groups, first_group)
            here = b.select(b.icmp_signed("<", there, int64(count)), there, int64(count))
            for r in range(rows):
                row = self.at(scales[r], first_group, SCALE_BYTES[self.scale])
                with cgutils.for_range(b, b.udiv(b.add(here, int64(LANES - 1)), int64(LANES))) as inner:
                    at = b.mul(inner.index, int64(LANES))
                    floats = self._scales(self.at(row, at, SCALE_BYTES[self.scale]), b.sub(here, at))
                    place = b.add(kept_at, b.mul(b.add(at, int64(r * count)), int64(4)))
                    self.store(floats, place, 64)

            def factors(r: int, stripe: Any) -> Any:
                each = self.width() // self.group
                some = self.load(self.at(b.add(kept_at, int64(4 * r * count)), stripe, 4 * each), vector(FLOAT, each))
                return self.shuffle(some, some, [lane * each // LANES for lane in range(LANES)])

            end = b.sub(cols, first)
            here_cols = b.select(b.icmp_signed("<", end, int64(_PART)), end, int64(_PART))
            at_codes = [b.add(row, b.udiv(first, int64(self.per_byte))) for row in codes]
            at_xs = [b.add(x, b.mul(b.udiv(first, int64(self.width())), int64(x_size))) for x in xs]
            part(at_codes, factors, at_xs, here_cols)

    def _scales(self, address: Any, count: Any) -> Any:
        """Sixteen scales of one byte, or two, as floats, without the matrix's gain; of fewer the rest are any."""
        b = self.b
        bits = 8 * SCALE_BYTES[self.scale]
        kind = vector(ir.IntType(bits))
        raw = cgutils.alloca_once(b, kind)
        with b.if_else(b.icmp_signed(">=", count, int64(LANES)), likely=True) as (whole, end):
            with whole:
                b.store(self.load(address, kind), raw)
            with end:
                lanes = ir.Constant(vector(I64), list(range(LANES)))
                many = b.insert_element(ir.Constant(vector(I64), ir.Undefined), count, ir.Constant(I32, 0))
                mask = b.icmp_signed("<", lanes, self.shuffle(many, many, [0] * LANES))
                pointer = b.inttoptr(address, kind.as_pointer())
                name = f"llvm.masked.load.v16i{bits}.p0"
                some = self.call(name, kind, pointer, ir.Constant(I32, 1), mask, splat(kind.element, 0))
                b.store(some, raw)
        raw = b.load(raw)
        if self.scale == SHORTS:
            return b.bitcast(b.shl(b.zext(raw, vector(I32)), splat(I32, 16)), vector(FLOAT))
        if (
            self.group == CHUNK
        ):  # e8m0: its code is a float's exponent; that of 2^-127 is a denormal's, of NaN infinity's.
            bits = b.shl(b.zext(raw, vector(I32)), splat(I32, 23))
            bits = self.call("llvm.umax.v16i32", bits.type, bits, splat(I32, 1 << 22))
            is_nan = b.icmp_signed("==", raw, splat(I8, -1))
            return b.bitcast(b.select(is_nan, splat(I32, 0x7FC00000), bits), vector(FLOAT))
        wide = b.and_(b.shl(b.sext(raw, vector(I16)), splat(I16, 7)), splat(I16, 0xBF80 - 0x10000))
        values = b.fmul(self.from_half(wide), splat(FLOAT, 2.0**8))  # See `Decoder.decode`.
        is_nan = b.icmp_signed("==", b.and_(raw, splat(I8, 0x7F)), splat(I8, 0x7F))
        return b.select(is_nan, splat(FLOAT, float("nan")), values)

    def terms(self, way: int, values: list[Any]) -> list[Any]:
        """What x is multiplied with: of each vector all of it, or the lower halves as floats, then the upper ones."""
        if way == PAIRS:
            return values
        b = self.b
        found = []
        for pairs in values:
            both = b.bitcast(pairs, vector(I32))
            upper = b.and_(both, splat(I32, -0x10000))
            found += [b.bitcast(half, vector(FLOAT)) for half in (b.shl(both, splat(I32, 16)), upper)]
        return found

    def add_product(self, way: int, weight: Any, x: Any, total: Any) -> Any:
        if way == SINGLES:
            return self.call(f"llvm.fmuladd.v{LANES}f32", vector(FLOAT), weight, x, total)
        pairs = [self.b.bitcast(value, vector(BFloat(), CHUNK)) for value in (weight, x)]
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", vector(FLOAT), total, *pairs)

    def bytes_of(self, index: Any, entries: list[int]) -> Any:
        """A byte per index, of 128; the indices' upper bit does not count."""
        low, high = (
            ir.Constant(vector(I8, STRIPE), [e - (e >> 7 << 8) for e in half]) for half in (entries[:64], entries[64:])
        )
        return self.call("llvm.x86.avx512.vpermi2var.qi.512", low.type, low, index, high)

    def unpacked(self, low: Any, high: Any) -> list[Any]:
        """Bytes side by side: of the first halves of each 16, and of the second."""
        pairs = [[at for lane in half for at in (lane, STRIPE + lane)] for half in HALVES]
        return [self.b.bitcast(self.shuffle(low, high, pair), vector(I16, STRIPE // 2)) for pair in pairs]


@intrinsic(prefer_literal=True)
def dots(
    typing_context, way, element, scale, group, rows, batch, codes, codes_stride, last, scales, scale_stride, down,
    table, x, x_stride, last_x, cols, out, out_stride, n, m
):  # fmt: skip
    """The product of `rows` weight rows from n and `batch` rows of x from m; beyond `last` and `last_x` those again."""
    numbers = [kind.literal_value for kind in (element, scale, group)]
    how, tile = way.literal_value, (rows.literal_value, batch.literal_value)

    def emit(context, b, signature, args):
        codes, codes_stride, last, scales, scale_stride, down, table, x, x_stride, last_x, cols, out, out_stride, n, m = args[6:]  # fmt: skip  # noqa: E501

        def up_to(first, count, end):
            found = [b.add(first, int64(i)) for i in range(count)]
            return [b.select(b.icmp_signed("<", i, end), i, end) for i in found]

        at_rows, at_x = up_to(n, tile[0], last), up_to(m, tile[1], last_x)
        vectors = StripeDecoder(context, b, *numbers)
        (vectors.dots if how == CHUNKS else functools.partial(vectors.stripe_dots, how))(
            *tile,
            [b.add(codes, b.mul(r, codes_stride)) for r in at_rows],
            [b.add(scales, b.mul(b.sdiv(r, down), scale_stride)) for r in at_rows],
            table,
            [b.add(x, b.mul(i, x_stride)) for i in at_x],
            cols,
            [[b.add(b.add(out, b.mul(i, out_stride)), b.mul(r, int64(4))) for r in at_rows] for i in at_x],
        )
        return context.get_dummy_value()

    return types.void(way, element, scale, group, rows, batch, *[types.int64] * 15), emit
