"""The GPU kernels, in Triton: one short file per kernel, each opening with its roofline.

per_channel, per_block, per_tensor,  weights, quantized in one launch (per_tensor and nvfp4: two)
per_group
activation                           dynamic activations, per token or per token and group of 128
dequant                              back to bf16, fp16 or fp32
product                              of a few rows with a weight, decoded on the way
searching                            scales chosen by their error, in the kernels per channel and group
recipes                              other tools' arithmetic, in all kernels that quantize
encode, findings, launch             what they share: number formats, fused checks, launch geometry

All equal kernels/reference.py byte for byte. None of them waits for the device, except that a call without an audit
verifies at once.
"""

from __future__ import annotations

import torch

from qtensor.errors import WeightDtypeError

from ..audit import Audit
from ..formats import SOURCE_DTYPES, WeightFormat
from ..parts import Parts
from ..recipes import OWN
from ..reference import Torch, room
from . import activation, dequant, per_block, per_channel, per_group, per_tensor, product, searching

__all__ = ["TRITON", "Triton"]


class Triton(Torch):
    """The backend "triton". Its products of many rows are the reference's, on weights that its own kernel dequantizes.

    band_elements: 64 MiB of bf16, so that most weights are dequantized in one launch.
    """

    name = "triton"
    own: tuple[str, ...] = ("quantize_into", "dequantize", "linear", "experts", "quantize_activation")
    band_elements = 32 << 20

    def quantize_into(
        self, source: torch.Tensor, parts: Parts, fmt: WeightFormat, audit: Audit | None = None, origin: int = 0
    ) -> None:
        """Non-finite elements are reported by `audit.verify()`, the rest is stored."""
        _check(source.dtype, fmt)
        if source.numel() == 0 or _takes_reference(fmt):
            super().quantize_into(source, parts, fmt, audit, origin)
            return
        source = source.resolve_neg()  # Kernels see memory, not torch's bit that says to negate what is there.
        findings = Audit() if audit is None else audit
        if fmt.granularity == "group":
            per_group.quantize(source, parts, fmt, findings, origin)
        elif fmt.granularity == "channel":
            per_channel.quantize(source, parts, fmt, findings, origin)
        elif fmt.granularity == "block":
            per_block.quantize(source, parts, fmt, findings, origin)
        else:
            per_tensor.quantize(source, parts, fmt, findings, origin)
        if audit is None:
            findings.verify()

    def raise_amax(
        self, source: torch.Tensor, amax: torch.Tensor, fmt: WeightFormat, audit: Audit, origin: int
    ) -> None:
        _check(source.dtype, fmt)
        if source.numel():
            per_tensor.accumulate_amax(source.resolve_neg(), amax, audit, origin)

    def quantize_rows(
        self, source: torch.Tensor, parts: Parts, fmt: WeightFormat, amax: torch.Tensor, audit: Audit, origin: int
    ) -> None:
        _check(source.dtype, fmt)
        if _takes_reference(fmt):
            super().quantize_rows(source, parts, fmt, amax, audit, origin)
            return
        source = source.resolve_neg()
        if fmt.granularity == "group":
            per_group.quantize(source, parts, fmt, audit, origin, amax)
        else:
            per_tensor.scale_and_cast(source, amax, parts, fmt, audit)

    def dequantize(
        self, parts: Parts, fmt: WeightFormat, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = room(parts, fmt, dtype) if out is None else out
        _check(out.dtype, fmt)
        if parts.qdata.numel():
            (per_group if fmt.granularity == "group" else dequant).dequantize(parts, fmt, out)
        return out

    def linear(
        self, x: torch.Tensor, parts: Parts, fmt: WeightFormat, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.shape[0] > product.MOST_ROWS or not _multiplies(x, parts, fmt):
            return super().linear(x, parts, fmt, bias)
        return product.product(x.resolve_neg(), parts, fmt, bias)

    def experts(
        self,
        x: torch.Tensor,
        parts: Parts,
        fmt: WeightFormat,
        offsets: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Few rows for each matrix on average: one launch, which waits for nothing."""
        if x.shape[0] > product.MOST_ROWS * parts.qdata.shape[0] or not _multiplies(x, parts, fmt):
            return super().experts(x, parts, fmt, offsets, bias)
        return product.product(x.resolve_neg(), parts, fmt, bias, offsets)

    def quantize_activation(self, x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
        _check(x.dtype, fmt)
        if fmt.granularity == "group":
            return super().quantize_activation(x, fmt)
        return activation.quantize(x.resolve_neg(), fmt.block[1] if fmt.granularity == "block" else max(x.shape[1], 1))


TRITON = Triton()


def _multiplies(x: torch.Tensor, parts: Parts, fmt: WeightFormat) -> bool:
    """Whether the product kernel takes these. A gradient comes by the operations of the reference."""
    gradient = x.requires_grad and torch.is_grad_enabled()
    return x.dtype in SOURCE_DTYPES and fmt.dtype != torch.float8_e5m2 and x.shape[1] > 0 and not gradient


def _takes_reference(fmt: WeightFormat) -> bool:
    """For a search or a recipe that the kernels do not know."""
    if fmt.recipe is not None:
        return fmt.recipe not in OWN
    return fmt.search is not None and not searching.is_searched_here(fmt)


def _check(dtype: torch.dtype, fmt: WeightFormat) -> None:
    if dtype not in SOURCE_DTYPES:
        raise WeightDtypeError(f"the Triton kernels take bf16, fp16 and fp32, not {dtype}")
    if fmt.dtype == torch.float8_e5m2:
        raise WeightDtypeError(f"the Triton kernels do not store the {fmt.dtype} of {fmt.name}")
