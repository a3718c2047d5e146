"""The loops over rows that are vector instructions: products and dequantizing (`decoders`, `tiles`), and what quantizes
finite sources (`encoders`).

They are C functions of one argument, a structure of sizes and addresses. No Python runs in them, so the threads of
OpenMP can (`rows.run_loop`): of `PRODUCT`, `PACK` and `DECODE` each takes the next rows that nobody has taken. This is
one file because they share that structure, and the way in which each is compiled.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types  # type: ignore[attr-defined]

from ..formats import SEARCHES, WeightFormat
from ..recipes import OWN
from .compiling import Once, compiled
from .decoders import AHEAD, BYTES, FLOATS, PER_ROW, SCALE_BYTES, SHORTS, STRIPE, UNITS, ZEROED, decode_row
from .encoders import BLOCK, block_scales, keep_block_amax, quantize_row, row_amax, scale_kind, scaled_row
from .instructions import CHUNK, DTYPES, E4M3, ELEMENTS, INT8, float32s, int64s, take, uint8s
from .recipes import recipe_block_scales, recipe_row, recipe_scaled_row
from .searching import add_block_errors, search_row
from .singles import BLOCK_STRIDE, SINGLE_COLS, TILE, TILE_ROWS, single_order, single_width
from .stripes import ONE, QUICK_SCALES, dots, is_quick
from .tiles import (
    BLOCK_COLS,
    BY_SINGLES,
    NONE,
    TILE_SCRATCH,
    configure_tiles,
    multiply_tiles,
    pack,
    release_tiles,
    store_sums,
    tile_row,
    tile_unit,
)


def _places(*names: str) -> np.dtype[Any]:
    return np.dtype([(name, np.int64) for name in names])


# What a loop over rows is called with. Strides are in bytes. `counter` is the address of an int64 that begins at 0: the
# piece that no thread has taken yet. A piece is `step` rows of the weight (of one job), which has `rows` of `cols`
# columns. `down` rows share a row of scales, and a table has the 256 fp32 values of scales of one byte.
PRODUCT = _places(
    "counter", "pieces", "pieces_per_job", "step", "rows", "cols", "codes_stride", "scale_stride", "down",
    "x", "x_stride", "out", "out_stride",  # rows of x are laid out as `orders` has them; out is fp32
    "block_rows", "scratch", "scratch_stride",  # of each thread; a second counter says which is whose
    "jobs",  # int64 [J, 8], see `JOB`
)  # fmt: skip
# Addresses of codes, scales, their table, and the first and last + 1 of the rows (tiles, of `tile_loop`) of x that they
# meet. Of `tile_loop` also: the address of the bias, fp32, the first row of out, and how many.
JOB = 8
PACK = _places("counter", "pieces", "cols", "x", "x_stride", "tiles", "out", "out_stride")  # tiles: (row, rows) of x
DECODE = _places(
    "counter", "step", "rows", "cols", "codes", "codes_stride", "scale", "scale_stride", "down", "table",
    "out", "out_stride",
)  # fmt: skip
# `gain`: the address of the matrix's gain and its inverse, fp32, or of the inverse of its one scale. `AMAX` leaves the
# bits of the largest magnitude at an address: those of fp32, which order like the values, with infinity and then NaN
# above everything finite.
QUANTIZE = _places(
    "rows", "cols", "source", "source_stride", "codes", "codes_stride", "scale", "scale_stride", "gain",
)  # fmt: skip
AMAX = _places("rows", "cols", "source", "source_stride", "found")


@numba.njit(nogil=True)
def _largest(address, count):
    found = np.uint8(0)
    for code in carray(uint8s(address), count):
        found = max(found, code)
    return found


@functools.cache
def _sources() -> str:
    """A digest of the files beside this one, and of what searches try and recipes are: numba's cache sees a change only
    of the one that defines a function."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), here.parent / "formats.py", here.parent / "recipes.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


Loop = Any  # numba's CFunc: `.address` for other threads, `.ctypes(address of the places)` for this one.


def _compiled(function: Callable[..., None], places: np.dtype[Any]) -> Loop:
    """As a C function."""
    signature = types.void(types.CPointer(numba.from_dtype(places)))
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    return compiled(function, (_sources(),), lambda named, cache: numba.cfunc(signature, cache=cache, **options)(named))


def _kind(fmt: WeightFormat) -> tuple[int, int, int]:
    """(element, scale, group) as the loops know them."""
    element = ELEMENTS[fmt.element]
    if fmt.granularity in ("tensor", "channel"):
        return element, PER_ROW, 0
    if fmt.has_zero_point:
        return element, ZEROED, fmt.block[1]
    return element, {1: BYTES, 2: SHORTS, 4: FLOATS}[fmt.scale_dtype.itemsize], fmt.block[1]


def product_loop(fmt: WeightFormat, way: int) -> Loop:
    """out = x times the dequantized rows of some weights, transposed: sums in fp32, each weight decoded once for up to
    4 rows of x. `way`: see `stripes.way_of`."""
    return _product_loop(*_kind(fmt), way, purpose=fmt.name)


def tile_loop(fmt: WeightFormat) -> Loop:
    """As `product_loop` with the tile unit, for x as `pack_loop` leaves it and out in bfloat16; jobs count tiles of x,
    their biases end with 16 values more, and `block_rows` is a multiple of 32."""
    return _tile_loop(*_kind(fmt), tile_unit(), purpose=fmt.name)


def pack_loop(fmt: WeightFormat) -> Loop:
    """Rows of x in bfloat16 as `tile_loop` reads them, a piece for each tile: `[chunks, 16, 16, 2]`; of `BY_SINGLES`
    `[columns, 16]` in float32."""
    unit = tile_unit()
    return _pack_loop(unit, single_order(fmt) if unit == BY_SINGLES else ELEMENTS[fmt.element], purpose=fmt.name)


def has_tiles() -> bool:
    """Whether many rows of bfloat16 are multiplied in tiles."""
    return tile_unit() != NONE


def decode_loop(fmt: WeightFormat, dtype: torch.dtype) -> Loop:
    """The dequantized rows of a weight, rounded once to `dtype`."""
    return _decode_loop(*_kind(fmt), DTYPES[dtype], purpose=fmt.name)


def quantize_loop(fmt: WeightFormat, dtype: torch.dtype) -> Loop:
    """The stored elements of finite rows of `dtype`, and scales that are not the whole matrix's; whole blocks."""
    recipe = -1 if fmt.recipe is None else OWN.index(fmt.recipe)
    if fmt.granularity == "tensor":
        return _scaled_loop(DTYPES[dtype], recipe, purpose=fmt.name)
    if fmt.granularity == "block":
        return _block_loop(DTYPES[dtype], fmt.search is not None, recipe, purpose=fmt.name)
    kind = DTYPES[dtype], ELEMENTS[fmt.element], scale_kind(fmt), fmt.block[1] if fmt.granularity == "group" else 0
    if recipe >= 0:
        return _recipe_loop(recipe, *kind, purpose=fmt.name)
    return (_quantize_loop if fmt.search is None else _search_loop)(*kind, purpose=fmt.name)


def amax_loop(dtype: torch.dtype, purpose: str) -> Loop:
    """The largest magnitude of some rows."""
    return _amax_loop(DTYPES[dtype], purpose=purpose)


@Once
def _product_loop(element: int, scale: int, group: int, way: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        while True:
            piece = take(p.counter)
            if piece >= p.pieces:
                return
            job = carray(int64s(p.jobs + piece // p.pieces_per_job * 8 * JOB), JOB)
            start = piece % p.pieces_per_job * p.step
            stop = min(start + p.step, p.rows)
            first, end = job[3], job[4]
            for n in range(start, stop, 4):
                for m in range(first, end, 4):
                    if end - m == 1:
                        dots(
                            way, element, scale, group, 4, 1, job[0], p.codes_stride, stop - 1, job[1],
                            p.scale_stride, p.down, job[2], p.x, p.x_stride, end - 1, p.cols, p.out, p.out_stride, n, m,
                        )  # fmt: skip
                    elif end - m == 2:
                        dots(
                            way, element, scale, group, 4, 2, job[0], p.codes_stride, stop - 1, job[1],
                            p.scale_stride, p.down, job[2], p.x, p.x_stride, end - 1, p.cols, p.out, p.out_stride, n, m,
                        )  # fmt: skip
                    else:
                        dots(
                            way, element, scale, group, 4, 4, job[0], p.codes_stride, stop - 1, job[1],
                            p.scale_stride, p.down, job[2], p.x, p.x_stride, end - 1, p.cols, p.out, p.out_stride, n, m,
                        )  # fmt: skip

    return _compiled(loop, PRODUCT)


@Once
def _tile_loop(element: int, scale: int, group: int, unit: int) -> Loop:
    single = unit == BY_SINGLES
    quick = is_quick(element, scale, group) and not single
    whole = np.float32(1.0 if quick or single else UNITS[element])
    block_cols, stripe = (SINGLE_COLS, single_width(element, scale)) if single else (BLOCK_COLS, STRIPE)
    chunk_size = 2048 if single else 1024  # Of 16 rows of x.
    gain = 4 * ONE[group] if single and scale == BYTES else 0  # Where the table has it.
    largest = QUICK_SCALES.get(element, 0)
    width = SCALE_BYTES[scale]
    per_byte = 1 if element in (E4M3, INT8) else 2

    def loop(pointer):
        p = carray(pointer, 1)[0]
        weights = p.scratch + take(p.counter + 8) * p.scratch_stride
        buffer = weights + TILE_SCRATCH
        factors = np.empty(p.block_rows, np.float32)
        configure_tiles(unit)
        while True:
            piece = take(p.counter)
            if piece >= p.pieces:
                break
            job = carray(int64s(p.jobs + piece // p.pieces_per_job * 8 * JOB), JOB)
            start = piece % p.pieces_per_job * p.step
            stop = min(start + p.step, p.rows)
            first, end = job[3], job[4]  # of tiles
            sums_stride = (end - first) * 64
            for top in range(start, stop, p.block_rows):
                height = min(p.block_rows, (stop - top + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS)
                for r in range(height):
                    factors[r] = whole
                    if scale == PER_ROW:
                        row = min(top + r, stop - 1)
                        factors[r] *= carray(float32s(job[1] + row // p.down * p.scale_stride), 1)[0]
                    elif gain:
                        factors[r] = carray(float32s(job[2] + gain), 1)[0]
                for left in range(0, p.cols, block_cols):
                    cols = min(block_cols, p.cols - left)
                    for r in range(height):
                        row = min(top + r, stop - 1)
                        codes = job[0] + row * p.codes_stride + left // per_byte
                        scales = job[1] + row // p.down * p.scale_stride
                        out = weights + r * BLOCK_STRIDE
                        ahead = AHEAD * p.codes_stride
                        if group:
                            scales += left // group * width
                        if single or (quick and scale == PER_ROW):
                            nan = tile_row(unit, element, scale, group, quick, codes, scales, job[2], cols, ahead, out)
                        elif quick and _largest(scales, (cols + group - 1) // group) <= largest:
                            less = job[2] + 1024  # See `stripes.subtrahends`.
                            nan = tile_row(unit, element, scale, group, True, codes, scales, less, cols, ahead, out)
                        else:
                            nan = tile_row(unit, element, scale, group, False, codes, scales, job[2], cols, ahead, out)
                        if nan:
                            factors[r] = np.float32(np.nan)
                    chunks = (cols + stripe - 1) // stripe * (stripe // CHUNK)
                    x = p.x + left // CHUNK * chunk_size
                    # What is decoded next: of the same rows, or the next ones.
                    down, right = (0, left + block_cols) if left + block_cols < p.cols else (p.block_rows, 0)
                    after = job[0] + (top + down) * p.codes_stride + right // per_byte
                    for m in range(first, end, 2):
                        x_tile = x + m * p.x_stride
                        for r in range(0, height, TILE_ROWS):
                            rows = weights + r * BLOCK_STRIDE
                            out = buffer + r * sums_stride + (m - first) * 64
                            ahead = after + r * p.codes_stride if m == first else 0
                            if m + 1 < end:
                                multiply_tiles(
                                    unit, element, 2, rows, x_tile, p.x_stride, chunks, out, sums_stride, left,
                                    ahead, p.codes_stride,
                                )  # fmt: skip
                            else:
                                multiply_tiles(
                                    unit, element, 1, rows, x_tile, p.x_stride, chunks, out, sums_stride, left,
                                    ahead, p.codes_stride,
                                )  # fmt: skip
                for m in range(0, job[7], TILE):
                    for r in range(0, min(height, stop - top), TILE):
                        n = top + r
                        sums = buffer + r * sums_stride + m * 4
                        out = p.out + (job[6] + m) * p.out_stride + 2 * n
                        at = factors.ctypes.data + 4 * r
                        store_sums(sums, sums_stride, at, job[5] + 4 * n, out, p.out_stride, stop - n, job[7] - m)
        release_tiles(unit)

    return _compiled(loop, PRODUCT)


@Once
def _pack_loop(unit: int, kind: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        while True:
            piece = take(p.counter)
            if piece >= p.pieces:
                return
            rows = carray(int64s(p.tiles + 16 * piece), 2)
            pack(unit, kind, p.x, p.x_stride, rows[0], rows[1], p.cols, p.out + piece * p.out_stride)

    return _compiled(loop, PACK)


@Once
def _decode_loop(element: int, scale: int, group: int, dtype: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        while True:
            start = take(p.counter) * p.step
            if start >= p.rows:
                return
            for n in range(start, min(start + p.step, p.rows)):
                codes, scales = p.codes + n * p.codes_stride, p.scale + n // p.down * p.scale_stride
                decode_row(element, scale, group, dtype, codes, scales, p.table, p.cols, p.out + n * p.out_stride)

    return _compiled(loop, DECODE)


@Once
def _quantize_loop(dtype: int, element: int, scale: int, group: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        for n in range(p.rows):
            source, codes = p.source + n * p.source_stride, p.codes + n * p.codes_stride
            scales = p.scale + n * p.scale_stride
            quantize_row(dtype, element, scale, group, source, codes, scales, p.cols, p.gain)

    return _compiled(loop, QUANTIZE)


@Once
def _search_loop(dtype: int, element: int, scale: int, group: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        for n in range(p.rows):
            source, codes = p.source + n * p.source_stride, p.codes + n * p.codes_stride
            scales = p.scale + n * p.scale_stride
            search_row(dtype, element, scale, group, source, codes, scales, p.cols, p.gain)

    return _compiled(loop, QUANTIZE)


@Once
def _recipe_loop(recipe: int, dtype: int, element: int, scale: int, group: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        for n in range(p.rows):
            source, codes = p.source + n * p.source_stride, p.codes + n * p.codes_stride
            scales = p.scale + n * p.scale_stride
            recipe_row(recipe, dtype, element, scale, group, source, codes, scales, p.cols, p.gain)

    return _compiled(loop, QUANTIZE)


@Once
def _scaled_loop(dtype: int, recipe: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        for n in range(p.rows):
            source, codes = p.source + n * p.source_stride, p.codes + n * p.codes_stride
            if recipe < 0:
                scaled_row(dtype, source, codes, p.cols, p.gain, 0)
            else:
                recipe_scaled_row(recipe, dtype, source, codes, p.cols, p.gain, 0)

    return _compiled(loop, QUANTIZE)


@Once
def _block_loop(dtype: int, searched: bool, recipe: int) -> Loop:
    candidates = np.array(SEARCHES["fp8_per_block"].candidates if searched else (), np.float32)
    count = len(candidates)

    def loop(pointer):
        p = carray(pointer, 1)[0]
        across = (p.cols + BLOCK - 1) // BLOCK
        found, factors = np.empty(16 * across, np.int32), np.empty(across, np.float32)
        inverses, sums = np.empty(count * across, np.float32), np.empty(16 * count * across, np.int32)
        for top in range(0, p.rows, BLOCK):
            found[:] = 0
            bottom = min(top + BLOCK, p.rows)
            for n in range(top, bottom):
                keep_block_amax(dtype, p.source + n * p.source_stride, p.cols, found.ctypes.data)
            address = p.scale + top // BLOCK * p.scale_stride
            if recipe < 0:
                block_scales(dtype, found.ctypes.data, across, address, factors.ctypes.data)
            else:
                recipe_block_scales(recipe, dtype, found.ctypes.data, across, address, factors.ctypes.data)
            if searched:
                scales = carray(float32s(address), across)
                for i in range(count * across):
                    inverses[i] = np.float32(1.0) / (scales[i % across] * candidates[i // across])
                sums[:] = 0
                for n in range(top, bottom):
                    source = p.source + n * p.source_stride
                    add_block_errors(dtype, source, p.cols, inverses.ctypes.data, across, sums.ctypes.data)
                for j in range(across):
                    plain, least = scales[j], np.inf
                    for i in range(count):
                        scale, at = plain * candidates[i], 16 * (j * count + i)
                        error = np.float64(sums[at : at + 16].sum()) * (np.float64(scale) * np.float64(scale))
                        if error < least:
                            scales[j], factors[j], least = scale, inverses[i * across + j], error
            for n in range(top, bottom):
                source, codes = p.source + n * p.source_stride, p.codes + n * p.codes_stride
                if recipe < 0:
                    scaled_row(dtype, source, codes, p.cols, factors.ctypes.data, 4)
                else:
                    recipe_scaled_row(recipe, dtype, source, codes, p.cols, factors.ctypes.data, 4)

    return _compiled(loop, QUANTIZE)


@Once
def _amax_loop(dtype: int) -> Loop:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        found = 0
        for n in range(p.rows):
            found = max(found, row_amax(dtype, p.source + n * p.source_stride, p.cols))
        carray(int64s(p.found), 1)[0] = found

    return _compiled(loop, AMAX)
