"""What surrounds a product of a few rows: x laid out as the loop of products reads it, and sums rounded. Loops in C
functions of one argument, as those of `vectors` are, and what calls them with tensors.
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
from . import products, rows
from .compiling import Once
from .instructions import float32s, int64s, intrinsic, take, uint16s
from .laying import PURPOSE, c_function, lay_any_row

_PIECE = 1 << 16  # Elements to round that are worth another thread.

# What a call sets comes first, so that it is packed at once.
LAY_OUT = np.dtype(
    [(name, np.int64) for name in ("x", "x_stride", "rows", "gain")]
    + [(name, np.int64) for name in ("cols", "order", "out", "out_stride", "values", "table", "counter", "job")]
)
ROUND = np.dtype(
    [(name, np.int64) for name in ("rows", "bias", "out", "sums", "sums_stride", "cols", "steps", "counter")]
)


@intrinsic()
def rounded(typing_context, value):
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


@intrinsic()
def widened(typing_context, bits):
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
        counters = carray(int64s(p.counter), 2)
        counters[0] = counters[1] = 0
        carray(int64s(p.job), 5)[4] = p.rows
        if p.table != 0:
            with_gain(p.values, p.gain, p.table)
        for m in range(p.rows):
            lay_any_row(p.x + m * p.x_stride, p.cols, p.order, p.out + m * p.out_stride)

    return c_function(loop, LAY_OUT)


@numba.njit(nogil=True)
def with_gain(values, gain, table):
    """A table of scales, in units of a matrix's global one."""
    values, table, gain = carray(float32s(values), 256), carray(float32s(table), 256), carray(float32s(gain), 1)[0]
    for i in range(256):
        table[i] = values[i] * gain


@Once
def round_rows() -> Any:
    """Sums, each row times its step if it has one, plus bias, as bfloat16, rounded to nearest even."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        while True:
            m = take(p.counter)
            if m >= p.rows:
                return
            sums = carray(float32s(p.sums + m * p.sums_stride), p.cols)
            out = carray(uint16s(p.out + m * p.cols * 2), p.cols)
            step = np.float32(1.0)
            if p.steps != 0:
                step = carray(float32s(p.steps + 4 * m), 1)[0]
            if p.bias != 0:
                bias = carray(uint16s(p.bias), p.cols)
                for n in range(p.cols):
                    out[n] = rounded(sums[n] * step + widened(bias[n]))
            else:
                for n in range(p.cols):
                    out[n] = rounded(sums[n] * step)

    return c_function(loop, ROUND)


def round_into(out: torch.Tensor, sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """out `[M, N]` in bfloat16 = sums in fp32, each row times its step, plus bias, in bfloat16 too. All contiguous."""
    counter, places = np.zeros(1, np.int64), np.zeros(1, ROUND)
    places[0] = (
        sums.shape[0],
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        sums.data_ptr(),
        sums.stride(0) * 4,
        sums.shape[1],
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
