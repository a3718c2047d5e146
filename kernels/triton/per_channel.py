"""One scale per row: scale = max(amax / 448, 1 / (448 * 512)), data = x / scale for fp8; for int8, scale = amax / 127,
data = x / scale, both rounded to the source's dtype.

Roofline: a row is read once and stays in registers, so per element 2 bytes read (bf16) + 1 written = 3, and 4 bytes of
scale per row. Beyond ONE_PASS_COLS a multiprocessor could hold only one row at a time, and its loads would wait for its
arithmetic; such rows are read twice, 2 * 2 + 1 = 5, the second time mostly from cache.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..audit import Audit
from ..formats import WeightFormat
from ..parts import Parts
from . import launch, recipes, searching
from .encode import bring_within, decode_element, divide, divide_or_zero, encode, encode_int, narrow, widen, without_nan
from .findings import add_sums, add_sums_of, finite_amax
from .recipes import divisor_of, recipe_scale, recipe_units
from .searching import channel_candidate, channel_off, channel_there, squared_step, total, without_nonfinite

ONE_PASS_COLS = 16384


@triton.jit
def channel_scale(amax, dtype: tl.constexpr, ELEMENT: tl.constexpr, CAST: tl.constexpr, RECIPE: tl.constexpr):
    if len(RECIPE) > 0:
        return recipe_scale(amax, dtype, CAST, RECIPE)
    if ELEMENT == "int8":
        return widen(narrow(tl.math.div_rn(amax, 127.0), dtype, CAST))
    return tl.maximum(tl.math.div_rn(amax, 448.0), 1.0 / (448.0 * 512.0))


@triton.jit
def scaled_codes(
    raw, dirty, scale, ELEMENT: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr, RECIPE: tl.constexpr
):
    """Source elements → (in units of their scale, as fp32; their codes, as uint8)."""
    value = widen(raw)
    divisor = divisor_of(scale, RECIPE)
    if dirty:
        value = bring_within(value, divisor)
        if ELEMENT == "int8":
            value = without_nan(value)
    if len(RECIPE) > 0:
        scaled = recipe_units(value, divisor, raw.dtype, CAST, FUSED, RECIPE)
        if ELEMENT == "int8":
            return scaled, encode_int(scaled, RECIPE[1], 127.0).to(tl.uint8)
        return scaled, encode(scaled, CAST)
    if ELEMENT == "int8":
        scaled = divide_or_zero(value, scale, FUSED)
        return scaled, encode_int(widen(narrow(scaled, raw.dtype, CAST)), -127.0, 127.0).to(tl.uint8)
    scaled = divide(value, scale, FUSED)
    return scaled, encode(scaled, CAST)


@triton.jit
def add_all_sums(sums, raw, scaled, code, scale, ELEMENT: tl.constexpr, CAST: tl.constexpr, RECIPE: tl.constexpr):
    slot = tl.program_id(0) + tl.program_id(1)
    if ELEMENT == "int8" or len(RECIPE) > 0:
        add_sums_of(sums, slot, widen(raw), decode_element(code, ELEMENT, CAST) * scale)
    else:
        add_sums(sums, slot, scaled, code, scale, CAST)


@triton.jit(do_not_specialize=["rows", "origin"])
def one_pass(
    x, q, s, found, sums, rows, cols, origin,
    x_e, x_n, x_k, q_e, q_n, q_k, s_e, s_n,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr,
    ELEMENT: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr,
    CANDIDATES: tl.constexpr, RESOLUTION: tl.constexpr, LIMIT: tl.constexpr, RECIPE: tl.constexpr,
):  # fmt: skip
    """Program (i, e): ROWS rows of matrix e, each whole in BLOCK + TAIL >= cols columns: see `launch.split`."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    inside = (row < rows) & (col < cols)
    x += expert * x_e + row * x_n
    raw = tl.load(x + col * x_k, mask=inside, other=0.0)
    first = origin + (expert * rows + row) * cols
    row_stop = tl.where(row < rows, cols, 0)
    amax, dirty = finite_amax(raw, x, x_k, 0, tl.minimum(BLOCK, cols), first, row_stop, found, CHECK)
    if TAIL:
        rest = BLOCK + tl.arange(0, TAIL)[None, :].to(tl.int64)
        rest_inside = (row < rows) & (rest < cols)
        rest_raw = tl.load(x + rest * x_k, mask=rest_inside, other=0.0)
        rest_amax, rest_dirty = finite_amax(rest_raw, x, x_k, BLOCK, cols, first, row_stop, found, CHECK)
        amax = tl.maximum(amax, rest_amax)
        dirty = dirty | rest_dirty
    scale = channel_scale(amax, raw.dtype, ELEMENT, CAST, RECIPE)
    if len(CANDIDATES) > 0:
        value = without_nonfinite(widen(raw), dirty)
        plain = scale
        for i in tl.static_range(len(CANDIDATES)):
            other = channel_candidate(plain, amax, CANDIDATES[i], raw.dtype, ELEMENT, CAST)
            there = channel_there(other, amax, LIMIT, ELEMENT)
            counted = total(channel_off(value, other, raw.dtype, RESOLUTION, ELEMENT, CAST, FUSED))
            if TAIL:
                rest_value = without_nonfinite(widen(rest_raw), dirty)
                counted += total(channel_off(rest_value, other, raw.dtype, RESOLUTION, ELEMENT, CAST, FUSED))
            error = counted.to(tl.float64) * squared_step(other)
            if i == 0:
                least, may = error, there
            else:
                better = may & there & (error < least)
                least, scale = tl.where(better, error, least), tl.where(better, other, scale)
    tl.store(s + expert * s_e + row * s_n, scale, mask=row < rows)
    q += expert * q_e + row * q_n
    scaled, code = scaled_codes(raw, dirty, scale, ELEMENT, CAST, FUSED, RECIPE)
    tl.store(q + col * q_k, code, mask=inside)
    if MEASURE:
        add_all_sums(sums, raw, scaled, code, scale, ELEMENT, CAST, RECIPE)
    if TAIL:
        scaled, code = scaled_codes(rest_raw, dirty, scale, ELEMENT, CAST, FUSED, RECIPE)
        tl.store(q + rest * q_k, code, mask=rest_inside)
        if MEASURE:
            add_all_sums(sums, rest_raw, scaled, code, scale, ELEMENT, CAST, RECIPE)


@triton.jit(do_not_specialize=["rows", "origin"])
def two_reads(
    x, q, s, found, sums, rows, cols, origin,
    x_e, x_n, x_k, q_e, q_n, q_k, s_e, s_n,
    BLOCK: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr,
    ELEMENT: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr,
    CANDIDATES: tl.constexpr, RESOLUTION: tl.constexpr, LIMIT: tl.constexpr, RECIPE: tl.constexpr,
):  # fmt: skip
    """Program (i, e): row i of matrix e, BLOCK columns at a time, once for its amax, once for each scale that is tried,
    and once to store it."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    x += expert * x_e + row * x_n
    q += expert * q_e + row * q_n
    amax = tl.zeros((1, 1), tl.float32)
    dirty = False
    first = origin + (expert * rows + row) * cols
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        raw = tl.load(x + col * x_k, mask=col < cols, other=0.0)
        stop = tl.minimum(start + BLOCK, cols)
        largest, dirt = finite_amax(raw, x, x_k, start, stop, first, tl.where(row < rows, cols, 0), found, CHECK)
        amax = tl.maximum(amax, largest)
        dirty = dirty | dirt
    scale = channel_scale(amax, x.dtype.element_ty, ELEMENT, CAST, RECIPE)
    if len(CANDIDATES) > 0:
        plain = scale
        for i in tl.static_range(len(CANDIDATES)):
            other = channel_candidate(plain, amax, CANDIDATES[i], x.dtype.element_ty, ELEMENT, CAST)
            there = channel_there(other, amax, LIMIT, ELEMENT)
            counted = tl.zeros((1, 1), tl.int64)
            for start in range(0, cols, BLOCK):
                col = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
                value = widen(tl.load(x + col * x_k, mask=col < cols, other=0.0))
                value = without_nonfinite(value, dirty)
                counted += total(channel_off(value, other, x.dtype.element_ty, RESOLUTION, ELEMENT, CAST, FUSED))
            error = counted.to(tl.float64) * squared_step(other)
            if i == 0:
                least, may = error, there
            else:
                better = may & there & (error < least)
                least, scale = tl.where(better, error, least), tl.where(better, other, scale)
    tl.store(s + expert * s_e + row * s_n, scale)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        raw = tl.load(x + col * x_k, mask=col < cols, other=0.0)
        scaled, code = scaled_codes(raw, dirty, scale, ELEMENT, CAST, FUSED, RECIPE)
        tl.store(q + col * q_k, code, mask=col < cols)
        if MEASURE:
            add_all_sums(sums, raw, scaled, code, scale, ELEMENT, CAST, RECIPE)


def quantize(
    source: torch.Tensor,
    parts: Parts,
    fmt: WeightFormat,
    audit: Audit,
    origin: int,
    one_pass_cols: int = ONE_PASS_COLS,
) -> None:
    """source `[..., N, K]` → values `[..., N, K]`, scales `[..., N, 1]`."""
    qdata, scale = parts.qdata, parts.scale
    experts, rows, cols = launch.geometry(source)
    target = launch.target(qdata.device)
    found, sums = launch.findings(audit, qdata)
    strides = (*launch.strides(source), *launch.strides(qdata), *launch.strides(scale)[:2])
    args = (source, launch.codes(qdata), scale, found, sums, rows, cols, origin, *strides)
    flags = {"ELEMENT": fmt.element, "CHECK": audit.refuse_nonfinite, "MEASURE": audit.measure_sqnr, **target}
    flags |= searching.constants(fmt) | searching.options(fmt) | recipes.constants(fmt)
    with launch.on(qdata.device):
        if cols > one_pass_cols:
            two_reads[(rows, experts)](*args, BLOCK=8192, num_warps=launch.warps(256), **flags)
        else:
            tile_rows, _, threads = launch.row_tile(cols)
            block, tail = launch.split(cols)
            one_pass[(triton.cdiv(rows, tile_rows), experts)](
                *args, ROWS=tile_rows, BLOCK=block, TAIL=tail, num_warps=launch.warps(threads), **flags
            )
