"""Products of a few rows of x, with all that a call needs worked out beforehand.

An engine's step goes over all weights of a model, which leaves nothing of the interpreter's own memory in the caches: a
call that takes 70 µs in a loop takes several times as long there, as long as reading some megabytes. So what
`products` works out for each call is kept here for each weight, by its address, and a call enters C once: one function
lays x out, the loop of `vectors` multiplies, one rounds. They read the weight where it is stored. Nothing of it is
copied or kept alive, and new values are seen.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..formats import WeightFormat, ceil_div
from ..parts import Parts
from . import products, rows, stripes, vectors
from .laying import PURPOSE
from .layouts import LAY_OUT, ROUND, lay_out, round_rows
from .orders import ORDERS, order_of
from .singles import TILE
from .steps import Step, Steps, entering, setter
from .tiles import ROWS_FOR_FEW, ROWS_FOR_MANY, TILE_SCRATCH, tile_size

_MOST_KEPT = 4096  # Weights.
_SET_LAY_OUT, _SET_ROUND = setter(4), setter(3)
_MOST_IN_TILES = 64  # Rows of x; for more, what a call costs is little beside them.


def linear(x: torch.Tensor, parts: Parts, fmt: WeightFormat, bias: torch.Tensor | None) -> torch.Tensor | None:
    """As `Backend.linear`, for an x whose gradient nobody wants; None for calls that are not of the kind."""
    qdata, scale = parts[0], parts[1]
    in_tiles = x.shape[0] > most_rows(fmt)
    if (
        not 0 < x.shape[0] <= (_MOST_IN_TILES if vectors.has_tiles() else most_rows(fmt))
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


def unless_busy(run: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
    """What `run` returns, which uses the memory that all calls share; None if another thread uses it."""
    if not _lock.acquire(blocking=False):
        return None
    try:
        return run()
    finally:
        _lock.release()


def _is_plain(bias: torch.Tensor) -> bool:
    wants_grad = bias.requires_grad and torch.is_grad_enabled()
    return bias.dtype is torch.bfloat16 and bias.is_contiguous() and not bias.is_neg() and not wants_grad


@functools.cache
def most_rows(fmt: WeightFormat) -> int:
    return products.most_in_registers(torch.bfloat16, fmt)


class Bound:
    """`linear` for one weight whose parts somebody holds, without what finds it anew. It takes plain tensors."""

    def __init__(self, parts: Parts, fmt: WeightFormat, cols: int) -> None:
        self._parts, self._places = parts, [part.data_ptr() for part in parts]
        self._product, self._most = _FewRows(parts, fmt, cols), most_rows(fmt)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        """x `[M, K]` → `[M, N]`; None for calls that are not of the kind, or where a part has moved."""
        if (
            type(x) is not torch.Tensor
            or x.dtype is not torch.bfloat16
            or not 0 < x.shape[0] <= self._most
            or x.stride(1) != 1
            or x.is_neg()
            or x.requires_grad
            or not (bias is None or _is_plain(bias))
            or [part.data_ptr() for part in self._parts] != self._places
            or not _lock.acquire(blocking=False)
        ):
            return None
        try:
            return self._product.run(x, self._parts, bias)
        finally:
            _lock.release()


class Multiplication:
    """The loop over a weight `[N, K]`, or a stack of them, at one address, for x of a dtype. jobs: `vectors.JOB` for
    each matrix; the first three of a row are set."""

    def __init__(self, parts: Parts, fmt: WeightFormat, cols: int, dtype: torch.dtype = torch.bfloat16) -> None:
        qdata, scale = parts.qdata, parts.scale
        count = qdata.shape[0] if qdata.dim() == 3 else 1
        self.rows, self.cols = qdata.shape[-2], cols
        way = stripes.way_of(fmt, dtype)
        self.order = order_of(fmt, way)
        self.x_stride, self.sums_stride = ORDERS[self.order].stride(cols), 4 * self.rows
        self.jobs, self.counters = np.zeros((count, vectors.JOB), np.int64), np.zeros(2, np.int64)
        self.matrices = np.zeros((count, 3), np.int64)
        for column, part in enumerate((qdata, scale)):
            step = part.stride(0) * part.itemsize if qdata.dim() == 3 else 0
            self.matrices[:, column] = part.data_ptr() + step * np.arange(count)
        self.tables: np.ndarray[Any, Any] | None = None  # Of each matrix with a global scale; `lay_out` fills them.
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
        set_places(self.places, places)
        self._loop = vectors.product_loop(fmt, way)
        self.room: torch.Tensor | None = None
        self.threads = 0

    def place(self, room: torch.Tensor, threads: int, x: int, sums: int) -> None:
        """x and sums: addresses in `room`."""
        step = products._step(self.rows, self.cols, 4)
        self.pieces = ceil_div(self.rows, step)
        places = {"x": x, "out": sums, "step": step, "pieces": self.pieces, "pieces_per_job": self.pieces}
        set_places(self.places, places)
        self.room, self.threads = room, threads

    def step(self, team: Any, pieces: int) -> Step:
        """pieces: How many there can be."""
        threads = 1 if team is None else min(self.threads, pieces)
        return Step(self._loop.address, self.places.ctypes.data, threads)


class _FewRows:
    """Products with one weight `[N, K]`."""

    def __init__(self, parts: Parts, fmt: WeightFormat, cols: int) -> None:
        self.cols, self._most = cols, most_rows(fmt)
        self._product = product = Multiplication(parts, fmt, cols)
        self._lay_out, self._round = np.zeros(1, LAY_OUT), np.zeros(1, ROUND)
        values: dict[str, int] = {"cols": cols, "order": product.order}
        values |= {"out_stride": product.x_stride, "counter": product.counters.ctypes.data}
        values["job"] = product.jobs.ctypes.data
        if product.tables is not None and product.values is not None:
            values |= {"values": product.values.data_ptr(), "table": product.tables.ctypes.data}
        set_places(self._lay_out, values)
        counter = product.counters.ctypes.data + 8
        set_places(self._round, {"sums_stride": product.sums_stride, "cols": product.rows, "counter": counter})

    def run(self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None) -> torch.Tensor | None:
        threads = torch.get_num_threads()
        product = self._product
        if threads != product.threads or product.room is not _room:
            team = rows.team() if threads > 1 else None
            if threads > 1 and team is None:
                return None
            self._place(threads, team)
        count = x.shape[0]
        out = torch.empty((count, product.rows), dtype=torch.bfloat16, device="cpu")
        gain = parts[2].data_ptr() if len(parts) == 3 else 0
        _SET_LAY_OUT(self._lay_out, 0, x.data_ptr(), 2 * x.stride(0), count, gain)
        _SET_ROUND(self._round, 0, count, 0 if bias is None else bias.data_ptr(), out.data_ptr())
        self._steps.run()
        return out

    def _place(self, threads: int, team: Any) -> None:
        """In memory that all weights use in turn, for so many threads."""
        product, most = self._product, self._most
        x_bytes = ceil_div(most * product.x_stride, 64) * 64
        room, start = roomy(x_bytes + most * product.sums_stride)
        product.place(room, threads, start, start + x_bytes)
        self._lay_out["out"], self._round["sums"] = start, start + x_bytes
        lay, end = (loop(purpose=PURPOSE).address for loop in (lay_out, round_rows))
        first, last = Step(lay, self._lay_out.ctypes.data), Step(end, self._round.ctypes.data)
        self._steps = Steps([first, product.step(team, product.pieces), last])


class _FewTiles:
    """Products with one weight `[N, K]` by the tile unit; see `products._in_tiles`."""

    def __init__(self, parts: Parts, fmt: WeightFormat, cols: int) -> None:
        qdata, scale = parts.qdata, parts.scale
        self.cols, self._rows = cols, qdata.shape[0]
        self._per_tile = tile_size(fmt, cols)
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
        set_places(self._pack, pack | {"out_stride": self._per_tile})
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
        set_places(self._multiply, multiply)
        self._loops = vectors.pack_loop(fmt).address, vectors.tile_loop(fmt).address
        names = vectors.PACK.names, vectors.PRODUCT.names
        self._x, self._x_stride = (list(names[0] or ()).index(name) for name in ("x", "x_stride"))
        self._out = list(names[1] or ()).index("out")
        self._now, self._after = self._pack.view(np.int64), self._multiply.view(np.int64)
        self._room: torch.Tensor | None = None
        self._threads = self._count = 0

    def run(self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None) -> torch.Tensor | None:
        threads, count = torch.get_num_threads(), x.shape[0]
        if threads != self._threads or self._room is not _room or count != self._count:
            team = rows.team() if threads > 1 else None
            if threads > 1 and team is None:
                return None
            self._place(count, threads)
        if self._table is not None and self._values is not None:
            np.multiply(self._values.numpy(), np.float32(parts[2].item()), out=self._table)
        out = torch.empty((count, self._rows), dtype=torch.bfloat16, device="cpu")
        self._counters[0] = self._counters[1] = self._packed[0] = 0
        self._now[self._x], self._now[self._x_stride] = x.data_ptr(), 2 * x.stride(0)
        self._after[self._out] = out.data_ptr()
        self._steps.run()
        return out

    def _place(self, count: int, threads: int) -> None:
        tile = TILE
        tiles = ceil_div(count, tile)
        self._where[:tiles] = [(row, min(tile, count - row)) for row in range(0, count, tile)]
        block_rows = ROWS_FOR_FEW if tiles <= 2 else ROWS_FOR_MANY
        per_thread = ceil_div(TILE_SCRATCH + block_rows * tiles * tile * 4, 64) * 64
        room, packed = roomy(tiles * self._per_tile + threads * per_thread)
        step = products._step(self._rows, self.cols, block_rows)
        pieces = ceil_div(self._rows, step)
        multiply = {"x": packed, "pieces": pieces, "pieces_per_job": pieces, "step": step}
        multiply |= {"block_rows": block_rows}
        multiply |= {"scratch": packed + tiles * self._per_tile, "scratch_stride": per_thread}
        set_places(self._multiply, multiply)
        set_places(self._pack, {"out": packed, "pieces": tiles})
        self._offsets = _zeros(self._rows + tile)
        self._job[3:] = 0, tiles, self._offsets.data_ptr(), 0, count
        calls = zip(self._loops, (self._pack, self._multiply), (tiles, pieces), strict=True)
        self._steps = Steps([Step(loop, places.ctypes.data, min(threads, count)) for loop, places, count in calls])
        self._room, self._threads, self._count = room, threads, count


def set_places(places: np.ndarray[Any, Any], values: dict[str, int]) -> None:
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


def roomy(nbytes: int) -> tuple[torch.Tensor, int]:
    """Memory that all calls use in turn, and a good address in it."""
    global _room
    if _room is None or _room.numel() < nbytes + 64:
        with torch.inference_mode(False):
            _room = torch.empty(nbytes + 64, dtype=torch.uint8, device="cpu")
    return _room, ceil_div(_room.data_ptr(), 64) * 64


def compile_loops() -> None:
    """What is no weight's own, for all processes to come."""
    for loop in (lay_out, round_rows, entering):
        loop(purpose=PURPOSE)


def _after_fork() -> None:
    """Steps of a parent may call its threads: they are made anew, as for another room."""
    global _room
    _room = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_lock = threading.Lock()
_kept: dict[Any, Any] = {}
_room: torch.Tensor | None = None
