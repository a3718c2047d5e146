"""The formats of single elements, from and to fp32: e4m3, e2m1, int8, int4. Two 4-bit elements share a byte.

e4m3fn: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, 0x7f is NaN; ±448.
e2m1:   1 sign, 2 exponent (bias 1), 1 mantissa bit; neither infinity nor NaN; 0, 0.5, 1, 1.5, 2, 3, 4, 6 and negatives.
int8:   ±127, and what some recipes store: -128.
int4:   ±7 and -8 likewise, two's complement.

The first of two elements that share a byte is in its low nibble.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from .formats import Element, WeightFormat

# Target dtype → (integer view, left shift of the sign bit, left shift of the magnitude bits, exponent bias difference).
_WIDER = {
    torch.bfloat16: (torch.int16, 8, 4, 2.0**120),
    torch.float16: (torch.int16, 8, 7, 2.0**8),
    torch.float32: (torch.int32, 24, 20, 2.0**120),
}
_NAN_CODE = 0x7F
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_INT4_VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)


def encode(x: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """fp32 `[..., K]`, in units of the scale → stored elements `[..., K / per_byte]`, rounded up; clobbers x.

    Clamps to `fmt.lowest` and `fmt.max` and rounds to nearest even. NaN becomes 0 where the format has none.
    """
    x.clamp_(fmt.lowest, fmt.max)
    if not fmt.keeps_nan:
        x.masked_fill_(x.isnan(), 0.0)
    return _ENCODE[fmt.element](x)


def decode(codes: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Stored elements `[..., K']` → their values `[..., K' * per_byte]` in `dtype`, exactly."""
    if fmt.element == "e4m3":
        return decode_e4m3(codes, dtype)
    if fmt.element == "int8":
        return codes.to(dtype)
    return torch.nn.functional.embedding(codes.int(), _pairs(fmt.element, dtype, codes.device)).flatten(-2)


def decode_e4m3(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e4m3fn values (any shape) → the same values in `dtype`, exactly.

    Shifting the seven magnitude bits of a code under the exponent of a wider float gives the value divided by a power
    of two, because both are sign-exponent-mantissa; one exact multiplication restores it, subnormals included. On CPU
    this is about four times as fast as torch's own cast from float8.
    """
    if codes.device.type != "cpu" or dtype not in _WIDER:
        return codes.to(dtype)
    view, sign_shift, magnitude_shift, restore = _WIDER[dtype]
    raw = codes.view(torch.uint8)
    magnitude = raw & 0x7F
    bits = magnitude.to(view).bitwise_left_shift_(magnitude_shift)
    bits |= (raw & 0x80).to(view).bitwise_left_shift_(sign_shift)
    values = bits.view(dtype).mul_(restore)
    nan = magnitude == _NAN_CODE
    return values.masked_fill_(nan, float("nan")) if nan.any() else values


def traceable_decode(codes: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """As `decode` to fp32, in arithmetic alone: no table and no branch on values, for compilers."""
    if fmt.per_byte == 1:
        return codes.to(torch.float32)
    # A shift by 0 and by 4, rather than a stack of both: torch 2.13's CPU compiler leaves out a stack's last columns.
    shifts = torch.arange(0, 8, 4, dtype=torch.uint8, device=codes.device)
    nibbles = (codes.unsqueeze(-1) >> shifts & 0xF).flatten(-2).to(torch.float32)
    if fmt.element == "int4":
        return torch.where(nibbles < 8.0, nibbles, nibbles - 16.0)
    m = torch.where(nibbles < 8.0, nibbles, nibbles - 8.0)
    m = torch.where(m < 4.0, m * 0.5, torch.where(m < 6.0, m - 2.0, 2.0 * m - 8.0))
    return torch.where(nibbles < 8.0, m, -m)


def _encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn)


def _encode_int8(x: torch.Tensor) -> torch.Tensor:
    return x.round_().to(torch.int8)


def _encode_int4(x: torch.Tensor) -> torch.Tensor:
    return _pack(x.round_().to(torch.int8).view(torch.uint8) & 0xF)


def _encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    # Codes count steps of 0.5 below 2, of 1 below 4, of 2 above; each binade begins on an even code.
    sign = x.signbit()
    m = x.abs_()
    code = torch.where(m < 2.0, (m * 2.0).round_(), torch.where(m < 4.0, m.round() + 2.0, (m * 0.5).round_() + 4.0))
    return _pack(code.to(torch.uint8) | sign.to(torch.uint8).bitwise_left_shift_(3))


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Nibbles (uint8 `[..., K]`) → bytes `[..., K/2]`; an odd last one shares its byte with 0."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | codes[..., 1::2] << 4


@cache
def _pairs(element: Element, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two values of every byte: `[256, 2]`."""
    values = torch.tensor(_E2M1_VALUES if element == "e2m1" else _INT4_VALUES, dtype=dtype, device=device)
    byte = torch.arange(256, dtype=torch.int64, device=device)
    return values[torch.stack((byte & 0xF, byte >> 4), -1)]


_ENCODE: dict[Element, Callable[[torch.Tensor], torch.Tensor]] = {
    "e4m3": _encode_e4m3,
    "e2m1": _encode_e2m1,
    "int8": _encode_int8,
    "int4": _encode_int4,
}
