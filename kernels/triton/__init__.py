"""The GPU kernels, in Triton: one short file per kernel, each opening with its roofline.

per_channel, per_block, per_tensor   weights, quantized in one launch (per_tensor: two)
activation                           dynamic activations, per token or per token and group of 128
dequant                              back to bf16, fp16 or fp32
encode, findings, launch             what they share: number formats, fused checks, launch geometry

The functions here have the signatures of kernels/reference.py and equal it byte for byte. None of them waits for the
device, except that a call without an audit verifies at once.
"""

from __future__ import annotations

import torch

from ..audit import Audit
from ..formats import SOURCE_DTYPES, WeightFormat
from . import activation, dequant, per_block, per_channel, per_tensor

__all__ = ["dequantize", "quantize_activation", "quantize_into"]


def quantize_into(
    source: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    audit: Audit | None = None,
    origin: int = 0,
    global_scale: torch.Tensor | None = None,
) -> None:
    """As `qtensor.kernels.quantize_into`; non-finite elements are reported by `audit.verify()`, the rest is stored."""
    _check(source.dtype, fmt)
    if source.numel() == 0:
        scale.copy_(fmt.scale_from_amax(torch.zeros_like(scale)))
        return
    findings = Audit() if audit is None else audit
    if fmt.granularity == "channel":
        per_channel.quantize(source, qdata, scale, findings, origin)
    elif fmt.granularity == "block":
        per_block.quantize(source, qdata, scale, findings, origin, fmt.block)
    else:
        per_tensor.quantize(source, qdata, scale, findings, origin)
    if audit is None:
        findings.verify()


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `qtensor.kernels.dequantize`."""
    out = torch.empty(qdata.shape, dtype=dtype, device=qdata.device) if out is None else out
    _check(out.dtype, fmt)
    if qdata.numel():
        dequant.dequantize(qdata, scale, out, fmt.granularity, fmt.block)
    return out


def quantize_activation(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """As `qtensor.kernels.quantize_activation`."""
    _check(x.dtype, fmt)
    return activation.quantize(x, fmt.block[1] if fmt.granularity == "block" else max(x.shape[1], 1))


def _check(dtype: torch.dtype, fmt: WeightFormat) -> None:
    if dtype not in SOURCE_DTYPES:
        raise TypeError(f"the Triton kernels take bf16, fp16 and fp32, not {dtype}")
    if fmt.dtype is not torch.float8_e4m3fn:
        raise TypeError(f"the Triton kernels store float8_e4m3fn, not the {fmt.dtype} of {fmt.name}")
