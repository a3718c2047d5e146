"""A tile unit made of products of single floats, for chips with AVX-512 that have neither tiles nor pairs of bfloat16
at full speed: Intel's, where AMX is not there or not let through.

`vdpbf16ps`, and so oneDNN's bfloat16, makes 16 products a cycle there; float32 makes 32. So weights are decoded to
float32, with their scales, into memory that stays in the second cache. x is widened, and sixteen of its rows are the
lanes of a vector. Only the result is rounded to bfloat16.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from ..formats import WeightFormat
from .decoders import PER_ROW
from .instructions import CHUNK, FLOAT, I16, I32, INT8, LANES, int64, splat, vector
from .orders import Order, order_of
from .stripes import CHUNKS, MADE_FLOATS, SINGLES, StripeDecoder, width_of

TILE = 16  # Rows of x that are lanes.
TILE_ROWS = 2 * TILE  # Of the weight, that are multiplied in one go.
SINGLE_COLS = 1024  # Columns of a weight that are decoded at a time: as many bytes of floats as 2048 of bfloat16.
BLOCK_STRIDE = 4 * SINGLE_COLS + 64  # Bytes; the padding keeps rows from falling on the same cache sets.
_PART = 256  # Columns that are multiplied at a time: 32 rows of x stay in the first cache.
_AT_ONCE = 4  # Columns per step of the innermost loop.
_LINE = 64


def single_width(element: int, scale: int) -> int:
    """Columns that are decoded together: of int8, which has one scale per row, a chunk."""
    return CHUNK if element == INT8 else width_of(element, scale)


def single_order(fmt: WeightFormat) -> int:
    """Of x, and of decoded weights."""
    return order_of(fmt, CHUNKS if fmt.element == "int8" else SINGLES)


class SingleDecoder(StripeDecoder):
    """Writes what decodes weights of one format to float32, and what multiplies them with many rows of x."""

    def single_row(self, codes: Any, scales: Any, table: Any, cols: Any, ahead: Any, out: Any) -> Any:
        """A row of `SINGLE_COLS` columns or fewer in the order of x, zeros up to a whole stripe; without a scale per
        row and without a matrix's gain, which the table has. NaN is what it was: returns false."""
        b, width = self.b, single_width(self.element, self.scale)

        def part(codes: list[Any], factors: Any, outs: list[Any], cols: Any) -> None:
            def step(stripe: Any, addresses: list[Any], left: Any) -> None:
                (address,) = addresses
                for line in range(0, width // self.per_byte, _LINE):
                    self.prefetch(b.add(address, b.add(ahead, int64(line))))
                if self.element == INT8:
                    values = self.decode(self.codes(address))
                else:
                    values = self.terms(SINGLES, self.wide_values(address, self.zero_of(scales, stripe)))
                if self.scale != PER_ROW:
                    by = factors(0, stripe)
                    values = [b.fmul(value, by) for value in values]
                place = self.at(outs[0], stripe, 4 * width)
                for v, value in enumerate(values):
                    self.store(value, b.add(place, int64(64 * v)), 64)

            self.chunks(cols, codes, step, width)

        if self.scale in MADE_FLOATS:
            self.in_parts(part, 1, [codes], [scales], [out], cols, 4 * width)
        else:
            part([codes], lambda r, stripe: self.float_scale(scales, stripe), [out], cols)
        return ir.Constant(ir.IntType(1), 0)

    def multiply_singles(
        self, wide: int, weights: Any, x: Any, x_stride: Any, chunks: Any, out: Any, out_stride: Any, adds: Any,
        ahead: Any, ahead_stride: Any,
    ) -> None:  # fmt: skip
        """What `multiply_tiles` does, by single floats: sixteen sums at a time, each of a row of the weight and of 16
        of x. Meanwhile the rows at `ahead`, if that is not 0, are fetched, which are decoded next."""
        b = self.b
        zero = splat(FLOAT, 0.0)
        height = TILE // wide
        cols = b.mul(chunks, int64(CHUNK))
        lines = _PART // self.per_byte // _LINE
        parts = b.udiv(b.add(cols, int64(_PART - 1)), int64(_PART))
        with cgutils.for_range(b, parts) as part:
            start = b.mul(part.index, int64(_PART))
            left = b.sub(cols, start)
            here = b.select(b.icmp_signed("<", left, int64(_PART)), left, int64(_PART))
            begins = b.icmp_signed("==", b.or_(adds, start), int64(0))
            with cgutils.for_range(b, int64(TILE_ROWS // height)) as block:
                first = b.mul(block.index, int64(height))
                with b.if_then(b.icmp_signed("!=", ahead, int64(0))):
                    for r in range(height):
                        row = b.add(ahead, b.mul(b.add(first, int64(r)), ahead_stride))
                        for line in range(lines):
                            at = b.add(b.mul(part.index, int64(lines)), int64(line))
                            self.prefetch(self.at(row, at, _LINE))
                top = b.add(self.at(weights, first, BLOCK_STRIDE), b.mul(start, int64(4)))
                places = [
                    [b.add(b.add(out, b.mul(b.add(first, int64(r)), out_stride)), int64(64 * j)) for j in range(wide)]
                    for r in range(height)
                ]
                sums = [[cgutils.alloca_once(b, zero.type) for _ in range(wide)] for _ in range(height)]
                each = [(p, q) for row in zip(sums, places, strict=True) for p, q in zip(*row, strict=True)]
                with b.if_else(begins) as (then, otherwise):
                    with then:
                        for pointer, _ in each:
                            b.store(zero, pointer)
                    with otherwise:
                        for pointer, place in each:
                            b.store(self.load(place, zero.type, 4), pointer)
                tiles = [b.add(b.add(x, b.mul(x_stride, int64(j))), b.mul(start, int64(64))) for j in range(wide)]
                with cgutils.for_range(b, b.udiv(here, int64(_AT_ONCE))) as loop:
                    for one in range(_AT_ONCE):
                        at = b.add(b.mul(loop.index, int64(_AT_ONCE)), int64(one))
                        of_x = [self.load(self.at(tile, at, 64), zero.type, 64) for tile in tiles]
                        for r in range(height):
                            place = b.add(self.at(top, at, 4), int64(r * BLOCK_STRIDE))
                            weight = self.broadcast(self.load(place, FLOAT, 4))
                            for j in range(wide):
                                total = self.add_product(SINGLES, weight, of_x[j], b.load(sums[r][j]))
                                b.store(total, sums[r][j])
                for pointer, place in each:
                    self.store(b.load(pointer), place, 4)

    def pack_singles(self, order: Order, rows: list[Any], cols: Any, out: Any) -> None:
        """Sixteen rows of x in bfloat16 as floats `[places of the order, 16]`, with zeros after the last column."""
        b = self.b
        width = len(order.columns)

        def step(stripe: Any, addresses: list[Any], left: Any) -> None:
            raw = [self.load(address, vector(I16, width), 2) for address in addresses]
            for at in range(0, width, LANES):
                some = [self.shuffle(row, row, order.columns[at : at + LANES]) for row in raw]
                floats = [b.shl(b.zext(row, vector(I32)), splat(I32, 16)) for row in some]
                for q, row in enumerate(self.transposed(floats)):
                    self.store(row, b.add(self.at(out, stripe, 64 * width), int64(64 * (at + q))), 64)

        # Elements of two bytes are codes of as many columns as two bytes of one.
        outer, self.per_byte = self.per_byte, 1
        self.chunks(b.mul(cols, int64(2)), rows, step, 2 * width)
        self.per_byte = outer
