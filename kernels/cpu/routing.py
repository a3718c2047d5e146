"""What surrounds the products of a mixture of experts: tokens routed to experts, the activation between two products,
and the sum over a token's experts. Loops in C functions of one argument, as those of `vectors` are, and what calls them
with tensors.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, types  # type: ignore[attr-defined]

from ..formats import ceil_div
from . import rows, vectors
from .compiling import Once
from .instructions import float32s, int32s, int64s, intrinsic, take, uint16s
from .laying import PURPOSE, c_function, lay_any_row, lay_floats
from .layouts import kept_memory, rounded, widened, with_gain

_JOB = vectors.JOB
_PIECE = 1 << 16  # Elements to combine that are worth another thread.

# What a call sets comes first, so that it is packed at once.
ROUTE = np.dtype(
    [(name, np.int64) for name in ("x", "x_stride", "ids", "pairs", "each", "gains1", "gains2")]
    + [(name, np.int64) for name in ("cols", "order", "out", "out_stride", "experts", "most", "ends", "where", "found")]
    + [
        (f"{name}{i}", np.int64)
        for i in (1, 2)
        for name in ("matrices", "jobs", "counter", "values", "count", "pieces")
    ]
)
GATE = np.dtype([(name, np.int64) for name in ("rows", "x", "x_stride", "cols", "order", "out", "out_stride")])
COMBINE = np.dtype(
    [(name, np.int64) for name in ("weights", "each", "rows", "out", "sums", "sums_stride", "where", "cols")]
)
COMBINE_ROWS = np.dtype(
    [
        (name, np.int64)
        for name in ("counter", "users", "sums", "terms", "where", "weights", "each", "rows", "cols", "out")
    ]
)


@Once
def route() -> Any:
    """Sorts pairs of a token and an expert by expert, makes a job of each expert that has some, and lays x out for it.
    found: how many; none if one of them has more rows than `most`. count: where it leaves how many pieces there are."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        ids, found = carray(int32s(p.ids), p.pairs), carray(int64s(p.found), 2)
        ends = carray(int64s(p.ends), p.experts + 1)
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
        jobs, more = carray(int64s(p.jobs1), p.experts * _JOB), carray(int64s(p.jobs2), p.experts * _JOB)
        matrices, others = carray(int64s(p.matrices1), p.experts * 3), carray(int64s(p.matrices2), p.experts * 3)
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
                with_gain(p.values1, p.gains1 + 4 * e, matrices[3 * e + 2])
                with_gain(p.values2, p.gains2 + 4 * e, others[3 * e + 2])
            count += 1
        where = carray(int64s(p.where), p.pairs)
        for i in range(p.pairs):
            e = ids[i]
            where[i] = ends[e]
            ends[e] += 1
            lay_any_row(p.x + i // p.each * p.x_stride, p.cols, p.order, p.out + where[i] * p.out_stride)
        carray(int64s(p.counter1), 1)[0] = 0
        carray(int64s(p.counter2), 1)[0] = 0
        carray(int64s(p.count1), 1)[0] = count * p.pieces1
        carray(int64s(p.count2), 1)[0] = count * p.pieces2
        found[0] = count

    return c_function(loop, ROUTE)


@intrinsic()
def _power(typing_context, exponent):
    """2^n as float32, of the float32 whose low bits are n + 127."""

    def emit(context, b, signature, args):
        bits = b.shl(b.bitcast(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 23))
        return b.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), emit


_SHIFT = np.float32(1.5 * 2.0**23 + 127)  # Added to a float32, the low bits are the integer nearest to it, plus 127.
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST, _LARGEST = np.float32(-87.0), np.float32(89.0)  # Infinity from 88.4 on.
_TERMS = [np.float32(term) for term in (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666667e-1, 0.5)]
_T0, _T1, _T2, _T3, _T4, _T5 = _TERMS


@numba.njit(nogil=True)
def exp(x):
    """e^x in float32, as Cephes has it (expf): 2^n times a polynomial of what is left; two units in the last place."""
    x = min(max(x, _LEAST), _LARGEST) if x == x else x
    shifted = x * _LOG2_E + _SHIFT
    n = shifted - _SHIFT
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    terms = ((((_T0 * r + _T1) * r + _T2) * r + _T3) * r + _T4) * r + _T5
    return (terms * r * r + r + np.float32(1.0)) * _power(shifted)


@Once
def gate() -> Any:
    """silu of the first half of each row, times the second, laid out for the product that follows."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        one = np.float32(1.0)
        for m in range(p.rows):
            at = p.x + m * p.x_stride
            gates, ups = carray(float32s(at), p.cols), carray(float32s(at + 4 * p.cols), p.cols)
            for n in range(p.cols):
                gates[n] = gates[n] / (one + exp(-gates[n])) * ups[n]
            lay_floats(at, p.cols, p.order, p.out + m * p.out_stride)

    return c_function(loop, GATE)


@Once
def combine() -> Any:
    """Of each token, the sum over its experts of weight times sums, as bfloat16."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        where = carray(int64s(p.where), p.rows * p.each)
        weights = carray(float32s(p.weights), p.rows * p.each)
        for t in range(p.rows):
            total = carray(float32s(p.sums + where[t * p.each] * p.sums_stride), p.cols)
            first = weights[t * p.each]
            for n in range(p.cols):
                total[n] *= first
            for j in range(1, p.each):
                sums = carray(float32s(p.sums + where[t * p.each + j] * p.sums_stride), p.cols)
                weight = weights[t * p.each + j]
                for n in range(p.cols):
                    total[n] += sums[n] * weight
            out = carray(uint16s(p.out + t * p.cols * 2), p.cols)
            for n in range(p.cols):
                out[n] = rounded(total[n])

    return c_function(loop, COMBINE)


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
            where, weights = carray(int64s(p.where + 8 * t * p.each), p.each), p.weights + 4 * t * p.each
            total = carray(float32s(p.sums + mine * p.cols * 4), p.cols)
            for n in range(p.cols):
                total[n] = 0
            for j in range(p.each):
                if where[j] >= 0:
                    weight = carray(float32s(weights + 4 * j), 1)[0]
                    terms = carray(uint16s(p.terms + where[j] * p.cols * 2), p.cols)
                    for n in range(p.cols):
                        total[n] += widened(terms[n]) * weight
            out = carray(uint16s(p.out + t * p.cols * 2), p.cols)
            for n in range(p.cols):
                out[n] = rounded(total[n])

    return c_function(loop, COMBINE_ROWS)


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
