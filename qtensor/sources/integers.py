"""Integers with scales, and perhaps zero points, for groups of columns: compressed-tensors' formats, and what GPTQ, AWQ
and torchao share with them.

Owner of the formats recognised here: compressed-tensors' `decompress` ("pack-quantized", "int-quantized",
"naive-quantized"): code minus zero point, times scale, rounded to the scale's dtype; the model's dtype comes after
that. `IntegerSource` has what all of them do with the numbers; a format only says where they lie.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Literal, NamedTuple

import torch

from ..kernels import Parts, WeightFormat
from ..kernels.formats import ceil_div
from .source import ROWS, UNNEEDED, Family, Matrix, PartSpec, Source, Span, Specs, Unusable

WIDE = (torch.float16, torch.bfloat16, torch.float32)
INTS = (torch.int32, torch.int64)
VALUES, SCALE, ZEROS, ORDER = "*", "*_scale", "*_zero_point", "*_g_idx"
PACKED, SHAPE = "*_packed", "*_shape"
WORD = 32
"""Bits of the words that integers are packed into, the first in the lowest bits, without gaps."""
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


class Integers(NamedTuple):
    """Rows of a matrix as integers: `(values - zeros) * scales`.

    Attributes:
        values: `[rows, K]`, of any integer dtype.
        zeros: `[rows, groups]`, or a number for all.
        scales: `[rows, groups]`, or `[1, groups]` for all rows.
        groups: The group of each column, `[K]`; None if groups are equal runs of columns.
    """

    values: torch.Tensor
    zeros: torch.Tensor | int
    scales: torch.Tensor
    groups: torch.Tensor | None = None

    def centred(self) -> torch.Tensor:
        """Values minus zeros, int16 `[rows, K]`."""
        wide = self.values.to(torch.int16)
        if isinstance(self.zeros, int):
            return wide - self.zeros if self.zeros else wide
        zeros = self.zeros.to(torch.int16)
        if self.groups is not None:
            return wide - zeros.index_select(1, self.groups)
        return (wide.unflatten(1, (zeros.shape[1], -1)) - zeros.unsqueeze(-1)).flatten(1)

    def around_zero_points(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and zero points `[rows, groups]` as int16, both less the middle of what four bits hold; values less a
        zero point that is one for all."""
        if isinstance(self.zeros, int):
            return self.centred(), self.values.new_zeros((self.values.shape[0], 1), dtype=torch.int16)
        return self.values.to(torch.int16) - _MIDDLE, self.zeros.to(torch.int16) - _MIDDLE

    def times_scales(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers, rounded once to `dtype`: integers and scales of 16 bits have their product in fp32."""
        integers, scales = self.centred(), self.scales.float()
        if self.groups is not None:
            return (integers * scales.index_select(1, self.groups)).to(dtype)
        return (integers.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).to(dtype).flatten(1)


class IntegerSource(Source):
    """A source whose rows are integers with scales.

    bits: of a value as it is stored. scale: the part with the scales.
    """

    bits: int
    scale: str

    @abstractmethod
    def integers(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> Integers:
        """Rows as integers."""

    @property
    @abstractmethod
    def width(self) -> int | None:
        """Columns that share a scale; None for all of them, 0 where only the parts can tell."""

    @property
    @abstractmethod
    def symmetric(self) -> bool | None:
        """Whether every zero point is the middle of the range; None where only the zero points know."""

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        finite(parts[self.scale])

    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        found = self.integers(parts, shape)
        return found.times_scales(found.scales.dtype).to(dtype)

    def moves(self, fmt: WeightFormat) -> Literal["unit", "matrix"] | None:
        """Into formats whose scales are each for columns of one group here, and that have its integers."""
        coarser = self.width is None or (fmt.granularity == "group" and self.width and not self.width % fmt.block[1])
        bits = self.bits or 8
        if fmt.has_zero_point:  # Whether it has the scales, and GPTQ's zero points, these tell.
            return "matrix" if coarser and bits <= 4 else None
        largest = 1 << (bits - 1 if self.symmetric else bits)
        limit = _LIMITS.get((fmt.element, fmt.granularity))
        if not coarser or limit is None:
            return None
        if largest <= limit:  # Whether bfloat16 has the scales, these tell.
            return "matrix" if fmt.scale_dtype == torch.bfloat16 else "unit"
        return "matrix" if self.symmetric is None and largest <= 2 * limit and fmt.element != "e4m3" else None

    def move(self, parts: Mapping[str, torch.Tensor], shape: Matrix, fmt: WeightFormat) -> Parts | None:
        rows, cols = shape
        spans, limit = self.parts(shape), _LIMITS[fmt.element, fmt.granularity]
        moved = Parts.of(shape, fmt, parts[self.scale].device)
        for start in range(0, rows, _ROWS):
            stop = min(start + _ROWS, rows)
            cut = {name: _rows(part, spans[name].span, start, stop) for name, part in parts.items()}
            found = self.integers(cut, (stop - start, cols))
            scales = found.scales.float().expand(stop - start, -1)
            zeros = scales.new_zeros((stop - start, 1), dtype=torch.int16)
            if fmt.has_zero_point:
                integers, zeros = found.around_zero_points()
                if zeros.numel() and (int(zeros.min()) < -limit or int(zeros.max()) >= limit):
                    return None
                words = fmt.word(scales, zeros)
                if not torch.equal(fmt.step(words), scales):
                    return None
                scales = words
            else:
                integers = found.centred()
            if integers.numel() and (int(integers.min()) < -limit or int(integers.max()) > limit - (limit != 16)):
                return None
            if not torch.equal(scales.to(fmt.scale_dtype).to(scales.dtype), scales):
                return None
            if fmt.granularity == "group":
                index = torch.arange(moved.scale.shape[1], dtype=torch.int64, device=scales.device) * fmt.block[1]
                scales = scales.index_select(1, index // (self.width or max(cols, 1)))
            moved.scale[start:stop] = scales
            if fmt.element == "int4":
                pairs = torch.cat([integers, zeros[:, -1:]], 1) if cols % 2 else integers
                pairs = pairs.unflatten(1, (-1, 2)) & 0xF
                integers = pairs[..., 0] | pairs[..., 1] << 4
            moved.qdata[start:stop] = integers.float().to(fmt.dtype) if fmt.element == "e4m3" else integers
        return moved

    def never_moves(self, parts: Mapping[str, torch.Tensor], fmt: WeightFormat) -> bool:
        scales = parts[self.scale].float()
        held = fmt.word(scales, torch.zeros_like(scales)) if fmt.has_zero_point else scales.to(fmt.scale_dtype)
        return not torch.equal(fmt.step(held), scales)


_LIMITS = {("int4", "group"): 8, ("int8", "channel"): 128, ("e4m3", "channel"): 16}
"""Of formats with a float for a scale of each row, or group of a row: the integers from minus this on that they have,
up to one less; e4m3 has 16, too."""
_MIDDLE = 8
_ROWS = 128
"""Moved at a time, so that the integers, of two bytes each, stay few."""


def _rows(part: torch.Tensor, span: Span, start: int, stop: int) -> torch.Tensor:
    if span.axis is None:
        return part
    a, b = span.entries(start, stop, part.shape[span.axis])
    return part.narrow(span.axis, a, b - a)


def finite(scales: torch.Tensor) -> None:
    """Raises Unusable for scales that are NaN or infinite. (Negative ones have a meaning: some tools choose them.)"""
    bad = ~scales.isfinite()
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise Unusable(f"its scale {at} is {float(scales[tuple(at)])}; scales are finite")


def in_range(groups: torch.Tensor, count: int, part: str) -> None:
    """Raises Unusable for a group of a column that is not there."""
    bad = (groups < 0) | (groups >= count)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise Unusable(f"{part}[{at}] is {int(groups[at])}, and there are {count} groups of columns")


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The integers in words (int32) `[rows, words]`, without sign: uint8 `[rows, count]`."""
    if words.stride(-1) != 1:  # Of one row or column, `contiguous` would leave it.
        words = words.clone(memory_format=torch.contiguous_format)
    if bits in (2, 4, 8):
        held = words.view(torch.uint8)
        if bits == 4:
            held = torch.stack((held & 0xF, held >> 4), -1).flatten(1)
        elif bits == 2:
            held = torch.stack([held >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)
        return held[:, :count]
    start = torch.arange(count, dtype=torch.int64, device=words.device) * bits
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    both = wide[:, start // WORD] | wide[:, start // WORD + 1] << WORD
    return (both >> start % WORD & (1 << bits) - 1).to(torch.uint8)


def words_for(count: int, bits: int) -> int:
    """How many words hold so many integers."""
    return ceil_div(count * bits, WORD)


def packed_span(bits: int, axis: int) -> Span:
    """Of a part that has the integers of output rows packed along an axis."""
    common = gcd(bits, WORD)
    return Span(axis, bits // common, WORD // common)


@dataclass(frozen=True)
class CompressedIntegers(IntegerSource):
    """compressed-tensors' integers, packed into words or a byte each.

    Attributes:
        bits: In which values are stored; 0 where nobody said, and the matrix's shape has to tell.
        words: In a row of packed values.
        groups: Columns of the scales; 0 where one scale is for the whole matrix.
        dims: Dimensions of the scales.
        zeros: Whether there are zero points.
        ordered: Whether a part says to which group a column belongs.
        group: Columns of a group, where the configuration tells.
        told: The configuration tells whether there are zero points, and an order.
    """

    bits: int
    groups: int
    words: int = 0
    dims: int = 2
    zeros: bool = False
    ordered: bool = False
    group: int = 0
    told: bool = False
    scale: str = SCALE

    @property
    def later(self) -> tuple[str, ...]:
        return () if self.told else (ZEROS,) * (not self.zeros) + (ORDER,) * (not self.ordered)

    @property
    def name(self) -> str:
        what = f"int{self.bits}" if self.bits else "packed integers"
        which = "per tensor" if not self.groups else "per channel" if self.groups == 1 else "per group"
        if self.groups > 1 and self.group:
            which = f"groups of {self.group}"
        more = (", zero points" if self.zeros else "") + (", columns in another order" if self.ordered else "")
        return f"{what} ({which}{more})"

    @property
    def width(self) -> int | None:
        return 0 if self.ordered else None if self.groups <= 1 else self.group

    @property
    def symmetric(self) -> bool:
        return not self.zeros

    def shape(self, specs: Specs) -> Matrix:
        values = specs.get(PACKED if self.words else VALUES)
        if values is None or len(values.shape) != 2:
            raise Unusable("its values are not there, or no matrix")
        rows, cols = values.shape
        if not self.words:
            return rows, cols
        if self.groups > 1 and self.group:
            return rows, self.groups * self.group
        if not self.bits or WORD % self.bits:
            raise Unusable(f"its words {list(values.shape)} do not tell how many columns it has; a model does")
        return rows, cols * WORD // self.bits

    def shape_told(self, specs: Specs, read: Callable[[str], torch.Tensor]) -> Matrix:
        if SHAPE not in specs or specs[SHAPE].shape != (2,) or not self.words:
            return self.shape(specs)
        rows, cols = specs[PACKED].shape[0], read(SHAPE).tolist()[-1]
        if not 0 < cols <= self.words * WORD:
            raise Unusable(f"{SHAPE} says that it has {cols} columns, and there are {self.words} words in a row")
        return rows, cols

    def of(self, shape: Matrix) -> CompressedIntegers:
        """With its bits, and the columns of a group."""
        bits, runs = self._bits(shape[1]), self.groups > 1 and not self.ordered
        return replace(self, bits=bits, group=shape[1] // self.groups if runs else self.group)

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        rows, cols = shape
        if self.groups > 1 and not self.ordered and (cols % self.groups or self.group * self.groups not in (0, cols)):
            raise Unusable(f"{cols} columns are no {self.groups} groups" + f" of {self.group}" * bool(self.group))
        scales = (rows, self.groups)[: self.dims] if self.groups else (1,) * self.dims
        span = ROWS if self.groups else Span(None)
        found = dict.fromkeys(_UNUSED, UNNEEDED)
        if self.words:
            found[PACKED] = PartSpec((rows, words_for(cols, self._bits(cols))), (torch.int32,))
            found[SHAPE] = PartSpec((2,), INTS, Span(None))
        else:
            found[VALUES] = PartSpec(shape, (torch.int8,))
        found[SCALE] = PartSpec(scales, WIDE, span)
        if self.zeros and self.words and self.groups:
            bits = self._bits(cols)
            zeros = (words_for(rows, bits), *scales[1:])
            found[ZEROS] = PartSpec(zeros, (torch.int32,), packed_span(bits, 0))
        elif self.zeros:
            found[ZEROS] = PartSpec(scales, (torch.int8,), span)
        if self.ordered:
            found[ORDER] = PartSpec((cols,), INTS, Span(None))
        return found

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        super().check(parts, shape)
        if self.words and (told := parts[SHAPE].tolist())[1] != shape[1]:
            raise Unusable(f"{SHAPE} says {told}, and the weight has {shape[1]} columns")
        if self.ordered and not (parts[ORDER] == -1).all():
            in_range(parts[ORDER], self.groups, ORDER)

    def integers(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> Integers:
        rows, cols = shape
        scales = parts[SCALE].reshape(-1, max(self.groups, 1))
        bits = self._bits(cols)
        half = 1 << bits - 1 if self.words else 0
        values = unpack(parts[PACKED], bits, cols) if self.words else parts[VALUES]
        groups = None
        # All -1: the file has the part, and its columns are in order.
        if self.ordered and not (parts[ORDER] == -1).all():
            groups = parts[ORDER].long()
        if not self.zeros:
            return Integers(values, half, scales, groups)
        if self.words and self.groups:
            packed = parts[ZEROS].reshape(-1, self.groups)
            return Integers(values, unpack(packed.t(), bits, rows).t(), scales, groups)
        return Integers(values, parts[ZEROS].reshape(scales.shape).to(torch.int16) + half, scales, groups)

    def _bits(self, cols: int) -> int:
        if self.bits:
            return self.bits
        fit = [bits for bits in range(1, 9) if words_for(cols, bits) == self.words]
        if len(fit) != 1:
            raise Unusable(
                f"{self.words} words for {cols} columns do not tell in how many bits its integers are packed"
            )
        return fit[0]


def weight_args(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors' configuration says of integer weights: one object for each group of modules."""
    groups = config.get("config_groups")
    found = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    return [args for args in found if isinstance(args, Mapping) and args.get("type") == "int"]


def recognise(specs: Specs, config: Mapping[str, Any]) -> CompressedIntegers | None:
    """By the dtype of the values; bits and groups by the configuration, as far as the parts agree."""
    packed = PACKED in specs and specs[PACKED].dtype == torch.int32
    if not packed and (VALUES not in specs or specs[VALUES].dtype != torch.int8):
        return None
    if SCALE not in specs or specs[SCALE].dtype not in WIDE:
        return None
    values, scale = specs[PACKED if packed else VALUES], specs[SCALE]
    lead = len(values.shape) - 2
    dims = len(scale.shape) - lead
    if dims not in (0, 1, 2):
        raise Unusable(f"its scales are {list(scale.shape)}, and should be a number, a column or a matrix")
    rows = values.shape[-2]
    whole = (dims < 2 and scale.shape[lead:] != (rows,)) or (dims == 2 and scale.shape[-2] != rows)
    groups = 0 if whole else scale.shape[-1] if dims == 2 else 1
    told = _fitting(weight_args(config), values.shape[-1], groups, packed)
    zeros = ZEROS in specs or (bool(told) and all(args.get("symmetric") is False for args in told))
    ordered = ORDER in specs or (bool(told) and all(args.get("actorder") in ("group", "dynamic") for args in told))
    bits = {args["num_bits"] for args in told} if packed else {8}
    sizes = {args.get("group_size") for args in told} if told else set()
    size = sizes.pop() if len(sizes) == 1 else None
    group = size if groups > 1 and type(size) is int and size > 0 else 0
    if groups > 1 and not packed and not group and not values.shape[-1] % groups:
        group = values.shape[-1] // groups
    words = values.shape[-1] if packed else 0
    return CompressedIntegers(
        bits.pop() if len(bits) == 1 else 0, groups, words, dims, zeros, ordered, group, bool(told)
    )


def _fitting(told: list[Mapping[str, Any]], values: int, groups: int, packed: bool) -> list[Mapping[str, Any]]:
    """Those that can be meant by a weight with so many words (or values) and groups in a row."""
    found = []
    for args in told:
        bits, size = args.get("num_bits"), args.get("group_size")
        if type(bits) is not int or not 1 <= bits <= 8:
            raise Unusable(f"config.json says that its integers have {bits!r} bits; they can have 1 to 8")
        if groups > 1 and type(size) is int and size > 0:
            if values != (words_for(groups * size, bits) if packed else groups * size):
                continue
        elif groups > 1:
            continue
        found.append(args)
    return found


FAMILY = Family(("compressed-tensors",), (VALUES, PACKED, SCALE, ZEROS, ORDER, SHAPE, *_UNUSED), recognise)
