"""AWQ in the GEMM order: 4 bits, the integers of 8 output rows in a word, interleaved.

Owner: AutoAWQ's `dequantize_gemm`: code minus zero point, times scale, in the scales' dtype (fp16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .integers import WIDE, WORD, Integers, IntegerSource
from .source import Family, Matrix, PartSpec, Span, Specs, Unusable

VALUES, ZEROS, SCALES = "qweight", "qzeros", "scales"
BITS = 4
_PER_WORD = WORD // BITS
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the integer of each of its output rows is."""
_WORDS = Span(1, 1, _PER_WORD)


@dataclass(frozen=True)
class Awq(IntegerSource):
    """A weight as AutoAWQ stores it: `[K, N]`, in groups of `group` columns."""

    group: int
    groups: int
    bits: int = BITS
    scale: str = SCALES

    @property
    def name(self) -> str:
        return f"AWQ int{self.bits} (groups of {self.group})"

    @property
    def width(self) -> int | None:
        return None if self.groups == 1 else self.group

    @property
    def symmetric(self) -> bool:
        return False

    def shape(self, specs: Specs) -> Matrix:
        return specs[SCALES].shape[-1], self.group * self.groups

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        rows, cols = shape
        if cols != self.group * self.groups or rows % _PER_WORD:
            raise Unusable(
                f"a matrix {list(shape)} is no {self.groups} groups of {self.group} columns, of rows by the {_PER_WORD}"
            )
        return {
            VALUES: PartSpec((cols, rows // _PER_WORD), (torch.int32,), _WORDS),
            ZEROS: PartSpec((self.groups, rows // _PER_WORD), (torch.int32,), _WORDS),
            SCALES: PartSpec((self.groups, rows), WIDE, Span(1)),
        }

    def integers(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> Integers:
        return Integers(_unpack(parts[VALUES]), _unpack(parts[ZEROS]), parts[SCALES].t())


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """Words `[K, rows / 8]` → integers without sign, uint8 `[rows, K]`."""
    turned = words.t()
    return torch.stack([(turned >> BITS * at & 0xF).to(torch.uint8) for at in _ORDER], 1).flatten(0, 1)


def recognise(specs: Specs, config: Mapping[str, Any]) -> Awq | None:
    """By the shapes of the parts; GPTQ has the same names and `qweight` the other way round."""
    if VALUES not in specs or SCALES not in specs:
        return None
    values, scales = specs[VALUES].shape, specs[SCALES].shape
    if len(values) < 2 or len(scales) < 2 or values[-1] * _PER_WORD != scales[-1]:
        return None
    version = config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise Unusable(f"config.json's version is {version!r}; of AWQ's layouts only gemm can be decoded")
    if config.get("bits", BITS) != BITS:
        raise Unusable(f"config.json says that its integers have {config['bits']!r} bits; AWQ's have {BITS}")
    groups, cols = scales[-2], values[-2]
    if not groups or cols % groups:
        raise Unusable(f"its scales are {list(scales)}, which are no groups of {cols} columns")
    return Awq(cols // groups, groups)


FAMILY = Family(("awq",), (VALUES, ZEROS, SCALES), recognise)
