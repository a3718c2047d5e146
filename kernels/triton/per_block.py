"""One scale per 128 × 128 block: scale = max(amax, 1e-4) / 448, data = x * (1 / scale).

Roofline: a block is read once and stays in registers, so per element 2 bytes read (bf16) + 1 written = 3, and 4 bytes
of scale per 16384 elements. Blocks at the edges are padded with zeros, which change no maximum.
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
from .encode import bring_within, decode, encode, reciprocal_or_zero, widen
from .findings import add_sums, add_sums_of, finite_amax
from .recipes import divisor_of, recipe_scale, recipe_units
from .searching import channel_off, squared_step, total, without_nonfinite


@triton.jit(do_not_specialize=["rows", "origin"])
def per_block(
    x, q, s, found, sums, rows, cols, origin,
    x_e, x_n, x_k, q_e, q_n, q_k, s_e, s_n, s_k,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr,
    CHECK: tl.constexpr, MEASURE: tl.constexpr,
    CANDIDATES: tl.constexpr, RESOLUTION: tl.constexpr, LIMIT: tl.constexpr, RECIPE: tl.constexpr,
):  # fmt: skip
    """Program (i, e): the i-th block, in row-major order, of matrix e."""
    expert = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(cols, ACROSS)
    band = (tl.program_id(0) // across).to(tl.int64)
    strip = (tl.program_id(0) % across).to(tl.int64)
    row = band * DOWN + tl.arange(0, DOWN)[:, None]
    col = strip * ACROSS + tl.arange(0, ACROSS)[None, :]
    inside = (row < rows) & (col < cols)
    x += expert * x_e + row * x_n
    raw = tl.load(x + col * x_k, mask=inside, other=0.0)
    first = origin + (expert * rows + row) * cols
    start = (strip * ACROSS).to(tl.int32)
    stop = tl.minimum(start + ACROSS, cols)
    amax, dirty = finite_amax(raw, x, x_k, start, stop, first, tl.where(row < rows, cols, 0), found, CHECK)
    if len(RECIPE) > 0:
        scale = recipe_scale(tl.max(amax), raw.dtype, CAST, RECIPE)
    else:
        scale = tl.math.div_rn(tl.maximum(tl.max(amax), 1e-4), 448.0)
    if len(CANDIDATES) > 0:
        value = without_nonfinite(widen(raw), dirty)
        plain = scale
        for i in tl.static_range(len(CANDIDATES)):  # None of them clips anything.
            other = plain * CANDIDATES[i]
            off = channel_off(value, other, raw.dtype, RESOLUTION, "e4m3", CAST, False)
            error = tl.sum(tl.sum(total(off), axis=1)).to(tl.float64) * squared_step(other)
            if i == 0:
                least = error
            else:
                least, scale = tl.where(error < least, error, least), tl.where(error < least, other, scale)
    tl.store(s + expert * s_e + band * s_n + strip * s_k, scale)
    if len(RECIPE) > 0:
        divisor = divisor_of(scale, RECIPE)
        scaled = recipe_units(bring_within(widen(raw), divisor), divisor, raw.dtype, CAST, FUSED, RECIPE)
    else:
        scaled = widen(raw) * reciprocal_or_zero(scale)
    code = encode(scaled, CAST)
    tl.store(q + expert * q_e + row * q_n + col * q_k, code, mask=inside)
    if MEASURE:
        if len(RECIPE) > 0:
            add_sums_of(sums, tl.program_id(0) + tl.program_id(1), widen(raw), decode(code, CAST) * scale)
        else:
            add_sums(sums, tl.program_id(0) + tl.program_id(1), scaled, code, scale, CAST)


def quantize(source: torch.Tensor, parts: Parts, fmt: WeightFormat, audit: Audit, origin: int) -> None:
    """source `[..., N, K]` → values `[..., N, K]`, scales `[..., ceil(N/128), ceil(K/128)]`."""
    qdata, scale = parts.qdata, parts.scale
    experts, rows, cols = launch.geometry(source)
    found, sums = launch.findings(audit, qdata)
    strides = (*launch.strides(source), *launch.strides(qdata), *launch.strides(scale))
    down, across = fmt.block
    with launch.on(qdata.device):
        per_block[(triton.cdiv(rows, down) * triton.cdiv(cols, across), experts)](
            source, launch.codes(qdata), scale, found, sums, rows, cols, origin, *strides,
            DOWN=down, ACROSS=across, **launch.target(qdata.device),
            CHECK=audit.refuse_nonfinite, MEASURE=audit.measure_sqnr, num_warps=launch.warps(256),
            **searching.constants(fmt), **searching.options(fmt), **recipes.constants(fmt),
        )  # fmt: skip
