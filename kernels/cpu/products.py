"""Products of x with quantized weights: three ways, by the number of rows of x.

A few rows meet weights that are decoded in registers, with sums in fp32. More of them, where the chip has a tile unit
and x is bfloat16, meet blocks of the weight that are decoded for it. Without one, a band of the weight is decoded to
x's dtype, into memory that is kept and stays in cache, and torch multiplies. The loops are in `vectors`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch

from ..formats import WeightFormat, ceil_div, e8m0_to_float
from ..parts import Parts
from . import stripes, vectors
from .laying import laid_out
from .orders import order_of
from .rows import run_loop
from .singles import TILE
from .tiles import (
    AMX,
    BY_PAIRS,
    BY_SINGLES,
    NONE,
    ROWS_FOR_FEW,
    ROWS_FOR_MANY,
    TILE_SCRATCH,
    tile_size,
    tile_unit,
)

FEW = 8  # Rows of x that are decoded for in registers, four at a time, where there are no tiles;
FEW_BESIDE_TILES = 4  # and where there are the chip's.
_BAND = 1 << 20  # Elements of a weight decoded at a time: what stays in cache beside x.
_PIECE = 1 << 16  # Elements that are worth another thread.

Span = tuple[int, int, int]  # (matrix of a stack, first row of x, last + 1)


def linear(x: torch.Tensor, parts: Parts, fmt: WeightFormat, bias: torch.Tensor | None) -> torch.Tensor:
    """As `Backend.linear`, for an x that is not empty and whose gradient nobody wants."""
    stack = Parts(*(part.unsqueeze(0) for part in parts))
    return _products(x, stack, fmt, [(0, 0, x.shape[0])], None if bias is None else bias[None])


def experts(
    x: torch.Tensor, parts: Parts, fmt: WeightFormat, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As `Backend.experts`, likewise: matrices that meet few rows share one call."""
    bounds = pairwise([0, *offsets.tolist()])
    return _products(x, parts, fmt, [(e, start, stop) for e, (start, stop) in enumerate(bounds) if start < stop], bias)


def _products(
    x: torch.Tensor, parts: Parts, fmt: WeightFormat, spans: list[Span], bias: torch.Tensor | None
) -> torch.Tensor:
    parts = Parts(parts.qdata.detach(), _readable(parts.scale.detach()), *(part.detach() for part in parts[2:]))
    tiled = x.dtype == torch.bfloat16 and vectors.has_tiles()
    most = most_in_registers(x.dtype, fmt)
    few = [span for span in spans if span[2] - span[1] <= most]
    many = [span for span in spans if span[2] - span[1] > most]
    out = torch.empty((x.shape[0], parts.qdata.shape[1]), dtype=x.dtype, device="cpu")
    if few and many:
        _some_in_registers(x, parts, fmt, few, bias, out)
    elif few:
        _in_registers(x, parts, fmt, few, bias, out)
    if many and tiled:
        _in_tiles(x, parts, fmt, many, bias, out)
    elif many:
        for e, start, stop in many:
            _by_torch(x[start:stop], parts.matrix(e), fmt, None if bias is None else bias[e], out[start:stop])
    return out


def most_in_registers(dtype: torch.dtype, fmt: WeightFormat) -> int:
    """Rows of x that are decoded for in registers."""
    unit = tile_unit() if dtype == torch.bfloat16 else NONE
    if unit == BY_PAIRS:  # Decoding anew for every four of 16 rows costs less than the tiles; more for e4m3 in groups.
        return 12 if fmt.element == "e4m3" and fmt.granularity == "group" else 16
    if unit == BY_SINGLES and stripes.way_of(fmt, dtype) == stripes.WORDS:  # Two products in one's time.
        return 20
    if unit == BY_SINGLES and fmt.granularity in ("tensor", "channel"):  # Decoding anew costs least without groups.
        return 12
    return FEW_BESIDE_TILES if unit == AMX else FEW


def dequantize(parts: Parts, fmt: WeightFormat, out: torch.Tensor) -> None:
    """One matrix into `out` `[N, K]`; quantized values and `out` are `adjacent`."""
    rows, cols = out.shape
    qdata, scale = parts.qdata.detach(), _readable(parts.scale.detach())
    table = _table(parts, fmt)
    counter = np.zeros(1, np.int64)
    step = _step(rows, cols, 4)
    places = np.zeros(1, vectors.DECODE)
    places[0] = (
        counter.ctypes.data,
        step,
        rows,
        cols,
        qdata.data_ptr(),
        qdata.stride(0),
        scale.data_ptr(),
        0 if fmt.granularity == "tensor" else scale.stride(0) * scale.itemsize,
        fmt.block[0],
        0 if table is None else table.data_ptr(),
        out.data_ptr(),
        out.stride(0) * out.itemsize,
    )
    run_loop(vectors.decode_loop(fmt, out.dtype), places, ceil_div(rows, step), torch.get_num_threads())


def _some_in_registers(
    x: torch.Tensor, parts: Parts, fmt: WeightFormat, spans: list[Span], bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """As `_in_registers`, with nothing laid out for the rows of x between them."""
    ends = np.cumsum([stop - start for _, start, stop in spans]).tolist()
    close = [(e, end - (stop - start), end) for (e, start, stop), end in zip(spans, ends, strict=True)]
    found = torch.empty((ends[-1], out.shape[1]), dtype=out.dtype, device="cpu")
    rows = torch.cat([x.detach()[start:stop] for _, start, stop in spans])
    _in_registers(rows, parts, fmt, close, bias, found)
    for (_, start, stop), (_, first, last) in zip(spans, close, strict=True):
        out[start:stop] = found[first:last]


def _in_registers(
    x: torch.Tensor, parts: Parts, fmt: WeightFormat, spans: list[Span], bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """`spans` cover x."""
    way = stripes.way_of(fmt, x.dtype)
    rows = laid_out(x.detach(), order_of(fmt, way))
    sums = torch.empty(out.shape, dtype=torch.float32, device="cpu")
    place = rows.data_ptr(), rows.stride(0) * rows.itemsize
    _run(
        vectors.product_loop(fmt, way),
        parts,
        fmt,
        x.shape[1],
        place,
        sums,
        (4, 0, 0),
        spans,
        torch.get_num_threads(),
    )
    if bias is not None:
        for e, start, stop in spans:
            sums[start:stop] += bias[e]
    out.copy_(sums)


def _in_tiles(
    x: torch.Tensor,
    parts: Parts,
    fmt: WeightFormat,
    spans: list[Span],
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    rows, cols = parts.qdata.shape[1], x.shape[1]
    x = x.detach() if x.stride(1) == 1 else x.detach().contiguous()
    tiles: list[tuple[int, int]] = []
    jobs = []
    offsets = torch.zeros((1 if bias is None else bias.shape[0], rows + TILE), dtype=torch.float32, device="cpu")
    if bias is not None:
        offsets[:, :rows] = bias.detach()
    for e, start, stop in spans:
        first = len(tiles)
        tiles += [(row, min(TILE, stop - row)) for row in range(start, stop, TILE)]
        offset = offsets.data_ptr() + (0 if bias is None else e * offsets.stride(0) * 4)
        jobs.append((e, first, len(tiles), offset, start, stop - start))
    most = max(end - first for _, first, end, *_ in jobs)
    block_rows = ROWS_FOR_FEW if most <= 2 else ROWS_FOR_MANY
    per_tile = tile_size(fmt, cols)
    per_thread = TILE_SCRATCH + block_rows * most * TILE * 4
    threads = torch.get_num_threads()
    with _scratch(len(tiles) * per_tile + threads * per_thread + 64) as room:
        packed = ceil_div(room.data_ptr(), 64) * 64
        where, counter = np.array(tiles, np.int64), np.zeros(1, np.int64)
        places = np.zeros(1, vectors.PACK)
        places[0] = (
            counter.ctypes.data,
            len(tiles),
            cols,
            x.data_ptr(),
            x.stride(0) * x.itemsize,
            where.ctypes.data,
            packed,
            per_tile,
        )
        run_loop(vectors.pack_loop(fmt), places, len(tiles), threads)
        own = (block_rows, packed + len(tiles) * per_tile, per_thread)
        _run(vectors.tile_loop(fmt), parts, fmt, cols, (packed, per_tile), out, own, jobs, threads)


def _run(
    loop: vectors.Loop,
    parts: Parts,
    fmt: WeightFormat,
    cols: int,
    x: tuple[int, int],
    out: torch.Tensor,
    own: tuple[int, int, int],
    jobs: Sequence[tuple[int, ...]],
    threads: int,
) -> None:
    """Run a loop of `vectors` for some matrices of a stack.

    x: Address, bytes from row to row (or tile).
    own: Rows of the weight that the loop takes at a time, the address of memory for each thread, its size.
    jobs: Matrix, and what `vectors.JOB` has after the addresses.
    """
    qdata, scale = parts.qdata, parts.scale
    rows = qdata.shape[1]
    tables = {e: _table(parts.matrix(e), fmt) for e, *_ in jobs}
    table = np.zeros((len(jobs), vectors.JOB), np.int64)
    for row, (e, *rest) in zip(table, jobs, strict=True):
        values = tables[e]
        row[:3] = (
            qdata.data_ptr() + e * qdata.stride(0) * qdata.itemsize,
            scale.data_ptr() + e * scale.stride(0) * scale.itemsize,
            0 if values is None else values.data_ptr(),
        )
        row[3 : 3 + len(rest)] = rest
    counters = np.zeros(2, np.int64)
    step = _step(rows, cols, own[0])
    per_job = ceil_div(rows, step)
    places = np.zeros(1, vectors.PRODUCT)
    places[0] = (
        counters.ctypes.data,
        per_job * len(jobs),
        per_job,
        step,
        rows,
        cols,
        qdata.stride(1) * qdata.itemsize,
        0 if fmt.granularity == "tensor" else scale.stride(1) * scale.itemsize,
        fmt.block[0],
        *x,
        out.data_ptr(),
        out.stride(0) * out.itemsize,
        *own,
        table.ctypes.data,
    )
    run_loop(loop, places, per_job * len(jobs), threads)


def _by_torch(x: torch.Tensor, parts: Parts, fmt: WeightFormat, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    rows, cols = parts.qdata.shape[0], x.shape[1]
    step = fmt.block[0] * max(1, _BAND // (fmt.block[0] * cols))
    with _scratch(min(step, rows) * cols * x.itemsize) as room:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            weight = room[: (stop - start) * cols * x.itemsize].view(x.dtype).view(stop - start, cols)
            dequantize(parts.rows(start, stop, fmt), fmt, weight)
            out[:, start:stop] = torch.nn.functional.linear(x, weight, None if bias is None else bias[start:stop])


def _step(rows: int, cols: int, unit: int) -> int:
    """Rows of a weight per piece: so many that taking one costs little, so few that threads end together."""
    wanted = min(_PIECE // max(1, cols), ceil_div(rows, 4 * torch.get_num_threads()))
    return max(1, wanted // unit) * unit


def _readable(scale: torch.Tensor) -> torch.Tensor:
    """Scales of a row next to each other."""
    return scale if scale.stride(-1) == 1 or scale.shape[-1] == 1 else scale.contiguous()


def _table(parts: Parts, fmt: WeightFormat) -> torch.Tensor | None:
    """What the scales of one byte are worth, fp32 `[256]`, and after them what `tile_loop` wants; None for floats."""
    if fmt.scale_dtype.itemsize > 1:
        return None
    table = _values(fmt)
    return table if parts.global_scale is None else table * parts.global_scale.detach()


@functools.cache
def _values(fmt: WeightFormat) -> torch.Tensor:
    with torch.inference_mode(False):
        codes = torch.arange(256, dtype=torch.uint8, device="cpu")
        if fmt.scale_dtype != torch.uint8:
            return codes.view(fmt.scale_dtype).float()
        values = e8m0_to_float(codes)
        return torch.cat([values, stripes.subtrahends(fmt)])


_kept: list[torch.Tensor] = []
_MOST_KEPT = 8


@contextmanager
def _scratch(nbytes: int) -> Iterator[torch.Tensor]:
    """Memory that was used before, where there is some: the page faults of fresh memory take longer than decoding."""
    try:
        memory = _kept.pop()
    except IndexError:
        memory = None
    if memory is None or memory.numel() < nbytes:
        with torch.inference_mode(False):
            memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    try:
        yield memory
    finally:
        if len(_kept) < _MOST_KEPT:
            _kept.append(memory)
