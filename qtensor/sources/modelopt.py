"""ModelOpt's 4-bit integers ("W4A16_AWQ"), two output rows in a byte; and what it asks of a layer beside its weight.

Owner: ModelOpt's `pack_int4_in_uint8`: code times scale, which is in fp32. Where AWQ's factors could not be put into
the layer before, a layer has "pre_quant_scale", which activations are multiplied with: no weight can say that, and of
it the weight alone would be another layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .integers import WIDE, Integers, IntegerSource
from .source import ROWS, UNNEEDED, Family, Matrix, PartSpec, Span, Specs, Unusable

VALUES, SCALE, ACTIVATIONS = "*", "*_scale", "pre_quant_scale"
_UNUSED = ("input_scale",)
_PAIRS = Span(0, 1, 2)


@dataclass(frozen=True)
class PairedRows(IntegerSource):
    """Values uint8 `[N / 2, K]`: of rows 2 i in the low half, 2 i + 1 in the high one; scales `[N, groups]`."""

    groups: int
    columns: int
    bits: int = 4
    scale: str = SCALE

    @property
    def name(self) -> str:
        return f"ModelOpt int4 (groups of {self.columns // self.groups})"

    @property
    def width(self) -> int | None:
        return None if self.groups == 1 else self.columns // self.groups

    @property
    def symmetric(self) -> bool:
        return True

    def shape(self, specs: Specs) -> Matrix:
        return specs[SCALE].shape[-2], self.columns

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        rows, cols = shape
        if rows % 2 or cols != self.columns:
            raise Unusable(f"a matrix {list(shape)} is no pairs of rows with {self.columns} columns")
        return {
            VALUES: PartSpec((rows // 2, cols), (torch.uint8,), _PAIRS),
            SCALE: PartSpec((rows, self.groups), WIDE, ROWS),
            **dict.fromkeys(_UNUSED, UNNEEDED),
        }

    def integers(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> Integers:
        held = parts[VALUES].view(torch.int8)
        values = torch.stack((held << 4 >> 4, held >> 4), 1).flatten(0, 1)
        return Integers(values, 0, parts[SCALE])


def recognise(specs: Specs, config: Mapping[str, Any]) -> PairedRows | None:
    """By the dtypes, and twice as many rows of scales as of values."""
    if ACTIVATIONS in specs and VALUES in specs:
        raise Unusable(
            f"has {ACTIVATIONS}: its layer multiplies activations by that, which no weight can say. Take a checkpoint "
            "that was made without AWQ"
        )
    values, scale = specs.get(VALUES), specs.get(SCALE)
    if values is None or scale is None or values.dtype != torch.uint8 or scale.dtype not in WIDE:
        return None
    if len(values.shape) < 2 or len(scale.shape) != len(values.shape) or scale.shape[-2] != 2 * values.shape[-2]:
        return None
    groups, columns = scale.shape[-1], values.shape[-1]
    if not groups or columns % groups:
        raise Unusable(f"its scales are {list(scale.shape)}, which are no groups of {columns} columns")
    return PairedRows(groups, columns)


FAMILY = Family(("modelopt",), (VALUES, SCALE, ACTIVATIONS, *_UNUSED), recognise)
