"""What a kernel notices in passing: the largest finite magnitude, the first non-finite element, the sums behind SQNR.

Finding nothing costs one integer maximum per element: as integers, magnitudes order like the numbers, with infinity
and NaN above them all, so the maximum that gives the scale also tells whether the tile is clean. Only a tile that is
not pays for a second look. The buffer these functions write to is described in kernels/audit.py.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ..audit import NO_FINDING, SLOTS
from .encode import INF_BITS, decode

_NO_FINDING = tl.constexpr(NO_FINDING)
_SLOTS = tl.constexpr(SLOTS)


@triton.jit
def finite_amax(x, row_start, col, inside, found, CHECK: tl.constexpr):
    """Largest finite magnitude in each row of fp32 `x` `[R, C]` → `[R, 1]`, 0 for a row without any.

    With CHECK, the first element that is not finite is noted in `found`. `row_start` `[R, 1]` holds the flat index of
    each row's column 0 and `col` `[1, C]` the columns, both int64. Elements outside `inside` must be loaded as 0.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, axis=1, keep_dims=True)
    if tl.max(largest) >= INF_BITS:
        if CHECK:
            kind = tl.where(x != x, 0, tl.where(x > 0, 1, 2))
            key = _NO_FINDING - ((row_start + col) * 4 + kind)
            key = tl.where(inside & (bits >= INF_BITS), key, 0)
            tl.atomic_max(found, tl.max(tl.max(key, axis=1)), sem="relaxed")
        largest = tl.max(tl.where(bits < INF_BITS, bits, 0), axis=1, keep_dims=True)
    return largest.to(tl.float32, bitcast=True)


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
    pair = sums + (slot % _SLOTS) * 2
    tl.atomic_add(pair, tl.sum(tl.sum(signal, axis=1)), sem="relaxed")
    tl.atomic_add(pair + 1, tl.sum(tl.sum(noise, axis=1)), sem="relaxed")
