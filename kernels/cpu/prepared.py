"""Products of a few rows of x, with all that a call needs worked out beforehand.

An engine's step goes over all weights of a model, which leaves nothing of the interpreter's own memory in the caches: a
call that takes 70 µs in a loop takes several times as long there, as long as reading some megabytes. So what
`products` works out for each call is kept here for each weight, by its address, and a call is two or three C functions:
one lays x out, the loop of `vectors` multiplies, one rounds. They read the weight where it is stored. Nothing of it is
copied or kept alive, and new values are seen.

This is one file because numba's cache notices a change only in the file that defines a function.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, extending, types  # type: ignore[attr-defined]

from ..formats import WeightFormat, ceil_div
from ..parts import Parts
from . import products, rows, vectors
from .compiling import Once
from .decoders import STRIPE, interleaved
from .instructions import CHUNK, take
from .tiles import BLOCK_FOR_FEW, BLOCK_FOR_MANY, TILE, TILE_SCRATCH

_MOST_KEPT = 4096  # Weights.
_PURPOSE = "products"
_IN_ORDER, _EVEN_FIRST, _STRIPED = range(3)  # See `products._arranged` and `_striped`.
_JOB = vectors.JOB
_WIDTHS = {_IN_ORDER: CHUNK, _EVEN_FIRST: CHUNK, _STRIPED: STRIPE}

_LAY_OUT = np.dtype(
    [(name, np.int64) for name in ("x", "x_stride", "rows", "cols", "order", "out", "out_stride", "whole")]
    + [(name, np.int64) for name in ("values", "gain", "table", "counter", "job")]
)
_ROUND = np.dtype(
    [(name, np.int64) for name in ("sums", "sums_stride", "rows", "cols", "bias", "out", "steps", "counter")]
)
_ROUTE = np.dtype(
    [(name, np.int64) for name in ("x", "x_stride", "cols", "order", "whole", "out", "out_stride")]
    + [(name, np.int64) for name in ("ids", "pairs", "each", "experts", "most", "ends", "where", "found")]
    + [(f"{name}{i}", np.int64) for i in (1, 2) for name in ("matrices", "jobs", "counter", "values", "gains")]
)
_GAINS = [list(_ROUTE.names or ()).index(name) for name in ("gains1", "gains2")]
_LAY_OUT_SUMS = np.dtype(
    [(name, np.int64) for name in ("x", "x_stride", "rows", "cols", "order", "whole", "out", "out_stride")]
)
_COMBINE = np.dtype(
    [(name, np.int64) for name in ("sums", "sums_stride", "where", "weights", "each", "rows", "cols", "out")]
)
_COMBINE_ROWS = np.dtype(
    [
        (name, np.int64)
        for name in ("counter", "users", "sums", "terms", "where", "weights", "each", "rows", "cols", "out")
    ]
)
_MOST_PAIRS = 256  # Of a token and an expert; of one expert, two times what is decoded for at once.
_AT_ONCE = 4  # Rows of x that a weight is decoded for.
_MOST_IN_TILES = 64  # Rows of x; for more, what a call costs is little beside them.
_PIECE = 1 << 16  # Elements to round that are worth another thread.


def linear(x: torch.Tensor, parts: Parts, fmt: WeightFormat, bias: torch.Tensor | None) -> torch.Tensor | None:
    """As `Backend.linear`, for an x whose gradient nobody wants; None for calls that are not of the kind."""
    qdata, scale = parts[0], parts[1]
    in_tiles = x.shape[0] > most_rows()
    if (
        not 0 < x.shape[0] <= (_MOST_IN_TILES if vectors.has_tiles() else most_rows())
        or x.dtype is not torch.bfloat16
        or x.stride(1) != 1
        or x.is_neg()
        or (bias is not None and (in_tiles or not _is_plain(bias)))
        or not _lock.acquire(blocking=False)
    ):
        return None
    try:
        places = qdata.data_ptr(), scale.data_ptr(), qdata.shape, scale.shape, qdata.stride(0), scale.stride(0)
        key = (*places, fmt.name, in_tiles)
        product = _kept.get(key)
        if product is None or product.cols != x.shape[1]:
            if qdata.stride(1) != 1 or (scale.stride(-1) != 1 and scale.shape[-1] != 1) or not qdata.numel():
                return None
            if len(_kept) == _MOST_KEPT:
                _kept.clear()
            product = _kept[key] = (_FewTiles if in_tiles else _FewRows)(parts, fmt, x.shape[1])
        return product.run(x, parts, bias)
    finally:
        _lock.release()


def experts(
    x: torch.Tensor,
    first: Parts,
    second: Parts,
    fmt: WeightFormat,
    ids: torch.Tensor,
    weights: torch.Tensor,
    inner: int,
    activate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    """Σ over each token's experts of weight · second(activate(first(x))), for a few tokens; None for other calls.

    Args:
        x: `[T, H]`.
        first: The stack `[E, I', H]`.
        second: The stack `[E, H, I]`.
        fmt: Of both.
        ids: Experts, int32 `[T, k]`.
        weights: fp32 `[T, k]`.
        inner: I.
        activate: Between the two, `[P, I']` → `[P, I]` in fp32.

    Returns:
        `[T, H]` in x's dtype; what lies between is not rounded.
    """
    tensors = (*first, *second)
    if (
        not 0 < ids.numel() <= _MOST_PAIRS
        or x.dtype is not torch.bfloat16
        or x.stride(1) != 1
        or x.is_neg()
        or ids.dtype is not torch.int32
        or weights.dtype is not torch.float32
        or not (ids.is_contiguous() and weights.is_contiguous())
        or not _lock.acquire(blocking=False)
    ):
        return None
    try:
        key = (*(part.data_ptr() for part in (*first[:2], *second[:2])), first[0].shape, second[0].shape, fmt.name)
        mixture = _kept.get(key)
        if mixture is None or mixture.cols != (x.shape[1], inner):
            if not all(part.is_contiguous() and part.numel() for part in tensors):
                return None
            if len(_kept) == _MOST_KEPT:
                _kept.clear()
            mixture = _kept[key] = _Mixture(first, second, fmt, x.shape[1], inner)
        gains = [part[2] for part in (first, second) if len(part) == 3]
        found: torch.Tensor | None = mixture.run(x, gains, ids, weights, activate)
        return found
    finally:
        _lock.release()


def _is_plain(bias: torch.Tensor) -> bool:
    wants_grad = bias.requires_grad and torch.is_grad_enabled()
    return bias.dtype is torch.bfloat16 and bias.is_contiguous() and not bias.is_neg() and not wants_grad


@functools.cache
def most_rows() -> int:
    """Rows of x in bfloat16 that are decoded for in registers."""
    return products.FEW_BESIDE_TILES if vectors.has_tiles() else products.FEW


class _Multiplication:
    """The loop over a weight `[N, K]`, or a stack of them, at one address. jobs: `vectors.JOB` for each matrix; the
    first three of a row are set."""

    def __init__(self, parts: Parts, fmt: WeightFormat, cols: int) -> None:
        qdata, scale = parts.qdata, parts.scale
        count = qdata.shape[0] if qdata.dim() == 3 else 1
        self.rows, self.cols = qdata.shape[-2], cols
        quick = vectors.has_quick_product(fmt)
        self.order = _STRIPED if quick else _EVEN_FIRST if interleaved(fmt) else _IN_ORDER
        self.whole = ceil_div(cols, _WIDTHS[self.order]) * _WIDTHS[self.order]
        self.x_stride, self.sums_stride = 4 * (self.whole + products._X_PADDING), 4 * self.rows
        self.jobs, self.counters = np.zeros((count, vectors.JOB), np.int64), np.zeros(2, np.int64)
        self.matrices = np.zeros((count, 3), np.int64)
        for column, part in enumerate((qdata, scale)):
            step = part.stride(0) * part.itemsize if qdata.dim() == 3 else 0
            self.matrices[:, column] = part.data_ptr() + step * np.arange(count)
        self.tables: np.ndarray[Any, Any] | None = None  # Of each matrix with a global scale; `_lay_out` fills them.
        self.values = products._values(fmt) if fmt.scale_dtype.itemsize == 1 else None
        if self.values is not None:
            self.matrices[:, 2] = self.values.data_ptr()
        if parts.global_scale is not None:
            self.tables = np.zeros((count, 256), np.float32)
            self.matrices[:, 2] = self.tables.ctypes.data + 1024 * np.arange(count)
        self.jobs[:, :3] = self.matrices
        self.places = np.zeros(1, vectors.PRODUCT)
        places = {
            "counter": self.counters.ctypes.data,
            "rows": self.rows,
            "cols": cols,
            "codes_stride": qdata.stride(-2) * qdata.itemsize,
            "scale_stride": 0 if fmt.granularity == "tensor" else scale.stride(-2) * scale.itemsize,
            "down": fmt.block[0],
            "x_stride": self.x_stride,
            "out_stride": self.sums_stride,
            "jobs": self.jobs.ctypes.data,
        }
        _set(self.places, places)
        loop = vectors.product_loop(fmt, quick)
        self._loop_address, self._alone, self._address = loop.address, _function(loop.address), self.places.ctypes.data
        self.room: torch.Tensor | None = None
        self.threads = 0

    def place(self, room: torch.Tensor, threads: int, x: int, sums: int) -> None:
        """x and sums: addresses in `room`."""
        step = products._step(self.rows, self.cols, 4)
        self.pieces = ceil_div(self.rows, step)
        places = {"x": x, "out": sums, "step": step, "pieces": self.pieces, "pieces_per_job": self.pieces}
        _set(self.places, places)
        self.room, self.threads = room, threads

    def run_jobs(self, team: Any, jobs: int) -> None:
        """With as many of the jobs as there are rows of `jobs` in use."""
        self.places["pieces"] = self.pieces * jobs
        self.run(team, self.pieces * jobs)

    def run(self, team: Any, pieces: int) -> None:
        if team is None:
            self._alone(self._address)
        else:
            team(self._loop_address, self._address, min(self.threads, pieces), 0)


class _FewRows:
    """Products with one weight `[N, K]`."""

    def __init__(self, parts: Parts, fmt: WeightFormat, cols: int) -> None:
        self.cols = cols
        self._product = product = _Multiplication(parts, fmt, cols)
        self._lay_out, self._round = np.zeros(1, _LAY_OUT), np.zeros(1, _ROUND)
        values: dict[str, int] = {"cols": cols, "order": product.order, "whole": product.whole}
        values |= {"out_stride": product.x_stride, "counter": product.counters.ctypes.data}
        values["job"] = product.jobs.ctypes.data
        if product.tables is not None and product.values is not None:
            values |= {"values": product.values.data_ptr(), "table": product.tables.ctypes.data}
        _set(self._lay_out, values)
        counter = product.counters.ctypes.data + 8
        _set(self._round, {"sums_stride": product.sums_stride, "cols": product.rows, "counter": counter})
        # What changes with each call, as flat arrays: an element of a structure takes three times as long to set.
        self._now, self._after = self._lay_out.view(np.int64), self._round.view(np.int64)
        self._addresses = self._lay_out.ctypes.data, self._round.ctypes.data
        self._loops = _lay_out(purpose=_PURPOSE), _round(purpose=_PURPOSE)

    def run(self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None) -> torch.Tensor | None:
        threads = torch.get_num_threads()
        team = rows.team() if threads > 1 else None
        if threads > 1 and team is None:
            return None
        product, now, after = self._product, self._now, self._after
        if threads != product.threads or product.room is not _room:
            self._place(threads)
        count = x.shape[0]
        out = torch.empty((count, product.rows), dtype=torch.bfloat16, device="cpu")
        now[0], now[1], now[2] = x.data_ptr(), 2 * x.stride(0), count
        if len(parts) == 3:
            now[9] = parts[2].data_ptr()
        self._loops[0](self._addresses[0])
        product.run(team, product.pieces)
        after[2], after[4], after[5] = count, 0 if bias is None else bias.data_ptr(), out.data_ptr()
        self._loops[1](self._addresses[1])
        return out

    def _place(self, threads: int) -> None:
        """In memory that all weights use in turn, for so many threads."""
        product, most = self._product, most_rows()
        x_bytes = ceil_div(most * product.x_stride, 64) * 64
        room, start = _roomy(x_bytes + most * product.sums_stride)
        product.place(room, threads, start, start + x_bytes)
        self._lay_out["out"], self._round["sums"] = start, start + x_bytes


class _FewTiles:
    """Products with one weight `[N, K]` by the tile unit; see `products._in_tiles`."""

    def __init__(self, parts: Parts, fmt: WeightFormat, cols: int) -> None:
        qdata, scale = parts.qdata, parts.scale
        self.cols, self._rows = cols, qdata.shape[0]
        self._per_tile = ceil_div(cols, STRIPE) * STRIPE * TILE * 2
        self._counters, self._packed = np.zeros(2, np.int64), np.zeros(1, np.int64)
        self._where = np.zeros((_MOST_IN_TILES // TILE, 2), np.int64)
        self._job = np.zeros(vectors.JOB, np.int64)
        self._job[:2] = qdata.data_ptr(), scale.data_ptr()
        self._values = products._values(fmt) if fmt.scale_dtype.itemsize == 1 else None
        self._table: np.ndarray[Any, Any] | None = None
        if self._values is not None:
            self._job[2] = self._values.data_ptr()
            if parts.global_scale is not None:
                self._table = np.zeros(self._values.numel(), np.float32)
                self._job[2] = self._table.ctypes.data
        self._pack, self._multiply = np.zeros(1, vectors.PACK), np.zeros(1, vectors.PRODUCT)
        pack = {"counter": self._packed.ctypes.data, "cols": cols, "tiles": self._where.ctypes.data}
        _set(self._pack, pack | {"out_stride": self._per_tile})
        multiply = {
            "counter": self._counters.ctypes.data,
            "rows": self._rows,
            "cols": cols,
            "codes_stride": qdata.stride(0) * qdata.itemsize,
            "scale_stride": 0 if fmt.granularity == "tensor" else scale.stride(0) * scale.itemsize,
            "down": fmt.block[0],
            "x_stride": self._per_tile,
            "out_stride": self._rows * 2,
            "jobs": self._job.ctypes.data,
        }
        _set(self._multiply, multiply)
        loops = vectors.pack_loop(fmt), vectors.tile_loop(fmt)
        self._loops = [(loop.address, _function(loop.address)) for loop in loops]
        self._addresses = self._pack.ctypes.data, self._multiply.ctypes.data
        names = vectors.PACK.names, vectors.PRODUCT.names
        self._x, self._x_stride = (list(names[0] or ()).index(name) for name in ("x", "x_stride"))
        self._out = list(names[1] or ()).index("out")
        self._now, self._after = self._pack.view(np.int64), self._multiply.view(np.int64)
        self._room: torch.Tensor | None = None
        self._threads = self._count = 0

    def run(self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None) -> torch.Tensor | None:
        threads = torch.get_num_threads()
        team = rows.team() if threads > 1 else None
        if threads > 1 and team is None:
            return None
        count = x.shape[0]
        if threads != self._threads or self._room is not _room or count != self._count:
            self._place(count, threads)
        if self._table is not None and self._values is not None:
            np.multiply(self._values.numpy(), np.float32(parts[2].item()), out=self._table)
        out = torch.empty((count, self._rows), dtype=torch.bfloat16, device="cpu")
        self._counters[0] = self._counters[1] = self._packed[0] = 0
        self._now[self._x], self._now[self._x_stride] = x.data_ptr(), 2 * x.stride(0)
        self._after[self._out] = out.data_ptr()
        for (address, alone), places, pieces in zip(self._loops, self._addresses, self._pieces, strict=True):
            if team is None or pieces == 1:
                alone(places)
            else:
                team(address, places, min(threads, pieces), 0)
        return out

    def _place(self, count: int, threads: int) -> None:
        tile = TILE
        tiles = ceil_div(count, tile)
        self._where[:tiles] = [(row, min(tile, count - row)) for row in range(0, count, tile)]
        block = BLOCK_FOR_FEW if tiles <= 2 else BLOCK_FOR_MANY
        per_thread = ceil_div(TILE_SCRATCH + block[0] * tiles * tile * 4, 64) * 64
        room, packed = _roomy(tiles * self._per_tile + threads * per_thread)
        step = products._step(self._rows, self.cols, block[0])
        pieces = ceil_div(self._rows, step)
        multiply = {"x": packed, "pieces": pieces, "pieces_per_job": pieces, "step": step}
        multiply |= {"block_rows": block[0], "block_cols": block[1]}
        multiply |= {"scratch": packed + tiles * self._per_tile, "scratch_stride": per_thread}
        _set(self._multiply, multiply)
        _set(self._pack, {"out": packed, "pieces": tiles})
        self._offsets = _zeros(self._rows + tile)
        self._job[3:] = 0, tiles, self._offsets.data_ptr(), 0, count
        self._pieces = tiles, pieces
        self._room, self._threads, self._count = room, threads, count


class _Mixture:
    """A mixture of experts: stacks `[E, I', H]` and `[E, H, I]`, and what is between them."""

    def __init__(self, first: Parts, second: Parts, fmt: WeightFormat, hidden: int, inner: int) -> None:
        experts = first.qdata.shape[0]
        self.cols = hidden, inner
        self._first, self._second = _Multiplication(first, fmt, hidden), _Multiplication(second, fmt, inner)
        self._ends, self._found = np.zeros(experts + 1, np.int64), np.zeros(2, np.int64)
        self._where = np.zeros(_MOST_PAIRS, np.int64)
        self._route, self._combine = np.zeros(1, _ROUTE), np.zeros(1, _COMBINE)
        self._between = np.zeros(1, _LAY_OUT_SUMS)
        one = self._first
        route = {"cols": hidden, "order": one.order, "whole": one.whole, "out_stride": one.x_stride, "experts": experts}
        route |= {"most": 2 * _AT_ONCE, "ends": self._ends.ctypes.data}
        route |= {"where": self._where.ctypes.data, "found": self._found.ctypes.data}
        for i, stack in ((1, self._first), (2, self._second)):
            route |= {f"matrices{i}": stack.matrices.ctypes.data, f"jobs{i}": stack.jobs.ctypes.data}
            route[f"counter{i}"] = stack.counters.ctypes.data
            if stack.tables is not None and stack.values is not None:
                route[f"values{i}"] = stack.values.data_ptr()
        _set(self._route, route)
        two = self._second
        between = {"x_stride": one.sums_stride, "cols": inner, "order": two.order, "whole": two.whole}
        _set(self._between, between | {"out_stride": two.x_stride})
        _set(self._combine, {"sums_stride": two.sums_stride, "where": self._where.ctypes.data, "cols": two.rows})
        self._pairs = 0

    def run(
        self,
        x: torch.Tensor,
        gains: list[torch.Tensor],
        ids: torch.Tensor,
        weights: torch.Tensor,
        activate: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        threads = torch.get_num_threads()
        team = rows.team() if threads > 1 else None
        if threads > 1 and team is None:
            return None
        one, two = self._first, self._second
        tokens, each = ids.shape
        pairs = tokens * each
        if threads != one.threads or one.room is not _room or pairs > self._pairs:
            self._place(pairs, threads)
        route, between, combine = (p.view(np.int64) for p in (self._route, self._between, self._combine))
        route[0], route[1], route[7], route[8], route[9] = x.data_ptr(), 2 * x.stride(0), ids.data_ptr(), pairs, each
        if gains:
            route[_GAINS[0]], route[_GAINS[1]] = gains[0].data_ptr(), gains[1].data_ptr()
        _route(purpose=_PURPOSE)(route.ctypes.data)
        jobs = int(self._found[0])
        if not jobs:
            return None
        one.run_jobs(team, jobs)
        assert self._sums is not None
        hidden = activate(self._sums[:pairs])
        between[0], between[1], between[2] = hidden.data_ptr(), 4 * hidden.stride(0), pairs
        _lay_out_sums(purpose=_PURPOSE)(between.ctypes.data)
        two.run_jobs(team, jobs)
        out = torch.empty((tokens, two.rows), dtype=torch.bfloat16, device="cpu")
        combine[3], combine[4], combine[5], combine[7] = weights.data_ptr(), each, tokens, out.data_ptr()
        _combine(purpose=_PURPOSE)(combine.ctypes.data)
        return out

    def _place(self, pairs: int, threads: int) -> None:
        one, two = self._first, self._second
        sizes = [pairs * size for size in (one.x_stride, one.sums_stride, two.x_stride, two.sums_stride)]
        sizes = [ceil_div(size, 64) * 64 for size in sizes]
        room, start = _roomy(sum(sizes))
        at = [start + sum(sizes[:i]) for i in range(4)]
        one.place(room, threads, at[0], at[1])
        two.place(room, threads, at[2], at[3])
        offset = at[1] - room.data_ptr()
        self._sums = room[offset : offset + pairs * one.sums_stride].view(torch.float32).view(pairs, one.rows)
        self._route["out"], self._between["out"], self._combine["sums"] = at[0], at[2], at[3]
        self._pairs = pairs


def _set(places: np.ndarray[Any, Any], values: dict[str, int]) -> None:
    for name, value in values.items():
        places[name] = value


_nothing = torch.zeros(0, dtype=torch.float32, device="cpu")


def _zeros(count: int) -> torch.Tensor:
    """The bias of a weight without one."""
    global _nothing
    if _nothing.numel() < count:
        with torch.inference_mode(False):
            _nothing = torch.zeros(count, dtype=torch.float32, device="cpu")
    return _nothing


def _roomy(nbytes: int) -> tuple[torch.Tensor, int]:
    """Memory that all calls use in turn, and a good address in it."""
    global _room
    if _room is None or _room.numel() < nbytes + 64:
        with torch.inference_mode(False):
            _room = torch.empty(nbytes + 64, dtype=torch.uint8, device="cpu")
    return _room, ceil_div(_room.data_ptr(), 64) * 64


def combine_into(out: torch.Tensor, terms: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> None:
    """out `[T, N]` = Σ over j of weights `[T, k]` · the row of terms that where `[T, k]` says; a row below zero adds
    nothing. All contiguous: out and terms in bfloat16, weights in fp32, where int64."""
    counters, places = np.zeros(2, np.int64), np.zeros(1, _COMBINE_ROWS)
    threads = min(torch.get_num_threads(), ceil_div(out.numel(), _PIECE))
    with kept_memory(4 * out.shape[1] * threads) as sums:
        first = counters.ctypes.data
        tensors = (t.data_ptr() for t in (sums, terms, where, weights))
        places[0] = (first, first + 8, *tensors, where.shape[1], *out.shape, out.data_ptr())
        team = rows.team() if threads > 1 else None
        if team is None:
            _combine_rows(purpose=_PURPOSE)(places.ctypes.data)
        else:
            team(_combine_rows(purpose=_PURPOSE).address, places.ctypes.data, threads, 0)


kept_memory = products._scratch
"""Memory that was used before, as a context: see `products`."""

_lock = threading.Lock()
_kept: dict[Any, Any] = {}
_room: torch.Tensor | None = None


_intrinsic: Any = extending.intrinsic


def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


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


@numba.njit(nogil=True)
def _lay_row(x, cols, whole, order, out):
    """One row of bfloat16 as float32, zeros up to whole chunks, in the order that a loop of products decodes in."""
    if whole > cols:
        for k in range(max(0, whole - 64), whole):
            out[k] = 0
    if order == _STRIPED:
        for k in range(cols):
            out[k & ~63 | (k & 8) << 2 | (k & 1) << 4 | (k & 48) >> 2 | (k & 6) >> 1] = _widened(x[k])
    elif order == _EVEN_FIRST:
        for k in range(cols):
            out[k & ~31 | (k & 1) << 4 | (k & 30) >> 1] = _widened(x[k])
    else:
        for k in range(cols):
            out[k] = _widened(x[k])


@Once
def _lay_out() -> Any:
    """Rows of x by `_lay_row`; the table of scales times the global one; and the loop's counters at their beginning."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        counters = carray(_int64s(p.counter), 2)
        counters[0] = counters[1] = 0
        carray(_int64s(p.job), 5)[4] = p.rows
        if p.table != 0:
            _with_gain(p.values, p.gain, p.table)
        for m in range(p.rows):
            x = carray(_uint16s(p.x + m * p.x_stride), p.cols)
            _lay_row(x, p.cols, p.whole, p.order, carray(_float32s(p.out + m * p.out_stride), p.whole))

    return _compiled(loop, _LAY_OUT)


@Once
def _route() -> Any:
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
            x = carray(_uint16s(p.x + i // p.each * p.x_stride), p.cols)
            _lay_row(x, p.cols, p.whole, p.order, carray(_float32s(p.out + where[i] * p.out_stride), p.whole))
        carray(_int64s(p.counter1), 1)[0] = 0
        carray(_int64s(p.counter2), 1)[0] = 0
        found[0] = count

    return _compiled(loop, _ROUTE)


@Once
def _lay_out_sums() -> Any:
    """As `_lay_row`, for rows of float32."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        for m in range(p.rows):
            x = carray(_float32s(p.x + m * p.x_stride), p.cols)
            out = carray(_float32s(p.out + m * p.out_stride), p.whole)
            if p.whole > p.cols:
                for k in range(max(0, p.whole - 64), p.whole):
                    out[k] = 0
            if p.order == _STRIPED:
                for k in range(p.cols):
                    out[k & ~63 | (k & 8) << 2 | (k & 1) << 4 | (k & 48) >> 2 | (k & 6) >> 1] = x[k]
            elif p.order == _EVEN_FIRST:
                for k in range(p.cols):
                    out[k & ~31 | (k & 1) << 4 | (k & 30) >> 1] = x[k]
            else:
                for k in range(p.cols):
                    out[k] = x[k]

    return _compiled(loop, _LAY_OUT_SUMS)


@Once
def _combine() -> Any:
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

    return _compiled(loop, _COMBINE)


@numba.njit(nogil=True)
def _with_gain(values, gain, table):
    values, table, gain = carray(_float32s(values), 256), carray(_float32s(table), 256), carray(_float32s(gain), 1)[0]
    for i in range(256):
        table[i] = values[i] * gain


@Once
def _combine_rows() -> Any:
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

    return _compiled(loop, _COMBINE_ROWS)


@Once
def _round() -> Any:
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

    return _compiled(loop, _ROUND)


def round_into(out: torch.Tensor, sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """out `[M, N]` in bfloat16 = sums in fp32, each row times its step, plus bias, in bfloat16 too. All contiguous."""
    counter, places = np.zeros(1, np.int64), np.zeros(1, _ROUND)
    places[0] = (
        sums.data_ptr(),
        sums.stride(0) * 4,
        *sums.shape,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        steps.data_ptr(),
        counter.ctypes.data,
    )
    loop, threads = _round(purpose=_PURPOSE), min(torch.get_num_threads(), ceil_div(sums.numel(), _PIECE))
    parallel = rows.team() if threads > 1 else None
    if parallel is None:
        loop(places.ctypes.data)
    else:
        parallel(loop.address, places.ctypes.data, threads, 0)


def compile_loops() -> None:
    """For all processes to come."""
    for loop in (_lay_out, _route, _lay_out_sums, _combine, _combine_rows, _round):
        loop(purpose=_PURPOSE)


def _compiled(loop: Any, places: np.dtype[Any]) -> Any:
    compiled = vectors._compiled(loop, places)
    function = _function(compiled.address)
    function.address, function.keeps = compiled.address, compiled
    return function
