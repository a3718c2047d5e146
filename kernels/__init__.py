"""Quantization kernels: number formats, the plain-torch reference, the fast backends, and the choice among them."""

from __future__ import annotations

from .formats import FORMATS, FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, SOURCE_DTYPES, NonFinite, WeightFormat
from .reference import Audit, dequantize, quantize_activation, quantize_into

__all__ = [
    "FORMATS",
    "FP8_PER_BLOCK",
    "FP8_PER_CHANNEL",
    "FP8_PER_TENSOR",
    "SOURCE_DTYPES",
    "Audit",
    "NonFinite",
    "WeightFormat",
    "dequantize",
    "quantize_activation",
    "quantize_into",
]
