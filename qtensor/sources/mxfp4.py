"""mxfp4: e2m1 values, two in a byte, and a power of two for each 32 of a row.

Owners: gpt-oss ("*_blocks", "*_scales": transformers' `convert_moe_packed_tensors`), compressed-tensors ("*_packed",
"*_scale"), and mixtures in fp8 checkpoints (values in an int8 "*": transformers' `Fp8Dequantize`). All of them multiply
code by scale, which is exact, and round once to the model's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from .. import kernels
from ..kernels import MXFP4, Parts, WeightFormat
from ..kernels.codes import decode
from ..tensor.rooms import PASSING_BYTES, room_for
from .rooms import kept_room
from .scales import EXPONENTS, finite_scales, overflows
from .source import ROWS, UNNEEDED, Family, Matrix, PartSpec, Source, Specs, Unusable

GROUP = 32
_FORMS = (("*_blocks", "*_scales"), ("*_packed", "*_scale"), ("*", "*_scale_inv"), ("*", "*_scale"))
_UNUSED = ("input_global_scale", "*_shape")
_BYTES = (torch.uint8, torch.int8)
_LOOKED_UP = 1 << 16
_ROWS = 128


@dataclass(frozen=True)
class MxFp4(Source):
    """Values `[N, K / 2]` (gpt-oss: `[N, K / 32, 16]`) and scales `[N, K / 32]`, by these names."""

    values: str = "*_packed"
    scales: str = "*_scale"

    @property
    def name(self) -> str:
        return "mxfp4 (blocks)" if self._in_blocks else "mxfp4"

    @property
    def _in_blocks(self) -> bool:
        return self.values == "*_blocks"

    @property
    def transposed(self) -> bool:
        """Models that are stored by these names keep their experts as `[E, K, N]`."""
        return self._in_blocks

    def shape(self, specs: Specs) -> Matrix:
        found = specs[self.values].shape if self.values in specs else ()
        if len(found) != (3 if self._in_blocks else 2):
            raise Unusable(f"its values are {list(found)}")
        return found[0], 2 * (found[1] * found[2] if self._in_blocks else found[1])

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        rows, cols = shape
        if cols % GROUP:
            raise Unusable(f"has {cols} columns; in mxfp4 they are a multiple of {GROUP}")
        packed = (rows, cols // GROUP, GROUP // 2) if self._in_blocks else (rows, cols // 2)
        return {
            self.values: PartSpec(packed, _BYTES, ROWS),
            self.scales: PartSpec((rows, cols // GROUP), EXPONENTS, ROWS),
            **dict.fromkeys(_UNUSED, UNNEEDED),
        }

    @property
    def quick(self) -> bool:
        return True

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        finite_scales(parts[self.scales])

    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=parts[self.values].device)
        if self.decode_into(parts, shape, out):
            return out
        codes, exponents = self._plain(parts, shape)
        values = decode(codes, MXFP4).unflatten(1, (-1, GROUP))
        return values.mul_(exponents.view(torch.float8_e8m0fnu).float().unsqueeze(-1)).flatten(1).to(dtype)

    def decode_into(self, parts: Mapping[str, torch.Tensor], shape: Matrix, out: torch.Tensor) -> bool:
        codes, exponents = self._plain(parts, shape)
        if overflows(exponents.view(torch.float8_e8m0fnu), MXFP4.max, out.dtype):
            return False
        kernels.dequantize(codes, exponents, MXFP4, out.dtype, out)
        return True

    def moves(self, fmt: WeightFormat) -> Literal["unit", "matrix"] | None:
        return {"mxfp4": "unit", "mxfp8": "unit", "nvfp4": "matrix"}.get(fmt.name)  # type: ignore[return-value]

    def move(self, parts: Mapping[str, torch.Tensor], shape: Matrix, fmt: WeightFormat) -> Parts | None:
        codes, exponents = self._plain(parts, shape)
        if fmt.name == "mxfp4":
            return Parts(codes, exponents)
        if fmt.name == "mxfp8":  # e4m3 has every number that e2m1 has.
            return Parts(_in_e4m3(codes), exponents)
        scales = _two_scales(codes, exponents)
        return None if scales is None else Parts(codes, *scales)

    def _plain(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        """Values as bytes `[rows, K / 2]`, and biased exponents `[rows, K / 32]`."""
        codes, scales = parts[self.values], parts[self.scales]
        return codes.reshape(shape[0], -1).contiguous().view(torch.uint8), scales.contiguous().view(torch.uint8)


def _in_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """The values of two-element bytes `[rows, K / 2]`, as e4m3 `[rows, K]`."""
    if not codes.is_cpu or codes.shape[1] % 2:
        return decode(codes, MXFP4).to(torch.float8_e4m3fn)
    pairs = codes.numpy().view(np.uint16).reshape(-1)
    room = kept_room(4 * len(pairs))
    found = room.numpy().view(np.uint32)
    for start in range(0, len(pairs), _LOOKED_UP):  # numpy makes an index of 8 bytes of each.
        part = slice(start, start + _LOOKED_UP)
        np.take(_e4m3_of_four(), pairs[part], out=found[part], mode="clip")
    return room.view(torch.float8_e4m3fn).view(len(codes), -1)


@functools.cache
def _e4m3_of_four() -> np.ndarray:
    """For every two bytes of e2m1 elements, the four of e4m3: uint32 `[2^16]`."""
    pairs = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2))
    found: np.ndarray = decode(pairs, MXFP4).to(torch.float8_e4m3fn).view(torch.uint8).numpy().view(np.uint32)
    return found.reshape(-1)


def _two_scales(codes: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The powers of two of a matrix as nvfp4 has scales: e4m3 for each 16, times one number for all.

    e4m3 has the powers from 2^-9 to 2^8, so those of groups that are not all zeros may span 18 of them.
    """
    low, high = (int(n) for n in exponents.aminmax()) if exponents.numel() else (127, 127)
    if low < _least(high):
        live = torch.cat(
            [exponents[r : r + _ROWS][_not_zero(codes[r : r + _ROWS])] for r in range(0, len(codes), _ROWS)]
        )
        low, high = (int(n) for n in live.aminmax()) if live.numel() else (127, 127)
        if low < _least(high):
            return None
    whole = max(high - 8, 1)  # Biased; 1 is the least normal number of fp32.
    powers = (torch.arange(256, dtype=torch.int32, device=codes.device) - whole).clamp_(-9, 8)
    table = torch.ldexp(torch.ones_like(powers, dtype=torch.float32), powers).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = room_for((*exponents.shape, 2), torch.uint8, codes.device, mapped_bytes=PASSING_BYTES)
    for start in range(0, len(codes), _ROWS):
        part = slice(start, start + _ROWS)
        scales[part] = table[exponents[part].int()].unsqueeze(-1)
    total = torch.full((1,), 2.0 ** (whole - 127), dtype=torch.float32, device=codes.device)
    return scales.flatten(1).view(torch.float8_e4m3fn), total


def _least(high: int) -> int:
    """The least biased exponent beside a largest one."""
    return max(high - 17, 1)


def _not_zero(codes: torch.Tensor) -> torch.Tensor:
    """Which groups of some rows are not all zeros."""
    return (codes.view(torch.uint8).unflatten(1, (-1, GROUP // 2)) & 0x77 != 0).any(-1)


def recognise(specs: Specs, config: Mapping[str, Any]) -> MxFp4 | None:
    """By the dtypes: bytes for two values each, exponents for scales."""
    for values, scales in _FORMS:
        if values not in specs or scales not in specs:
            continue
        held, scale = specs[values], specs[scales]
        if held.dtype not in _BYTES or (values == "*" and scale.dtype not in EXPONENTS):
            continue
        if values == "*_packed" and scale.dtype not in EXPONENTS:
            continue
        if len(held.shape) < (3 if values == "*_blocks" else 2):
            raise Unusable(
                f"its values are {list(held.shape)}, and should be {'blocks of ' * (values == '*_blocks')}rows"
            )
        if scale.dtype not in EXPONENTS:
            raise Unusable(f"its scales are {scale.dtype}; those of mxfp4 are exponents (uint8)")
        elements = 2 * held.shape[-1] * (held.shape[-2] if values == "*_blocks" else 1)
        if scale.shape[-1:] and elements == GROUP * scale.shape[-1]:
            return MxFp4(values, scales)
    return None


FAMILY = Family(
    ("mxfp4", "compressed-tensors", "fp8"),
    tuple(dict.fromkeys([name for form in _FORMS for name in form] + list(_UNUSED))),
    recognise,
)
