"""Codes back to floats: value = code times its scale in fp32, rounded once to the output dtype.

Roofline: per element 1 byte read + 2 written (bf16) = 3, and the scales, which are few.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import WeightFormat
from ..parts import Parts
from . import launch
from .encode import decode, decode_element, restore


@triton.jit(do_not_specialize=["rows"])
def per_row(
    q, s, out, rows, cols, q_e, q_n, q_k, s_e, s_n, o_e, o_n, o_k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ELEMENT: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """Program (i, e): ROWS rows of matrix e, BLOCK columns at a time. A per-tensor scale has s_n = 0."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    scale = tl.load(s + expert * s_e + row * s_n, mask=row < rows, other=0.0)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        inside = (row < rows) & (col < cols)
        code = tl.load(q + expert * q_e + row * q_n + col * q_k, mask=inside, other=0)
        value = decode_element(code, ELEMENT, CAST) * scale
        value = restore(value, out.dtype.element_ty, CAST)
        tl.store(out + expert * o_e + row * o_n + col * o_k, value, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def per_block(
    q, s, out, rows, cols, q_e, q_n, q_k, s_e, s_n, s_k, o_e, o_n, o_k,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """Program (i, e): the i-th block, in row-major order, of matrix e."""
    expert = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(cols, ACROSS)
    band = (tl.program_id(0) // across).to(tl.int64)
    strip = (tl.program_id(0) % across).to(tl.int64)
    row = band * DOWN + tl.arange(0, DOWN)[:, None]
    col = strip * ACROSS + tl.arange(0, ACROSS)[None, :]
    inside = (row < rows) & (col < cols)
    scale = tl.load(s + expert * s_e + band * s_n + strip * s_k)
    value = decode(tl.load(q + expert * q_e + row * q_n + col * q_k, mask=inside, other=0), CAST) * scale
    value = restore(value, out.dtype.element_ty, CAST)
    tl.store(out + expert * o_e + row * o_n + col * o_k, value, mask=inside)


def dequantize(parts: Parts, fmt: WeightFormat, out: torch.Tensor) -> None:
    """The parts of a format without groups → `out` `[..., N, K]`, bf16, fp16 or fp32."""
    qdata, scale = parts.qdata, parts.scale
    experts, rows, cols = launch.geometry(qdata)
    codes, cast = launch.codes(qdata), launch.target(qdata.device)["CAST"]
    q_strides, out_strides = launch.strides(qdata), launch.strides(out)
    with launch.on(qdata.device):
        if fmt.granularity == "block":
            down, across = fmt.block
            per_block[(triton.cdiv(rows, down) * triton.cdiv(cols, across), experts)](
                codes, scale, out, rows, cols, *q_strides, *launch.strides(scale), *out_strides,
                DOWN=down, ACROSS=across, CAST=cast, num_warps=launch.warps(256),
            )  # fmt: skip
            return
        if fmt.granularity == "tensor":
            scale_strides = (scale.stride(0) if scale.dim() == 2 else 0, 0)
        else:
            scale_strides = launch.strides(scale)[:2]
        tile_rows, tile_cols, threads = launch.loop_tile(cols)
        per_row[(triton.cdiv(rows, tile_rows), experts)](
            codes, scale, out, rows, cols, *q_strides, *scale_strides, *out_strides,
            ROWS=tile_rows, BLOCK=tile_cols, ELEMENT=fmt.element, CAST=cast, num_warps=launch.warps(threads),
        )  # fmt: skip
