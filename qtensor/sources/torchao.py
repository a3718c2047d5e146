"""torchao's tensors as its safetensors support flattens them: "_weight_qdata", "_weight_scale", "_weight_zero_point".

Owner: the `dequantize` of torchao's Float8Tensor, Int8Tensor and IntxUnpackedToInt8Tensor: code minus zero point, times
scale, in fp32, rounded once to the dtype that is asked for. Its other classes are refused by name: Int4Tensor and
Int4TilePackedTo4dTensor are defined by GPU kernels, and of MXTensor and NVFP4Tensor only the file's metadata says in
which order their scales lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from ..kernels import Parts, WeightFormat
from . import fp8
from .integers import WIDE, Integers, IntegerSource
from .source import ROWS, Family, Matrix, PartSpec, Source, Span, Spec, Specs, Unusable

VALUES, SCALE, ZEROS, BOTH, ACTIVATIONS = (
    "_*_qdata",
    "_*_scale",
    "_*_zero_point",
    "_*_scale_and_zero",
    "_*_act_pre_scale",
)
_PER_TENSOR = "_*_per_tensor_scale"
_T = TypeVar("_T")
_AS_FP8 = {VALUES: "*", SCALE: "*_scale"}
_OF_FP8 = {theirs: ours for ours, theirs in _AS_FP8.items()}


@dataclass(frozen=True)
class TorchaoFloat8(Source):
    """Float8Tensor: what `fp8.Fp8` is, by other names."""

    inner: Source

    @property
    def name(self) -> str:
        return f"torchao {self.inner.name}"

    def shape(self, specs: Specs) -> Matrix:
        return self.inner.shape(_renamed(specs))

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        return {_OF_FP8[name]: part for name, part in self.inner.parts(shape).items() if name in _OF_FP8}

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        self.inner.check(_renamed(parts), shape)

    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        return self.inner.decode(_renamed(parts), shape, dtype)

    def moves(self, fmt: WeightFormat) -> Literal["unit", "matrix"] | None:
        return self.inner.moves(fmt)

    def move(self, parts: Mapping[str, torch.Tensor], shape: Matrix, fmt: WeightFormat) -> Parts | None:
        return self.inner.move(_renamed(parts), shape, fmt)


def _renamed(parts: Mapping[str, _T]) -> dict[str, _T]:
    return {_AS_FP8[name]: part for name, part in parts.items() if name in _AS_FP8}


@dataclass(frozen=True)
class TorchaoIntegers(IntegerSource):
    """Int8Tensor and IntxUnpackedToInt8Tensor: a byte for each value, whatever its bits.

    Attributes:
        columns: Of the matrix.
        groups: Columns of the scales.
        whole: Whether one scale is for the whole matrix.
    """

    columns: int
    groups: int
    whole: bool = False
    bits: int = 8
    scale: str = SCALE

    @property
    def name(self) -> str:
        which = "per channel" if self.groups == 1 else f"groups of {self.columns // self.groups}"
        return f"torchao int8 ({'per tensor' if self.whole else which})"

    @property
    def width(self) -> int | None:
        return None if self.groups == 1 else self.columns // self.groups

    @property
    def symmetric(self) -> bool | None:
        return None

    def shape(self, specs: Specs) -> Matrix:
        return specs[VALUES].shape[-2], self.columns

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        grid, span = (1 if self.whole else shape[0], self.groups), Span(None) if self.whole else ROWS
        values = PartSpec((shape[0], self.columns), (torch.int8,))
        return {VALUES: values, SCALE: PartSpec(grid, WIDE, span), ZEROS: PartSpec(grid, (torch.int8,), span)}

    def integers(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> Integers:
        return Integers(parts[VALUES], parts[ZEROS], parts[SCALE])

    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        return self.integers(parts, shape).times_scales(dtype)


def recognise(specs: Specs, config: Mapping[str, Any]) -> Source | None:
    """By names and dtypes."""
    if VALUES not in specs:
        return None
    if BOTH in specs or _PER_TENSOR in specs:
        name = BOTH if BOTH in specs else _PER_TENSOR
        raise Unusable(f"has {name}, as torchao's 4-bit tensors for GPUs do; of torchao, fp8 and int8 can be decoded")
    if ACTIVATIONS in specs:
        raise Unusable(f"has {ACTIVATIONS}: its layer multiplies activations by that, which no weight can say")
    if SCALE not in specs:
        return None
    values, scale = specs[VALUES], specs[SCALE]
    if values.dtype.is_floating_point and scale.dtype == torch.float32:
        inner = fp8.recognise(_renamed(specs), {})
        return None if inner is None else TorchaoFloat8(inner)
    # Its integers have zero points, if only zeros.
    if ZEROS not in specs and values.dtype == torch.int8:
        return None
    grid = scale.shape[-2:]
    if values.dtype != torch.int8 or scale.dtype not in WIDE or len(values.shape) < 2 or len(scale.shape) < 2:
        raise Unusable(
            f"its values are {_told(values)} with scales {_told(scale)}; of torchao, fp8 and int8 can be decoded"
        )
    rows, cols = values.shape[-2:]
    if grid[0] not in (1, rows) or not grid[1] or cols % grid[1]:
        raise Unusable(f"its scales are {list(scale.shape)}, which fits no int8 values {list(values.shape)}")
    return TorchaoIntegers(cols, grid[1], grid[0] == 1 and rows != 1 and grid[1] == 1)


def _told(spec: Spec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


FAMILY = Family(("torchao",), (VALUES, SCALE, ZEROS, BOTH, ACTIVATIONS, _PER_TENSOR), recognise)
