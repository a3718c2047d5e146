"""GGUF: llama.cpp's blocks of 32 or 256 values of a row, each with its scales inside.

Owner: the gguf package's `quants.dequantize`, in fp32, rounded to the model's dtype afterwards. The types that most
files are made of are decoded here, in the same order of operations; the others (IQ, ternary, floats of 4 bits) by that
package (`pip install 'qtensor-online[gguf]'`).

A part's name says its type: "*.Q4_K" holds the rows of a weight as they lie in the file, uint8 `[N, bytes]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..extras import require
from ..kernels.cpu.compiling import Once
from .source import Family, Matrix, PartSpec, Source, Specs, Unusable

TYPES: dict[str, tuple[int, int, int]] = {
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "IQ1_M": (29, 256, 56),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
}
"""By type: its number in a file, the values of a block, and the bytes of one."""
PREFIX = "*."


@dataclass(frozen=True)
class Gguf(Source):
    """Rows of blocks of one of the `TYPES`; columns: of the matrix."""

    type: str
    columns: int

    @property
    def name(self) -> str:
        return f"GGUF {self.type}"

    @property
    def part(self) -> str:
        return PREFIX + self.type

    def shape(self, specs: Specs) -> Matrix:
        return specs[self.part].shape[-2], self.columns

    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        _, values, size = TYPES[self.type]
        if shape[1] % values:
            raise Unusable(f"{shape[1]} columns are no blocks of {values}, which {self.type} is made of")
        return {self.part: PartSpec((shape[0], shape[1] // values * size), (torch.uint8,))}

    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        """A scale that is not finite makes values that are not, which the weight refuses by index."""

    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        blocks = parts[self.part].reshape(-1, TYPES[self.type][2])
        decoder = _DECODERS.get(self.type)
        if decoder is not None:
            return decoder(blocks).reshape(shape).to(dtype)
        gguf = _owner(self.type)
        kind = gguf.GGMLQuantizationType(TYPES[self.type][0])
        values = torch.from_numpy(gguf.quants.dequantize(blocks.cpu().contiguous().numpy(), kind))
        return values.to(parts[self.part].device).reshape(shape).to(dtype)


@Once
def _owner(kind: str) -> Any:
    """The package that decodes a type. It is asked for when a weight is recognised, before anything is written."""
    return require("gguf", "gguf", f"decoding GGUF's {kind}")


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """A number in fp16 of each block, in fp32: `[blocks, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(held: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """The fields of that many bits in bytes `[blocks, n]`: the lowest of `run` bytes, then the next of the same ones.
    uint8 `[blocks, n * 8 / bits]`."""
    runs = held.unflatten(1, (-1, 1, run))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=held.device).view(1, 1, -1, 1)
    return (runs >> shifts & (1 << bits) - 1).flatten(1)


def _bits(held: torch.Tensor) -> torch.Tensor:
    """The bits of bytes `[blocks, n]`, the lowest of the first byte first: uint8 `[blocks, 8 n]`."""
    return (held.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=held.device) & 1).flatten(1)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_fields(blocks[:, 2:], 16, 4).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _fields(blocks[:, 4:], 16, 4) + _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    five = _fields(blocks[:, 6:], 16, 4) | _bits(blocks[:, 2:6]) << 4
    return _half(blocks, 0) * (five.float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    five = _fields(blocks[:, 8:], 16, 4) | _bits(blocks[:, 4:8]) << 4
    return _half(blocks, 0) * five + _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8) * _half(blocks, 0)


def _grouped(values: torch.Tensor, scales: torch.Tensor, lows: torch.Tensor | None = None) -> torch.Tensor:
    """Values times the scales of runs of them, less what is for each run."""
    found = values.float().unflatten(1, (scales.shape[1], -1)).mul_(scales.unsqueeze(-1))
    return (found if lows is None else found.sub_(lows.unsqueeze(-1))).flatten(1)


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    both = blocks[:, :16]
    scales, lows = _half(blocks, 80) * (both & 0xF), _half(blocks, 82) * (both >> 4)
    return _grouped(_fields(blocks[:, 16:80], 32, 2), scales, lows)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    packed = blocks[:, 96:108]
    six = _fields(packed[:, :8], 8, 4) | _fields(packed[:, 8:], 4, 2) << 4
    scales = _half(blocks, 108) * (six.float() - 32)
    # A bit that is not set takes 4 away.
    values = _fields(blocks[:, 32:96], 32, 2).float() - 4 * (_fields(blocks[:, :32], 32, 1) ^ 1)
    return _grouped(values, scales)


def _scales_and_lows(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Q4_K and Q5_K: eight pairs of six bits in 12 bytes, the upper two bits of four pairs elsewhere."""
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = torch.cat((first & 0x3F, third & 0xF | first >> 2 & 0x30), 1)
    lows = torch.cat((second & 0x3F, third >> 4 | second >> 2 & 0x30), 1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * lows


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _grouped(_fields(blocks[:, 16:], 32, 4), *_scales_and_lows(blocks))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    five = _fields(blocks[:, 48:], 32, 4) | _fields(blocks[:, 16:48], 32, 1) << 4
    return _grouped(five, *_scales_and_lows(blocks))


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    six = _fields(blocks[:, :128], 64, 4) | _fields(blocks[:, 128:192], 32, 2) << 4
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return _grouped(six.float() - 32, scales)


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""`[blocks, bytes]` → fp32 `[blocks, values]`, for the types that need no other package."""


def recognise(specs: Specs, config: Mapping[str, Any]) -> Gguf | None:
    """By the name of the part."""
    for kind, (_, values, size) in TYPES.items():
        if (spec := specs.get(PREFIX + kind)) is not None:
            if spec.dtype != torch.uint8 or len(spec.shape) < 2 or spec.shape[-1] % size:
                raise Unusable(f"its {kind} is {spec.dtype} {list(spec.shape)}, which are no blocks of {size} bytes")
            if kind not in _DECODERS:
                _owner(kind)
            return Gguf(kind, spec.shape[-1] // size * values)
    return None


FAMILY = Family(("gguf",), tuple(PREFIX + kind for kind in TYPES), recognise)
