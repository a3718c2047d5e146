"""GPTQ: 2, 3, 4 or 8 bits, the integers of 32 / bits columns in a word, with a group for each column (`g_idx`).

Owner: GPTQModel's `dequantize_weight` (what transformers loads these with): code minus zero point, times scale, in the
scales' dtype (fp16). Checkpoints of the first version ("gptq", as AutoGPTQ wrote them) hold zero points less one, and
GPTQModel adds it to whole words, with what carries over from a zero point to the next; of 3 bits, to each for itself.
"gptq_v2" holds them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..kernels import Parts, WeightFormat
from ..kernels.formats import ceil_div
from .integers import (
    INTS,
    WIDE,
    WORD,
    Integers,
    IntegerSource,
    in_range,
    packed_span,
    unpack,
    words_for,
)
from .source import UNNEEDED, Family, Matrix, PartSpec, Span, Specs, Unusable

VALUES, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
BITS = (2, 3, 4, 8)
_COLUMN = Span(1)


@dataclass(frozen=True)
class Gptq(IntegerSource):
    """A weight as GPTQ tools store it: `[K, N]`.

    Attributes:
        bits: Of a value.
        groups: Rows of the scales.
        group: Columns that share a scale, where no part says which; 0 where `g_idx` does.
        first: Zero points are stored less one.
        symmetric: The configuration says that no zero point is the middle of the range (False), or they have to be
            looked at.
        stored: Columns that there is room for, which is K.
    """

    bits: int
    groups: int
    stored: int
    group: int = 0
    first: bool = True
    symmetric: bool | None = None
    scale: str = SCALES

    @property
    def name(self) -> str:
        which = "per channel" if self.groups == 1 else f"{self.groups} groups of columns"
        if self.group and self.groups > 1:
            which = f"groups of {self.group}"
        return f"GPTQ int{self.bits} ({which}{'' if self.first else ', v2'})"

    @property
    def width(self) -> int | None:
        if self.groups == 1:
            return None
        return self.group or ceil_div(self.stored, self.groups)

    def shape(self, specs: Specs) -> Matrix:
        return specs[SCALES].shape[-1], self.stored

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        rows, cols = shape
        if self.group and ceil_div(cols, self.group) != self.groups:
            raise Unusable(f"{cols} columns are no {self.groups} groups of {self.group}")
        values = PartSpec((words_for(cols, self.bits), rows), (torch.int32,), _COLUMN)
        zeros = PartSpec((self.groups, words_for(rows, self.bits)), (torch.int32,), packed_span(self.bits, 1))
        order = UNNEEDED if self.group else PartSpec((cols,), INTS, Span(None))
        return {VALUES: values, ZEROS: zeros, SCALES: PartSpec((self.groups, rows), WIDE, _COLUMN), ORDER: order}

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        super().check(parts, shape)
        if not self.group:
            in_range(parts[ORDER], self.groups, ORDER)

    def integers(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> Integers:
        rows, cols = shape
        values = unpack(parts[VALUES].t(), self.bits, cols)
        stored = parts[ZEROS]
        if self.first and self.bits != 3:
            stored = stored + _ONES[self.bits]
        zeros = unpack(stored, self.bits, rows)
        if self.first and self.bits == 3:
            zeros = zeros + 1 & 7
        return Integers(values, zeros.t(), parts[SCALES].t(), self._groups(parts, cols))

    def moves(self, fmt: WeightFormat) -> Literal["unit", "matrix"] | None:
        found = super().moves(fmt)
        # Whether groups are runs of columns, `g_idx` tells.
        return "matrix" if found and not self.group and self.groups > 1 else found

    def move(self, parts: Mapping[str, torch.Tensor], shape: Matrix, fmt: WeightFormat) -> Parts | None:
        return None if self._groups(parts, shape[1]) is not None else super().move(parts, shape, fmt)

    def _groups(self, parts: Mapping[str, torch.Tensor], cols: int) -> torch.Tensor | None:
        """The group of each column; None where they are equal runs of columns."""
        width = max(self.width or cols, 1)
        plain = torch.arange(cols, dtype=torch.int64, device=parts[VALUES].device) // width
        groups = plain if self.group else parts[ORDER].long()
        return None if width * self.groups == cols and torch.equal(groups, plain) else groups


_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""One in every integer of a word."""


def recognise(specs: Specs, config: Mapping[str, Any]) -> Gptq | None:
    """By the shapes of the parts; AWQ has the same names and `qweight` the other way round."""
    if VALUES not in specs or SCALES not in specs or ZEROS not in specs:
        return None
    values, zeros, scales = specs[VALUES].shape, specs[ZEROS].shape, specs[SCALES].shape
    if any(len(shape) < 2 for shape in (values, zeros, scales)) or values[-1] != scales[-1]:
        return None
    rows, groups = scales[-1], scales[-2]
    told = config.get("bits")
    if told is not None and told not in BITS:
        raise Unusable(f"config.json says that its integers have {told!r} bits; GPTQ's can have 2, 3, 4 or 8")
    fit = [bits for bits in BITS if words_for(rows, bits) == zeros[-1] and (told is None or bits == told)]
    if len(fit) != 1:
        says = f", and config.json says {told}" if told is not None else ""
        raise Unusable(f"its {ZEROS} {list(zeros)} are {rows} zero points of no known number of bits{says}")
    bits, stored = fit[0], values[-2] * WORD // fit[0]
    if config.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        raise Unusable(f"config.json's checkpoint_format is {config['checkpoint_format']!r}; it can be gptq or gptq_v2")
    if ORDER not in specs and config.get("desc_act") is not False:
        return None
    size = config.get("group_size")
    group = size if type(size) is int and size > 0 else ceil_div(stored, groups)
    first = config.get("checkpoint_format", "gptq") == "gptq"
    return Gptq(
        bits, groups, stored, 0 if ORDER in specs else group, first, False if config.get("sym") is False else None
    )


FAMILY = Family(("gptq", "gptqmodel", "auto-round"), (VALUES, ZEROS, SCALES, ORDER), recognise)
