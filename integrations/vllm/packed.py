"""Reading a weight back from the layout that a kernel has packed it into, without knowing the layout.

A kernel moves each element of a weight, and each of its scales, to a place that depends on shapes alone. So the places
are learned from the kernel: it packs weights whose elements are digits of their own positions. What is read that way is
then packed once more, and has to give what the layer holds, bit for bit; where it does not, there is no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qtensor.kernels import Parts, WeightFormat

_E4M3_ONE, _E4M3_TWO = 0x78, 0x7E  # 256 and 448: with one of these, nvfp4's scales are not spread over a wider range.
_E8M0_ONE, _E8M0_TWO = 127, 128
_NAMES = ("weight", "weight_scale", "weight_scale_inv", "weight_global_scale")

Pack = Callable[[Any, Parts], None]
"""(layer, parts): gives the layer these parts in the kernel's layout."""


@dataclass(frozen=True)
class Geometry:
    """The parts of a weight of `shape` `[N, K]`."""

    fmt: WeightFormat
    shape: tuple[int, int]

    def parts(self, codes: torch.Tensor, scale: torch.Tensor) -> Parts:
        """From a code (uint8) for each element, and scales of the stored dtype, both flat."""
        codes = codes.view(self.shape)
        if self.fmt.per_byte == 2:
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        found = self.fmt.global_scale_shape(self.shape)
        one = None if found is None else torch.ones(found, dtype=torch.float32, device=codes.device)
        return Parts(codes.view(self.fmt.dtype), scale.view(self.fmt.scale_shape(self.shape)), one)

    def scales(self, bits: torch.Tensor) -> torch.Tensor:
        """bits (bool) → scales of two values."""
        if self.fmt.has_e8m0_scale:
            return torch.where(bits, _E8M0_TWO, _E8M0_ONE).to(torch.uint8)
        if self.fmt.has_global_scale:
            return torch.where(bits, _E4M3_TWO, _E4M3_ONE).to(torch.uint8).view(torch.float8_e4m3fn)
        return torch.where(bits, 2.0, 1.0).to(self.fmt.scale_dtype)


def read(layer: Any, geometry: Geometry, pack: Pack, empty: Callable[[Any], Any]) -> Parts | None:
    """The parts of the weight that `pack` has given the layer; None if they cannot be told.

    `empty(layer)`: a layer like this one, without weights. Takes memory for two int32 per element meanwhile.
    """
    fmt, shape = geometry.fmt, geometry.shape
    device = layer.weight.device
    elements = shape[0] * shape[1]
    groups = torch.Size(fmt.scale_shape(shape)).numel()
    bits = 8 // fmt.per_byte
    number, group = (torch.arange(count, dtype=torch.int32, device=device) for count in (elements, groups))

    def proven(parts: Parts) -> bool:
        again = empty(layer)
        pack(again, parts.map(torch.clone))
        return all(_same(getattr(again, name, None), getattr(layer, name, None)) for name in _NAMES)

    as_it_is = _as_it_is(layer, geometry)
    if as_it_is is not None and proven(as_it_is):
        return as_it_is

    def packed(codes: torch.Tensor, scale: torch.Tensor) -> Any:
        probe = empty(layer)
        pack(probe, geometry.parts(codes, scale))
        return probe

    if not elements:
        return None
    ones = torch.full_like(number, (1 << bits) - 1, dtype=torch.uint8)
    low = packed(torch.zeros_like(ones), geometry.scales(torch.zeros_like(group, dtype=torch.bool)))
    high = packed(ones, geometry.scales(torch.ones_like(group, dtype=torch.bool)))
    zero, scale_zero, scale_one = _codes(low, fmt), _scales(low), _scales(high)
    if _codes(layer, fmt).shape != zero.shape or _scales(layer).shape != scale_zero.shape:
        return None
    place, scale_place = torch.zeros_like(zero, dtype=torch.int32), torch.zeros_like(scale_zero, dtype=torch.int32)
    for step in range(max(_digits(elements, bits), _digits(groups, 1))):
        digit = (number >> min(step * bits, 31) & (1 << bits) - 1).to(torch.uint8)
        probe = packed(digit, geometry.scales((group >> min(step, 31) & 1).bool()))
        if step * bits < 31:
            place |= (_codes(probe, fmt) ^ zero).to(torch.int32) << step * bits
        scale_place |= (_scales(probe) != scale_zero).to(torch.int32) << step
    used, scale_used = zero != _codes(high, fmt), scale_zero != scale_one
    if bool((place[used] >= elements).any() or (scale_place[scale_used] >= groups).any()):
        return None
    codes = torch.zeros(elements, dtype=torch.uint8, device=device)
    codes[place[used].long()] = (_codes(layer, fmt) ^ zero)[used]
    held = _scales(layer)[scale_used]
    for scale in _values(held, scale_zero[scale_used], layer, fmt):
        found = torch.zeros(groups, dtype=scale.dtype, device=device)
        found.view(torch.uint8).view(groups, -1)[scale_place[scale_used].long()] = scale.view(torch.uint8).view(
            scale.numel(), -1
        )
        parts = geometry.parts(codes, found)
        if parts.global_scale is not None:
            parts.global_scale.copy_(layer.weight_global_scale.reshape(-1) / low.weight_global_scale.reshape(-1))
        if proven(parts):
            return parts
    return None


def _as_it_is(layer: Any, geometry: Geometry) -> Parts | None:
    """The layer's tensors, if they may be the parts themselves."""
    held = [p.data for name in _NAMES if (p := getattr(layer, name, None)) is not None]
    like = Parts.of(geometry.shape, geometry.fmt, "meta")
    same = len(held) == len(like) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(held, like, strict=True)
    )
    return Parts(*held) if same else None


def _digits(count: int, bits: int) -> int:
    return -(-max(count - 1, 1).bit_length() // bits)


def _codes(layer: Any, fmt: WeightFormat) -> torch.Tensor:
    """The codes of a packed weight, flat, in the order of its memory."""
    raw = layer.weight.data.contiguous().view(torch.uint8).flatten()
    return raw if fmt.per_byte == 1 else torch.stack([raw & 15, raw >> 4], -1).flatten()


def _scales(layer: Any) -> torch.Tensor:
    """The packed scales, flat; those of one byte as bytes."""
    held = getattr(layer, "weight_scale", None)
    scale = (layer.weight_scale_inv if held is None else held).data.contiguous().flatten()
    return scale.view(torch.uint8) if scale.element_size() == 1 else scale


def _values(held: torch.Tensor, one: torch.Tensor, layer: Any, fmt: WeightFormat) -> list[torch.Tensor]:
    """What packed scales may stand for, in the stored dtype; `one`: what 1 is packed as."""
    if fmt.has_e8m0_scale:
        return [held]
    if fmt.has_global_scale:
        # Marlin keeps them times 2^7, by five bits of exponent and three of mantissa.
        half = (held.to(torch.int16) << 7).view(torch.float16)
        return [(half / 128).to(torch.float8_e4m3fn), held.view(torch.float8_e4m3fn)]
    return [(held.to(torch.float32) / one.to(torch.float32)).to(fmt.scale_dtype)]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(
        a.data.contiguous().view(torch.uint8), b.data.contiguous().view(torch.uint8)
    )
