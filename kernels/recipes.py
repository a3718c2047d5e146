"""Recipes: how other tools arrive at scales and elements of the same stored forms, where that is not our formula.

A format's own formulas are those of vLLM (`formats.WeightFormat`). `RECIPES` has a row for each tool: the formats of
which its arithmetic is known, with what differs, or None where nothing does. Sources: compressed-tensors 0.20
(quantization/utils/helpers.py and mxfp_utils.py, quantization/lifecycle/forward_helpers.py), which llm-compressor calls
with the weight's own dtype; AMD Quark 0.13 (online_quantization/vllm/utils.py and quant_method/linear.py); torchao 0.18
(prototype/mx_formats/mx_tensor.py, scaling mode RCEIL, the default of its configurations).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0


@dataclass(frozen=True)
class Recipe:
    """The arithmetic of another tool for one stored form, in terms of D, the weight's dtype.

    fp32 scales are amax / `levels`, rounded to D, or `empty` where that is 0; the data is x / scale, rounded to D,
    then clamped to `lowest`..F and rounded to nearest even. A scale of 0 divides as 1 does. Scales that are stored in
    bfloat16 are rounded to it after that, where D has more bits.

    e8m0 scales follow from amax by `power`. nvfp4's gain G is (1 / amax of the matrix) * (6 * 448), each rounded to D,
    and 1 where that is infinite; its scales are e4m3(G * scale), 0.125 where that is 0, and the data x / (scale / G),
    the last two in fp32.

    With zero points, the scale is (largest - lowest) / 15, the zero point -8 - lowest / scale, and the data x / scale +
    zero point, each operation rounded to D; both are then clamped to -8..7 and rounded. Scales of more than 20
    significant bits, which only fp32 has, are rounded to these after all, for more are not stored.

    Attributes:
        tool: Whose arithmetic it is.
        levels: What amax becomes, in units of the scale.
        lowest: The smallest element; 0 stands for -F.
        empty: "epsilon" puts D's where a scale would be 0 (the code of 1 where D does not hold a power of two), "one"
            keeps 0 (the code 0), and does not divide there.
        power: "nearest" rounds amax to a power of two, up from 1.75 times one, and divides it by `levels`; "above"
            takes the smallest power of two that is at least amax / `levels`.
        rounds: Whether x / scale is rounded to D.
        drops_sign: Whether a quotient of -0 becomes 0.
    """

    tool: str
    levels: float
    lowest: float = 0.0
    empty: Literal["epsilon", "one"] = "epsilon"
    power: Literal["", "nearest", "above"] = ""
    rounds: bool = True
    drops_sign: bool = False

    def gain(self, amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """fp32 amax of whole matrices of `dtype`, any shape → G of the same shape, fp32."""
        held = amax.to(dtype).clamp_min(torch.finfo(dtype).tiny)
        return (held.reciprocal() * (_E2M1_MAX * _E4M3_MAX)).nan_to_num(1.0, 1.0, 1.0).to(torch.float32)

    def scale(self, amax: torch.Tensor, dtype: torch.dtype, gain: torch.Tensor | None) -> torch.Tensor:
        """fp32 amax of elements of `dtype`, any shape → the scale to store: e8m0 codes (uint8), e4m3 where there is a
        `gain`, else fp32."""
        # A 0-d tensor, because CUDA turns division by a Python scalar into multiplication by its reciprocal.
        levels = torch.full((), self.levels, dtype=torch.float32, device=amax.device)
        if self.power == "nearest":
            half = dtype == torch.float16
            normal = amax.clamp_min(2.0**-14) if half else amax  # Rounding is of D's own bits.
            code = (((normal.view(torch.int32) + 0x200000) >> 23) - int(self.levels).bit_length() + 1).clamp_min(0)
            # fp16 holds no power of two for what it rounds to 0.
            return (torch.where(amax < 0.75 * 2.0**-14, 127, code) if half else code).to(torch.uint8)
        if self.power == "above":
            bits = (amax / levels).view(torch.int32)
            return torch.where(bits <= 0x400000, 0, (bits + 0x7FFFFF) >> 23).to(torch.uint8)
        scale = (amax / levels).to(dtype).to(torch.float32)
        if gain is not None:
            rounded = (gain * scale).clamp_max(_E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
            return torch.where(rounded == 0.0, 0.125, rounded).to(torch.float8_e4m3fn)
        return torch.where(scale == 0.0, torch.finfo(dtype).eps, scale) if self.empty == "epsilon" else scale

    def scale_and_zero(
        self, lowest: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 lowest and largest elements of groups of `dtype`, any shape → scales and zero points, fp32."""
        low, high = lowest.to(dtype).clamp_max(0.0), largest.to(dtype).clamp_min(0.0)
        levels = torch.full((), self.levels, dtype=dtype, device=low.device)
        scale = (high - low) / levels
        zero = (-8.0 - low / scale).nan_to_num(0.0, 7.0, -8.0).clamp(-8.0, 7.0).round()
        return torch.where(scale == 0.0, torch.finfo(dtype).eps, scale).float(), zero.float()

    def units(self, x: torch.Tensor, step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """fp32 elements that come from `dtype`, and fp32 steps that broadcast → elements in units of their step."""
        # The code 0 of e8m0 is 2^-127.
        none = step == (2.0**-127 if self.power else 0.0)
        scaled = x / (torch.where(none, 1.0, step) if self.empty == "one" else step)
        scaled = scaled.to(dtype).to(torch.float32) if self.rounds else scaled
        return torch.where(scaled == 0.0, 0.0, scaled) if self.drops_sign else scaled


_COMPRESSED, _QUARK, _TORCHAO = "compressed-tensors", "quark", "torchao"
_FP8 = Recipe(_COMPRESSED, _E4M3_MAX)
RECIPES: dict[str, dict[str, Recipe | None]] = {
    "vllm": dict.fromkeys(
        ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8", "mxfp4", "nvfp4", "int8_per_channel")
    ),
    _COMPRESSED: {
        "fp8_per_tensor": _FP8,
        "fp8_per_channel": _FP8,
        "fp8_per_block": _FP8,
        "mxfp8": Recipe(_COMPRESSED, 256.0, power="nearest"),
        "mxfp4": Recipe(_COMPRESSED, 4.0, power="nearest", drops_sign=True),
        "nvfp4": Recipe(_COMPRESSED, _E2M1_MAX, rounds=False, drops_sign=True),
        "int8_per_channel": Recipe(_COMPRESSED, 127.5, -128.0),
        "int4_per_group": Recipe(_COMPRESSED, 7.5, -8.0),
        "int4_per_group_32": Recipe(_COMPRESSED, 7.5, -8.0),
        "int4_asymmetric": Recipe(_COMPRESSED, 15.0, -8.0),
    },
    _QUARK: {"fp8_per_channel": Recipe(_QUARK, _E4M3_MAX, empty="one"), "mxfp4": None},
    _TORCHAO: {
        "mxfp8": Recipe(_TORCHAO, _E4M3_MAX, empty="one", power="above", rounds=False),
        "mxfp4": Recipe(_TORCHAO, _E2M1_MAX, empty="one", power="above", rounds=False),
    },
}
"""Tool → name of a format → what differs from the format's own formula; None where nothing does."""
OWN = tuple(dict.fromkeys(own for formats in RECIPES.values() for own in formats.values() if own is not None))
"""All recipes there are. Compiled kernels know these, by their number or by their fields."""
