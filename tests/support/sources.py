"""Matrices in every quantized format that checkpoints arrive in, made of random codes with edge values among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qtensor.sources.families import recognise
from qtensor.sources.source import Source, Spec

Tensors = dict[str, torch.Tensor]


def specs_of(parts: Tensors) -> dict[str, Spec]:
    return {name: Spec(t.dtype, tuple(t.shape)) for name, t in parts.items()}


@dataclass(frozen=True)
class Form:
    """A format: how a matrix of `[rows, cols]` in it is made, and of how many columns a multiple it has to have."""

    make: Callable[[int, int, torch.Generator], Tensors]
    multiple: int = 1

    def parts(self, rows: int, cols: int, seed: int = 0) -> Tensors:
        return self.make(rows, cols, torch.Generator().manual_seed(seed))


def source_of(parts: Tensors, config: dict[str, Any] | None = None) -> Source:
    found = recognise(specs_of(parts), config or {})
    assert found is not None
    return found


def whole(parts: Tensors, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix, decoded in one go."""
    source = source_of(parts)
    needed = {name: parts[name] for name, spec in source.parts(shape).items() if spec.needed}
    return source.decode(needed, shape, dtype)


def e4m3(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Every finite e4m3 value."""
    codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    return torch.where((codes & 0x7F) == 0x7F, 0x80, codes).view(torch.float8_e4m3fn)


def exponents(shape: tuple[int, ...], generator: torch.Generator, low: int = 112, high: int = 128) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator).to(torch.uint8)


def packed(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def floats(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=generator) * 0.03 + 1e-5).to(dtype)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _fp8(
    grid: Callable[[int, int], tuple[int, ...]], make: Callable[..., torch.Tensor] = floats, name: str = "*_scale"
) -> Callable[[int, int, torch.Generator], Tensors]:
    return lambda n, k, g: {"*": e4m3((n, k), g), name: make(grid(n, k), g)}


def _blocks(n: int, k: int) -> tuple[int, ...]:
    return _up(n, 128), _up(k, 128)


FORMS: dict[str, Form] = {
    "fp8 tensor": Form(_fp8(lambda n, k: ())),
    "fp8 channel": Form(_fp8(lambda n, k: (n, 1), lambda s, g: floats(s, g, torch.bfloat16))),
    "fp8 blocks": Form(_fp8(_blocks, name="*_scale_inv")),
    "fp8 ue8m0 blocks": Form(_fp8(_blocks, lambda s, g: exponents(s, g).view(torch.float8_e8m0fnu), "*_scale_inv")),
    "fp8 blocks of powers of two": Form(_fp8(_blocks, lambda s, g: 2.0 ** (exponents(s, g).float() - 127))),
    "mxfp8": Form(_fp8(lambda n, k: (n, k // 32), exponents), 32),
    "mxfp4": Form(lambda n, k, g: {"*_packed": packed((n, k // 2), g), "*_scale": exponents((n, k // 32), g)}, 32),
    "mxfp4 blocks": Form(
        lambda n, k, g: {"*_blocks": packed((n, k // 32, 16), g), "*_scales": exponents((n, k // 32), g)}, 32
    ),
    "nvfp4": Form(
        lambda n, k, g: {
            "*_packed": packed((n, k // 2), g),
            "*_scale": e4m3((n, k // 16), g).abs(),
            "*_global_scale": 100 + 1000 * torch.rand((1,), generator=g),
        },
        16,
    ),
    "nvfp4 of ModelOpt": Form(
        lambda n, k, g: {
            "*": packed((n, k // 2), g),
            "*_scale": e4m3((n, k // 16), g).abs(),
            "*_scale_2": floats((), g),
        },
        16,
    ),
}
