"""Rows of x laid out as the loops of products read them (see `orders`), by a loop for all orders: a C function of one
argument, as those of `vectors` are."""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]

from . import vectors
from .compiling import Once
from .instructions import BF16, FP32
from .orders import (
    EVEN_FIRST,
    IN_ORDER,
    ORDERS,
    PAIRED,
    PAIRED_QUARTERS,
    STRIPED,
    STRIPED_QUARTERS,
    WORDED,
    WORDED_QUARTERS,
    arranged,
    lay_row,
)
from .stripes import WORDS

PURPOSE = "products"
LAY_ROWS = np.dtype([(name, np.int64) for name in ("x", "x_stride", "rows", "cols", "order", "out", "out_stride")])


def function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def c_function(loop: Any, places: np.dtype[Any]) -> Any:
    compiled = vectors._compiled(loop, places)
    found = function(compiled.address)
    found.address, found.keeps = compiled.address, compiled
    return found


@numba.njit(nogil=True)
def lay_any_row(x, cols, order, out):
    """One row of bfloat16, laid out as a loop of products reads it."""
    if order == PAIRED:
        lay_row(PAIRED, BF16, x, cols, out)
    elif order == PAIRED_QUARTERS:
        lay_row(PAIRED_QUARTERS, BF16, x, cols, out)
    elif order == WORDED:
        lay_row(WORDED, BF16, x, cols, out)
    elif order == WORDED_QUARTERS:
        lay_row(WORDED_QUARTERS, BF16, x, cols, out)
    elif order == STRIPED:
        lay_row(STRIPED, BF16, x, cols, out)
    elif order == STRIPED_QUARTERS:
        lay_row(STRIPED_QUARTERS, BF16, x, cols, out)
    elif order == EVEN_FIRST:
        lay_row(EVEN_FIRST, BF16, x, cols, out)
    else:
        lay_row(IN_ORDER, BF16, x, cols, out)


@numba.njit(nogil=True)
def lay_floats(x, cols, order, out):
    """One row of float32, likewise; it stays that."""
    if order == STRIPED:
        lay_row(STRIPED, FP32, x, cols, out)
    elif order == STRIPED_QUARTERS:
        lay_row(STRIPED_QUARTERS, FP32, x, cols, out)
    elif order == EVEN_FIRST:
        lay_row(EVEN_FIRST, FP32, x, cols, out)
    else:
        lay_row(IN_ORDER, FP32, x, cols, out)


@Once
def lay_rows(dtype: int) -> Any:
    """Of bfloat16 or float32."""
    lay = lay_any_row if dtype == BF16 else lay_floats

    def loop(pointer):
        p = carray(pointer, 1)[0]
        for m in range(p.rows):
            lay(p.x + m * p.x_stride, p.cols, p.order, p.out + m * p.out_stride)

    return c_function(loop, LAY_ROWS)


def laid_out(x: torch.Tensor, order: int) -> torch.Tensor:
    """x `[M, K]` in an order, a row each; what becomes integers is bfloat16."""
    if ORDERS[order].way != WORDS:
        return arranged(x, ORDERS[order])
    x = x.resolve_neg()
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, cols = x.shape
    stride = ORDERS[order].stride(cols)
    out = torch.empty((rows, stride), dtype=torch.uint8, device="cpu")
    places = np.zeros(1, LAY_ROWS)
    places[0] = x.data_ptr(), x.stride(0) * x.itemsize, rows, cols, order, out.data_ptr(), stride
    lay_rows(BF16, purpose=PURPOSE)(places.ctypes.data)
    return out
