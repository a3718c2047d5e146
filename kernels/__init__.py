"""Quantization kernels: number formats, the plain-torch reference, the fast backends, and the choice among them.

The functions here take the tensors of a weight one by one, let `backend.py` pick the code for their device, and call
it with their `Parts`. `backend` ("triton", "numba", "torch") or the environment variable QTENSOR_KERNELS overrides it.
"""

from __future__ import annotations

import torch

from .audit import Audit
from .backend import Backend, UnsupportedBackend, choose, describe, serving
from .formats import (
    FORMATS,
    FP8_PER_BLOCK,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    INT4_PER_GROUP,
    INT8_PER_CHANNEL,
    MXFP4,
    MXFP8,
    NVFP4,
    SOURCE_DTYPES,
    NonFinite,
    WeightFormat,
)
from .parts import Parts
from .reference import round_trip_activation

__all__ = [
    "FORMATS",
    "FP8_PER_BLOCK",
    "FP8_PER_CHANNEL",
    "FP8_PER_TENSOR",
    "INT4_PER_GROUP",
    "INT8_PER_CHANNEL",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "SOURCE_DTYPES",
    "Audit",
    "Backend",
    "NonFinite",
    "Parts",
    "UnsupportedBackend",
    "WeightFormat",
    "choose",
    "dequantize",
    "describe",
    "experts",
    "linear",
    "quantize_activation",
    "quantize_into",
    "round_trip_activation",
    "serving",
]


def quantize_into(
    source: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    audit: Audit | None = None,
    origin: int = 0,
    global_scale: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Quantize `source` `[..., N, K]` (any strides) into `qdata`, `scale` and, for formats with one, `global_scale`.

    Their shapes are the format's `qdata_shape`, `scale_shape` and `global_scale_shape`. All are on one device, and
    all but the source may be views of a larger weight. The rows must be whole units of `fmt`: any rows per channel or
    group, a band that starts on a multiple of 128 per block, the entire matrix per tensor and for nvfp4. `origin` is
    the flat index of `source[0]` in the weight, for error messages.

    Raises NonFinite(index, value) for NaN or infinity unless `audit` allows them; on a GPU `audit.verify()` raises it,
    and a call without an audit waits for the device. Raises UnsupportedBackend as `choose` does.
    """
    parts = Parts(qdata, scale, global_scale)
    choose(qdata.device, backend).quantize_into(source, parts, fmt, audit, origin)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """qdata times its scale in fp32, rounded once to `dtype`: `[..., N, K]`. Traces under torch.compile.

    Where two elements share a byte, the last of an odd number of columns has a zero beside it, which `out` leaves off
    if it has one column less than qdata has elements.
    """
    parts = Parts(qdata, scale, global_scale)
    return serving(*parts, out, backend=backend).dequantize(parts, fmt, dtype, out)


def quantize_activation(
    x: torch.Tensor, fmt: WeightFormat, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic activation quantization: x `[M, K]` → fp8 `[M, K]` and its scales.

    Per token (`[M, 1]`, fp32), per token and group of 128 (`[M, ceil(K/128)]`, fp32) for a per-block weight, or per
    token and group of 32 with the weight's own formula (`[M, ceil(K/32)]`, e8m0) for mxfp8: the granularities of vLLM's
    dynamic fp8 activations. The first two: max(amax / F, 1 / (F * 512)), divide, clamp, cast. Traces under
    torch.compile.
    """
    return serving(x, backend=backend).quantize_activation(x, fmt)


def linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    bias: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """x `[M, K]` times the dequantized weight `[N, K]` transposed, plus bias `[N]`: `[M, N]` in x's dtype.

    Weight-only: x is used as it is. A backend without a fused product dequantizes first. Traces under torch.compile.
    """
    parts = Parts(qdata, scale, global_scale)
    return serving(x, *parts, backend=backend).linear(x, parts, fmt, bias)


def experts(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Each row of x `[M, K]` times the dequantized matrix of its expert, transposed, plus bias `[E, N]`: `[M, N]`.

    The weight is `[E, N, K]`. Rows are sorted by expert: those of expert e end at `offsets[e]` (int `[E]`), where those
    of e + 1 begin, and the last offset is M. Weight-only, as `linear`.
    """
    parts = Parts(qdata, scale, global_scale)
    return serving(x, *parts, backend=backend).experts(x, parts, fmt, offsets, bias)
