"""Matrices in every quantized format that checkpoints arrive in, made of random codes with edge values among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qtensor.sources.bitsandbytes import CODES
from qtensor.sources.families import recognise
from qtensor.sources.gguf import TYPES
from qtensor.sources.source import Source, Spec

Tensors = dict[str, torch.Tensor]


def specs_of(parts: Tensors) -> dict[str, Spec]:
    return {name: Spec(t.dtype, tuple(t.shape)) for name, t in parts.items()}


@dataclass(frozen=True)
class Form:
    """A format: how a matrix of `[rows, cols]` in it is made, and of how many columns, and rows, a multiple it has to
    have."""

    make: Callable[[int, int, torch.Generator], Tensors]
    multiple: int = 1
    rows: int = 1
    config: Mapping[str, Any] | None = None
    """What config.json has to say where parts may come one by one."""

    def parts(self, rows: int, cols: int, seed: int = 0) -> Tensors:
        return self.make(rows, cols, torch.Generator().manual_seed(seed))


def source_of(parts: Tensors, config: dict[str, Any] | None = None, shape: tuple[int, int] | None = None) -> Source:
    """shape: of the matrix, where it is known."""
    found = recognise(specs_of(parts), config or {})
    assert found is not None
    return found if shape is None else found.of(shape)


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
    """Scales, of which some are 0."""
    found = (torch.rand(shape, generator=generator) * 0.03 + 1e-5).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) < 1 / 64, torch.zeros_like(found), found)


def signed_floats(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Scales of integers, which some tools choose to be negative."""
    found = floats(shape, generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.25, -found, found)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _fp8(
    grid: Callable[[int, int], tuple[int, ...]], make: Callable[..., torch.Tensor] = floats, name: str = "*_scale"
) -> Callable[[int, int, torch.Generator], Tensors]:
    return lambda n, k, g: {"*": e4m3((n, k), g), name: make(grid(n, k), g)}


def _blocks(n: int, k: int) -> tuple[int, ...]:
    return _up(n, 128), _up(k, 128)


def words(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def int8(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


def order(cols: int, groups: int, generator: torch.Generator) -> torch.Tensor:
    """A group for each column, as often each, in any order."""
    return (torch.arange(cols) // (cols // groups))[torch.randperm(cols, generator=generator)].to(torch.int32)


def _packed_integers(
    n: int, k: int, g: torch.Generator, bits: int, groups: int, zeros: bool = False, ordered: bool = False
) -> Tensors:
    found = {
        "*_packed": words((n, _up(k * bits, 32)), g),
        "*_scale": signed_floats((n, groups), g),
        "*_shape": torch.tensor([n, k]),
    }
    if zeros:
        found["*_zero_point"] = words((_up(n * bits, 32), groups), g)
    return found | ({"*_g_idx": order(k, groups, g)} if ordered else {})


def _compressed(bits: int, **more: Any) -> Mapping[str, Any]:
    weights = {"type": "int", "num_bits": bits, "group_size": 32, "strategy": "group", **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def _gptq(bits: int, groups: int | None) -> Callable[[int, int, torch.Generator], Tensors]:
    def make(n: int, k: int, g: torch.Generator) -> Tensors:
        count = groups or k // 32
        return {
            "qweight": words((k * bits // 32, n), g),
            "qzeros": words((count, n * bits // 32), g),
            "scales": signed_floats((count, n), g),
            "g_idx": order(k, count, g) if groups is None else (torch.arange(k) // (k // count)).int(),
        }

    return make


def _four_bit(n: int, k: int, g: torch.Generator, kind: str, nested: bool) -> Tensors:
    blocks, state = _up(n * k, 64), {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0123}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    found = {
        "*": packed((_up(n * k, 2), 1), g),
        "*.absmax": packed((blocks,), g) if nested else floats((blocks,), g),
        "*.quant_map": torch.tensor(CODES[kind]),
        f"*.quant_state.bitsandbytes__{kind}": text,
    }
    if nested:
        found["*.nested_absmax"] = floats((_up(blocks, 256),), g)
        found["*.nested_quant_map"] = torch.linspace(-1, 1, 256)
    return found


def gguf_rows(kind: str, n: int, k: int, g: torch.Generator) -> torch.Tensor:
    """Random blocks; the fp16 numbers in them are finite, and of the size that weights have."""
    _, values, size = TYPES[kind]
    rows = packed((n, k // values, size), g)
    for at in HALVES[kind]:
        rows[..., at : at + 2] = (floats((n, k // values, 1), g) - 0.015).half().view(torch.uint8)
    return rows.reshape(n, -1)


HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where in a GGUF block its fp16 numbers are."""


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
    "ModelOpt int4": Form(lambda n, k, g: {"*": packed((n // 2, k), g), "*_scale": floats((n, k // 32), g)}, 32, 2),
    "int8 channel": Form(lambda n, k, g: {"*": int8((n, k), g), "*_scale": signed_floats((n, 1), g)}),
    "int8 zero points": Form(
        lambda n, k, g: {
            "*": int8((n, k), g),
            "*_scale": floats((n, k // 32), g),
            "*_zero_point": int8((n, k // 32), g),
        },
        32,
        config=_compressed(8, symmetric=False),
    ),
    "int8 words": Form(lambda n, k, g: _packed_integers(n, k, g, 8, 1), 32),
    "int4 channel": Form(lambda n, k, g: _packed_integers(n, k, g, 4, 1), 32),
    "int4 groups, zero points": Form(
        lambda n, k, g: _packed_integers(n, k, g, 4, k // 32, True), 32, config=_compressed(4, symmetric=False)
    ),
    "int3 groups, another order": Form(
        lambda n, k, g: _packed_integers(n, k, g, 3, k // 32, False, True), 32, config=_compressed(3, actorder="group")
    ),
    "GPTQ": Form(_gptq(4, None), 32, 32),
    "GPTQ int8 channel": Form(_gptq(8, 1), 32, 32),
    "AWQ": Form(
        lambda n, k, g: {
            "qweight": words((k, n // 8), g),
            "qzeros": words((k // 32, n // 8), g),
            "scales": floats((k // 32, n), g),
        },
        32,
        8,
    ),
    "bitsandbytes nf4": Form(lambda n, k, g: _four_bit(n, k, g, "nf4", True)),
    "bitsandbytes fp4": Form(lambda n, k, g: _four_bit(n, k, g, "fp4", False)),
    "bitsandbytes int8": Form(lambda n, k, g: {"*": int8((n, k), g), "SCB": floats((n,), g)}),
    "torchao fp8": Form(lambda n, k, g: {"_*_qdata": e4m3((n, k), g), "_*_scale": floats((n, 1), g)}),
    "torchao int8": Form(
        lambda n, k, g: {
            "_*_qdata": int8((n, k), g),
            "_*_scale": floats((n, 1), g),
            "_*_zero_point": torch.zeros(n, 1, dtype=torch.int8),
        }
    ),
    "GGUF Q4_0": Form(lambda n, k, g: {"*.Q4_0": gguf_rows("Q4_0", n, k, g)}, 32),
    "GGUF Q8_0": Form(lambda n, k, g: {"*.Q8_0": gguf_rows("Q8_0", n, k, g)}, 32),
}
