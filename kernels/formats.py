"""What a quantized weight is made of: element format, which elements share a scale, and how that scale is derived.

A `WeightFormat` is pure description. The reference quantizer, the Triton kernels and the CPU kernels all read their
formulas from here, so that "byte-exact" has one meaning. Shapes: a weight is `[..., N, K]` (`[N, K]`, or `[E, N, K]`
for a stack of E experts, each quantized as a matrix of its own).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Granularity = Literal["tensor", "channel", "block"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class NonFinite(ValueError):
    """The source holds NaN or infinity. `index` is the flat, row-major position in the whole weight."""

    def __init__(self, index: int, value: float) -> None:
        super().__init__(f"non-finite value {value} at flat index {index}")
        self.index = index
        self.value = value


@dataclass(frozen=True)
class WeightFormat:
    """An element dtype plus the rule that gives each group of elements its scale.

    With F = `max` and amax the largest magnitude among the elements that share a scale, all in fp32:

    ======== ============================ ============================= ==========================
    tensor   scale = amax / F             x * (1 / scale)               scale `[..., 1]`
    channel  max(amax / F, 1 / (F * 512)) x / scale                     scale `[..., N, 1]`
    block    max(amax, 1e-4) / F          x * (1 / scale)               scale `[..., N/128, K/128]`
    ======== ============================ ============================= ==========================

    then clamp to ±F and round to nearest even. These are the formulas of vLLM's online quantization
    (vllm/model_executor/layers/quantization/online/fp8.py). Where 1 / scale is not finite the data is 0.
    """

    name: str
    dtype: torch.dtype
    max: float
    granularity: Granularity
    block: tuple[int, int] = (1, 1)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the fp32 scale that belongs to a weight of `shape` `[..., N, K]`."""
        *lead, rows, cols = shape
        if self.granularity == "tensor":
            return (*lead, 1)
        if self.granularity == "channel":
            return (*lead, rows, 1)
        return (*lead, ceil_div(rows, self.block[0]), ceil_div(cols, self.block[1]))

    def unit_rows(self, rows: int) -> int:
        """How many rows of an N-row matrix must be known before any of them can be quantized."""
        if self.granularity == "tensor":
            return max(rows, 1)
        return 1 if self.granularity == "channel" else self.block[0]

    def scale_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """fp32 amax, any shape → fp32 scale of the same shape."""
        # A 0-d tensor, because CUDA turns division by a Python scalar into multiplication by its reciprocal.
        limit = torch.full((), self.max, dtype=torch.float32, device=amax.device)
        if self.granularity == "block":
            return amax.clamp_min(1e-4) / limit
        scale = amax / limit
        return scale if self.granularity == "tensor" else scale.clamp_min(1.0 / (self.max * 512.0))


E4M3_MAX = 448.0

FP8_PER_TENSOR = WeightFormat("fp8_per_tensor", torch.float8_e4m3fn, E4M3_MAX, "tensor")
FP8_PER_CHANNEL = WeightFormat("fp8_per_channel", torch.float8_e4m3fn, E4M3_MAX, "channel")
FP8_PER_BLOCK = WeightFormat("fp8_per_block", torch.float8_e4m3fn, E4M3_MAX, "block", (128, 128))

FORMATS = {f.name: f for f in (FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_PER_BLOCK)}
SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
