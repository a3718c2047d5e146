"""The GPU kernels, in Triton: one short file per kernel, each opening with its roofline.

per_channel, per_block, per_tensor,  weights, quantized in one launch (per_tensor and nvfp4: two)
per_group
activation                           dynamic activations, per token or per token and group of 128
dequant                              back to bf16, fp16 or fp32
encode, findings, launch             what they share: number formats, fused checks, launch geometry

The functions here have the signatures of kernels/reference.py and equal it byte for byte. None of them waits for the
device, except that a call without an audit verifies at once.
"""

from __future__ import annotations

import torch

from qtensor.errors import WeightDtypeError

from .. import reference
from ..audit import Audit
from ..formats import SOURCE_DTYPES, WeightFormat
from . import activation, dequant, per_block, per_channel, per_group, per_tensor

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
        reference.quantize_into(source, qdata, scale, fmt, audit, origin, global_scale)
        return
    findings = Audit() if audit is None else audit
    if fmt.granularity == "group":
        per_group.quantize(source, qdata, scale, fmt, findings, origin, global_scale)
    elif fmt.granularity == "channel":
        per_channel.quantize(source, qdata, scale, findings, origin, fmt.element)
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
    if out is None:
        out = torch.empty((*qdata.shape[:-1], qdata.shape[-1] * fmt.per_byte), dtype=dtype, device=qdata.device)
    _check(out.dtype, fmt)
    if qdata.numel() and fmt.granularity == "group":
        per_group.dequantize(qdata, scale, out, fmt, global_scale)
    elif qdata.numel():
        dequant.dequantize(qdata, scale, out, fmt)
    return out


def quantize_activation(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """As `qtensor.kernels.quantize_activation`."""
    _check(x.dtype, fmt)
    if fmt.granularity == "group":
        return reference.quantize_activation(x, fmt)
    return activation.quantize(x, fmt.block[1] if fmt.granularity == "block" else max(x.shape[1], 1))


def _check(dtype: torch.dtype, fmt: WeightFormat) -> None:
    if dtype not in SOURCE_DTYPES:
        raise WeightDtypeError(f"the Triton kernels take bf16, fp16 and fp32, not {dtype}")
    if fmt.dtype == torch.float8_e5m2:
        raise WeightDtypeError(f"the Triton kernels do not store the {fmt.dtype} of {fmt.name}")
