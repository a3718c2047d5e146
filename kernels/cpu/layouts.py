"""What surrounds a product of a few rows: x laid out as the loop of products reads it, tokens routed to experts, sums
rounded or combined. Loops in C functions of one argument, as those of `vectors` are, and what calls them with tensors.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, extending, types  # type: ignore[attr-defined]

from ..formats import ceil_div
from . import products, rows, vectors
from .compiling import Once
from .instructions import BF16, FP32, take
from .laying import PURPOSE, c_function, lay_any_row, lay_rows

_JOB = vectors.JOB
_PIECE = 1 << 16  # Elements to round that are worth another thread.

LAY_OUT = np.dtype(
    [(name, np.int64) for name in ("x", "x_stride", "rows", "cols", "order", "out", "out_stride")]
    + [(name, np.int64) for name in ("values", "gain", "table", "counter", "job")]
)
ROUND = np.dtype(
    [(name, np.int64) for name in ("sums", "sums_stride", "rows", "cols", "bias", "out", "steps", "counter")]
)
ROUTE = np.dtype(
    [(name, np.int64) for name in ("x", "x_stride", "cols", "order", "out", "out_stride")]
    + [(name, np.int64) for name in ("ids", "pairs", "each", "experts", "most", "ends", "where", "found")]
    + [(f"{name}{i}", np.int64) for i in (1, 2) for name in ("matrices", "jobs", "counter", "values", "gains")]
)
COMBINE = np.dtype(
    [(name, np.int64) for name in ("sums", "sums_stride", "where", "weights", "each", "rows", "cols", "out")]
)
COMBINE_ROWS = np.dtype(
    [
        (name, np.int64)
        for name in ("counter", "users", "sums", "terms", "where", "weights", "each", "rows", "cols", "out")
    ]
)

_intrinsic: Any = extending.intrinsic


def _pointers(kind: Any) -> Any:
    @_intrinsic
    def pointers(typing_context, address):
        """An address as a pointer."""

        def emit(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.int64), emit

    return pointers


_int64s, _int32s, _uint16s, _float32s = map(_pointers, (types.int64, types.int32, types.uint16, types.float32))


@_intrinsic
def _rounded(typing_context, value):
    """A float32 as the bits of bfloat16, to nearest even; any NaN as the quiet one."""

    def emit(context, b, signature, args):
        def number(n):
            return ir.Constant(ir.IntType(32), n)

        bits = b.bitcast(args[0], ir.IntType(32))
        odd = b.and_(b.lshr(bits, number(16)), number(1))
        bits = b.lshr(b.add(b.add(bits, number(0x7FFF)), odd), number(16))
        bits = b.select(b.fcmp_unordered("uno", args[0], args[0]), number(0x7FC0), bits)
        return b.trunc(bits, ir.IntType(16))

    return types.uint16(types.float32), emit


@_intrinsic
def _widened(typing_context, bits):
    """The bits of bfloat16 as a float32."""

    def emit(context, b, signature, args):
        wide = b.shl(b.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return b.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), emit


@Once
def lay_out() -> Any:
    """Rows of x by `lay_any_row`; the table of scales times the global one; the loop's counters at their beginning."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        counters = carray(_int64s(p.counter), 2)
        counters[0] = counters[1] = 0
        carray(_int64s(p.job), 5)[4] = p.rows
        if p.table != 0:
            _with_gain(p.values, p.gain, p.table)
        for m in range(p.rows):
            lay_any_row(p.x + m * p.x_stride, p.cols, p.order, p.out + m * p.out_stride)

    return c_function(loop, LAY_OUT)


@Once
def route() -> Any:
    """Sorts pairs of a token and an expert by expert, makes a job of each expert that has some, and lays x out for it.
    found: how many; none if one of them has more rows than `most`."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        ids, found = carray(_int32s(p.ids), p.pairs), carray(_int64s(p.found), 2)
        ends = carray(_int64s(p.ends), p.experts + 1)
        for e in range(p.experts + 1):
            ends[e] = 0
        found[0] = 0
        for i in range(p.pairs):
            if ids[i] < 0 or ids[i] >= p.experts:
                return
            ends[ids[i] + 1] += 1
        for e in range(p.experts):
            if ends[e + 1] > p.most:
                return
            ends[e + 1] += ends[e]
        jobs, more = carray(_int64s(p.jobs1), p.experts * _JOB), carray(_int64s(p.jobs2), p.experts * _JOB)
        matrices, others = carray(_int64s(p.matrices1), p.experts * 3), carray(_int64s(p.matrices2), p.experts * 3)
        count = 0
        for e in range(p.experts):
            if ends[e] == ends[e + 1]:
                continue
            at = count * _JOB
            for i in range(3):
                jobs[at + i], more[at + i] = matrices[3 * e + i], others[3 * e + i]
            jobs[at + 3], jobs[at + 4] = ends[e], ends[e + 1]
            more[at + 3], more[at + 4] = ends[e], ends[e + 1]
            if p.values1 != 0:
                _with_gain(p.values1, p.gains1 + 4 * e, matrices[3 * e + 2])
                _with_gain(p.values2, p.gains2 + 4 * e, others[3 * e + 2])
            count += 1
        where = carray(_int64s(p.where), p.pairs)
        for i in range(p.pairs):
            e = ids[i]
            where[i] = ends[e]
            ends[e] += 1
            lay_any_row(p.x + i // p.each * p.x_stride, p.cols, p.order, p.out + where[i] * p.out_stride)
        carray(_int64s(p.counter1), 1)[0] = 0
        carray(_int64s(p.counter2), 1)[0] = 0
        found[0] = count

    return c_function(loop, ROUTE)


@Once
def combine() -> Any:
    """Of each token, the sum over its experts of weight times sums, as bfloat16."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        where = carray(_int64s(p.where), p.rows * p.each)
        weights = carray(_float32s(p.weights), p.rows * p.each)
        for t in range(p.rows):
            total = carray(_float32s(p.sums + where[t * p.each] * p.sums_stride), p.cols)
            first = weights[t * p.each]
            for n in range(p.cols):
                total[n] *= first
            for j in range(1, p.each):
                sums = carray(_float32s(p.sums + where[t * p.each + j] * p.sums_stride), p.cols)
                weight = weights[t * p.each + j]
                for n in range(p.cols):
                    total[n] += sums[n] * weight
            out = carray(_uint16s(p.out + t * p.cols * 2), p.cols)
            for n in range(p.cols):
                out[n] = _rounded(total[n])

    return c_function(loop, COMBINE)


@numba.njit(nogil=True)
def _with_gain(values, gain, table):
    values, table, gain = carray(_float32s(values), 256), carray(_float32s(table), 256), carray(_float32s(gain), 1)[0]
    for i in range(256):
        table[i] = values[i] * gain


@Once
def combine_rows() -> Any:
    """See `combine_into`; a row of `sums` is each thread's own."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        mine = -1
        while True:
            t = take(p.counter)
            if t >= p.rows:
                return
            if mine < 0:
                mine = take(p.users)
            where, weights = carray(_int64s(p.where + 8 * t * p.each), p.each), p.weights + 4 * t * p.each
            total = carray(_float32s(p.sums + mine * p.cols * 4), p.cols)
            for n in range(p.cols):
                total[n] = 0
            for j in range(p.each):
                if where[j] >= 0:
                    weight = carray(_float32s(weights + 4 * j), 1)[0]
                    terms = carray(_uint16s(p.terms + where[j] * p.cols * 2), p.cols)
                    for n in range(p.cols):
                        total[n] += _widened(terms[n]) * weight
            out = carray(_uint16s(p.out + t * p.cols * 2), p.cols)
            for n in range(p.cols):
                out[n] = _rounded(total[n])

    return c_function(loop, COMBINE_ROWS)


@Once
def round_rows() -> Any:
    """Sums, each row times its step if it has one, plus bias, as bfloat16, rounded to nearest even."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        while True:
            m = take(p.counter)
            if m >= p.rows:
                return
            sums = carray(_float32s(p.sums + m * p.sums_stride), p.cols)
            out = carray(_uint16s(p.out + m * p.cols * 2), p.cols)
            step = np.float32(1.0)
            if p.steps != 0:
                step = carray(_float32s(p.steps + 4 * m), 1)[0]
            if p.bias != 0:
                bias = carray(_uint16s(p.bias), p.cols)
                for n in range(p.cols):
                    out[n] = _rounded(sums[n] * step + _widened(bias[n]))
            else:
                for n in range(p.cols):
                    out[n] = _rounded(sums[n] * step)

    return c_function(loop, ROUND)


def combine_into(out: torch.Tensor, terms: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> None:
    """out `[T, N]` = Σ over j of weights `[T, k]` · the row of terms that where `[T, k]` says; a row below zero adds
    nothing. All contiguous: out and terms in bfloat16, weights in fp32, where int64."""
    counters, places = np.zeros(2, np.int64), np.zeros(1, COMBINE_ROWS)
    threads = min(torch.get_num_threads(), ceil_div(out.numel(), _PIECE))
    with kept_memory(4 * out.shape[1] * threads) as sums:
        first = counters.ctypes.data
        tensors = (t.data_ptr() for t in (sums, terms, where, weights))
        places[0] = (first, first + 8, *tensors, where.shape[1], *out.shape, out.data_ptr())
        team = rows.team() if threads > 1 else None
        if team is None:
            combine_rows(purpose=PURPOSE)(places.ctypes.data)
        else:
            team(combine_rows(purpose=PURPOSE).address, places.ctypes.data, threads, 0)


def round_into(out: torch.Tensor, sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """out `[M, N]` in bfloat16 = sums in fp32, each row times its step, plus bias, in bfloat16 too. All contiguous."""
    counter, places = np.zeros(1, np.int64), np.zeros(1, ROUND)
    places[0] = (
        sums.data_ptr(),
        sums.stride(0) * 4,
        *sums.shape,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        steps.data_ptr(),
        counter.ctypes.data,
    )
    loop, threads = round_rows(purpose=PURPOSE), min(torch.get_num_threads(), ceil_div(sums.numel(), _PIECE))
    parallel = rows.team() if threads > 1 else None
    if parallel is None:
        loop(places.ctypes.data)
    else:
        parallel(loop.address, places.ctypes.data, threads, 0)


kept_memory = products._scratch
"""Memory that was used before, as a context: see `products`."""


def compile_loops() -> None:
    """For all processes to come."""
    for loop in (lay_out, route, combine, combine_rows, round_rows):
        loop(purpose=PURPOSE)
    for dtype in (BF16, FP32):
        lay_rows(dtype, purpose=PURPOSE)
