"""One scale per matrix: scale = amax / 448, data = x * (1 / scale).

Two kernels, because the scale depends on every element. `accumulate_amax` may see the matrix write by write, in any
order and with overlaps: a maximum is exact and commutes, so the result is the same in every run. `scale_and_cast` then
turns the maximum into the scale and stores the data.

Roofline: 2 bytes read (bf16) for the maximum; 2 read + 1 written for the cast; 5 per element in all.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..audit import Audit
from ..formats import WeightFormat
from ..parts import Parts
from . import launch, recipes
from .encode import bring_within, decode, encode, reciprocal_or_zero, widen
from .findings import add_sums, add_sums_of, finite_amax
from .recipes import divisor_of, recipe_scale, recipe_units


@triton.jit(do_not_specialize=["rows", "origin"])
def amax_kernel(
    x, amax, found, rows, cols, origin, x_e, x_n, x_k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Program (i, e): ROWS rows of matrix e, BLOCK columns at a time. `amax` holds fp32 bits, one word per matrix."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    x += expert * x_e + row * x_n
    first = origin + (expert * rows + row) * cols
    largest = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        inside = (row < rows) & (col < cols)
        raw = tl.load(x + col * x_k, mask=inside, other=0.0)
        stop = tl.minimum(start + BLOCK, cols)
        amount, _ = finite_amax(raw, x, x_k, start, stop, first, tl.where(row < rows, cols, 0), found, CHECK)
        largest = tl.maximum(largest, amount)
    bits = tl.max(largest.to(tl.int32, bitcast=True))
    # Most programs find nothing larger than what is there already, and need not queue for the word.
    if bits > tl.load(amax + expert):
        tl.atomic_max(amax + expert, bits, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def cast_kernel(
    x, q, s, amax, sums, rows, cols,
    x_e, x_n, x_k, q_e, q_n, q_k, s_e,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr, MEASURE: tl.constexpr,
    RECIPE: tl.constexpr,
):  # fmt: skip
    """Program (i, e): ROWS rows of matrix e, BLOCK columns at a time; the first program stores the scale."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if len(RECIPE) > 0:
        scale = recipe_scale(tl.load(amax + expert), x.dtype.element_ty, CAST, RECIPE)
    else:
        scale = tl.math.div_rn(tl.load(amax + expert), 448.0)
    if tl.program_id(0) == 0:
        tl.store(s + expert * s_e, scale)
    inverse = reciprocal_or_zero(scale)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        inside = (row < rows) & (col < cols)
        value = widen(tl.load(x + expert * x_e + row * x_n + col * x_k, mask=inside, other=0.0))
        if len(RECIPE) > 0:
            divisor = divisor_of(scale, RECIPE)
            scaled = recipe_units(bring_within(value, divisor), divisor, x.dtype.element_ty, CAST, FUSED, RECIPE)
        else:
            scaled = value * inverse
        code = encode(scaled, CAST)
        tl.store(q + expert * q_e + row * q_n + col * q_k, code, mask=inside)
        if MEASURE and len(RECIPE) > 0:
            add_sums_of(sums, tl.program_id(0) + tl.program_id(1), value, decode(code, CAST) * scale)
        elif MEASURE:
            add_sums(sums, tl.program_id(0) + tl.program_id(1), scaled, code, scale, CAST)


def accumulate_amax(source: torch.Tensor, amax: torch.Tensor, audit: Audit, origin: int) -> None:
    """Raise `amax` (fp32 `[E]`, `[1]` for a 2-D source; never negative) to the magnitudes in `source` `[..., N, K]`."""
    experts, rows, cols = launch.geometry(source)
    found, _ = launch.findings(audit, source)
    tile_rows, block, threads = launch.loop_tile(cols)
    with launch.on(source.device):
        amax_kernel[(triton.cdiv(rows, tile_rows), experts)](
            source, amax.view(torch.int32), found, rows, cols, origin, *launch.strides(source),
            ROWS=tile_rows, BLOCK=block, CHECK=audit.refuse_nonfinite, num_warps=launch.warps(threads),
        )  # fmt: skip


def scale_and_cast(source: torch.Tensor, amax: torch.Tensor, parts: Parts, fmt: WeightFormat, audit: Audit) -> None:
    """`source` `[..., N, K]` and its `amax` (fp32 `[E]`) → values `[..., N, K]` and scales `[..., 1]`."""
    qdata, scale = parts.qdata, parts.scale
    experts, rows, cols = launch.geometry(source)
    _, sums = launch.findings(audit, qdata)
    tile_rows, block, threads = launch.loop_tile(cols)
    scale_stride = scale.stride(0) if scale.dim() == 2 else 0
    with launch.on(qdata.device):
        cast_kernel[(triton.cdiv(rows, tile_rows), experts)](
            source, launch.codes(qdata), scale, amax, sums, rows, cols,
            *launch.strides(source), *launch.strides(qdata), scale_stride,
            ROWS=tile_rows, BLOCK=block, **launch.target(qdata.device), **recipes.constants(fmt),
            MEASURE=audit.measure_sqnr, num_warps=launch.warps(threads),
        )  # fmt: skip


def quantize(source: torch.Tensor, parts: Parts, fmt: WeightFormat, audit: Audit, origin: int) -> None:
    """source `[..., N, K]` → values `[..., N, K]`, scales `[..., 1]`."""
    amax = torch.zeros(launch.geometry(source)[0], dtype=torch.float32, device=source.device)
    accumulate_amax(source, amax, audit, origin)
    scale_and_cast(source, amax, parts, fmt, audit)
