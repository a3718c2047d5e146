"""Products of a few rows with a quantized weight, decoded on the way: x `[M, K]` times `[N, K]` transposed, for every
format, and the same for stacks of experts. Weight-only: x is used as it is.

The weight is rounded to x's dtype as `dequantize` rounds it, and multiplied with the matrix units into fp32.

Roofline: of few rows, the bytes of the codes: per element 1 or 1/2, and the scales. Programs read them once for every
BM rows of x; from MOST_ROWS on, dequantizing once and multiplying with the vendor's library is less work.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..formats import WeightFormat
from ..parts import Parts
from . import launch
from .encode import decode, decode_element, narrow, of_bf16_bits, power_of_two, restore, word_step, word_zero
from .per_group import unpack

MOST_ROWS = 32
BN, BK = 32, 128


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x, q, s, g, bias, offsets, out, rows, n, k, q_cols,
    x_m, x_k, q_e, q_n, q_k, s_e, s_n, s_k, b_e, o_m, o_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOWN: tl.constexpr, SPAN: tl.constexpr,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, GROUPED: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """Program (i, e): BN columns of the result of matrix e, for its rows of x, BM at a time.

    DOWN rows and SPAN columns share a scale, where BK holds whole spans; one for all of a row is at s_k = 0.
    """
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BN + tl.arange(0, BN)  # of the weight
    wide_row = row.to(tl.int64)[:, None]
    first, stop = 0, rows
    if GROUPED:
        stop = tl.load(offsets + expert).to(tl.int32)
        if expert > 0:
            first = tl.load(offsets + expert - 1).to(tl.int32)
    q += expert * q_e + wide_row * q_n
    s += expert * s_e + (wide_row // DOWN) * s_n
    whole = 1.0
    if SCALE == "e4m3":
        whole = tl.load(g + expert)
    for start in range(first, stop, BM):
        token = start + tl.arange(0, BM)
        inside = (token < stop)[:, None]
        total = tl.zeros((BM, BN), tl.float32)
        for at in range(0, k, BK):
            col = at + tl.arange(0, BK)[None, :].to(tl.int64)
            held = (row[:, None] < n) & (col < k)
            if ELEMENT == "e2m1" or ELEMENT == "int4":
                byte = at // 2 + tl.arange(0, BK // 2)[None, :].to(tl.int64)
                code = unpack(tl.load(q + byte * q_k, mask=(row[:, None] < n) & (byte < q_cols), other=0))
            else:
                code = tl.load(q + col * q_k, mask=held, other=0)
            span = at // SPAN + tl.arange(0, BK // SPAN)[None, :].to(tl.int64)
            scale = tl.load(s + span * s_k, mask=(row[:, None] < n) & (span * SPAN < k), other=0)
            if SCALE == "e8m0":
                step = power_of_two(scale.to(tl.int32))
            elif SCALE == "e4m3":
                step = decode(scale, CAST) * whole
            elif SCALE == "word":
                step = word_step(scale)
            elif SCALE == "bf16":
                step = of_bf16_bits(scale)
            else:
                step = scale
            value = tl.reshape(decode_element(code, ELEMENT, CAST), (BN, BK // SPAN, SPAN))
            if SCALE == "word":
                value -= word_zero(scale)[:, :, None]
            value *= step[:, :, None]
            weight = restore(tl.reshape(value, (BN, BK)), x.dtype.element_ty, CAST)
            # What lies beyond the columns is 0 times anything, and NaN among it would be no 0.
            weight = tl.where(held, weight, 0.0).to(x.dtype.element_ty)
            given = tl.load(x + token[:, None].to(tl.int64) * x_m + col * x_k, mask=inside & (col < k), other=0.0)
            total = tl.dot(given, tl.trans(weight), total, input_precision="ieee")
        if BIAS:
            total += tl.load(bias + expert * b_e + row, mask=row < n, other=0.0).to(tl.float32)[None, :]
        place = out + token[:, None].to(tl.int64) * o_m + row[None, :].to(tl.int64) * o_n
        tl.store(place, narrow(total, out.dtype.element_ty, CAST), mask=inside & (row < n)[None, :])


def product(
    x: torch.Tensor,
    parts: Parts,
    fmt: WeightFormat,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """x `[M, K]` → `[M, N]`. offsets: where the rows of each matrix of a stack end."""
    qdata, scale = parts.qdata, parts.scale
    matrices, rows, _ = launch.geometry(qdata)
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    tall = x.shape[0] > 16 * matrices
    scale_strides = launch.strides(scale)
    if fmt.granularity == "tensor":
        scale_strides = (scale.stride(0) if scale.dim() == 2 else 0, 0, 0)
    elif fmt.granularity == "channel":
        scale_strides = (*scale_strides[:2], 0)
    grouped = offsets is not None
    bias = None if bias is None else bias.contiguous()
    whole = parts.global_scale
    none = out  # for pointers that nobody follows
    with launch.on(x.device):
        product_kernel[(triton.cdiv(rows, BN), matrices)](
            x, launch.codes(qdata), launch.scales(scale), none if whole is None else whole,
            none if bias is None else bias, none if offsets is None else offsets, out, x.shape[0], rows, x.shape[1],
            qdata.shape[-1], *x.stride(), *launch.strides(qdata), *scale_strides,
            rows if grouped else 0, *out.stride(), BM=32 if tall else 16, BN=BN, BK=BK, **_kind(fmt),
            BIAS=bias is not None, GROUPED=grouped, CAST=launch.target(x.device)["CAST"], num_warps=launch.warps(128),
        )  # fmt: skip
    return out


def _kind(fmt: WeightFormat) -> dict[str, Any]:
    span = BK if fmt.granularity in ("tensor", "channel") else fmt.block[1]
    return {"DOWN": fmt.block[0], "SPAN": span, "ELEMENT": fmt.element, "SCALE": launch.scale_kind(fmt)}
