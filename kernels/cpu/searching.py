"""Searched scales: what `formats.Search` says, as vector instructions, between the amax of a group and its codes.

Of each chunk the errors with all candidates are found while it is in registers; those of 4-bit elements in integers of
16 bits, 32 at a time, where one instruction goes from one candidate's units to another's.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[attr-defined]
from numba.core import cgutils

from ..formats import E4M3_MAX, SEARCHES, WeightFormat
from .encoders import _ROUND, BLOCK, E8M0, IN_FP32, NV, Encoder
from .instructions import (
    CHUNK,
    E2M1,
    E4M3,
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    INT4,
    INT8,
    LANES,
    chip_features,
    int64,
    intrinsic,
    splat,
    vector,
)

DOUBLE = ir.DoubleType()
_BY_KIND = {
    (E2M1, NV): "nvfp4",
    (E2M1, E8M0): "mxfp4",
    (E4M3, E8M0): "mxfp8",
    (INT4, IN_FP32): "int4_per_group",
    (INT8, IN_FP32): "int8_per_channel",
    (E4M3, IN_FP32): "fp8_per_channel",
}
_PIECE = 4 * CHUNK  # Columns whose errors add up in 32 bits.


def is_searched_here(fmt: WeightFormat) -> bool:
    """Whether the loops know the format's search, for it may be somebody's own."""
    return fmt.search == SEARCHES.get(fmt.name)


def _nearest_e2m1(value: float) -> float:
    """The number that is nearest to all between this multiple of a quarter and the next."""
    return min((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), key=lambda number: abs(number - value - 0.125))


class Searcher(Encoder):
    """Writes what quantizes with searched scales."""

    def __init__(self, context: Any, builder: Any, dtype: int, element: int, scale: int, group: int) -> None:
        super().__init__(context, builder, dtype, element, scale, group)
        search = SEARCHES[_BY_KIND[element, scale]]
        self.candidates, self.resolution, self.limit = search.candidates, search.resolution, search.limit
        self.has_short_vectors = platform.machine() in ("x86_64", "AMD64") and "+avx512bw" in chip_features()

    # Candidates: of 16 groups the stored scale, as bits, what their elements are multiplied with or divided by, what a
    # unit of the elements is worth, and whether it is one.

    def candidate(self, number: float, amax: Any, scale: Any, factor: Any, gain: Any) -> tuple[Any, Any, Any, Any]:
        b = self.b
        if self.scale == IN_FP32:
            if number != 1.0:
                plain = b.fdiv(amax, splat(FLOAT, {INT8: 127.0, INT4: 7.0, E4M3: E4M3_MAX}[self.element]))
                if self.element == E4M3:
                    plain = scale  # has a floor
                scale = b.fmul(plain, splat(FLOAT, number))
                if self.element == INT8:
                    scale = self.through(scale)
                factor = scale
            bits = b.bitcast(scale, vector(I32))
            there = b.and_(
                b.icmp_unsigned(">=", bits, splat(I32, 0x00800000)),
                b.icmp_unsigned("<", bits, splat(I32, 0x7F800000)),
            )
            if self.per_byte == 1:
                largest = b.fdiv(amax, factor) if self.element == INT8 else b.fmul(amax, self.inverse(factor))
                there = b.and_(there, b.fcmp_ordered("<=", largest, splat(FLOAT, self.limit)))
            return bits, factor, scale, there
        code = b.add(b.zext(scale, vector(I32)), splat(I32, int(number)))
        last = 254 if self.scale == E8M0 else 126
        there = b.and_(b.icmp_signed(">=", code, splat(I32, 1)), b.icmp_signed("<=", code, splat(I32, last)))
        code = b.select(there, code, splat(I32, 1))
        if self.scale == E8M0:
            step = b.bitcast(b.shl(code, splat(I32, 23)), vector(FLOAT))
            inverse = b.bitcast(b.shl(b.sub(splat(I32, 254), code), splat(I32, 23)), vector(FLOAT))
        else:
            whole = self.broadcast(self.load(b.add(gain, int64(4)), FLOAT, 4))
            small = self.from_half(b.trunc(b.shl(code, splat(I32, 7)), vector(I16)))
            step = b.fmul(b.fmul(small, splat(FLOAT, 256.0)), whole)
            inverse = b.fdiv(splat(FLOAT, 1.0), step)
        if self.per_byte == 1:
            there = b.and_(there, b.fcmp_ordered("<=", b.fmul(amax, inverse), splat(FLOAT, self.limit)))
        return code, inverse, step, there

    def best(self, found: list[tuple[Any, Any, Any, Any]], sums: list[Any], plain: Any) -> tuple[Any, Any]:
        """Of candidates and the sums of their errors (16 integers each): the best one's stored scale, and its factor;
        `plain`: those of the first as they were."""
        b = self.b
        scale, factor = plain
        bits = found[0][0]
        may, least = found[0][3], self.error(sums[0], found[0][2])
        for (code, divisor, step, there), total in zip(found[1:], sums[1:], strict=True):
            error = self.error(total, step)
            better = b.and_(b.and_(may, there), b.fcmp_ordered("<", error, least))
            least = b.select(better, error, least)
            bits, factor = b.select(better, code, bits), b.select(better, divisor, factor)
        if self.scale == IN_FP32:
            return b.bitcast(bits, vector(FLOAT)), factor
        # Where the plain scale is none of the candidates, its code was replaced.
        return b.select(may, b.trunc(bits, vector(I8)), scale), factor

    def error(self, total: Any, step: Any) -> Any:
        b = self.b
        wide = b.fpext(step, vector(DOUBLE))
        return b.fmul(b.sitofp(total, vector(DOUBLE)), b.fmul(wide, wide))

    # Errors of a chunk: 16 sums of two squares, those of an even column and the odd one beside it.

    def squares(self, magnitudes: list[Any], factors: list[Any], exactly: bool) -> Any:
        """Of e4m3, by an inverse; of int8, by `factors` as in `encode`."""
        b = self.b
        if self.element == E4M3:
            scaled = [b.fmul(value, factors[-1]) for value in magnitudes]
        elif exactly:
            scaled = [b.fdiv(value, factors[0]) for value in magnitudes]
        else:
            scaled = [self.divided(value, *factors) for value in magnitudes]
        errors = [b.fsub(value, self.nearest(value)) for value in scaled]
        return self.sum_of_squares(self.halves([self.counted(error, self.resolution) for error in errors]))

    def fixed_squares(self, fixed: Any, ratio: Any) -> Any:
        """Of 4-bit elements: 32 X of `formats.Search`, and M in each."""
        b, unit = self.b, int(self.resolution)
        if self.has_short_vectors:
            value = self.call("llvm.x86.avx512.pmul.hr.sw.512", vector(I16, CHUNK), fixed, ratio)
        else:
            wide = vector(I32, CHUNK)
            product = b.add(b.mul(b.zext(fixed, wide), b.zext(ratio, wide)), splat(I32, 1 << 14, CHUNK))
            value = b.trunc(b.lshr(product, splat(I32, 15, CHUNK)), vector(I16, CHUNK))
        if self.element == INT4:
            near = b.and_(b.add(value, splat(I16, unit // 2, CHUNK)), splat(I16, -unit, CHUNK))
            near = self.call(f"llvm.smin.v{CHUNK}i16", vector(I16, CHUNK), near, splat(I16, 7 * unit, CHUNK))
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
        return self.sum_of_squares(b.sub(value, near))

    def nearest(self, value: Any) -> Any:
        """What the code of a magnitude stands for, in e4m3 or int8."""
        b = self.b
        if self.element == INT8:
            value = self.through(value)
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

    def sum_of_squares(self, short: Any) -> Any:
        b = self.b
        if self.has_short_vectors:
            return self.call("llvm.x86.avx512.pmaddw.d.512", vector(I32), short, short)
        both = b.bitcast(short, vector(I32))
        even, odd = b.ashr(b.shl(both, splat(I32, 16)), splat(I32, 16)), b.ashr(both, splat(I32, 16))
        return b.add(b.mul(even, even), b.mul(odd, odd))

    def totals(self, vectors: list[Any]) -> Any:
        """The sums of the lanes of sixteen vectors."""
        rows = self.transposed(vectors)
        while len(rows) > 1:
            rows = [self.b.add(x, y) for x, y in zip(rows[::2], rows[1::2], strict=True)]
        return rows[0]

    def space(self, nbytes: int) -> Any:
        """As `room`, without zeros."""
        return self.b.ptrtoint(cgutils.alloca_once(self.b, ir.ArrayType(vector(I8, 64), nbytes // 64)), I64)

    def magnitudes(self, source: Any) -> list[Any]:
        return self.pairs(self.unsigned(self.words(source)))

    def choose(self, source: Any, amax: Any, scale: Any, factor: Any, gain: Any) -> tuple[Any, Any]:
        found = [self.candidate(number, amax, scale, factor, gain) for number in self.candidates]
        if self.per_byte == 2:
            sums = self.fixed_sums(source, amax, factor, found)
        else:
            sums = self.sums(source, [divisor for _, divisor, _, _ in found])
        return self.best(found, sums, (scale, factor))

    def sums(self, source: Any, factors: list[Any]) -> list[Any]:
        """Of each candidate the sums of 16 groups, of e4m3 with power-of-two scales."""
        b, count = self.b, len(factors)
        held, sums = self.space(64 * count), self.space(64 * count * self.groups)
        for i, factor in enumerate(factors):
            self.store(factor, b.add(held, int64(64 * i)))
        with cgutils.for_range(b, int64(self.groups)) as loop:
            values = self.magnitudes(self.at(source, loop.index, self.group * self.size))
            for i in range(count):
                mine = self.broadcast(self.load(b.add(self.at(held, loop.index, 4), int64(64 * i)), FLOAT, 4))
                total = self.squares(values, [mine], False)
                self.store(total, b.add(self.at(sums, loop.index, 64), int64(64 * self.groups * i)))
        found = [
            [self.at(sums, int64(i), 64) for i in range(i * self.groups, (i + 1) * self.groups)] for i in range(count)
        ]
        return [self.totals([self.load(place, vector(I32)) for place in places]) for places in found]

    def fixed_sums(self, source: Any, amax: Any, factor: Any, found: list[tuple[Any, Any, Any, Any]]) -> list[Any]:
        """Of each candidate the sums of 16 groups, of 4-bit elements. Takes candidates out of `found` that clip too
        much."""
        b, times = self.b, 4.0 * self.resolution
        inverse = self.inverse(factor) if self.scale == IN_FP32 else factor
        units = self.space(64)
        self.store(inverse, units)
        most = b.fmul(amax, inverse)
        in_range = b.fcmp_ordered("<", b.fmul(most, splat(FLOAT, times)), splat(FLOAT, 32767.5))
        most = b.and_(self.counted(most, times), splat(I32, 0x7FFF))
        ratios = []
        for i, (bits, divisor, step, there) in enumerate(found):
            ratio = b.and_(self.counted(b.fdiv(found[0][2], step), 8192.0), splat(I32, 0x7FFF))
            largest = b.lshr(b.add(b.mul(most, ratio), splat(I32, 1 << 14)), splat(I32, 15))
            fits = b.icmp_signed("<=", largest, splat(I32, int(self.limit * self.resolution)))
            found[i] = bits, divisor, step, b.and_(there, b.and_(in_range, fits))
            ratios.append(b.or_(ratio, b.shl(ratio, splat(I32, 16))))
        # Turned, so that each lane has the columns of one group, or of a quarter of one: sums need no lanes added up.
        fixed = []
        for column in range(0, self.groups * self.group, CHUNK):
            unit = self.unit_of(units, column)
            values = self.magnitudes(b.add(source, int64(column * self.size)))
            fixed.append(self.halves([self.counted(b.fmul(value, unit), times) for value in values]))
        fixed = self.turned([b.bitcast(vector_, vector(I32)) for vector_ in fixed])
        lanes = self.lanes()
        sums = []
        for ratio in ratios:
            mine = b.bitcast(self.shuffle(ratio, ratio, lanes), vector(I16, CHUNK))
            total = None
            for vector_ in fixed:
                squares = self.fixed_squares(b.bitcast(vector_, vector(I16, CHUNK)), mine)
                total = squares if total is None else b.add(total, squares)
            for step in (1, 2) if self.groups == 4 else ():
                total = b.add(total, self.shuffle(total, total, [at ^ step for at in range(LANES)]))
            sums.append(self.shuffle(total, total, [lanes.index(at % self.groups) for at in range(LANES)]))
        return sums

    def lanes(self) -> list[int]:
        """Of each lane of `turned`, which group it has."""
        if self.group == 16:
            return [*range(0, LANES, 2), *range(1, LANES, 2)]
        return [at * CHUNK // self.group for at in range(LANES)]

    def turned(self, chunks: list[Any]) -> list[Any]:
        """Sixteen vectors transposed; of eight, their halves."""
        if len(chunks) == LANES:
            return self.transposed(chunks)
        for step in (4, 2, 1):
            new = list(chunks)
            for i in range(8):
                if i & step == 0:
                    a, b, at = chunks[i], chunks[i + step], range(LANES)
                    new[i] = self.shuffle(a, b, [k if k & step == 0 else k - step + LANES for k in at])
                    new[i + step] = self.shuffle(a, b, [k + step if k & step == 0 else k + LANES for k in at])
            chunks = new
        return chunks

    def unit_of(self, units: Any, column: int) -> Any:
        """What a chunk is multiplied with, of what `units` has for each group."""
        if self.group >= CHUNK:
            return self.broadcast(self.load(self.b.add(units, int64(4 * (column // self.group))), FLOAT, 4))
        two = self.load(self.b.add(units, int64(4 * (column // self.group))), vector(FLOAT, 2), 4)
        return self.shuffle(two, two, [0] * 8 + [1] * 8)  # Even and odd columns alike: 8 of the first group, 8 more.

    def if_usual(self, factor: Any, write: Any) -> None:
        """write(exactly), for divisors whose inverses do and for others; once where all is multiplied."""
        if self.element != INT8:
            write(False)
            return
        with self.b.if_else(self.are_usual(factor)) as usual_or_not:
            for case, exactly in zip(usual_or_not, (False, True), strict=True):
                with case:
                    write(exactly)

    def choose_for_row(self, source: Any, cols: Any, amax: Any, scale: Any, factor: Any) -> tuple[Any, Any]:
        b = self.b
        found = [self.candidate(number, amax, scale, factor, None) for number in self.candidates]
        kind = vector(I64)
        places = [cgutils.alloca_once(b, kind) for _ in found]
        for place in places:
            b.store(ir.Constant(kind, None), place)
        inverses = [self.inverse(divisor) for _, divisor, _, _ in found]

        def measure(exactly: bool) -> None:
            def work(_index: Any, here: Any, _codes: Any, _is_last: Any) -> None:
                totals: list[Any] = [None] * len(found)
                for column in range(0, _PIECE, CHUNK):
                    values = self.magnitudes(b.add(here, int64(column * self.size)))
                    for i, (candidate, inverse) in enumerate(zip(found, inverses, strict=True)):
                        squares = self.squares(values, [candidate[1], inverse], exactly)
                        totals[i] = squares if totals[i] is None else b.add(totals[i], squares)
                for place, total in zip(places, totals, strict=True):
                    b.store(b.add(b.load(place), b.zext(total, kind)), place)

            self.pieces(source, None, cols, _PIECE, work)

        self.if_usual(factor, measure)
        sums = []
        for place in places:
            whole = self.call(f"llvm.vector.reduce.add.v{LANES}i64", I64, b.load(place))
            one = b.insert_element(ir.Constant(kind, ir.Undefined), whole, ir.Constant(I32, 0))
            sums.append(self.shuffle(one, one, [0] * LANES))
        return self.best(found, sums, (scale, factor))

    def add_block_errors(self, source: Any, cols: Any, inverses: Any, across: Any, sums: Any) -> None:
        """Of a row in blocks: add to the 16 int64 that `sums` has for each block and candidate, in this order, by the
        inverses of steps at an address, in the other."""
        b, count, kind = self.b, len(self.candidates), vector(I64)

        def work(index: Any, here: Any, _codes: Any, _is_last: Any) -> None:
            factors = []
            for i in range(count):
                at = b.add(index, b.mul(across, int64(i)))
                factors.append(self.broadcast(self.load(self.at(inverses, at, 4), FLOAT, 4)))
            totals: list[Any] = [None] * count
            for column in range(0, BLOCK, CHUNK):
                values = self.magnitudes(b.add(here, int64(column * self.size)))
                for i, factor in enumerate(factors):
                    squares = self.squares(values, [factor], False)
                    totals[i] = squares if totals[i] is None else b.add(totals[i], squares)
            for i, total in enumerate(totals):
                place = b.add(self.at(sums, index, 128 * count), int64(128 * i))
                self.store(b.add(self.load(place, kind, 8), b.zext(total, kind)), place, 8)

        self.pieces(source, None, cols, BLOCK, work)


@intrinsic(prefer_literal=True)
def add_block_errors(typing_context, dtype, source, cols, inverses, across, sums):
    """See `Searcher.add_block_errors`."""
    kind = dtype.literal_value

    def emit(context, builder, signature, args):
        Searcher(context, builder, kind, E4M3, IN_FP32, 0).add_block_errors(*args[1:])
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 5), emit


@intrinsic(prefer_literal=True)
def search_row(typing_context, dtype, element, scale, group, source, codes, scales, cols, gain):
    """As `encoders.quantize_row`, with searched scales."""
    numbers = [kind.literal_value for kind in (dtype, element, scale, group)]

    def emit(context, builder, signature, args):
        searcher = Searcher(context, builder, *numbers)
        (searcher.row_of_groups if searcher.group else searcher.row)(*args[4:])
        return context.get_dummy_value()

    return types.void(dtype, element, scale, group, *[types.int64] * 5), emit
