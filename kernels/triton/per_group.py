"""One scale per row and group of columns: mxfp8, mxfp4 (32 columns), nvfp4 (16), int4 (128, or 32). See ../formats.py.

Two 4-bit codes leave in one byte, the first in the low nibble. nvfp4 needs the largest magnitude of each matrix first,
which per_tensor's kernel finds; the others are one launch.

Roofline: a group is read once and stays in registers, so per element 2 bytes read (bf16) + 1 or 1/2 written, and one
scale (1 byte; for int4 4, or 2 in bfloat16) per group. nvfp4 reads twice.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..audit import Audit
from ..formats import WeightFormat
from ..parts import Parts
from ..reference import gain_of
from . import launch, per_tensor, recipes, searching
from .encode import (
    bf16_bits,
    bf16_step,
    bring_within,
    decode,
    decode_element,
    divide_or_zero,
    encode,
    encode_e2m1_pairs,
    encode_element,
    encode_from_zero,
    encode_int,
    of_bf16_bits,
    power_of_two,
    reciprocal_or_zero,
    restore,
    widen,
    without_nan,
    word_of_range,
    word_step,
    word_zero,
)
from .findings import add_sums_of, finite_amax
from .recipes import (
    divisor_of_power,
    recipe_code,
    recipe_exponent,
    recipe_scale,
    recipe_units,
    recipe_units_from_zero,
    recipe_units_of_power,
    recipe_word,
)
from .searching import best_of_group, without_nonfinite

TILE = 4096  # Elements of a program.


@triton.jit
def pairs(x):
    """`[T, G]` → the even and the odd columns, `[T, G/2]` each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def pack(code):
    """Nibbles in int32 `[T, G]` → bytes `[T, G/2]`."""
    low, high = pairs(code)
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def unpack(byte):
    """Bytes `[T, G/2]` → nibbles `[T, G]`."""
    return tl.reshape(tl.join(byte & 0xF, byte >> 4), (byte.shape[0], byte.shape[1] * 2))


@triton.jit
def place(cols, TILE_GROUPS: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr):
    """(row `[T, 1]`, number of the group in it `[T, 1]`, column `[T, G]`) of a program's groups, in 64 bits each.

    The division is done in INDEX, 32 bits wherever those suffice: in 64 it takes a hundred instructions, by every
    thread.
    """
    across = tl.cdiv(cols, GROUP)
    index = tl.program_id(0).to(INDEX) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)[:, None]
    strip = index % across
    col = strip.to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]
    return (index // across).to(tl.int64), strip.to(tl.int64), col


@triton.jit
def mx_exponent(amax, ELEMENT: tl.constexpr):
    """fp32 amax → biased exponent of its group's scale, as int32."""
    if ELEMENT == "e2m1":
        return tl.maximum(((amax.to(tl.int32, bitcast=True) + 0x200000) >> 23) - 2, 0)
    bits = tl.math.div_rn(amax, 448.0).to(tl.int32, bitcast=True)
    return tl.where(bits <= 0x400000, 0, (bits + 0x7FFFFF) >> 23)


@triton.jit(do_not_specialize=["rows", "origin"])
def quantize_kernel(
    x, q, s, gain, found, sums, rows, cols, q_cols, origin,
    x_e, x_n, x_k, q_e, q_n, q_k, s_e, s_n, s_k,
    TILE_GROUPS: tl.constexpr, GROUP: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr, INDEX: tl.constexpr,
    CAST: tl.constexpr, FUSED: tl.constexpr, CHECK: tl.constexpr, MEASURE: tl.constexpr,
    CANDIDATES: tl.constexpr, RESOLUTION: tl.constexpr, LIMIT: tl.constexpr, RECIPE: tl.constexpr,
):  # fmt: skip
    """Program (i, e): TILE_GROUPS groups, in row-major order, of matrix e. `gain`: fp32, one per matrix, for nvfp4."""
    expert = tl.program_id(1).to(tl.int64)
    row, strip, col = place(cols, TILE_GROUPS, GROUP, INDEX)
    inside = (row < rows) & (col < cols)
    x += expert * x_e + row * x_n
    raw = tl.load(x + col * x_k, mask=inside, other=0.0)
    first = origin + (expert * rows + row) * cols + strip * GROUP
    row_stop = tl.where(row < rows, cols - strip * GROUP, 0)
    amax, dirty = finite_amax(raw, x + strip * GROUP * x_k, x_k, 0, GROUP, first, row_stop, found, CHECK)
    s += expert * s_e + row * s_n + strip * s_k
    value = widen(raw)
    if SCALE == "e8m0":
        exponent = mx_exponent(amax, ELEMENT) if len(RECIPE) == 0 else recipe_exponent(amax, raw.dtype, RECIPE)
        if len(CANDIDATES) > 0:
            exponent = best_of_group(
                without_nonfinite(value, dirty),
                amax,
                exponent,
                1.0,
                ELEMENT,
                SCALE,
                CAST,
                CANDIDATES,
                RESOLUTION,
                LIMIT,
            )
        step = power_of_two(exponent)
        tl.store(s, exponent.to(tl.uint8), mask=row < rows)
    elif SCALE == "e4m3":
        matrix_gain = tl.load(gain + expert)
        if len(RECIPE) > 0:
            scale = recipe_code(amax, matrix_gain, raw.dtype, CAST, RECIPE)
        else:
            scale = encode(tl.minimum(matrix_gain * (amax * 0.16666666666666666), 448.0), CAST)
        whole = tl.math.div_rn(1.0, matrix_gain)
        if len(CANDIDATES) > 0:
            finite = without_nonfinite(value, dirty)
            code = best_of_group(
                finite, amax, scale.to(tl.int32), whole, ELEMENT, SCALE, CAST, CANDIDATES, RESOLUTION, LIMIT
            )
            scale = code.to(tl.uint8)
        step = decode(scale, CAST) * whole
        tl.store(s, scale, mask=row < rows)
    elif SCALE == "word":
        finite = without_nonfinite(value, dirty)
        # As signed integers, the bits of what is not negative order like floats, and all others are below zero.
        largest = tl.maximum(tl.max(finite.to(tl.int32, bitcast=True), 1, keep_dims=True), 0)
        below = tl.maximum(tl.max((finite * -1.0).to(tl.int32, bitcast=True), 1, keep_dims=True), 0)
        largest, below = largest.to(tl.float32, bitcast=True), below.to(tl.float32, bitcast=True)
        if len(RECIPE) > 0:
            step, zero = recipe_word(largest, below, raw.dtype, CAST, FUSED, RECIPE)
        else:
            step, zero = word_of_range(largest, below, x.dtype.element_ty, CAST, FUSED)
        tl.store(s, step.to(tl.int32, bitcast=True) | (zero & 0xF), mask=row < rows)
    else:
        step = tl.math.div_rn(amax, 7.0) if len(RECIPE) == 0 else recipe_scale(amax, raw.dtype, CAST, RECIPE)
        if len(CANDIDATES) > 0:
            finite = without_nonfinite(value, dirty)
            step = best_of_group(finite, amax, step, 1.0, ELEMENT, SCALE, CAST, CANDIDATES, RESOLUTION, LIMIT)
        elif SCALE == "bf16":
            step = bf16_step(step)
        tl.store(s, bf16_bits(step) if SCALE == "bf16" else step, mask=row < rows)
    if len(RECIPE) > 0:
        if SCALE == "e8m0":
            divisor = divisor_of_power(exponent, RECIPE)
        elif SCALE == "e4m3":
            divisor = tl.math.div_rn(decode(scale, CAST), matrix_gain)
        else:
            divisor = tl.where(step == 0.0, 1.0, step)
    bounded = value
    if (ELEMENT != "e4m3") & dirty:
        size = tl.abs(step) if len(RECIPE) == 0 else divisor
        bounded = without_nan(bring_within(value, size, SCALE == "e8m0"))
        if SCALE == "e4m3" and len(RECIPE) == 0:  # An infinity has no sign where the scale is 0.
            bounded = tl.where((step == 0.0) & (tl.abs(value) == float("inf")), 0.0, bounded)
    if len(RECIPE) > 0:
        if SCALE == "e8m0":
            scaled = recipe_units_of_power(bounded, divisor, raw.dtype, RECIPE)
        elif SCALE == "word":
            scaled = recipe_units_from_zero(bounded, step, zero, raw.dtype, CAST, FUSED)
        else:
            scaled = recipe_units(bounded, divisor, raw.dtype, CAST, FUSED, RECIPE)
    elif SCALE == "e8m0":
        scaled = bounded * power_of_two(254 - exponent)
    elif SCALE == "e4m3":
        scaled = bounded * reciprocal_or_zero(step)
    elif ELEMENT == "int4" and len(CANDIDATES) > 0:
        sign = tl.where(step < 0.0, -1.0, 1.0)
        scaled = divide_or_zero(bounded * sign, step * sign, FUSED)
    else:
        scaled = divide_or_zero(bounded, step, FUSED)
    # Of int4.
    LOWEST: tl.constexpr = RECIPE[1] if len(RECIPE) > 0 else -8.0 if len(CANDIDATES) > 0 else -7.0
    q += expert * q_e + row * q_n
    if ELEMENT == "e4m3":
        code = encode_element(scaled, ELEMENT, CAST)
        tl.store(q + col * q_k, code, mask=inside)
    else:
        byte = strip * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        if ELEMENT == "e2m1" and CAST == "e2m1x2":
            low, high = pairs(scaled)
            packed = encode_e2m1_pairs(low, high)
        elif SCALE == "word" and len(RECIPE) == 0:
            packed = pack(encode_from_zero(scaled, zero))
        else:
            packed = pack(encode_element(scaled, ELEMENT, CAST, LOWEST))
        tl.store(q + byte * q_k, packed, mask=(row < rows) & (byte < q_cols))
    if MEASURE:
        # The compiler has it already, where there are no pairs.
        if SCALE == "word":
            code = encode_from_zero(scaled, zero) if len(RECIPE) == 0 else encode_int(scaled, LOWEST, 7.0) & 0xF
            restored = (decode_element(code.to(tl.uint8), ELEMENT, CAST) - zero.to(tl.float32)) * step
        else:
            code = encode_element(scaled, ELEMENT, CAST, LOWEST)
            restored = decode_element(code.to(tl.uint8), ELEMENT, CAST) * step
        add_sums_of(sums, tl.program_id(0) + tl.program_id(1), value, restored)


@triton.jit(do_not_specialize=["rows"])
def dequantize_kernel(
    q, s, g, out, rows, cols, q_cols, q_e, q_n, q_k, s_e, s_n, s_k, o_e, o_n, o_k,
    TILE_GROUPS: tl.constexpr, GROUP: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr, INDEX: tl.constexpr,
    CAST: tl.constexpr,
):  # fmt: skip
    """Program (i, e): TILE_GROUPS groups, in row-major order, of matrix e. `g`: global scales, for nvfp4."""
    expert = tl.program_id(1).to(tl.int64)
    row, strip, col = place(cols, TILE_GROUPS, GROUP, INDEX)
    inside = (row < rows) & (col < cols)
    scale = tl.load(s + expert * s_e + row * s_n + strip * s_k, mask=row < rows, other=0)
    if SCALE == "e8m0":
        step = power_of_two(scale.to(tl.int32))
    elif SCALE == "e4m3":
        step = decode(scale, CAST) * tl.load(g + expert)
    elif SCALE == "word":
        step = word_step(scale)
    elif SCALE == "bf16":
        step = of_bf16_bits(scale)
    else:
        step = scale
    q += expert * q_e + row * q_n
    if ELEMENT == "e4m3":
        code = tl.load(q + col * q_k, mask=inside, other=0)
    else:
        byte = strip * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        code = unpack(tl.load(q + byte * q_k, mask=(row < rows) & (byte < q_cols), other=0))
    value = decode_element(code, ELEMENT, CAST)
    if SCALE == "word":
        value -= word_zero(scale)
    value = restore(value * step, out.dtype.element_ty, CAST)
    tl.store(out + expert * o_e + row * o_n + col * o_k, value, mask=inside)


def constants(fmt: WeightFormat) -> dict[str, Any]:
    """The constexprs that tell the kernels a format."""
    group = fmt.block[1]
    return {"TILE_GROUPS": TILE // group, "GROUP": group, "ELEMENT": fmt.element, "SCALE": launch.scale_kind(fmt)}


def _grid(fmt: WeightFormat, experts: int, rows: int, cols: int) -> tuple[int, int]:
    return triton.cdiv(rows * triton.cdiv(cols, fmt.block[1]), TILE // fmt.block[1]), experts


def _index(fmt: WeightFormat, rows: int, cols: int) -> Any:
    """The dtype for the numbers of all groups of a matrix, and those of the last program that there are none of."""
    return tl.int32 if rows * triton.cdiv(cols, fmt.block[1]) + TILE < 1 << 31 else tl.int64


def quantize(
    source: torch.Tensor,
    parts: Parts,
    fmt: WeightFormat,
    audit: Audit,
    origin: int,
    amax: torch.Tensor | None = None,
) -> None:
    """source `[..., N, K]` → the parts of a format with groups. amax: fp32 `[E]`, if the source is a part of what has
    a global scale."""
    qdata, scale = parts.qdata, parts.scale
    experts, rows, cols = launch.geometry(source)
    gain = torch.ones(experts, dtype=torch.float32, device=source.device)
    if parts.global_scale is not None:
        if amax is None:
            amax = torch.zeros_like(gain)
            per_tensor.accumulate_amax(source, amax, audit, origin)
        gain = gain_of(amax, fmt, source.dtype)
        parts.global_scale.copy_((1.0 / gain).view(parts.global_scale.shape))
    found, sums = launch.findings(audit, qdata)
    strides = (*launch.strides(source), *launch.strides(qdata), *launch.strides(scale))
    with launch.on(qdata.device):
        quantize_kernel[_grid(fmt, experts, rows, cols)](
            source, launch.codes(qdata), launch.scales(scale), gain, found, sums, rows, cols, qdata.shape[-1],
            origin, *strides,
            **constants(fmt), **searching.constants(fmt), **recipes.constants(fmt),
            INDEX=_index(fmt, rows, cols), **launch.target(qdata.device),
            CHECK=audit.refuse_nonfinite, MEASURE=audit.measure_sqnr, num_warps=launch.warps(128),
        )  # fmt: skip


def dequantize(parts: Parts, fmt: WeightFormat, out: torch.Tensor) -> None:
    """The parts of a format with groups → `out` `[..., N, K]`, bf16, fp16 or fp32."""
    qdata, scale = parts.qdata, parts.scale
    experts, rows, cols = launch.geometry(out)
    strides = (*launch.strides(qdata), *launch.strides(scale), *launch.strides(out))
    whole = parts.global_scale
    per_matrix = out.new_ones(1, dtype=torch.float32) if whole is None else whole.contiguous()
    with launch.on(qdata.device):
        dequantize_kernel[_grid(fmt, experts, rows, cols)](
            launch.codes(qdata), launch.scales(scale), per_matrix, out, rows, cols, qdata.shape[-1], *strides,
            **constants(fmt), INDEX=_index(fmt, rows, cols), CAST=launch.target(qdata.device)["CAST"],
            num_warps=launch.warps(128),
        )  # fmt: skip
