"""nvfp4: e2m1 values, two in a byte, an e4m3 scale for each 16 of a row, and an fp32 scale for the matrix.

Owners: compressed-tensors ("*_packed", "*_scale", "*_global_scale", which the scales are divided by), ModelOpt ("*",
"*_scale", "*_scale_2", which they are multiplied with). The step is rounded to fp32, and the value once to the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .. import kernels
from ..kernels import NVFP4, Parts, WeightFormat
from ..kernels.codes import decode
from .scales import finite_scales, in_fp32, overflows
from .source import ROWS, UNNEEDED, Family, Matrix, PartSpec, Source, Span, Specs, Unusable

GROUP = 16
_FORMS = (("*_packed", "*_global_scale"), ("*", "*_scale_2"))
SCALES = "*_scale"
_UNUSED = ("input_global_scale", "input_scale")


@dataclass(frozen=True)
class NvFp4(Source):
    """Values `[N, K / 2]`, scales `[N, K / 16]`, and one for all, `[1]` or `[]`, by these names.

    Attributes:
        divides: The scales are divided by the one for all.
        dims: Dimensions of that.
    """

    values: str = "*_packed"
    whole: str = "*_global_scale"
    divides: bool = True
    dims: int = 1

    @property
    def name(self) -> str:
        return "nvfp4" if self.divides else "nvfp4 (ModelOpt)"

    def shape(self, specs: Specs) -> Matrix:
        found = specs[self.values].shape if self.values in specs else ()
        if len(found) != 2:
            raise Unusable(f"its values are {list(found)}, and should be a matrix")
        return found[0], 2 * found[1]

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        rows, cols = shape
        if cols % GROUP:
            raise Unusable(f"has {cols} columns; in nvfp4 they are a multiple of {GROUP}")
        return {
            self.values: PartSpec((rows, cols // 2), (torch.uint8,), ROWS),
            SCALES: PartSpec((rows, cols // GROUP), (torch.float8_e4m3fn,), ROWS),
            self.whole: PartSpec((1,) * self.dims, (torch.float32,), Span(None)),
            **dict.fromkeys(_UNUSED, UNNEEDED),
        }

    @property
    def quick(self) -> bool:
        return True

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        finite_scales(parts[SCALES])
        finite_scales(parts[self.whole])
        if self.divides and not parts[self.whole].all():
            raise Unusable("its global scale is 0, and scales are divided by it")

    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=parts[self.values].device)
        if self.decode_into(parts, shape, out):
            return out
        codes, scales, whole = self._plain(parts)
        step = scales.float() / whole if self.divides else scales.float() * whole
        return decode(codes, NVFP4).unflatten(1, (-1, GROUP)).mul_(step.unsqueeze(-1)).flatten(1).to(dtype)

    def decode_into(self, parts: Mapping[str, torch.Tensor], shape: Matrix, out: torch.Tensor) -> bool:
        codes, scales, whole = self._plain(parts)
        if self.divides or overflows(scales.float() * whole, NVFP4.max, out.dtype):
            return False
        kernels.dequantize(codes, scales, NVFP4, out.dtype, out, global_scale=whole)
        return True

    def moves(self, fmt: WeightFormat) -> Literal["unit"] | None:
        return "unit" if fmt.name == "nvfp4" else None

    def move(self, parts: Mapping[str, torch.Tensor], shape: Matrix, fmt: WeightFormat) -> Parts:
        codes, scales, whole = self._plain(parts)
        return Parts(codes, scales, whole.reciprocal() if self.divides else whole)

    def exact(self, parts: Mapping[str, torch.Tensor], fmt: WeightFormat) -> bool:
        """A divisor is kept as its inverse, which only powers of two have without rounding."""
        mantissa, _ = torch.frexp(in_fp32(parts[self.whole]))
        return not self.divides or bool((mantissa == 0.5).all())

    def _plain(self, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return parts[self.values].contiguous(), parts[SCALES].contiguous(), parts[self.whole].reshape(1)


def recognise(specs: Specs, config: Mapping[str, Any]) -> NvFp4 | None:
    """By the name of the scale for all, which no other format has."""
    for values, whole in _FORMS:
        if all(name in specs for name in (values, SCALES, whole)) and specs[values].dtype == torch.uint8:
            lead = len(specs[values].shape) - 2
            return NvFp4(values, whole, whole == "*_global_scale", len(specs[whole].shape) - lead)
    return None


FAMILY = Family(
    ("compressed-tensors", "modelopt"),
    tuple(dict.fromkeys([SCALES, *(name for form in _FORMS for name in form), *_UNUSED])),
    recognise,
)
