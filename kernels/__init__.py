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
    INT4_ASYMMETRIC,
    INT4_PER_GROUP,
    INT4_PER_GROUP_32,
    INT8_PER_CHANNEL,
    MXFP4,
    MXFP8,
    NVFP4,
    SEARCHES,
    SOURCE_DTYPES,
    NonFinite,
    Search,
    WeightFormat,
)
from .parts import Parts
from .recipes import RECIPES, Recipe
from .reference import round_trip_activation

__all__ = [
    "FORMATS",
    "FP8_PER_BLOCK",
    "FP8_PER_CHANNEL",
    "FP8_PER_TENSOR",
    "INT4_ASYMMETRIC",
    "INT4_PER_GROUP",
    "INT4_PER_GROUP_32",
    "INT8_PER_CHANNEL",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "RECIPES",
    "SEARCHES",
    "SOURCE_DTYPES",
    "Audit",
    "Backend",
    "NonFinite",
    "Parts",
    "Recipe",
    "Search",
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
    """Quantize a weight, or some rows of one, into memory that exists.

    All tensors are on one device, and all but the source may be views of a larger weight. The rows must be whole units
    of `fmt`: any rows per channel or group, a band that starts on a multiple of 128 per block, the entire matrix per
    tensor and for nvfp4.

    Args:
        source: `[..., N, K]`, any strides.
        qdata: Where the quantized values go, of the format's `qdata_shape`.
        scale: Where the scales go, of the format's `scale_shape`.
        fmt: The number format.
        audit: What to refuse, and what to measure.
        origin: The flat index of `source[0]` in the weight, for error messages.
        global_scale: Where the global scale goes, for formats with one.
        backend: As `choose` takes it.

    Raises:
        NonFinite: The source has NaN or infinity, and `audit` does not allow them. On a GPU `audit.verify()` raises it,
            and a call without an audit waits for the device.
        UnsupportedBackend: As `choose` raises it.
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

    Args:
        qdata: Quantized values, of the format's `qdata_shape`.
        scale: Scales, of the format's `scale_shape`.
        fmt: The number format.
        dtype: Of the result.
        out: Where to; new memory by default.
        global_scale: fp32, for formats with one.
        backend: As `choose` takes it.

    Returns:
        The values.
    """
    parts = Parts(qdata, scale, global_scale)
    return serving(*parts, out, backend=backend).dequantize(parts, fmt, dtype, out)


def quantize_activation(
    x: torch.Tensor, fmt: WeightFormat, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic activation quantization. Traces under torch.compile.

    The granularities are those of vLLM's dynamic fp8 activations. Per token, and per token and group of 128:
    max(amax / F, 1 / (F * 512)), divide, clamp, cast.

    Args:
        x: `[M, K]`.
        fmt: The number format of the weight.
        backend: As `choose` takes it.

    Returns:
        fp8 `[M, K]` and its scales: per token (`[M, 1]`, fp32), per token and group of 128 (`[M, ceil(K/128)]`, fp32)
        for a per-block weight, or per token and group of 32 with the weight's own formula (`[M, ceil(K/32)]`, e8m0) for
        mxfp8.
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
    """x times the dequantized weight transposed, plus bias.

    Weight-only: x is used as it is. A backend without a fused product dequantizes first. Traces under torch.compile.

    Args:
        x: `[M, K]`.
        qdata: Quantized values of the weight `[N, K]`.
        scale: Its scales.
        fmt: The number format.
        bias: `[N]`.
        global_scale: fp32, for formats with one.
        backend: As `choose` takes it.

    Returns:
        `[M, N]` in x's dtype.
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
    """Each row of x times the dequantized matrix of its expert, transposed, plus bias. Weight-only, as `linear`.

    Args:
        x: `[M, K]`, rows sorted by expert.
        qdata: Quantized values of the stack `[E, N, K]`.
        scale: Its scales.
        fmt: The number format.
        offsets: int `[E]`: the rows of expert e end where those of e + 1 begin; the last is M.
        bias: `[E, N]`.
        global_scale: fp32, for formats with one.
        backend: As `choose` takes it.

    Returns:
        `[M, N]` in x's dtype.
    """
    parts = Parts(qdata, scale, global_scale)
    return serving(x, *parts, backend=backend).experts(x, parts, fmt, offsets, bias)
