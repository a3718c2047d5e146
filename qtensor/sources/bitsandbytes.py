"""bitsandbytes: nf4 and fp4, whose absmax may be quantized itself, and int8.

Owner: bitsandbytes' `dequantize_4bit` (value of the code times the block's absmax, in fp32, rounded to the dtype that
the weight had before) and `int8_vectorwise_dequant` (code times the row's absmax, times 1 / 127 in fp32, in fp32). What
absmax values were quantized to is a code of 256 values times the absmax of 256 of them, plus a mean, in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any, Literal

import torch

from ..kernels import Parts, WeightFormat
from ..kernels.formats import ceil_div
from .integers import finite
from .source import ROWS, UNNEEDED, Family, Matrix, PartSpec, Source, Span, Specs, Unusable

VALUES, ABSMAX, CODE = "*", "*.absmax", "*.quant_map"
NESTED_ABSMAX, NESTED_CODE = "*.nested_absmax", "*.nested_quant_map"
STATES = {"nf4": "*.quant_state.bitsandbytes__nf4", "fp4": "*.quant_state.bitsandbytes__fp4"}
ROW_ABSMAX, ORDER = "SCB", "*_format"
NESTED_BLOCK = 256
_BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INVERSE = 7.874015718698502e-3
"""Of 127, to the digits that bitsandbytes has."""
CODES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.005208333333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25),
        *(0.0, -0.005208333333, -0.6666666667, -1.0, -0.3333333333, -0.5, -0.1666666667, -0.25),
    ),
}
"""The values of the codes. bitsandbytes decodes with its own tables, not with the one in the file."""


@dataclass(frozen=True)
class FourBit(Source):
    """nf4 or fp4: two values in a byte, the first in the high half; blocks go on across rows.

    Attributes:
        kind: "nf4" or "fp4".
        block: Values that share an absmax.
        nested: Whether the absmax are quantized themselves.
        count: Bytes of the values.
    """

    kind: str
    block: int
    nested: bool
    count: int

    @property
    def name(self) -> str:
        return f"bitsandbytes {self.kind} (blocks of {self.block}{', nested' if self.nested else ''})"

    def shape(self, specs: Specs) -> Matrix:
        raise Unusable(f"its values are {self.count} bytes in a list: how many columns it has, only a model tells")

    def shape_told(self, specs: Specs, read: Callable[[str], torch.Tensor]) -> Matrix:
        part = STATES[self.kind]
        found = _parsed(bytes(read(part).tolist()), part).get("shape")
        sizes = found if isinstance(found, list) and all(type(n) is int and n > 0 for n in found) else []
        if len(sizes) != 2 or ceil_div(sizes[0] * sizes[1], 2) != self.count:
            raise Unusable(f"{part} says that its shape is {found!r:.60}, and its values are {self.count} bytes")
        return sizes[0], sizes[1]

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        rows, cols = shape
        blocks = ceil_div(rows * cols, self.block)
        found = {
            VALUES: PartSpec((ceil_div(rows * cols, 2), 1), (torch.uint8,), _run(cols, 2)),
            ABSMAX: PartSpec((blocks,), (torch.uint8 if self.nested else torch.float32,), _run(cols, self.block)),
            CODE: PartSpec((len(CODES[self.kind]),), (torch.float32,), Span(None)),
            STATES[self.kind]: PartSpec((-1,), (torch.uint8,), Span(None)),
        }
        if self.nested:
            many = self.block * NESTED_BLOCK
            found[NESTED_ABSMAX] = PartSpec((ceil_div(blocks, NESTED_BLOCK),), (torch.float32,), _run(cols, many))
            found[NESTED_CODE] = PartSpec((256,), (torch.float32,), Span(None))
        return found

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        finite(parts[NESTED_ABSMAX] if self.nested else parts[ABSMAX])
        if not torch.allclose(
            parts[CODE].cpu(), torch.tensor(CODES[self.kind], dtype=torch.float32, device="cpu"), atol=1e-6
        ):
            raise Unusable(f"{CODE} is no codebook of {self.kind}")
        state = self._state(parts)
        for key, wanted in (("quant_type", self.kind), ("blocksize", self.block)):
            if state.get(key) != wanted:
                raise Unusable(
                    f"{STATES[self.kind]} says that {key} is {state.get(key)!r}, and its parts are {wanted!r}"
                )
        stored = state.get("shape")
        if not isinstance(stored, list) or len(stored) != 2 or stored[1] != shape[1]:
            raise Unusable(
                f"{STATES[self.kind]} says that its shape is {stored}, and the weight has {shape[1]} columns"
            )
        if state.get("dtype") not in _DTYPES:
            raise Unusable(f"{STATES[self.kind]} says that its dtype is {state.get('dtype')!r}")
        size, mean = state.get("nested_blocksize"), state.get("nested_offset")
        if self.nested and (size != NESTED_BLOCK or not _finite(mean)):
            raise Unusable(
                f"{STATES[self.kind]} says that nested_blocksize is {size!r} and nested_offset {mean!r}; they should "
                f"be {NESTED_BLOCK} and a finite number"
            )

    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        rows, cols = shape
        state = self._state(parts)
        absmax = parts[ABSMAX]
        if self.nested:
            absmax = _blocks_times(parts[NESTED_CODE][absmax.int()], parts[NESTED_ABSMAX], NESTED_BLOCK)
            absmax = absmax + torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=absmax.device)
        held = parts[VALUES].reshape(-1)
        table = torch.tensor(CODES[self.kind], dtype=torch.float32, device=held.device)
        values = torch.stack((table[(held >> 4).int()], table[(held & 0xF).int()]), 1).flatten()[: rows * cols]
        return _blocks_times(values, absmax, self.block).reshape(shape).to(_DTYPES[state["dtype"]]).to(dtype)

    def _state(self, parts: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        return _parsed(bytes(parts[STATES[self.kind]].tolist()), STATES[self.kind])


@lru_cache(maxsize=64)
def _parsed(text: bytes, part: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Unusable(f"{part} is no JSON text ({error})") from None
    if not isinstance(found, dict):
        raise Unusable(f"{part} is no JSON object")
    return found


def _finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and abs(number) < float("inf")


def _run(cols: int, block: int) -> Span:
    """Of a list with an entry for each so many elements of the matrix, one row after the other."""
    common = gcd(cols, block)
    return Span(0, cols // common, block // common) if cols else Span(0)


def _blocks_times(values: torch.Tensor, absmax: torch.Tensor, block: int) -> torch.Tensor:
    """A list of values, times what is for each block of them."""
    whole = len(values) // block * block
    found = (values[:whole].view(-1, block) * absmax[: whole // block, None]).flatten()
    return found if whole == len(values) else torch.cat((found, values[whole:] * absmax[whole // block]))


@dataclass(frozen=True)
class EightBit(Source):
    """int8 `[N, K]`, with the absmax of each row.

    ordered: a part says whether the rows lie as they are.
    """

    ordered: bool = False

    @property
    def name(self) -> str:
        return "bitsandbytes int8"

    def shape(self, specs: Specs) -> Matrix:
        rows, cols = specs[VALUES].shape
        return rows, cols

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        order = PartSpec((), (torch.uint8,), Span(None)) if self.ordered else UNNEEDED
        return {
            VALUES: PartSpec(shape, (torch.int8,)),
            ROW_ABSMAX: PartSpec(shape[:1], (torch.float32,), ROWS),
            ORDER: order,
        }

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        finite(parts[ROW_ABSMAX])
        if self.ordered and parts[ORDER].item() != 0:
            raise Unusable(f"{ORDER} is {parts[ORDER].item()}; only 0, rows as they are, can be decoded")

    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        return (parts[VALUES] * parts[ROW_ABSMAX].view(-1, 1) * _INVERSE).to(dtype)

    def moves(self, fmt: WeightFormat) -> Literal["unit"] | None:
        return "unit" if fmt.element == "int8" and fmt.granularity == "channel" else None

    def move(self, parts: Mapping[str, torch.Tensor], shape: Matrix, fmt: WeightFormat) -> Parts | None:
        return Parts(parts[VALUES].contiguous(), parts[ROW_ABSMAX].view(-1, 1) * _INVERSE)

    def exact(self, parts: Mapping[str, torch.Tensor], fmt: WeightFormat) -> bool:
        """The scale is absmax / 127, which is rounded here as it is in the owner's product."""
        return False


def recognise(specs: Specs, config: Mapping[str, Any]) -> Source | None:
    """By the names of the parts."""
    values = specs.get(VALUES)
    if values is None:
        return None
    if ROW_ABSMAX in specs and values.dtype == torch.int8:
        return EightBit(ORDER in specs)
    kind = next((kind for kind, name in STATES.items() if name in specs), None)
    if kind is None or ABSMAX not in specs:
        return None
    if values.dtype != torch.uint8 or len(values.shape) != 2:
        raise Unusable(
            f"its values are {values.dtype} {list(values.shape)}; of bitsandbytes' 4-bit weights only those stored as "
            "uint8 [bytes, 1] can be decoded"
        )
    absmax, count = specs[ABSMAX], values.shape[0]
    fit = [b for b in _BLOCKS if absmax.shape in {(ceil_div(2 * count - odd, b),) for odd in (0, 1)}]
    if not fit:
        raise Unusable(f"its absmax {list(absmax.shape)} are of no blocks of {2 * count} values")
    told = config.get("bnb_4bit_blocksize")
    return FourBit(kind, told if told in fit else fit[0], absmax.dtype == torch.uint8, count)


FAMILY = Family(
    ("bitsandbytes",),
    (VALUES, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, *STATES.values(), ROW_ABSMAX, ORDER),
    recognise,
)
