"""Products with quantized weights, embedding lookups, and the transposition that comes with them.

A product reads the stored matrix as it is, `[N, K]` row-major, and dequantizes in the kernel. One in another order, or
of two quantized weights, is computed on the dequantized values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .. import kernels
from ..kernels import compiled
from ..kernels.backend import multiplies_e4m3fn
from .dequantized_view import view_of_values
from .ops_slices import index_rows, select
from .qtensor import QTensor, on_dequantized
from .table import OpTable

aten = torch.ops.aten
OPS = OpTable()


@OPS.implements(aten.t.default, aten.transpose.int)
def transpose(func: Any, w: QTensor, d0: int = 0, d1: int = 1) -> Any:
    if {d0 % w.dim(), d1 % w.dim()} != {w.dim() - 2, w.dim() - 1}:
        return view_of_values(func, w, d0, d1)
    turned = w.with_parts(*w.parts(), transposed=not w.transposed)
    if w._part_of is not None:
        whole, dim, part = w._part_of
        other = {w.dim() - 2: w.dim() - 1, w.dim() - 1: w.dim() - 2}
        turned._part_of = (transpose(func, whole, d0, d1), other.get(dim, dim), part)
    return turned


@OPS.implements(aten.linear.default)
def _linear(func: Any, x: Any, w: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(w, QTensor) or isinstance(x, QTensor) or w.transposed:
        return on_dequantized(func, x, w, bias)
    out = _product(x.reshape(-1, x.shape[-1]), w, bias)
    return out.view(*x.shape[:-1], w.shape[0])


@OPS.implements(aten.mm.default)
def _mm(func: Any, x: Any, w: Any) -> torch.Tensor:
    if isinstance(w, QTensor) and w.transposed and not isinstance(x, QTensor):
        return _product(x, w, None)
    return on_dequantized(func, x, w)


@OPS.implements(aten.addmm.default)
def _addmm(func: Any, bias: Any, x: Any, w: Any, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
    if isinstance(w, QTensor) and w.transposed and not isinstance(x, QTensor) and beta == 1 and alpha == 1:
        return _product(x, w, bias)
    return on_dequantized(func, bias, x, w, beta=beta, alpha=alpha)


@OPS.implements(aten.bmm.default)
def _bmm(func: Any, x: Any, w: Any) -> torch.Tensor:
    if isinstance(w, QTensor) and w.transposed and not isinstance(x, QTensor):
        return torch.stack([_mm(aten.mm.default, x[e], select(aten.select.int, w, 0, e)) for e in range(w.shape[0])])
    return on_dequantized(func, x, w)


@OPS.implements(aten._grouped_mm.default)
def _grouped_mm(
    func: Any,
    x: Any,
    w: Any,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rows of x sorted by expert, times the matrices of a stack: what transformers' mixtures of experts call."""
    ours = isinstance(w, QTensor) and w.transposed and w.dim() == 3 and not isinstance(x, QTensor) and x.dim() == 2
    if not ours or offs is None or bias is not None or out_dtype not in (None, x.dtype):
        return on_dequantized(func, x, w, offs, bias, out_dtype)
    parts, fmt = w.parts(), w.scheme.format
    if compiled.must_trace(x, *parts, offs):
        return on_dequantized(func, x, w, offs, bias, out_dtype)
    if w.scheme.activation == "dynamic":
        x = kernels.round_trip_activation(x, fmt)
    return kernels.choose(x.device).experts(x, parts, fmt, offs)


@OPS.implements(aten.embedding.default)
def _embedding(func: Any, w: Any, indices: torch.Tensor, *args: Any) -> torch.Tensor:
    """Dequantizes the rows that are looked up, not the table."""
    fmt, rows = w.scheme.format, indices.reshape(-1)
    scale = w.scale if fmt.granularity == "tensor" else index_rows(w.scale, rows // fmt.block[0])
    row_format = replace(fmt, block=(1, fmt.block[1]))
    parts = kernels.Parts(index_rows(w.qdata, rows), scale, w.global_scale)
    values = compiled.TRACED.dequantize(parts, row_format, w.dtype)
    return values[:, : w.cols].reshape(*indices.shape, w.cols)


def _product(x: torch.Tensor, w: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[M, K]` times the stored matrix `[N, K]` transposed, plus bias `[N]`."""
    fmt, activation = w.scheme.format, w.scheme.activation
    if activation != "none" and has_fp8_matmul(x, w):
        return scaled_mm(x, w, bias)
    if activation == "dynamic":
        x = kernels.round_trip_activation(x, fmt)
    parts = w.parts()
    return kernels.serving(x, *parts).linear(x, parts, fmt, bias)


def has_fp8_matmul(x: torch.Tensor, w: QTensor) -> bool:
    """Can the device multiply these in fp8? Per-token × per-row scales, sizes in steps of 16."""
    return (
        x.is_cuda
        and w.scheme.format.granularity in ("tensor", "channel")
        and x.dtype == torch.bfloat16
        and multiplies_e4m3fn(x.device)
        and all(n % 16 == 0 for n in w.qdata.shape)
    )


def scaled_mm(x: torch.Tensor, w: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product in fp8: activations quantized per token, the weight's scale per output row."""
    xq, xs = kernels.quantize_activation(x, w.scheme.format)
    row_wise = torch.nn.functional.ScalingType.RowWise
    w_scale = w.scale.reshape(1, -1).expand(1, w.qdata.shape[0]).contiguous()
    return torch.nn.functional.scaled_mm(
        xq, w.qdata.t(), xs, row_wise, w_scale, row_wise, bias=bias, output_dtype=x.dtype
    )
