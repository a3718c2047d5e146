"""Scales: what several families do with them. Powers of two are stored as biased exponents (e8m0) or as floats."""

from __future__ import annotations

import torch

from .source import Unusable

EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
"""The dtypes of biased exponents."""
_BIAS = 127
_AT_ONCE = 1 << 18
"""Codes that are looked at together."""


def finite_scales(scales: torch.Tensor) -> None:
    """Raises Unusable for scales that are NaN, infinite or negative."""
    if scales.dtype in EXPONENTS:
        bad = scales.view(torch.uint8) == 0xFF
    else:
        wide = scales.float()
        bad = ~(wide.isfinite() & (wide >= 0))
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise Unusable(f"its scale {at} is {float(in_fp32(scales)[tuple(at)])}; scales are finite and not negative")


def in_fp32(scales: torch.Tensor) -> torch.Tensor:
    """Scales in fp32, exactly; of exponents, the powers of two."""
    if scales.dtype in EXPONENTS:
        codes = scales.view(torch.uint8)
        # The exponent's bits of an fp32; 2^-127 is subnormal, and 255 is NaN.
        bits = codes.int() << 23
        bits = torch.where(codes == 0, 1 << 22, torch.where(codes == 0xFF, 0x7FC00000, bits))
        return bits.int().view(torch.float32)
    return scales.float()


def as_exponents(scales: torch.Tensor) -> torch.Tensor | None:
    """Scales as biased exponents (uint8); None if one of them is no power of two, or is out of their range."""
    if scales.dtype in EXPONENTS:
        return scales.view(torch.uint8)
    mantissa, exponent = torch.frexp(scales.float())
    code = exponent - 1 + _BIAS
    if not bool(((mantissa == 0.5) & (code >= 0) & (code < 0xFF)).all()):
        return None
    return code.to(torch.uint8)


def overflows(scales: torch.Tensor, largest: float, dtype: torch.dtype) -> bool:
    """May a value of at most `largest`, times its scale, be infinite in `dtype`? Our kernels end at the largest number
    there, and no owner's decoder does: then it has to be infinite, and refused, as theirs is."""
    return bool(scales.numel()) and float(in_fp32(scales).max()) * largest > torch.finfo(dtype).max


def has_nan(codes: torch.Tensor) -> bool:
    """Is there a NaN among quantized values? Only e4m3 has one."""
    if codes.dtype != torch.float8_e4m3fn or not codes.numel():
        return False
    pieces = codes.view(torch.uint8).split(max(1, _AT_ONCE * len(codes) // codes.numel()))
    return any(bool((piece & 0x7F).max() == 0x7F) for piece in pieces)
