"""What a kernel notices in passing: the largest finite magnitude, the first non-finite element, the sums behind SQNR.

Finding nothing costs one integer maximum per element: as integers, magnitudes order like the numbers, with infinity
and NaN above them all, so the maximum that gives the scale also tells whether the tile is clean. A tile that is not is
read a second time, a few columns at a time: done on the tile in registers, the rare case would cost every kernel half
its registers. The buffer these functions write to is described in kernels/audit.py.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ..audit import NO_FINDING, SLOTS
from .encode import INF_BITS, decode, widen

_NO_FINDING = tl.constexpr(NO_FINDING)
_SLOTS = tl.constexpr(SLOTS)


@triton.jit
def finite_amax(tile, x, x_k, start, stop, row_start, row_stop, found, CHECK: tl.constexpr):
    """Largest finite magnitude in each row of an fp32 tile `[R, C]` → (fp32 `[R, 1]`, whether it has a non-finite one).

    `tile` holds columns start to stop of R rows, and 0 outside the matrix. `x` `[R, 1]` points at each row's column 0,
    `row_start` `[R, 1]` is the flat index of that element, `row_stop` `[R, 1]` the row's own last column if that comes
    before `stop`. With CHECK the first non-finite element goes to `found`.
    """
    if tile.dtype == tl.float32:
        largest = tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    else:
        short = tl.max(tile.to(tl.int16, bitcast=True) & 0x7FFF, axis=1, keep_dims=True)
        largest = widen(short.to(tl.int16).to(tile.dtype, bitcast=True)).to(tl.int32, bitcast=True)
    dirty = tl.max(largest) >= INF_BITS
    if dirty:
        largest = _second_look(x, x_k, start, stop, row_start, row_stop, found, CHECK)
    return largest.to(tl.float32, bitcast=True), dirty


@triton.jit
def _second_look(x, x_k, start, stop, row_start, row_stop, found, CHECK: tl.constexpr):
    ROWS: tl.constexpr = x.shape[0]
    STEP: tl.constexpr = 4 if ROWS >= 64 else 256 // ROWS
    largest = tl.zeros((ROWS, 1), tl.int32)
    for first in range(start, stop, STEP):
        col = first + tl.arange(0, STEP)[None, :].to(tl.int64)
        value = widen(tl.load(x + col * x_k, mask=(col < row_stop) & (col < stop), other=0.0))
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        finite = bits < INF_BITS
        largest = tl.maximum(largest, tl.max(tl.where(finite, bits, 0), axis=1, keep_dims=True))
        if CHECK:
            kind = tl.where(value != value, 0, tl.where(value > 0, 1, 2))
            key = tl.where(finite, 0, _NO_FINDING - ((row_start + col) * 4 + kind))
            tl.atomic_max(found, tl.max(tl.max(key, axis=1)), sem="relaxed")
    return largest


@triton.jit
def add_sums(sums, slot, scaled, code, scale, CAST: tl.constexpr):
    """Add a tile's Σx² and Σ(x - dequantized)² to one of the SLOTS pairs of float64 in `sums`.

    `scaled` is x in units of its scale `[R, 1]`: there neither square can overflow or vanish in fp32.
    """
    error = scaled - decode(code, CAST)
    weight = scale.to(tl.float64)
    weight = weight * weight
    signal = tl.sum(scaled * scaled, axis=1, keep_dims=True).to(tl.float64) * weight
    noise = tl.sum(error * error, axis=1, keep_dims=True).to(tl.float64) * weight
    _add_pair(sums, slot, signal, noise)


@triton.jit
def add_sums_of(sums, slot, value, restored):
    """As `add_sums`, from the values themselves: for scales that may vanish and for errors that may be small."""
    value, error = value.to(tl.float64), (value - restored).to(tl.float64)
    _add_pair(sums, slot, value * value, error * error)


@triton.jit
def _add_pair(sums, slot, signal, noise):
    pair = sums + (slot % _SLOTS) * 2
    tl.atomic_add(pair, tl.sum(tl.sum(signal, axis=1)), sem="relaxed")
    tl.atomic_add(pair + 1, tl.sum(tl.sum(noise, axis=1)), sem="relaxed")
