"""Dynamic activation quantization: one scale per token, or per token and group of 128 columns.

scale = max(amax / 448, 1 / (448 * 512)), data = x / scale. Unlike a weight, an activation with NaN or infinity gets
that as its scale: what went wrong upstream should show.

Roofline: a group is read once and stays in registers, so per element 2 bytes read (bf16) + 1 written = 3, and 4 bytes
of scale per group. Tokens longer than ONE_PASS_COLS are read twice (see per_channel.py): 5.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .encode import divide, encode, widen

ONE_PASS_COLS = 16384


@triton.jit
def token_scale(largest):
    """fp32 bits of the largest magnitude → scale; NaN stays NaN."""
    scale = tl.math.div_rn(largest.to(tl.float32, bitcast=True), 448.0)
    return tl.maximum(scale, 1.0 / (448.0 * 512.0), propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["rows"])
def one_pass(
    x, q, s, rows, cols, group, x_n, x_k, q_n, q_k, s_n,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Program (i, g): ROWS tokens, the columns of group g, whole in BLOCK + TAIL columns: see `launch.split`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    within = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * group + within
    inside = (row < rows) & (within < group) & (col < cols)
    value = widen(tl.load(x + row * x_n + col * x_k, mask=inside, other=0.0))
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    if TAIL:
        rest = BLOCK + tl.arange(0, TAIL)[None, :].to(tl.int64)  # Groups of 128 have none: this is a whole token.
        rest_inside = (row < rows) & (rest < cols)
        rest_value = widen(tl.load(x + row * x_n + rest * x_k, mask=rest_inside, other=0.0))
        rest_bits = rest_value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(rest_bits, axis=1, keep_dims=True))
    scale = token_scale(largest)
    tl.store(s + row * s_n + tl.program_id(1), scale, mask=row < rows)
    tl.store(q + row * q_n + col * q_k, encode(divide(value, scale, FUSED), CAST), mask=inside)
    if TAIL:
        tl.store(q + row * q_n + rest * q_k, encode(divide(rest_value, scale, FUSED), CAST), mask=rest_inside)


@triton.jit(do_not_specialize=["rows"])
def two_reads(
    x, q, s, rows, cols, x_n, x_k, q_n, q_k, s_n,
    BLOCK: tl.constexpr, CAST: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Program i: token i, BLOCK columns at a time, once for its amax and once to store it."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    largest = tl.zeros((1, 1), tl.int32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        value = widen(tl.load(x + row * x_n + col * x_k, mask=col < cols, other=0.0))
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(bits, axis=1, keep_dims=True))
    scale = token_scale(largest)
    tl.store(s + row * s_n, scale)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        value = widen(tl.load(x + row * x_n + col * x_k, mask=col < cols, other=0.0))
        tl.store(q + row * q_n + col * q_k, encode(divide(value, scale, FUSED), CAST), mask=col < cols)


def quantize(x: torch.Tensor, group: int, one_pass_cols: int = ONE_PASS_COLS) -> tuple[torch.Tensor, torch.Tensor]:
    """x `[M, K]` → e4m3fn `[M, K]` and fp32 scales `[M, ceil(K / group)]`."""
    rows, cols = x.shape
    groups = triton.cdiv(cols, group)
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    if rows == 0 or cols == 0:
        return q, scale
    args = (x, launch.codes(q), scale, rows, cols)
    strides = (*x.stride(), *q.stride(), scale.stride(0))
    target = launch.target(x.device)
    with launch.on(x.device):
        if group > one_pass_cols:
            two_reads[(rows,)](*args, *strides, BLOCK=8192, num_warps=launch.warps(256), **target)
        else:
            tile_rows, _, threads = launch.row_tile(group)
            block, tail = launch.split(group)
            one_pass[(triton.cdiv(rows, tile_rows), groups)](
                *args,
                group,
                *strides,
                ROWS=tile_rows,
                BLOCK=block,
                TAIL=tail,
                num_warps=launch.warps(threads),
                **target,
            )
    return q, scale
