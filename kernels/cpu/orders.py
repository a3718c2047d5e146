"""In what order the loops of products read x: as their weights are decoded, which saves shuffling those.

A row of x is laid out anew for each call, in whole chunks or stripes of columns, with zeros after the last column.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[attr-defined]
from numba.core import cgutils

from ..formats import WeightFormat, ceil_div
from .decoders import DOUBLE, STRIPE, interleaved
from .instructions import BF16, CHUNK, FLOAT, I16, I32, I64, LANES, int64, intrinsic, splat, vector
from .stripes import CHUNKS, HALVES, PAIRS, QUARTERS, SINGLES, WORDS
from .words import WORDS_SIZE, WordLayout

_PADDING = 64  # Bytes; keeps rows of x from falling on the same cache sets when K is a power of two.


class Order(NamedTuple):
    """columns: Of a chunk or stripe. way: `PAIRS` stay bfloat16, `WORDS` become integers, others float32."""

    columns: list[int]
    way: int = SINGLES

    def whole(self, cols: int) -> int:
        """Columns with the zeros after the last."""
        return ceil_div(cols, len(self.columns)) * len(self.columns)

    def stride(self, cols: int) -> int:
        """Bytes from row to row."""
        return self.whole(cols) // len(self.columns) * self.size() + _PADDING

    def size(self) -> int:
        """Bytes of a chunk or stripe."""
        return WORDS_SIZE if self.way == WORDS else len(self.columns) * (2 if self.way == PAIRS else 4)


def _widened(pairs: list[list[int]]) -> list[int]:
    """The columns of pairs of bfloat16, as `stripes.terms` makes floats of them."""
    return [column for vector in pairs for half in (vector[0::2], vector[1::2]) for column in half]


IN_ORDER, EVEN_FIRST, STRIPED, STRIPED_QUARTERS, PAIRED, PAIRED_QUARTERS, WORDED, WORDED_QUARTERS = range(8)
_BOTH = [[at + column for column in half] for at in (0, STRIPE) for half in HALVES]
ORDERS = (
    Order(list(range(CHUNK))),
    Order([*range(0, CHUNK, 2), *range(1, CHUNK, 2)]),
    Order(_widened(_BOTH)),
    Order(_widened(QUARTERS)),
    Order([column for vector in _BOTH for column in vector], PAIRS),
    Order([column for vector in QUARTERS for column in vector], PAIRS),
    Order(list(range(DOUBLE)), WORDS),
    Order([column for vector in QUARTERS for column in vector], WORDS),
)


def order_of(fmt: WeightFormat, way: int) -> int:
    """For a product by `stripes.way_of`."""
    return {CHUNKS: IN_ORDER, SINGLES: STRIPED, PAIRS: PAIRED, WORDS: WORDED}[way] + interleaved(fmt)


def arranged(x: torch.Tensor, order: Order) -> torch.Tensor:
    """x laid out; of pairs, in bfloat16. Not as integers."""
    rows, cols = x.shape
    whole, width = order.whole(cols), len(order.columns)
    if whole != cols:
        x = torch.nn.functional.pad(x, (0, whole - cols))
    columns = torch.tensor(order.columns, dtype=torch.int64, device="cpu")
    x = x.reshape(rows, -1, width)[:, :, columns]
    dtype = torch.bfloat16 if order.way == PAIRS else torch.float32
    out = torch.empty((rows, order.stride(cols) // dtype.itemsize), dtype=dtype, device="cpu")
    out[:, :whole] = x.reshape(rows, whole)
    return out


@intrinsic(prefer_literal=True)
def lay_row(typing_context, order, dtype, x, cols, out):
    """One row of x, in bfloat16 or float32, laid out; orders of pairs and of integers take bfloat16 alone."""
    laid = ORDERS[order.literal_value]
    columns, pairs = laid.columns, laid.way == PAIRS
    single = dtype.literal_value != BF16

    def emit(context, b, signature, args):
        i = WordLayout(context, b)
        x, cols, out = args[2:]
        width, size = len(columns), 4 if single else 2

        def floats(values: Any, at: int) -> Any:
            some = i.shuffle(values, values, columns[at : at + LANES])
            return some if single else b.bitcast(b.shl(b.zext(some, vector(I32)), splat(I32, 16)), vector(FLOAT))

        def step(source: Any, target: Any) -> None:
            values = i.load(source, vector(FLOAT if single else I16, width), size)
            if laid.way == WORDS:
                i.words([[floats(values, at + half) for half in (0, LANES)] for at in range(0, width, CHUNK)], target)
                return
            lanes = CHUNK if pairs else LANES
            for at in range(0, width, lanes):
                some = i.shuffle(values, values, columns[at : at + lanes]) if pairs else floats(values, at)
                i.store(some, b.add(target, int64((2 if pairs else 4) * at)), 4)

        def place(index: Any) -> tuple[Any, Any]:
            return i.at(x, index, width * size), i.at(out, index, laid.size())

        whole, left = b.udiv(cols, int64(width)), b.urem(cols, int64(width))
        with cgutils.for_range(b, whole) as loop:
            step(*place(loop.index))
        with b.if_then(b.icmp_signed(">", left, int64(0)), likely=False):
            kind = FLOAT if single else I16
            copy = cgutils.alloca_once(b, ir.ArrayType(kind, width))
            b.store(ir.Constant(ir.ArrayType(kind, width), [0] * width), copy)
            source, target = place(whole)
            copy_at = b.ptrtoint(copy, I64)
            with cgutils.for_range(b, left) as loop:
                i.store(i.load(i.at(source, loop.index, size), kind, size), i.at(copy_at, loop.index, size), size)
            step(copy_at, target)
        return context.get_dummy_value()

    return types.void(order, dtype, *[types.int64] * 3), emit
