"""Searched scales: what `formats.Search` says, as vector instructions, between the amax of a group and its codes.

Of each chunk the errors with all candidates are found while it is in registers; those of 4-bit elements in integers of
16 bits, 32 at a time, where one instruction goes from one candidate's units to another's.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[attr-defined]
from numba.core import cgutils

from ..formats import E4M3_MAX, SEARCHES, WeightFormat
from .encoders import BLOCK, E8M0, IN_BF16, IN_FP32, NV
from .errors import Measurer
from .instructions import (
    CHUNK,
    E4M3,
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    INT4,
    INT8,
    LANES,
    int64,
    intrinsic,
    splat,
    vector,
)

DOUBLE = ir.DoubleType()
_PIECE = 4 * CHUNK  # Columns whose errors add up in 32 bits.


def is_searched_here(fmt: WeightFormat) -> bool:
    """Whether the loops know the format's search, for it may be somebody's own."""
    return fmt.search == SEARCHES.get(fmt.name)


class Searcher(Measurer):
    """Writes what quantizes with searched scales."""

    # Candidates: of 16 groups the stored scale, as bits, what their elements are multiplied with or divided by, what a
    # unit of the elements is worth, and whether it is one.

    def candidate(self, number: float, amax: Any, scale: Any, factor: Any, gain: Any) -> tuple[Any, Any, Any, Any]:
        b = self.b
        if self.scale in (IN_FP32, IN_BF16):
            if number != 1.0:
                plain = b.fdiv(amax, splat(FLOAT, {INT8: 127.0, INT4: 7.0, E4M3: E4M3_MAX}[self.element]))
                if self.element == E4M3:
                    plain = scale  # has a floor
                scale = b.fmul(plain, splat(FLOAT, abs(number)))
                if self.element == INT8:
                    scale = self.through(scale)
                factor = scale = self.as_stored(scale)
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
            step = inverse = b.fmul(b.fmul(small, splat(FLOAT, 256.0)), whole)  # `best` inverts the one that it takes.
        if self.per_byte == 1:
            there = b.and_(there, b.fcmp_ordered("<=", b.fmul(amax, inverse), splat(FLOAT, self.limit)))
        return code, inverse, step, there

    def best(self, found: list[tuple[Any, Any, Any, Any]], sums: list[Any], plain: Any) -> tuple[Any, Any]:
        """Of candidates and the sums of their errors (16 integers each): the best one's stored scale, and its factor;
        `plain`: those of the first as they were."""
        b = self.b
        scale, factor = plain
        bits = found[0][0]
        if self.scale == NV:
            factor = found[0][1]
        may, least = found[0][3], self.error(sums[0], found[0][2])
        for (code, divisor, step, there), total in zip(found[1:], sums[1:], strict=True):
            error = self.error(total, step)
            better = b.and_(b.and_(may, there), b.fcmp_ordered("<", error, least))
            least = b.select(better, error, least)
            bits, factor = b.select(better, code, bits), b.select(better, divisor, factor)
        if self.scale in (IN_FP32, IN_BF16):
            return b.bitcast(bits, vector(FLOAT)), factor
        if self.scale == NV:
            factor = b.select(may, b.fdiv(splat(FLOAT, 1.0), factor), plain[1])
        # Where the plain scale is none of the candidates, its code was replaced.
        return b.select(may, b.trunc(bits, vector(I8)), scale), factor

    def error(self, total: Any, step: Any) -> Any:
        b = self.b
        wide = b.fpext(step, vector(DOUBLE))
        return b.fmul(b.sitofp(total, vector(DOUBLE)), b.fmul(wide, wide))

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
                total = self.squares(splat(I32, 0), values, [mine], False)
                self.store(total, b.add(self.at(sums, loop.index, 64), int64(64 * self.groups * i)))
        found = [
            [self.at(sums, int64(i), 64) for i in range(i * self.groups, (i + 1) * self.groups)] for i in range(count)
        ]
        return [self.totals([self.load(place, vector(I32)) for place in places]) for places in found]

    def fixed_sums(self, source: Any, amax: Any, factor: Any, found: list[tuple[Any, Any, Any, Any]]) -> list[Any]:
        """Of each candidate the sums of 16 groups, of 4-bit elements. Takes candidates out of `found` that clip too
        much."""
        b, times = self.b, 4.0 * self.resolution
        inverse = self.inverse(factor) if self.scale in (IN_FP32, IN_BF16) else factor
        units = self.space(64)
        self.store(inverse, units)
        most = b.fmul(amax, inverse)
        in_range = b.fcmp_ordered("<", b.fmul(most, splat(FLOAT, times)), splat(FLOAT, 32767.5))
        most = b.and_(self.counted(most, times), splat(I32, 0x7FFF))
        ratios = []
        for i, (bits, divisor, step, there) in enumerate(found):
            if i == 0 or self.scale == E8M0:  # Steps that are no normal numbers are none that is taken.
                ratio = splat(I32, int(8192 / 2.0 ** self.candidates[i]) if i else 8192)
            else:
                ratio = b.and_(self.counted(b.fdiv(found[0][2], step), 8192.0), splat(I32, 0x7FFF))
            largest = b.lshr(b.add(b.mul(most, ratio), splat(I32, 1 << 14)), splat(I32, 15))
            fits = b.icmp_signed("<=", largest, splat(I32, int(self.limit * self.resolution)))
            found[i] = bits, divisor, step, b.and_(there, b.and_(in_range, fits))
            ratios.append(ratio)
        # Turned, so that each lane has the columns of one group, or of a quarter of one: sums need no lanes added up.
        fixed = []
        for column in range(0, self.groups * self.group, CHUNK):
            unit, here = self.unit_of(units, column), b.add(source, int64(column * self.size))
            values = self.pairs(self.words(here)) if self.element == INT4 else self.magnitudes(here)
            fixed.append(self.halves([self.counted(b.fmul(value, unit), times) for value in values]))
        fixed = self.turned([b.bitcast(vector_, vector(I32)) for vector_ in fixed])
        if self.element == INT4:
            self.turn(fixed, found, ratios)
        ratios = [b.or_(b.and_(ratio, splat(I32, 0xFFFF)), b.shl(ratio, splat(I32, 16))) for ratio in ratios]
        lanes = self.lanes()
        sums = []
        for ratio in ratios:
            mine = b.bitcast(self.shuffle(ratio, ratio, lanes), vector(I16, CHUNK))
            total = splat(I32, 0)
            for vector_ in fixed:
                total = self.fixed_squares(total, b.bitcast(vector_, vector(I16, CHUNK)), mine)
            for step in (1, 2) if self.groups == 4 else ():
                total = b.add(total, self.shuffle(total, total, [at ^ step for at in range(LANES)]))
            sums.append(self.shuffle(total, total, [lanes.index(at % self.groups) for at in range(LANES)]))
        return sums

    def turn(self, fixed: list[Any], found: list[tuple[Any, Any, Any, Any]], ratios: list[Any]) -> None:
        """Give the candidates of negative factors the sign with which the largest of a group's elements is below zero,
        and their ratios."""
        b, kind = self.b, vector(I16, CHUNK)
        ends = []
        for which in ("smax", "smin"):
            end = b.bitcast(fixed[0], kind)
            for word in fixed[1:]:
                end = self.call(f"llvm.{which}.v{CHUNK}i16", kind, end, b.bitcast(word, kind))
            # The halves of a lane, and where a group has four lanes, those.
            for step in (1, 2, 4) if self.groups == 4 else (1,):
                other = self.shuffle(end, end, [at ^ step for at in range(CHUNK)])
                end = self.call(f"llvm.{which}.v{CHUNK}i16", kind, end, other)
            ends.append(end)
        both = self.shuffle(b.add(*ends), ends[0], [2 * self.lanes().index(at % self.groups) for at in range(LANES)])
        above = b.icmp_signed(">", both, splat(I16, 0))
        sign = b.select(above, splat(I32, -0x80000000), splat(I32, 0))
        for i, (bits, _, step, there) in enumerate(found):
            if self.candidates[i] < 0:
                bits = b.or_(bits, sign)
                found[i] = bits, b.bitcast(bits, vector(FLOAT)), step, there
                ratios[i] = b.select(above, b.neg(ratios[i]), ratios[i])

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
        divisors = [divisor for _, divisor, _, _ in found]
        inverses = [self.counting(self.inverse(divisor)) for divisor in divisors]

        def measure(exactly: bool) -> None:
            by = divisors if exactly else [self.counting(divisor, -1) for divisor in divisors]

            def work(_index: Any, here: Any, _codes: Any, _is_last: Any) -> None:
                totals = [splat(I32, 0)] * len(found)
                for column in range(0, _PIECE, CHUNK):
                    values = self.magnitudes(b.add(here, int64(column * self.size)))
                    for i, factors in enumerate(zip(by, inverses, strict=True)):
                        totals[i] = self.squares(totals[i], values, list(factors), exactly)
                for place, total in zip(places, totals, strict=True):
                    b.store(b.add(b.load(place), b.zext(total, kind)), place)

            self.pieces(source, None, cols, _PIECE, work, b.mul(cols, int64(self.size)))

        self.if_usual(factor, measure)
        sums = []
        for place in places:
            whole = self.call(f"llvm.vector.reduce.add.v{LANES}i64", I64, b.load(place))
            one = b.insert_element(ir.Constant(kind, ir.Undefined), whole, ir.Constant(I32, 0))
            sums.append(self.shuffle(one, one, [0] * LANES))
        return self.best(found, sums, (scale, factor))

    def add_block_errors(self, source: Any, cols: Any, inverses: Any, across: Any, sums: Any) -> None:
        """Of a row in blocks: add to the 16 int32 that `sums` has for each block and candidate, in this order, by the
        inverses of steps at an address, in the other. The squares of 128 rows fit: an element is off by 16 at most."""
        b, count = self.b, len(self.candidates)

        def work(index: Any, here: Any, _codes: Any, _is_last: Any) -> None:
            factors = []
            for i in range(count):
                at = b.add(index, b.mul(across, int64(i)))
                factors.append(self.counting(self.broadcast(self.load(self.at(inverses, at, 4), FLOAT, 4))))
            places = [b.add(self.at(sums, index, 64 * count), int64(64 * i)) for i in range(count)]
            totals = [self.load(place, vector(I32), 4) for place in places]
            for column in range(0, BLOCK, CHUNK):
                values = self.magnitudes(b.add(here, int64(column * self.size)))
                for i, factor in enumerate(factors):
                    totals[i] = self.squares(totals[i], values, [factor], False)
            for total, place in zip(totals, places, strict=True):
                self.store(total, place, 4)

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
