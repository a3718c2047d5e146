"""The tile unit of newer Xeons (AMX), which multiplies bfloat16: weights decoded for it, x packed for it, its sums.

It has eight registers of 16 rows of 64 bytes. 32 columns of 16 rows of a weight are one operand; 32 columns of 16 rows
of x, two adjacent columns side by side, the other; 16 x 16 fp32 sums the result. Four sums are kept at a time: 32 rows
of the weight by 32 of x.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[attr-defined]
from numba.core import cgutils

from ..formats import WeightFormat, ceil_div
from .decoders import BYTES, PER_ROW, STRIPE, UNITS
from .instructions import (
    CHUNK,
    E4M3,
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    INT8,
    LANES,
    chip_features,
    int64,
    intrinsic,
    splat,
    vector,
)
from .orders import ORDERS
from .singles import BLOCK_STRIDE, SINGLE_COLS, TILE, TILE_ROWS, SingleDecoder, single_order
from .stripes import HALVES, PAIRS, StripeDecoder, has_pairs, is_quick

# Tile units: none, the chip's, and those made of products of pairs, and of single floats (see `singles`).
NONE, AMX, BY_PAIRS, BY_SINGLES = range(4)
# Rows and columns of a weight that are decoded at a time: columns so that memory is read in long stretches; for more
# than 32 rows of x more of the weight's, as all of x is read for each block.
ROWS_FOR_FEW, ROWS_FOR_MANY = 32, 128
BLOCK_COLS = 2 * SINGLE_COLS
PAIRS_AT_ONCE = 4
TILE_SCRATCH = ROWS_FOR_MANY * BLOCK_STRIDE


@functools.cache
def tile_unit() -> int:
    """`AMX` where numba compiles for a chip with tiles of bfloat16, and the system lets this process use them;
    `BY_PAIRS` where pairs of bfloat16 are multiplied at full speed, `BY_SINGLES` where they are at half of that; else
    `NONE`."""
    needed = {"+amx-tile", "+amx-bf16", "+avx512bf16", "+avx512vbmi"}
    if needed <= set(chip_features()) and hasattr(torch.cpu, "_init_amx") and bool(torch.cpu._init_amx()):
        return AMX
    if has_pairs():
        return BY_PAIRS
    return BY_SINGLES if {"+avx512bf16", "+avx512vbmi"} <= set(chip_features()) else NONE


def tile_size(fmt: WeightFormat, cols: int) -> int:
    """Bytes of 16 rows of x as `vectors.pack_loop` leaves them."""
    if tile_unit() == BY_SINGLES:
        return ORDERS[single_order(fmt)].whole(cols) * TILE * 4
    return ceil_div(cols, STRIPE) * STRIPE * TILE * 2


class TileDecoder(StripeDecoder):
    """Writes what decodes weights of one format for the tile unit, and what packs x alike."""

    def is_quick(self) -> bool:
        return is_quick(self.element, self.scale, self.group)

    def tile_row(self, codes: Any, scales: Any, table: Any, cols: Any, ahead: Any, out: Any) -> Any:
        """A row for the tile unit: bfloat16, of each stripe the even columns first where two elements share a byte and
        the halves of its 16s for e4m3; zeros up to a whole stripe; without a scale per row. Returns whether a code is
        NaN."""
        b = self.b
        # As `quick_row` gives them, or in units of `UNITS`, where there is none.
        unit = splat(FLOAT, UNITS[self.element]) if self.is_quick() else None
        last = self.last_group(cols)
        seen = cgutils.alloca_once(b, vector(I8, self.bytes))
        b.store(splat(I8, 0, self.bytes), seen)

        def step(stripe: Any, addresses: list[Any], left: Any) -> None:
            halves = []
            self.prefetch(b.add(addresses[0], ahead))
            for half in range(2):
                raw = self.codes(b.add(addresses[0], int64(half * self.bytes)))
                chunk = b.add(b.mul(stripe, int64(2)), int64(half))
                values = self.decode(raw, zeros=self.zeros(scales, chunk))
                if self.element == E4M3:
                    self.see(raw, seen)
                if self.scale != PER_ROW:
                    factors = self.factors(scales, table, chunk, last)
                    values = [value if unit is None else b.fmul(value, unit) for value in values]
                    values = [b.fmul(value, factors) for value in values]
                halves.append(values)
            if self.per_byte == 2:  # Even columns of both halves, then odd ones.
                halves = [[halves[0][v], halves[1][v]] for v in range(2)]
            packed = [self.to_bfloat(*values) for values in halves]
            if self.element == E4M3:
                packed = [self.shuffle(*packed, lanes) for lanes in HALVES]
            self.store_stripe(packed, out, stripe)

        self.chunks(cols, [codes], step, STRIPE)
        return self.has_nan(seen)

    def quick_row(self, codes: Any, scales: Any, table: Any, cols: Any, ahead: Any, out: Any) -> Any:
        """As `tile_row`, by look-ups in tables and integers: for e4m3 without a scale or with a power of two, and e2m1
        with one. `table` has, for each code of e8m0, how much it is to be subtracted from the bits of bfloat16, twice.
        """
        b = self.b
        seen = cgutils.alloca_once(b, vector(I8, STRIPE // self.per_byte))
        b.store(splat(I8, 0, STRIPE // self.per_byte), seen)
        last = self.last_group(cols)

        def step(stripe: Any, addresses: list[Any], left: Any) -> None:
            self.prefetch(b.add(addresses[0], ahead))
            if self.scale == PER_ROW:
                values = self.values(addresses[0])
            else:
                values = self.scaled_values(addresses[0], scales, table, stripe, last, seen)
            self.store_stripe(values, out, stripe)

        self.chunks(cols, [codes], step, STRIPE)
        return self.quick_nan(seen)

    def quick_nan(self, seen: Any) -> Any:
        """Whether a code that `scaled_values` saw is NaN and its value is not."""
        if self.element == E4M3 and self.scale == BYTES:
            return self.has_nan(seen)
        return ir.Constant(ir.IntType(1), 0)

    def store_stripe(self, packed: list[Any], out: Any, stripe: Any) -> None:
        for part in range(2):
            self.store(packed[part], self.b.add(self.at(out, stripe, 2 * STRIPE), int64(64 * part)), 64)

    def store_sums(
        self, sums: Any, stride: Any, factors: Any, bias: Any, out: Any, out_stride: Any, across: Any, down: Any
    ) -> None:
        """A tile of sums `[16 rows of the weight, 16 of x]` times factors, plus bias, as bfloat16 into out the other
        way round: `down` rows, `across` columns."""
        b = self.b
        rows = []
        for r in range(TILE):
            row = self.load(b.add(sums, b.mul(stride, int64(r))), vector(FLOAT), 4)
            rows.append(b.fmul(row, self.broadcast(self.load(b.add(factors, int64(4 * r)), FLOAT, 4))))
        offset = self.load(bias, vector(FLOAT), 4)
        rows = [b.fadd(row, offset) for row in self.transposed(rows)]
        whole = b.icmp_signed(">=", across, int64(TILE))
        buffer = cgutils.alloca_once(b, vector(I16, TILE))
        for pair in range(TILE // 2):
            packed = self.to_bfloat(rows[2 * pair], rows[2 * pair + 1])
            for m in (2 * pair, 2 * pair + 1):
                half = self.shuffle(packed, packed, list(range(TILE * (m % 2), TILE * (m % 2) + TILE)))
                target = b.add(out, b.mul(out_stride, int64(m)))
                with b.if_then(b.icmp_signed("<", int64(m), down)), b.if_else(whole) as (then, otherwise):
                    with then:
                        self.store(half, target, 2)
                    with otherwise:
                        b.store(half, buffer)
                        source = b.ptrtoint(buffer, I64)
                        with cgutils.for_range(b, across) as loop:
                            value = self.load(self.at(source, loop.index, 2), I16, 2)
                            self.store(value, self.at(target, loop.index, 2), 2)

    def multiply(
        self, wide: int, weights: Any, x: Any, x_stride: Any, chunks: Any, out: Any, out_stride: Any, adds: Any,
        ahead: Any, ahead_stride: Any,
    ) -> None:  # fmt: skip
        """What `multiply_tiles` does, by pairs: sixteen sums at a time, each of a row of the weight and of 16 of x.

        Meanwhile the rows at `ahead`, if that is not 0, are fetched, which are decoded next.
        """
        b = self.b
        zero = splat(FLOAT, 0.0)
        height = TILE // wide
        with cgutils.for_range(b, int64(TILE_ROWS // height)) as block:
            first = b.mul(block.index, int64(height))
            top = b.add(weights, b.mul(first, int64(BLOCK_STRIDE)))
            top_ahead = b.add(ahead, b.mul(first, ahead_stride))
            places = [
                [b.add(b.add(out, b.mul(b.add(first, int64(r)), out_stride)), int64(64 * j)) for j in range(wide)]
                for r in range(height)
            ]
            sums = [[cgutils.alloca_once(b, zero.type) for _ in range(wide)] for _ in range(height)]
            with b.if_else(b.icmp_signed("!=", adds, int64(0))) as (then, otherwise):
                with then:
                    for pointers, here in zip(sums, places, strict=True):
                        for pointer, place in zip(pointers, here, strict=True):
                            b.store(self.load(place, zero.type, 4), pointer)
                with otherwise:
                    for pointers in sums:
                        for pointer in pointers:
                            b.store(zero, pointer)
            tiles = [b.add(x, b.mul(x_stride, int64(j))) for j in range(wide)]
            with cgutils.for_range(b, b.mul(chunks, int64(LANES // PAIRS_AT_ONCE))) as loop:
                # A line of one of the rows, or two: when all columns are through, all lines are.
                line, row = b.udiv(loop.index, int64(height)), b.urem(loop.index, int64(height))
                with b.if_then(b.icmp_signed("!=", ahead, int64(0))):
                    for i in range(height // 8):
                        lines = b.add(b.mul(line, int64(height // 8)), int64(i))
                        self.prefetch(b.add(self.at(top_ahead, lines, 64), b.mul(row, ahead_stride)))
                for pair in range(PAIRS_AT_ONCE):
                    at = b.add(b.mul(loop.index, int64(PAIRS_AT_ONCE)), int64(pair))
                    of_x = [self.load(self.at(tile, at, 64), vector(I16, CHUNK), 64) for tile in tiles]
                    for r in range(height):
                        place = b.add(self.at(top, at, 4), int64(r * BLOCK_STRIDE))
                        one = self.broadcast(self.load(place, I32, 4))
                        weight = b.bitcast(one, vector(I16, CHUNK))
                        for j in range(wide):
                            pointer = sums[r][j]
                            b.store(self.add_product(PAIRS, weight, of_x[j], b.load(pointer)), pointer)
            for pointers, here in zip(sums, places, strict=True):
                for pointer, place in zip(pointers, here, strict=True):
                    self.store(b.load(pointer), place, 4)

    def pack(self, rows: list[Any], cols: Any, out: Any) -> None:
        """Sixteen rows of x in bfloat16 as tiles, one after the other, in the order of `tile_row`."""
        b = self.b
        lanes = list(range(STRIPE))
        if self.per_byte == 2:
            order = [lanes[0::2], lanes[1::2]]
        elif self.element == E4M3:
            order = HALVES
        else:
            order = [lanes[:CHUNK], lanes[CHUNK:]]

        def step(stripe: Any, addresses: list[Any], left: Any) -> None:
            halves: list[list[Any]] = [[], []]
            for address in addresses:
                whole = [self.load(b.add(address, int64(at)), vector(I16, CHUNK)) for at in (0, 2 * CHUNK)]
                for half in range(2):
                    halves[half].append(b.bitcast(self.shuffle(*whole, order[half]), vector(I32)))
            for half in range(2):
                for q, row in enumerate(self.transposed(halves[half])):
                    place = b.add(self.at(out, stripe, 2048), int64(1024 * half + 64 * q))
                    self.store(row, place, 64)

        # Elements of two bytes are codes of as many columns as two bytes of one.
        outer, self.per_byte = self.per_byte, 1
        self.chunks(b.mul(cols, int64(2)), rows, step, 2 * STRIPE)
        self.per_byte = outer


@intrinsic(prefer_literal=True)
def configure_tiles(typing_context, unit):
    """All eight registers at their full size, for this thread."""
    is_amx = unit.literal_value == AMX

    def emit(context, b, signature, args):
        if not is_amx:
            return context.get_dummy_value()
        config = cgutils.alloca_once(b, ir.ArrayType(I8, 64))
        content = [1, 0] + [0] * 14 + [64, 0] * 8 + [0] * 16 + [TILE] * 8 + [0] * 8
        b.store(ir.Constant(ir.ArrayType(I8, 64), content), config)
        pointer = b.bitcast(config, I8.as_pointer())
        function = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.VoidType(), [I8.as_pointer()]), "llvm.x86.ldtilecfg"
        )
        b.call(function, [pointer])
        return context.get_dummy_value()

    return types.void(unit), emit


@intrinsic(prefer_literal=True)
def release_tiles(typing_context, unit):
    is_amx = unit.literal_value == AMX

    def emit(context, b, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        if is_amx:
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.tilerelease"), [])
        return context.get_dummy_value()

    return types.void(unit), emit


@intrinsic(prefer_literal=True)
def multiply_tiles(
    typing_context, unit, element, across, weights, x, x_stride, chunks, out, out_stride, adds, ahead, ahead_stride
):  # fmt: skip
    """out `[32, 16 * across]` = weights `[32, 32 * chunks]` times x, or plus it if `adds`; `x_stride` is that between
    the tiles of 16 rows of x. `ahead`: see `TileDecoder.multiply`."""
    by, kind, wide = unit.literal_value, element.literal_value, across.literal_value

    def emit(context, b, signature, args):
        weights, x, x_stride, chunks, out, out_stride, adds = args[3:10]
        stride = int64(BLOCK_STRIDE)
        if by == BY_SINGLES:
            SingleDecoder(context, b, kind, PER_ROW, 0).multiply_singles(wide, *args[3:])
            return context.get_dummy_value()
        if by == BY_PAIRS:
            TileDecoder(context, b, kind, PER_ROW, 0).multiply(wide, *args[3:])
            return context.get_dummy_value()

        def call(name, *operands):
            kinds = [operand.type for operand in operands]
            function = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}"
            )
            b.call(function, operands)

        def tile(number):
            return ir.Constant(I8, number)

        def pointer(address):
            return b.inttoptr(address, I8.as_pointer())

        def down(address, step, times):
            return b.add(address, b.mul(step, int64(times)))

        sums = [(tile(2 * i + j), i, j) for i in range(2) for j in range(wide)]
        places = [b.add(down(out, out_stride, TILE * i), int64(64 * j)) for _, i, j in sums]
        with b.if_else(b.icmp_signed("!=", adds, int64(0))) as (then, otherwise):
            with then:
                for (number, _, _), place in zip(sums, places, strict=True):
                    call("tileloadd64", number, pointer(place), out_stride)
            with otherwise:
                for number, _, _ in sums:
                    call("tilezero", number)
        with cgutils.for_range(b, chunks) as loop:
            for i in range(2):
                place = b.add(down(weights, stride, TILE * i), b.mul(loop.index, int64(64)))
                call("tileloadd64", tile(4 + i), pointer(place), stride)
            for j in range(wide):
                place = b.add(down(x, x_stride, j), b.mul(loop.index, int64(1024)))
                call("tileloadd64", tile(6 + j), pointer(place), int64(64))
            for number, i, j in sums:
                call("tdpbf16ps", number, tile(4 + i), tile(6 + j))
        for (number, _, _), place in zip(sums, places, strict=True):
            call("tilestored64", number, pointer(place), out_stride)
        return context.get_dummy_value()

    return types.void(unit, element, across, *[types.int64] * 9), emit


@intrinsic(prefer_literal=True)
def tile_row(typing_context, unit, element, scale, group, quick, codes, scales, table, cols, ahead, out):
    """See `TileDecoder.tile_row` and `quick_row`, and `SingleDecoder.single_row`."""
    numbers, by_table = [kind.literal_value for kind in (element, scale, group)], quick.literal_value
    single = unit.literal_value == BY_SINGLES

    def emit(context, builder, signature, args):
        if single:
            return SingleDecoder(context, builder, *numbers).single_row(*args[5:])
        vectors = TileDecoder(context, builder, *numbers)
        return (vectors.quick_row if by_table else vectors.tile_row)(*args[5:])

    return types.boolean(unit, element, scale, group, quick, *[types.int64] * 6), emit


@intrinsic()
def store_sums(typing_context, sums, stride, factors, bias, out, out_stride, across, down):
    """See `TileDecoder.store_sums`."""

    def emit(context, builder, signature, args):
        TileDecoder(context, builder, E4M3, PER_ROW, 0).store_sums(*args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), emit


@intrinsic(prefer_literal=True)
def pack(typing_context, unit, kind, x, stride, first, count, cols, out):
    """See `TileDecoder.pack` and `SingleDecoder.pack_singles`: `count` rows of x from `first`, and the last of them
    again. kind: The element, or the order."""
    single, number = unit.literal_value == BY_SINGLES, kind.literal_value

    def emit(context, b, signature, args):
        x, stride, first, count, cols, out = args[2:]
        last = b.sub(count, int64(1))
        rows = [b.select(b.icmp_signed("<", int64(i), last), int64(i), last) for i in range(TILE)]
        addresses = [b.add(x, b.mul(b.add(first, r), stride)) for r in rows]
        if single:
            SingleDecoder(context, b, INT8, PER_ROW, 0).pack_singles(ORDERS[number], addresses, cols, out)
        else:
            TileDecoder(context, b, number, PER_ROW, 0).pack(addresses, cols, out)
        return context.get_dummy_value()

    return types.void(unit, kind, *[types.int64] * 6), emit
