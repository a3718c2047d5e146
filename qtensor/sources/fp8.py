"""fp8 values with scales per tensor, per channel or per block, in fp32, bf16, fp16 or powers of two (e8m0): mxfp8 too.

Owners: transformers' `Fp8Dequantize` (DeepSeek-V3's blocks, "weight_scale_inv"), compressed-tensors' `dequantize`
("weight_scale"), ModelOpt's FP8. All of them multiply code by scale and round once to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch

from .. import kernels
from ..kernels import FORMATS, Parts, WeightFormat
from ..kernels.formats import ceil_div
from .scales import EXPONENTS, as_exponents, finite_scales, in_fp32, overflows
from .source import UNNEEDED, Family, Matrix, PartSpec, Source, Span, Specs, Unusable

VALUES = "*"
SCALES = ("*_scale_inv", "*_scale")
UNUSED = ("input_scale", "input_scale_inv", "activation_scale")
_WIDE = (torch.float32, torch.bfloat16, torch.float16)
_WORTH_SEARCHING = 1 << 10
"""Elements of a block; of smaller ones the largest code takes as long as all values do."""
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Fp8(Source):
    """e4m3 values `[N, K]`, with a scale for each `block` of rows and columns; None in its place means all of them.

    Attributes:
        block: (None, None) per tensor, (1, None) per channel, (128, 128) DeepSeek's blocks, (1, 32) mxfp8.
        scale: The name of the part that holds the scales.
        dims: Dimensions of that tensor: per tensor 0, 1 or 2, per channel 1 or 2.
        exponents: The scales are stored as powers of two.
    """

    block: tuple[int | None, int | None]
    scale: str = "*_scale"
    dims: int = 2
    exponents: bool = False

    @property
    def name(self) -> str:
        rows, cols = self.block
        if cols is None:
            return "fp8 (per tensor)" if rows is None else "fp8 (per channel)"
        if self.block == (1, 32) and self.exponents:
            return "mxfp8"
        return f"fp8 (blocks of {rows} × {cols}{', powers of two' if self.exponents else ''})"

    def shape(self, specs: Specs) -> Matrix:
        found = specs[VALUES].shape if VALUES in specs else ()
        if len(found) != 2:
            raise Unusable(f"its values are {list(found)}, and should be a matrix")
        return found[0], found[1]

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        rows, cols = self.block
        grid = (ceil_div(shape[0], rows or shape[0] or 1), ceil_div(shape[1], cols or shape[1] or 1))
        scales = PartSpec(
            grid[: self.dims], EXPONENTS if self.exponents else _WIDE, Span(None) if rows is None else Span(0, 1, rows)
        )
        return {VALUES: PartSpec(shape, (torch.float8_e4m3fn,)), self.scale: scales, **dict.fromkeys(UNUSED, UNNEEDED)}

    @property
    def quick(self) -> bool:
        return True

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        finite_scales(parts[self.scale])

    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=parts[VALUES].device)
        if self.decode_into(parts, shape, out):
            return out
        return _times(parts[VALUES], in_fp32(self._grid(parts)), self.block).to(dtype)

    def decode_into(self, parts: Mapping[str, torch.Tensor], shape: Matrix, out: torch.Tensor) -> bool:
        values, scales = parts[VALUES], self._grid(parts)
        fmt = next((fmt for fmt in FORMATS.values() if _block_of(fmt) == self.block), None)
        if fmt is None or overflows(scales, fmt.max, out.dtype):
            return False
        held = as_exponents(scales) if fmt.has_e8m0_scale else in_fp32(scales)
        if held is None:
            return False
        values = values if values.stride(-1) == 1 else values.contiguous()
        kernels.dequantize(values, held.reshape(fmt.scale_shape(shape)).contiguous(), fmt, out.dtype, out)
        return True

    def amax(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> float | None:
        """Of each block the largest code is the largest magnitude, and only that is decoded."""
        rows, cols = (size or whole for size, whole in zip(self.block, shape, strict=True))
        if not parts[VALUES].is_cpu or not parts[VALUES].numel() or rows * cols < _WORTH_SEARCHING:
            return None
        largest = _largest_codes(parts[VALUES].view(torch.uint8).numpy(), rows, cols)
        scales = in_fp32(self._grid(parts)).expand(largest.shape)
        found = torch.from_numpy(largest).view(torch.float8_e4m3fn).float().mul_(scales).to(dtype).max().item()
        return found if isfinite(found) else None

    def moves(self, fmt: WeightFormat) -> Literal["unit", "matrix"] | None:
        """Into what has e4m3 values and scales of blocks that the ones here are made up of."""
        block = _block_of(fmt)
        if block is None or any(b is not None and (a is None or b % a) for a, b in zip(block, self.block, strict=True)):
            return None
        return "matrix" if fmt.has_e8m0_scale and not self.exponents else "unit"

    def move(self, parts: Mapping[str, torch.Tensor], shape: Matrix, fmt: WeightFormat) -> Parts | None:
        scales: torch.Tensor | None = self._grid(parts)
        assert scales is not None
        if fmt.granularity != "tensor":
            wanted, given = fmt.scale_shape(shape), self.block
            for dim, (size, ours, theirs) in enumerate(zip(shape, _block_of(fmt) or (), given, strict=True)):
                step, held = ours or size, theirs or size
                index = torch.arange(wanted[dim], dtype=torch.int64, device=scales.device) * step // max(held, 1)
                scales = scales.index_select(dim, index)
        scales = as_exponents(scales) if fmt.has_e8m0_scale else in_fp32(scales)
        return None if scales is None else Parts(parts[VALUES], scales.reshape(fmt.scale_shape(shape)))

    def never_moves(self, parts: Mapping[str, torch.Tensor], fmt: WeightFormat) -> bool:
        return as_exponents(self._grid(parts)) is None

    def _grid(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The scales as `[bands of rows, bands of columns]`."""
        scales = parts[self.scale]
        return scales.reshape(scales.shape[0] if self.block[0] is not None else 1, -1)


def _largest_codes(codes: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The largest code without its sign of each block of a matrix; NaN's is above all others."""
    largest = np.zeros((ceil_div(len(codes), rows), ceil_div(codes.shape[1], cols)), dtype=np.uint8)
    edges = np.arange(0, codes.shape[1], cols)
    step = min(rows, _ROWS_AT_ONCE)
    room = np.empty((step, codes.shape[1]), dtype=np.uint8)
    for band, found in enumerate(largest):
        for start in range(band * rows, min(band * rows + rows, len(codes)), step):
            part = codes[start : min(start + step, band * rows + rows)]
            magnitudes = np.bitwise_and(part, 0x7F, out=room[: len(part)])
            np.maximum(found, np.maximum.reduceat(magnitudes.max(0), edges), out=found)
    return largest


def _block_of(fmt: WeightFormat) -> tuple[int | None, int | None] | None:
    """How much one scale of a format is for, as `Fp8.block`; None for formats of other values."""
    if fmt.element != "e4m3":
        return None
    return {"tensor": (None, None), "channel": (1, None)}.get(fmt.granularity, fmt.block)


def _times(values: torch.Tensor, scales: torch.Tensor, block: tuple[int | None, int | None]) -> torch.Tensor:
    """Values times the scale of their block, in fp32."""
    rows, cols = (size or whole for size, whole in zip(block, values.shape, strict=True))
    wide = scales.repeat_interleave(rows, 0)[: values.shape[0]].repeat_interleave(cols, 1)[:, : values.shape[1]]
    return values.float().mul_(wide)


def recognise(specs: Specs, config: Mapping[str, Any]) -> Fp8 | None:
    """By dtype of the values, and by the shape of the scales."""
    values, name = specs.get(VALUES), next((name for name in SCALES if name in specs), None)
    if values is None or name is None or values.dtype.itemsize != 1 or not values.dtype.is_floating_point:
        return None
    if values.dtype != torch.float8_e4m3fn:
        raise Unusable(f"its values are {values.dtype}; of 8-bit floats only torch.float8_e4m3fn can be decoded")
    scale = specs[name]
    if len(values.shape) < 2:
        raise Unusable(f"its values are {list(values.shape)}, and should be a matrix")
    if scale.dtype not in (*_WIDE, *EXPONENTS):
        raise Unusable(f"its scales are {scale.dtype}; they can be fp32, bf16, fp16 or e8m0 (uint8)")
    *lead, rows, cols = values.shape
    for dims in (0, 1, 2):
        for block in _blocks(name, config):
            source = Fp8(block, name, dims, scale.dtype in EXPONENTS)
            if dims < (2 if block[1] is not None else int(block[0] is not None)):
                continue
            if (*lead, *source.parts((rows, cols))[name].shape) == scale.shape:
                return source
    raise Unusable(f"its scales are {list(scale.shape)}, which fits no blocks of its values {list(values.shape)}")


def _blocks(name: str, config: Mapping[str, Any]) -> list[tuple[int | None, int | None]]:
    """The blocks that scales may be of, the likeliest first: a matrix of one block is one per tensor as well. None is
    guessed from the scales' shape: that would make another format of scales that are cut off."""
    blocks: list[tuple[int | None, int | None]] = [(128, 128), (1, 32)]
    told = config.get("weight_block_size")
    if isinstance(told, (list, tuple)) and len(told) == 2 and all(type(n) is int and n > 0 for n in told):
        blocks.insert(0, (told[0], told[1]))
    whole: list[tuple[int | None, int | None]] = [(None, None), (1, None)]
    return [*blocks, *whole] if name == "*_scale_inv" else [*whole, *blocks]


FAMILY = Family(("fp8", "compressed-tensors", "modelopt", "fbgemm_fp8"), (VALUES, *SCALES, *UNUSED), recognise)
