"""Products with quantized weights and their decoding, as vectors of 16 floats: the code that reads stored weights.

Numba has no vectors of its own, so the inner loops are written as LLVM instructions (`_Vectors`), in its generic vector
operations, which it lowers for whatever chip there is. Two things are a chip's own: AVX-512's table look-ups in
registers, and the tile unit of newer Xeons (AMX), which multiplies bfloat16. Elsewhere a loop decodes 32 columns at a
time in registers, for up to four rows of x, and sums in fp32.

Loops over rows are C functions of one argument, a structure of sizes and addresses (`PRODUCT`, `PACK`, `DECODE`). No
Python runs in them, so the threads of OpenMP can (`rows.run_loop`): each takes the next rows that nobody has taken.

This is one file because numba's cache notices a change only in the file that defines a function.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, extending, types  # type: ignore[attr-defined]
from numba.core import cgutils, registry

from ..formats import WeightFormat
from .compiling import Once, compiled

E4M3, E2M1, INT8, INT4 = range(4)
_ELEMENTS = {"e4m3": E4M3, "e2m1": E2M1, "int8": INT8, "int4": INT4}
PER_ROW, FLOATS, BYTES = range(3)
BF16, FP16, FP32 = range(3)
_DTYPES = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}

STRIPE = 64  # Columns that are decoded together for the tile unit.
CHUNK = 32  # Columns that are decoded together: two vectors.
_LANES = CHUNK // 2
AHEAD = 4  # Rows that are fetched beforehand; chips do so by themselves within a page of memory only.

# What a decoded element is to be multiplied with: a code's bits, shifted into a float16, are this much too small.
_UNITS = {E4M3: 2.0**8, E2M1: 2.0**14, INT8: 1.0, INT4: 1.0}
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TABLES = {
    E2M1: [sign * value / _UNITS[E2M1] for sign in (1.0, -1.0) for value in _E2M1_VALUES],
    INT4: [float(value) for value in (*range(8), *range(-8, 0))],
}


def _places(*names: str) -> np.dtype[Any]:
    return np.dtype([(name, np.int64) for name in names])


# What a loop over rows is called with. Strides are in bytes. `counter` is the address of an int64 that begins at 0: the
# piece that no thread has taken yet. A piece is `step` rows of the weight (of one job), which has `rows` of `cols`
# columns. `down` rows share a row of scales, and a table has the 256 fp32 values of scales of one byte.
PRODUCT = _places(
    "counter", "pieces", "pieces_per_job", "step", "rows", "cols", "codes_stride", "scale_stride", "down",
    "x", "x_stride", "out", "out_stride",  # fp32; rows of x are whole chunks, see `interleaved`
    "block_rows", "block_cols", "scratch", "scratch_stride",  # of each thread; a second counter says which is whose
    "jobs",  # int64 [J, 8], see `JOB`
)  # fmt: skip
# Addresses of codes, scales, their table, and the first and last + 1 of the rows (tiles, of `tile_loop`) of x that they
# meet. Of `tile_loop` also: the address of the bias, fp32, the first row of out, and how many.
JOB = 8
PACK = _places("counter", "pieces", "cols", "x", "x_stride", "tiles", "out", "out_stride")  # tiles: (row, rows) of x
DECODE = _places(
    "counter", "step", "rows", "cols", "codes", "codes_stride", "scale", "scale_stride", "down", "table",
    "out", "out_stride",
)  # fmt: skip


# Stored powers of two up to these are scales that `quick_row` can subtract; see `_bfloat_bits`.
QUICK_SCALES = {E4M3: 245, E2M1: 252}


def _bfloat_bits(element: int, scaled: bool) -> list[int]:
    """The bits of bfloat16 of each code; of its magnitude only, for e4m3 and with a scale. `scaled`: times a power of
    two so large that scales need only divide, by a subtraction in which zero stays zero."""
    if element == E2M1:
        values = [value for _ in range(2) for value in _E2M1_VALUES]
    else:
        values = [(m & 7) * 2.0**-9 if m < 8 else (8 + (m & 7)) * 2.0 ** ((m >> 3) - 10) for m in range(127)] + [0.0]
    if scaled:
        values = [value * 2.0 ** (QUICK_SCALES[element] - 127) for value in values]
    bits = [int(np.float32(value).view(np.uint32)) >> 16 for value in values]
    return bits if element == E2M1 else [*bits[:127], 0x7FC0]


def is_quick(element: int, scale: int, group: int) -> bool:
    """Whether `quick_row` can decode rows for the tile unit."""
    return element in (E4M3, E2M1) and (group == CHUNK or (element == E4M3 and scale == PER_ROW))


def subtrahends(fmt: WeightFormat) -> torch.Tensor:
    """For each code of e8m0, what `quick_row` takes from the bits of a bfloat16, twice: int32, seen as float32."""
    less = (QUICK_SCALES[_ELEMENTS[fmt.element]] - torch.arange(256, dtype=torch.int32, device="cpu")).clamp_min(0) << 7
    return (less | less << 16).view(torch.float32)


def interleaved(fmt: WeightFormat) -> bool:
    """Whether a decoded chunk comes as its even columns, then its odd ones: two elements share a byte."""
    return fmt.per_byte == 2


_HALVES = [[16 * q + 8 * half + i for q in range(4) for i in range(8)] for half in range(2)]  # of the 16s of a stripe

_I8, _I16, _I32, _I64 = map(ir.IntType, (8, 16, 32, 64))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()


def _intrinsic(prefer_literal: bool = False) -> Any:
    """A function that is LLVM instructions: what is decorated returns its signature and what writes them."""
    return extending.intrinsic(prefer_literal=prefer_literal)


class _BFloat(ir.Type):  # type: ignore[misc]
    """bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _vector(element: Any, lanes: int = _LANES) -> Any:
    return ir.VectorType(element, lanes)


def _splat(element: Any, value: float, lanes: int = _LANES) -> Any:
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


class _Vectors:
    """Writes vector instructions for weights of one element format and one kind of scale."""

    def __init__(self, context: Any, builder: Any, element: int, scale: int, group: int) -> None:
        self.b, self.element, self.scale, self.group = builder, element, scale, group
        self.has_tables = "+avx512f" in chip_features()
        self.per_byte = 1 if element in (E4M3, INT8) else 2
        self.bytes = CHUNK // self.per_byte

    def call(self, name: str, result: Any, *args: Any, **options: Any) -> Any:
        signature = ir.FunctionType(result, [arg.type for arg in args])
        function = self.b.module.globals.get(name) or ir.Function(self.b.module, signature, name)
        return self.b.call(function, args, **options)

    def load(self, address: Any, kind: Any, align: int = 1) -> Any:
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any, align: int = 1) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=align)

    def at(self, base: Any, index: Any, size: int) -> Any:
        return self.b.add(base, self.b.mul(index, _int(size)))

    def shuffle(self, *operands: Any) -> Any:
        """Lanes of two vectors, those of the second counted on; the last operand says which."""
        a, b, lanes = operands
        return self.b.shuffle_vector(a, b, ir.Constant(_vector(_I32, len(lanes)), lanes))

    def broadcast(self, value: Any) -> Any:
        one = self.b.insert_element(ir.Constant(_vector(_FLOAT), ir.Undefined), value, ir.Constant(_I32, 0))
        return self.shuffle(one, one, [0] * _LANES)

    def prefetch(self, address: Any) -> None:
        pointer = self.b.inttoptr(address, _I8.as_pointer())
        flags = [ir.Constant(_I32, flag) for flag in (0, 3, 1)]  # to read, into the nearest cache, data
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *flags)

    def codes(self, address: Any) -> Any:
        """The stored elements of a chunk."""
        return self.load(address, _vector(_I8, self.bytes))

    def decode(self, codes: Any) -> list[Any]:
        """The two vectors of a chunk, in units of `_UNITS`; NaN codes of e4m3 give ±480. See `interleaved`."""
        b = self.b
        if self.element in (E4M3, INT8):
            halves = [self.shuffle(codes, codes, list(range(at, at + _LANES))) for at in (0, _LANES)]
            if self.element == INT8:
                return [b.sitofp(b.sext(half, _vector(_I32)), _vector(_FLOAT)) for half in halves]
            # The seven magnitude bits are a float16's with a smaller exponent bias. The shift of the sign-extended
            # code puts the sign where it belongs and a copy of it in bit 14, which the mask clears.
            wide = [b.shl(b.sext(half, _vector(_I16)), _splat(_I16, 7)) for half in halves]
            return [self.from_half(b.and_(bits, _splat(_I16, 0xBF80 - 0x10000))) for bits in wide]
        if self.has_tables:
            wide = b.zext(codes, _vector(_I32))
            both = [wide, b.lshr(wide, _splat(_I32, 4))]
            table = ir.Constant(_vector(_FLOAT), _TABLES[self.element])
            # Reads the low four bits of each index.
            return [self.call("llvm.x86.avx512.permvar.sf.512", _vector(_FLOAT), table, index) for index in both]
        if self.element == INT4:
            wide = b.zext(codes, _vector(_I32))
            top = [b.shl(wide, _splat(_I32, shift)) for shift in (28, 24)]
            return [b.sitofp(b.ashr(bits, _splat(_I32, 28)), _vector(_FLOAT)) for bits in top]
        wide = b.zext(codes, _vector(_I16))
        found = []
        for sign, magnitude in ((12, 9), (8, 5)):
            bits = b.and_(b.shl(wide, _splat(_I16, magnitude)), _splat(_I16, 0x0E00))
            negative = b.and_(b.shl(wide, _splat(_I16, sign)), _splat(_I16, -0x8000))
            found.append(self.from_half(b.or_(bits, negative)))
        return found

    def from_half(self, bits: Any) -> Any:
        return self.b.fpext(self.b.bitcast(bits, _vector(_HALF)), _vector(_FLOAT))

    def factors(self, row: Any, table: Any, chunk: Any, last: Any) -> Any:
        """The scales of a chunk's vectors (both have the same), from the scales of its row, of which `last` is the
        last."""
        b = self.b

        def up_to_last(index: Any) -> Any:
            return b.select(b.icmp_signed("<", index, last), index, last)

        if self.group == _LANES:  # Even and odd columns alike: 8 of the first group, 8 of the second.
            first = b.mul(chunk, _int(2))
            both = [up_to_last(first), up_to_last(b.add(first, _int(1)))]
            return self.shuffle(*(self.broadcast(self.factor(row, table, i)) for i in both), [0] * 8 + [_LANES] * 8)
        index = b.lshr(chunk, _int((self.group // CHUNK).bit_length() - 1))
        return self.broadcast(self.factor(row, table, up_to_last(index)))

    def factor(self, row: Any, table: Any, index: Any) -> Any:
        if self.scale == FLOATS:
            return self.load(self.at(row, index, 4), _FLOAT, 4)
        code = self.b.zext(self.load(self.b.add(row, index), _I8), _I64)
        return self.load(self.at(table, code, 4), _FLOAT, 4)

    def chunks(
        self, cols: Any, codes: list[Any], step: Callable[[Any, list[Any], Any], None], width: int = CHUNK
    ) -> None:
        """step(chunk, addresses of its codes, None) for whole chunks of rows that begin at `codes`, then for what is
        left of them, copied to where zeros follow, with the number of its columns."""
        b, size = self.b, width // self.per_byte
        whole = b.udiv(cols, _int(width))
        with cgutils.for_range(b, whole) as loop:
            step(loop.index, [self.at(row, loop.index, size) for row in codes], None)
        left = b.urem(cols, _int(width))
        with b.if_then(b.icmp_signed(">", left, _int(0)), likely=False):
            count = b.udiv(b.add(left, _int(self.per_byte - 1)), _int(self.per_byte))
            copies = []
            for row in codes:
                copy = cgutils.alloca_once(b, _vector(_I8, size))
                b.store(_splat(_I8, 0, size), copy)
                target = b.ptrtoint(copy, _I64)
                with cgutils.for_range(b, count) as loop:
                    source = b.add(self.at(row, whole, size), loop.index)
                    self.store(self.load(source, _I8), b.add(target, loop.index))
                copies.append(target)
            step(whole, copies, left)

    def last_group(self, cols: Any) -> Any:
        return self.b.sdiv(self.b.sub(cols, _int(1)), _int(max(self.group, 1)))

    def dots(self, rows: int, batch: int, codes: Any, scales: Any, table: Any, xs: Any, cols: Any, out: Any) -> None:
        """out[m][r] = Σ_k weight[r][k] * x[m][k], fp32, for weight rows at `codes` and rows of x at `xs`."""
        b = self.b
        # Few sums would wait for one another: two each hide the latency of an addition.
        split = 2 if rows * batch <= 8 else 1
        zero = _splat(_FLOAT, 0.0)
        sums = [[[cgutils.alloca_once(b, zero.type) for _ in range(split)] for _ in range(batch)] for _ in range(rows)]
        for pointer in (p for row in sums for of_x in row for p in of_x):
            b.store(zero, pointer)
        seen = [cgutils.alloca_once(b, _vector(_I8, self.bytes)) for _ in range(rows if self.element == E4M3 else 0)]
        for pointer in seen:
            b.store(_splat(_I8, 0, self.bytes), pointer)
        last = self.last_group(cols)
        ahead = b.mul(b.sub(codes[1], codes[0]), _int(AHEAD))

        def step(chunk: Any, addresses: list[Any], left: Any) -> None:
            weights = []
            for r in range(rows):
                raw = self.codes(addresses[r])
                if left is None:
                    self.prefetch(b.add(addresses[r], ahead))
                if seen:
                    self.see(raw, seen[r])
                values = self.decode(raw)
                if self.scale != PER_ROW:
                    factors = self.factors(scales[r], table, chunk, last)
                    values = [b.fmul(value, factors) for value in values]
                weights.append(values)
            for m in range(batch):
                for v in range(2):
                    x = self.load(b.add(self.at(xs[m], chunk, 4 * CHUNK), _int(4 * _LANES * v)), zero.type, 4)
                    for r in range(rows):
                        pointer = sums[r][m][v % split]
                        name = f"llvm.fmuladd.v{_LANES}f32"
                        b.store(self.call(name, zero.type, weights[r][v], x, b.load(pointer)), pointer)

        self.chunks(cols, codes, step)
        unit = ir.Constant(_FLOAT, _UNITS[self.element])
        for r in range(rows):
            factor = self.b.fmul(self.load(scales[r], _FLOAT, 4), unit) if self.scale == PER_ROW else unit
            if seen:  # A NaN code decodes to a number above, and NaN times anything is NaN.
                factor = b.select(self.has_nan(seen[r]), ir.Constant(_FLOAT, float("nan")), factor)
            self.store_totals(sums[r], factor, [out[m][r] for m in range(batch)])

    def decoded(self, dtype: int, codes: Any, scales: Any, table: Any, cols: Any, out: Any) -> None:
        """The values of one row times their scales, rounded once to the type of `out`."""
        b = self.b
        last = self.last_group(cols)
        size = 4 if dtype == FP32 else 2
        narrow = _vector(_I32 if dtype == FP32 else _I16, CHUNK)
        buffer = cgutils.alloca_once(b, narrow)
        row_factor = self.broadcast(self.load(scales, _FLOAT, 4)) if self.scale == PER_ROW else None
        unit = _splat(_FLOAT, _UNITS[self.element])

        def step(chunk: Any, addresses: list[Any], left: Any) -> None:
            raw = self.codes(addresses[0])
            values = self.decode(raw)
            if self.element == E4M3:
                magnitude = b.and_(raw, _splat(_I8, 0x7F, self.bytes))
                is_nan = b.icmp_unsigned("==", magnitude, _splat(_I8, 0x7F, self.bytes))
                for v in range(2):
                    here = self.shuffle(is_nan, is_nan, list(range(v * _LANES, v * _LANES + _LANES)))
                    values[v] = b.select(here, _splat(_FLOAT, float("nan")), values[v])
            factors = self.factors(scales, table, chunk, last) if row_factor is None else row_factor
            values = [b.fmul(b.fmul(value, unit), factors) for value in values]
            packed = self.packed([self.restored(value, dtype) for value in values], dtype)
            target = self.at(out, chunk, size * CHUNK)
            if left is None:
                self.store(packed, target, size)
                return
            b.store(packed, buffer)
            source = b.ptrtoint(buffer, _I64)
            with cgutils.for_range(b, left) as loop:
                kind = narrow.element
                self.store(self.load(self.at(source, loop.index, size), kind), self.at(target, loop.index, size))

        self.chunks(cols, [codes], step)

    def tile_row(self, codes: Any, scales: Any, table: Any, cols: Any, ahead: Any, out: Any) -> Any:
        """A row for the tile unit: bfloat16, of each stripe the even columns first where two elements share a byte and
        the halves of its 16s for e4m3; zeros up to a whole stripe; without a scale per row. Returns whether a code is
        NaN."""
        b = self.b
        # As `quick_row` gives them, or in units of `_UNITS`, where there is none.
        unit = _splat(_FLOAT, _UNITS[self.element]) if self.is_quick() else None
        last = self.last_group(cols)
        seen = cgutils.alloca_once(b, _vector(_I8, self.bytes))
        b.store(_splat(_I8, 0, self.bytes), seen)

        def step(stripe: Any, addresses: list[Any], left: Any) -> None:
            halves = []
            self.prefetch(b.add(addresses[0], ahead))
            for half in range(2):
                raw = self.codes(b.add(addresses[0], _int(half * self.bytes)))
                values = self.decode(raw)
                if self.element == E4M3:
                    self.see(raw, seen)
                if self.scale != PER_ROW:
                    chunk = b.add(b.mul(stripe, _int(2)), _int(half))
                    factors = self.factors(scales, table, chunk, last)
                    values = [value if unit is None else b.fmul(value, unit) for value in values]
                    values = [b.fmul(value, factors) for value in values]
                halves.append(values)
            if self.per_byte == 2:  # Even columns of both halves, then odd ones.
                halves = [[halves[0][v], halves[1][v]] for v in range(2)]
            packed = [self.to_bfloat(*values) for values in halves]
            if self.element == E4M3:
                packed = [self.shuffle(*packed, lanes) for lanes in _HALVES]
            self.store_stripe(packed, out, stripe)

        self.chunks(cols, [codes], step, STRIPE)
        return self.has_nan(seen)

    def transposed(self, rows: list[Any]) -> list[Any]:
        """Sixteen vectors of sixteen 32-bit elements, the other way round."""
        for step in (8, 4, 2, 1):
            new = list(rows)
            for i in range(_LANES):
                if i & step == 0:
                    a, b = rows[i], rows[i + step]
                    lanes = range(_LANES)
                    new[i] = self.shuffle(a, b, [k if k & step == 0 else k - step + _LANES for k in lanes])
                    new[i + step] = self.shuffle(a, b, [k + step if k & step == 0 else k + _LANES for k in lanes])
            rows = new
        return rows

    def store_sums(
        self, sums: Any, stride: Any, factors: Any, bias: Any, out: Any, out_stride: Any, across: Any, down: Any
    ) -> None:
        """A tile of sums `[16 rows of the weight, 16 of x]` times factors, plus bias, as bfloat16 into out the other
        way round: `down` rows, `across` columns."""
        b = self.b
        rows = []
        for r in range(TILE):
            row = self.load(b.add(sums, b.mul(stride, _int(r))), _vector(_FLOAT), 4)
            rows.append(b.fmul(row, self.broadcast(self.load(b.add(factors, _int(4 * r)), _FLOAT, 4))))
        offset = self.load(bias, _vector(_FLOAT), 4)
        rows = [b.fadd(row, offset) for row in self.transposed(rows)]
        whole = b.icmp_signed(">=", across, _int(TILE))
        buffer = cgutils.alloca_once(b, _vector(_I16, TILE))
        for pair in range(TILE // 2):
            packed = self.to_bfloat(rows[2 * pair], rows[2 * pair + 1])
            for m in (2 * pair, 2 * pair + 1):
                half = self.shuffle(packed, packed, list(range(TILE * (m % 2), TILE * (m % 2) + TILE)))
                target = b.add(out, b.mul(out_stride, _int(m)))
                with b.if_then(b.icmp_signed("<", _int(m), down)), b.if_else(whole) as (then, otherwise):
                    with then:
                        self.store(half, target, 2)
                    with otherwise:
                        b.store(half, buffer)
                        source = b.ptrtoint(buffer, _I64)
                        with cgutils.for_range(b, across) as loop:
                            value = self.load(self.at(source, loop.index, 2), _I16, 2)
                            self.store(value, self.at(target, loop.index, 2), 2)

    def pack(self, rows: list[Any], cols: Any, out: Any) -> None:
        """Sixteen rows of x in bfloat16 as tiles, one after the other, in the order of `tile_row`."""
        b = self.b
        lanes = list(range(STRIPE))
        if self.per_byte == 2:
            order = [lanes[0::2], lanes[1::2]]
        elif self.element == E4M3:
            order = _HALVES
        else:
            order = [lanes[:CHUNK], lanes[CHUNK:]]

        def step(stripe: Any, addresses: list[Any], left: Any) -> None:
            halves: list[list[Any]] = [[], []]
            for address in addresses:
                whole = [self.load(b.add(address, _int(at)), _vector(_I16, CHUNK)) for at in (0, 2 * CHUNK)]
                for half in range(2):
                    halves[half].append(b.bitcast(self.shuffle(*whole, order[half]), _vector(_I32)))
            for half in range(2):
                for q, row in enumerate(self.transposed(halves[half])):
                    place = b.add(self.at(out, stripe, 2048), _int(1024 * half + 64 * q))
                    self.store(row, place, 64)

        # Elements of two bytes are codes of as many columns as two bytes of one.
        outer, self.per_byte = self.per_byte, 1
        self.chunks(b.mul(cols, _int(2)), rows, step, 2 * STRIPE)
        self.per_byte = outer

    def is_quick(self) -> bool:
        return is_quick(self.element, self.scale, self.group)

    def to_bfloat(self, low: Any, high: Any) -> Any:
        name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        return self.b.bitcast(self.call(name, _vector(_BFloat(), CHUNK), high, low), _vector(_I16, CHUNK))

    def store_stripe(self, packed: list[Any], out: Any, stripe: Any) -> None:
        for part in range(2):
            self.store(packed[part], self.b.add(self.at(out, stripe, 2 * STRIPE), _int(64 * part)), 64)

    def quick_row(self, codes: Any, scales: Any, table: Any, cols: Any, ahead: Any, out: Any) -> Any:
        """As `tile_row`, by look-ups in tables and integers: for e4m3 without a scale or with a power of two, and e2m1
        with one. `table` has, for each code of e8m0, how much it is to be subtracted from the bits of bfloat16, twice.
        """
        b = self.b
        seen = cgutils.alloca_once(b, _vector(_I8, STRIPE // self.per_byte))
        b.store(_splat(_I8, 0, STRIPE // self.per_byte), seen)
        last = self.last_group(cols)

        def step(stripe: Any, addresses: list[Any], left: Any) -> None:
            self.prefetch(b.add(addresses[0], ahead))
            values = self.quick_values(addresses[0], scales, table, stripe, last, seen)
            self.store_stripe(values, out, stripe)

        self.chunks(cols, [codes], step, STRIPE)
        return self.quick_nan(seen)

    def quick_values(self, address: Any, scales: Any, table: Any, stripe: Any, last: Any, seen: Any) -> list[Any]:
        """The two vectors of a stripe; see `quick_row`."""
        b, wide = self.b, _vector(_I16, STRIPE // 2)
        scaled = self.scale == BYTES
        bits = _bfloat_bits(self.element, scaled)
        raw = self.load(address, _vector(_I8, STRIPE // self.per_byte))
        if self.element == E4M3:
            if scaled:
                self.see(raw, seen)
            low, high = (self.bytes_of(raw, [value >> shift & 0xFF for value in bits]) for shift in (0, 8))
            if not scaled:
                high = b.or_(high, b.and_(raw, _splat(_I8, -128, STRIPE)))
            values = self.unpacked(low, high)
            signs = [b.and_(v, _splat(_I16, -0x8000, 32)) for v in self.unpacked(raw, raw)] if scaled else []
        else:
            codes = b.zext(raw, wide)
            both = [codes, b.lshr(codes, _splat(_I16, 4, 32))]
            entries = ir.Constant(wide, [value - (value >> 15 << 16) for value in bits * 2])
            # Reads the low five bits of each index; the table repeats after sixteen.
            values = [self.call("llvm.x86.avx512.permvar.hi.512", wide, entries, index) for index in both]
            signs = [b.and_(b.shl(codes, _splat(_I16, by, 32)), _splat(_I16, -0x8000, 32)) for by in (12, 8)]
        if not scaled:
            return values
        first = b.mul(stripe, _int(2))
        second = b.add(first, _int(1))
        both = []
        for index in (first, b.select(b.icmp_signed("<", second, last), second, last)):
            code = b.zext(self.load(b.add(scales, index), _I8), _I64)
            one = self.load(self.at(table, code, 4), _I32, 4)
            lane = b.insert_element(ir.Constant(_vector(_I32), ir.Undefined), one, ir.Constant(_I32, 0))
            both.append(self.shuffle(lane, lane, [0] * _LANES))
        less = b.bitcast(self.shuffle(*both, [0] * 8 + [_LANES] * 8), wide)
        values = [self.call("llvm.usub.sat.v32i16", wide, value, less) for value in values]
        return [b.or_(value, sign) for value, sign in zip(values, signs, strict=True)]

    def quick_nan(self, seen: Any) -> Any:
        """Whether a code that `quick_values` saw is NaN and its value is not."""
        if self.element == E4M3 and self.scale == BYTES:
            return self.has_nan(seen)
        return ir.Constant(ir.IntType(1), 0)

    def quick_dots(
        self, rows: int, batch: int, codes: Any, scales: Any, table: Any, xs: Any, cols: Any, out: Any
    ) -> None:
        """As `dots`, where there is `has_quick_product`."""
        b = self.b
        zero = _splat(_FLOAT, 0.0)
        sums = [[[cgutils.alloca_once(b, zero.type) for _ in range(2)] for _ in range(batch)] for _ in range(rows)]
        for pointer in (p for row in sums for of_x in row for p in of_x):
            b.store(zero, pointer)
        ahead = b.mul(b.sub(codes[1], codes[0]), _int(AHEAD))

        def step(stripe: Any, addresses: list[Any], left: Any) -> None:
            weights = []
            for r in range(rows):
                if left is None:
                    self.prefetch(b.add(addresses[r], ahead))
                values = []
                for pairs in self.quick_values(addresses[r], scales[r], table, stripe, None, None):
                    both = b.bitcast(pairs, _vector(_I32))
                    upper = b.and_(both, _splat(_I32, -0x10000))
                    values += [b.bitcast(half, zero.type) for half in (b.shl(both, _splat(_I32, 16)), upper)]
                weights.append(values)
            for m in range(batch):
                for v in range(4):
                    x = self.load(b.add(self.at(xs[m], stripe, 4 * STRIPE), _int(64 * v)), zero.type, 4)
                    for r in range(rows):
                        pointer = sums[r][m][v % 2 if rows * batch <= 8 else 0]
                        name = f"llvm.fmuladd.v{_LANES}f32"
                        b.store(self.call(name, zero.type, weights[r][v], x, b.load(pointer)), pointer)

        self.chunks(cols, codes, step, STRIPE)
        for r in range(rows):
            self.store_totals(sums[r], self.load(scales[r], _FLOAT, 4), [out[m][r] for m in range(batch)])

    def store_totals(self, sums: Any, factor: Any, out: Any) -> None:
        """The sum of each vector (or two) of sums, times a factor."""
        for pointers, address in zip(sums, out, strict=True):
            total = self.b.load(pointers[0])
            for pointer in pointers[1:]:
                total = self.b.fadd(total, self.b.load(pointer))
            name = f"llvm.vector.reduce.fadd.v{_LANES}f32"
            total = self.call(name, _FLOAT, ir.Constant(_FLOAT, 0.0), total, fastmath=("reassoc",))
            self.store(self.b.fmul(total, factor), address, 4)

    def bytes_of(self, index: Any, entries: list[int]) -> Any:
        """A byte per index, of 128; the indices' upper bit does not count."""
        low, high = (
            ir.Constant(_vector(_I8, STRIPE), [e - (e >> 7 << 8) for e in half])
            for half in (entries[:64], entries[64:])
        )
        return self.call("llvm.x86.avx512.vpermi2var.qi.512", low.type, low, index, high)

    def unpacked(self, low: Any, high: Any) -> list[Any]:
        """Bytes side by side: of the first halves of each 16, and of the second."""
        pairs = [[at for lane in half for at in (lane, STRIPE + lane)] for half in _HALVES]
        return [self.b.bitcast(self.shuffle(low, high, pair), _vector(_I16, STRIPE // 2)) for pair in pairs]

    def see(self, raw: Any, seen: Any) -> None:
        """Keep the largest magnitudes among codes of e4m3."""
        lanes = raw.type.count
        magnitude = self.b.and_(raw, _splat(_I8, 0x7F, lanes))
        self.b.store(self.call(f"llvm.umax.v{lanes}i8", raw.type, self.b.load(seen), magnitude), seen)

    def has_nan(self, seen: Any) -> Any:
        value = self.b.load(seen)
        largest = self.call(f"llvm.vector.reduce.umax.v{value.type.count}i8", _I8, value)
        return self.b.icmp_unsigned("==", largest, ir.Constant(_I8, 0x7F))

    def restored(self, value: Any, dtype: int) -> Any:
        """Within the type's range: rounding up near its end would make infinity of a finite weight. NaN stays."""
        b = self.b
        largest = {BF16: 0x7F7F0000, FP16: 0x477FE000, FP32: 0x7F7FFFFF}[dtype]
        limit = b.bitcast(_splat(_I32, largest), value.type)
        value = b.select(b.fcmp_ordered(">", value, limit), limit, value)
        limit = b.bitcast(_splat(_I32, largest - 2**31), value.type)
        return b.select(b.fcmp_ordered("<", value, limit), limit, value)

    def packed(self, values: list[Any], dtype: int) -> Any:
        """Two vectors of fp32, rounded to nearest even, as a chunk in the order of its columns."""
        b = self.b
        pairs = [lane + source for lane in range(_LANES) for source in (0, _LANES)]
        order = list(range(CHUNK)) if self.bytes == CHUNK else pairs
        if dtype == FP32:
            return self.shuffle(*(b.bitcast(value, _vector(_I32)) for value in values), order)
        if dtype == FP16:
            halves = (b.bitcast(b.fptrunc(value, _vector(_HALF)), _vector(_I16)) for value in values)
            return self.shuffle(*halves, order)
        upper = []
        for value in values:
            bits = b.bitcast(value, _vector(_I32))
            odd = b.and_(b.lshr(bits, _splat(_I32, 16)), _splat(_I32, 1))
            rounded = b.add(b.add(bits, _splat(_I32, 0x7FFF)), odd)
            nan = b.fcmp_unordered("uno", value, value)
            upper.append(b.bitcast(b.select(nan, _splat(_I32, 0x7FC00000), rounded), _vector(_I16, CHUNK)))
        return self.shuffle(*upper, [2 * lane + 1 for lane in order])  # bfloat16 is the upper half of float32


@_intrinsic()
def _int64s(typing_context, address):
    """An address as a pointer to int64."""

    def emit(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.int64)))

    return types.CPointer(types.int64)(types.int64), emit


@_intrinsic()
def _float32s(typing_context, address):
    """An address as a pointer to float32."""

    def emit(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.float32)))

    return types.CPointer(types.float32)(types.int64), emit


@_intrinsic()
def _bytes(typing_context, address):
    """An address as a pointer to uint8."""

    def emit(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.uint8)))

    return types.CPointer(types.uint8)(types.int64), emit


@numba.njit(nogil=True)
def _largest(address, count):
    found = np.uint8(0)
    for code in carray(_bytes(address), count):
        found = max(found, code)
    return found


@_intrinsic()
def _take(typing_context, counter):
    """Add one to the int64 at an address and return what it was, as one step for all threads."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _I64.as_pointer()), _int(1), "monotonic")

    return types.int64(types.int64), emit


@_intrinsic(prefer_literal=True)
def _dots(
    typing_context, element, scale, group, rows, batch, quick, codes, codes_stride, last, scales, scale_stride, down,
    table, x, x_stride, last_x, cols, out, out_stride, n, m
):  # fmt: skip
    """The product of `rows` weight rows from n and `batch` rows of x from m; beyond `last` and `last_x` those again.
    `quick`: by `_Vectors.quick_dots`."""
    numbers = [kind.literal_value for kind in (element, scale, group)]
    tile = rows.literal_value, batch.literal_value
    way = quick.literal_value

    def emit(context, b, signature, args):
        codes, codes_stride, last, scales, scale_stride, down, table, x, x_stride, last_x, cols, out, out_stride, n, m = args[6:]  # fmt: skip  # noqa: E501

        def up_to(first, count, end):
            found = [b.add(first, _int(i)) for i in range(count)]
            return [b.select(b.icmp_signed("<", i, end), i, end) for i in found]

        at_rows, at_x = up_to(n, tile[0], last), up_to(m, tile[1], last_x)
        vectors = _Vectors(context, b, *numbers)
        (vectors.quick_dots if way else vectors.dots)(
            *tile,
            [b.add(codes, b.mul(r, codes_stride)) for r in at_rows],
            [b.add(scales, b.mul(b.sdiv(r, down), scale_stride)) for r in at_rows],
            table,
            [b.add(x, b.mul(i, x_stride)) for i in at_x],
            cols,
            [[b.add(b.add(out, b.mul(i, out_stride)), b.mul(r, _int(4))) for r in at_rows] for i in at_x],
        )
        return context.get_dummy_value()

    return types.void(element, scale, group, rows, batch, quick, *[types.int64] * 15), emit


@_intrinsic(prefer_literal=True)
def _decode_row(typing_context, element, scale, group, dtype, codes, scales, table, cols, out):
    """One row of `cols` columns into `out`."""
    numbers, to = [kind.literal_value for kind in (element, scale, group)], dtype.literal_value

    def emit(context, builder, signature, args):
        _Vectors(context, builder, *numbers).decoded(to, *args[4:])
        return context.get_dummy_value()

    return types.void(element, scale, group, dtype, *[types.int64] * 5), emit


# The tile unit of newer Xeons (AMX): eight registers of 16 rows of 64 bytes. 32 columns of 16 rows of a weight are one
# operand; 32 columns of 16 rows of x, two adjacent columns side by side, the other; 16 x 16 fp32 sums the result. Four
# sums are kept at a time: 32 rows of the weight by 32 of x.
TILE = 16
TILE_ROWS = 2 * TILE
# (rows, columns) decoded at a time: columns so that memory is read in long stretches; for more than 32 rows of x more
# of the weight's, as all of x is read for each block.
BLOCK_FOR_FEW = 32, 2048
BLOCK_FOR_MANY = 128, 2048
_ROW_PADDING = 64  # Bytes; keeps rows from falling on the same cache sets.
TILE_SCRATCH = max(rows * (2 * cols + _ROW_PADDING) for rows, cols in (BLOCK_FOR_FEW, BLOCK_FOR_MANY))


@_intrinsic()
def _configure_tiles(typing_context):
    """All eight registers at their full size, for this thread."""

    def emit(context, b, signature, args):
        config = cgutils.alloca_once(b, ir.ArrayType(_I8, 64))
        content = [1, 0] + [0] * 14 + [64, 0] * 8 + [0] * 16 + [TILE] * 8 + [0] * 8
        b.store(ir.Constant(ir.ArrayType(_I8, 64), content), config)
        pointer = b.bitcast(config, _I8.as_pointer())
        function = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.VoidType(), [_I8.as_pointer()]), "llvm.x86.ldtilecfg"
        )
        b.call(function, [pointer])
        return context.get_dummy_value()

    return types.void(), emit


@_intrinsic()
def _release_tiles(typing_context):
    def emit(context, b, signature, args):
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.tilerelease")
        b.call(function, [])
        return context.get_dummy_value()

    return types.void(), emit


@_intrinsic(prefer_literal=True)
def _multiply_tiles(typing_context, across, weights, stride, x, x_stride, chunks, out, out_stride, adds):
    """out `[32, 16 * across]` = weights `[32, 32 * chunks]` times x, or plus it if `adds`; `x_stride` is that between
    the tiles of 16 rows of x."""
    wide = across.literal_value

    def emit(context, b, signature, args):
        weights, stride, x, x_stride, chunks, out, out_stride, adds = args[1:]

        def call(name, *operands):
            kinds = [operand.type for operand in operands]
            function = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}"
            )
            b.call(function, operands)

        def tile(number):
            return ir.Constant(_I8, number)

        def pointer(address):
            return b.inttoptr(address, _I8.as_pointer())

        def down(address, step, times):
            return b.add(address, b.mul(step, _int(times)))

        sums = [(tile(2 * i + j), i, j) for i in range(2) for j in range(wide)]
        places = [b.add(down(out, out_stride, TILE * i), _int(64 * j)) for _, i, j in sums]
        with b.if_else(b.icmp_signed("!=", adds, _int(0))) as (then, otherwise):
            with then:
                for (number, _, _), place in zip(sums, places, strict=True):
                    call("tileloadd64", number, pointer(place), out_stride)
            with otherwise:
                for number, _, _ in sums:
                    call("tilezero", number)
        with cgutils.for_range(b, chunks) as loop:
            for i in range(2):
                place = b.add(down(weights, stride, TILE * i), b.mul(loop.index, _int(64)))
                call("tileloadd64", tile(4 + i), pointer(place), stride)
            for j in range(wide):
                place = b.add(down(x, x_stride, j), b.mul(loop.index, _int(1024)))
                call("tileloadd64", tile(6 + j), pointer(place), _int(64))
            for number, i, j in sums:
                call("tdpbf16ps", number, tile(4 + i), tile(6 + j))
        for (number, _, _), place in zip(sums, places, strict=True):
            call("tilestored64", number, pointer(place), out_stride)
        return context.get_dummy_value()

    return types.void(across, *[types.int64] * 8), emit


@_intrinsic(prefer_literal=True)
def _tile_row(typing_context, element, scale, group, quick, codes, scales, table, cols, ahead, out):
    """See `_Vectors.tile_row` and `quick_row`."""
    numbers, by_table = [kind.literal_value for kind in (element, scale, group)], quick.literal_value

    def emit(context, builder, signature, args):
        vectors = _Vectors(context, builder, *numbers)
        return (vectors.quick_row if by_table else vectors.tile_row)(*args[4:])

    return types.boolean(element, scale, group, quick, *[types.int64] * 6), emit


@_intrinsic()
def _store_sums(typing_context, sums, stride, factors, bias, out, out_stride, across, down):
    """See `_Vectors.store_sums`."""

    def emit(context, builder, signature, args):
        _Vectors(context, builder, E4M3, PER_ROW, 0).store_sums(*args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), emit


@_intrinsic(prefer_literal=True)
def _pack(typing_context, element, x, stride, first, count, cols, out):
    """See `_Vectors.pack`: `count` rows of x from `first`, and the last of them again."""
    kind = element.literal_value

    def emit(context, b, signature, args):
        x, stride, first, count, cols, out = args[1:]
        last = b.sub(count, _int(1))
        rows = [b.select(b.icmp_signed("<", _int(i), last), _int(i), last) for i in range(TILE)]
        _Vectors(context, b, kind, PER_ROW, 0).pack([b.add(x, b.mul(b.add(first, r), stride)) for r in rows], cols, out)
        return context.get_dummy_value()

    return types.void(element, *[types.int64] * 6), emit


Loop = Any  # numba's CFunc: `.address` for other threads, `.ctypes(address of the places)` for this one.


def _compiled(function: Callable[..., None], places: np.dtype[Any]) -> Loop:
    """As a C function."""
    signature = types.void(types.CPointer(numba.from_dtype(places)))
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    return compiled(function, (), lambda named, cache: numba.cfunc(signature, cache=cache, **options)(named))


def _kind(fmt: WeightFormat) -> tuple[int, int, int]:
    """(element, scale, group) as the loops know them."""
    element = _ELEMENTS[fmt.element]
    if fmt.granularity in ("tensor", "channel"):
        return element, PER_ROW, 0
    return element, BYTES if fmt.scale_dtype.itemsize == 1 else FLOATS, fmt.block[1]


def product_loop(fmt: WeightFormat, quick: bool = False) -> Loop:
    """out = x times the dequantized rows of some weights, transposed: sums in fp32, each weight decoded once for up to
    4 rows of x. `quick`: see `has_quick_product`."""
    return _product_loop(*_kind(fmt), quick, purpose=fmt.name)


def has_quick_product(fmt: WeightFormat) -> bool:
    """Whether e4m3 is decoded by table, to bfloat16 that is then widened: that takes half the instructions. Only where
    a row has one scale; x is fp32 in the order of `quick_values`, of each vector the even columns first."""
    return _kind(fmt)[:2] == (E4M3, PER_ROW) and "+avx512vbmi" in chip_features()


@Once
def chip_features() -> list[str]:
    """Of the chip that numba compiles for. It sets numba up."""
    features: str = registry.cpu_target.target_context.codegen().magic_tuple()[2]
    return features.split(",")


def tile_loop(fmt: WeightFormat) -> Loop:
    """As `product_loop` with the tile unit, for x as `pack_loop` leaves it and out in bfloat16; jobs count tiles of x,
    their biases end with 16 values more, and `block_rows` is a multiple of 32."""
    return _tile_loop(*_kind(fmt), purpose=fmt.name)


def pack_loop(fmt: WeightFormat) -> Loop:
    """Rows of x in bfloat16 as `[tiles, chunks, 16, 16, 2]` for `tile_loop`, a piece for each tile."""
    return _pack_loop(_ELEMENTS[fmt.element], purpose=fmt.name)


@functools.cache
def has_tiles() -> bool:
    """Whether numba compiles for a chip with tiles of bfloat16, and the system lets this process use them."""
    needed = {"+amx-tile", "+amx-bf16", "+avx512bf16", "+avx512vbmi"}
    return needed <= set(chip_features()) and hasattr(torch.cpu, "_init_amx") and bool(torch.cpu._init_amx())


def decode_loop(fmt: WeightFormat, dtype: torch.dtype) -> Loop:
    """The dequantized rows of a weight, rounded once to `dtype`."""
    return _decode_loop(*_kind(fmt), _DTYPES[dtype], purpose=fmt.name)


@Once
def _product_loop(element: int, scale: int, group: int, quick: bool) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        while True:
            piece = _take(p.counter)
            if piece >= p.pieces:
                return
            job = carray(_int64s(p.jobs + piece // p.pieces_per_job * 8 * JOB), JOB)
            start = piece % p.pieces_per_job * p.step
            stop = min(start + p.step, p.rows)
            first, end = job[3], job[4]
            for n in range(start, stop, 4):
                for m in range(first, end, 4):
                    if end - m == 1:
                        _dots(
                            element, scale, group, 4, 1, quick, job[0], p.codes_stride, stop - 1, job[1],
                            p.scale_stride, p.down, job[2], p.x, p.x_stride, end - 1, p.cols, p.out, p.out_stride, n, m,
                        )  # fmt: skip
                    else:
                        _dots(
                            element, scale, group, 4, 4, quick, job[0], p.codes_stride, stop - 1, job[1],
                            p.scale_stride, p.down, job[2], p.x, p.x_stride, end - 1, p.cols, p.out, p.out_stride, n, m,
                        )  # fmt: skip

    return _compiled(loop, PRODUCT)


@Once
def _tile_loop(element: int, scale: int, group: int) -> Loop:
    quick = is_quick(element, scale, group)
    unit = np.float32(1.0 if quick else _UNITS[element])
    largest = QUICK_SCALES.get(element, 0)
    width = 1 if scale == BYTES else 4
    per_byte = 1 if element in (E4M3, INT8) else 2

    def loop(pointer):
        p = carray(pointer, 1)[0]
        weights = p.scratch + _take(p.counter + 8) * p.scratch_stride
        buffer = weights + TILE_SCRATCH
        stride = 2 * p.block_cols + _ROW_PADDING
        factors = np.empty(p.block_rows, np.float32)
        _configure_tiles()
        while True:
            piece = _take(p.counter)
            if piece >= p.pieces:
                break
            job = carray(_int64s(p.jobs + piece // p.pieces_per_job * 8 * JOB), JOB)
            start = piece % p.pieces_per_job * p.step
            stop = min(start + p.step, p.rows)
            first, end = job[3], job[4]  # of tiles
            sums_stride = (end - first) * 64
            for top in range(start, stop, p.block_rows):
                height = min(p.block_rows, (stop - top + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS)
                for r in range(height):
                    factors[r] = unit
                    if scale == PER_ROW:
                        row = min(top + r, stop - 1)
                        factors[r] *= carray(_float32s(job[1] + row // p.down * p.scale_stride), 1)[0]
                for left in range(0, p.cols, p.block_cols):
                    cols = min(p.block_cols, p.cols - left)
                    for r in range(height):
                        row = min(top + r, stop - 1)
                        codes = job[0] + row * p.codes_stride + left // per_byte
                        scales = job[1] + row // p.down * p.scale_stride
                        out = weights + r * stride
                        ahead = AHEAD * p.codes_stride
                        if group:
                            scales += left // group * width
                        if quick and scale == PER_ROW:
                            nan = _tile_row(element, scale, group, True, codes, scales, job[2], cols, ahead, out)
                        elif quick and _largest(scales, (cols + group - 1) // group) <= largest:
                            nan = _tile_row(element, scale, group, True, codes, scales, job[2] + 1024, cols, ahead, out)
                        else:
                            nan = _tile_row(element, scale, group, False, codes, scales, job[2], cols, ahead, out)
                        if nan:
                            factors[r] = np.float32(np.nan)
                    chunks = (cols + STRIPE - 1) // STRIPE * 2
                    x = p.x + left // CHUNK * 1024
                    for m in range(first, end, 2):
                        x_tile = x + m * p.x_stride
                        for r in range(0, height, TILE_ROWS):
                            rows = weights + r * stride
                            out = buffer + r * sums_stride + (m - first) * 64
                            if m + 1 < end:
                                _multiply_tiles(2, rows, stride, x_tile, p.x_stride, chunks, out, sums_stride, left)
                            else:
                                _multiply_tiles(1, rows, stride, x_tile, p.x_stride, chunks, out, sums_stride, left)
                for m in range(0, job[7], TILE):
                    for r in range(0, min(height, stop - top), TILE):
                        n = top + r
                        sums = buffer + r * sums_stride + m * 4
                        out = p.out + (job[6] + m) * p.out_stride + 2 * n
                        at = factors.ctypes.data + 4 * r
                        _store_sums(sums, sums_stride, at, job[5] + 4 * n, out, p.out_stride, stop - n, job[7] - m)
        _release_tiles()

    return _compiled(loop, PRODUCT)


@Once
def _pack_loop(element: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        while True:
            piece = _take(p.counter)
            if piece >= p.pieces:
                return
            rows = carray(_int64s(p.tiles + 16 * piece), 2)
            _pack(element, p.x, p.x_stride, rows[0], rows[1], p.cols, p.out + piece * p.out_stride)

    return _compiled(loop, PACK)


@Once
def _decode_loop(element: int, scale: int, group: int, dtype: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        while True:
            start = _take(p.counter) * p.step
            if start >= p.rows:
                return
            for n in range(start, min(start + p.step, p.rows)):
                codes, scales = p.codes + n * p.codes_stride, p.scale + n // p.down * p.scale_stride
                _decode_row(element, scale, group, dtype, codes, scales, p.table, p.cols, p.out + n * p.out_stride)

    return _compiled(loop, DECODE)
