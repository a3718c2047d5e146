"""Quantized formats that checkpoints arrive in: decoded as their owners do, refused where they mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from random import Random
from typing import Any

import pytest
import torch

from qtensor import MissingExtraError
from qtensor.sources.families import families, recognise
from qtensor.sources.source import Family, Source, Spec, Unusable

SHAPE = (192, 320)
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def source_of(parts: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Source | None:
    return recognise({name: Spec(t.dtype, tuple(t.shape)) for name, t in parts.items()}, config or {})


def decoded(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> Any:
    source = source_of(parts, config)
    assert source is not None
    shape = source.shape({name: Spec(t.dtype, tuple(t.shape)) for name, t in parts.items()})
    specs = source.parts(shape)
    assert all(specs[name].fits(Spec(t.dtype, tuple(t.shape))) for name, t in parts.items())
    source.check(parts, shape)
    return source.decode(parts, shape, dtype)


def codes(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Every finite e4m3 value, many times."""
    finite = CODES[CODES.float().isfinite()]
    index = torch.randint(len(finite), shape, generator=torch.Generator().manual_seed(seed))
    return finite.view(torch.uint8)[index].view(torch.float8_e4m3fn)


def scales(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.randint(100, 140, shape, generator=generator).to(torch.uint8).view(dtype)
    return (torch.rand(shape, generator=generator) * 0.1 + 1e-4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("grid", [(), (1,), (192, 1), (2, 4), (192, 10)], ids=str)
def test_fp8_is_decoded_as_transformers_decodes_it(grid: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of (192, 320), 96 × 80 blocks are what transformers finds in a grid of 2 × 4."""
    theirs = pytest.importorskip("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    if not hasattr(theirs, "_dequantize_one"):
        pytest.skip("this transformers decodes whole checkpoints only")
    parts = {"*": codes(SHAPE), "*_scale_inv": scales(grid, dtype)}
    config = {"weight_block_size": [96, 80]}
    for out in (torch.bfloat16, torch.float16, torch.float32):
        given = parts["*_scale_inv"] if len(grid) == 2 else parts["*_scale_inv"].reshape(1, 1)
        expected = theirs._dequantize_one(parts["*"], given, out)
        assert torch.equal(decoded(parts, out, config).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "grid", "told"), [((192, 320), (2, 3), None), ((200, 300), (50, 100), [4, 3])], ids=["plain", "told"]
)
def test_blocks_are_128_unless_the_configuration_says_otherwise(shape: Any, grid: Any, told: Any) -> None:
    parts = {"*": codes(shape), "*_scale_inv": scales(grid, torch.float32)}
    config = {"weight_block_size": told}
    height, width = told or (128, 128)
    assert f"{height} × {width}" in str(source_of(parts, config))
    wide = parts["*_scale_inv"].repeat_interleave(height, 0)[: shape[0]].repeat_interleave(width, 1)[:, : shape[1]]
    assert torch.equal(decoded(parts, torch.bfloat16, config), (parts["*"].float() * wide).bfloat16())


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"*": codes(SHAPE), "*_scale": torch.ones(7, 3)}, r"\[7, 3\]"),
        ({"*": codes(SHAPE), "*_scale": torch.ones(2, 3, dtype=torch.int32)}, "int32"),
        ({"*": codes(SHAPE).view(torch.float8_e5m2), "*_scale": torch.ones(2, 3)}, "float8_e5m2"),
    ],
    ids=["grid", "dtype", "values"],
)
def test_parts_that_fit_no_format_are_refused(parts: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(Unusable, match=says):
        source_of(parts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scales_that_mean_nothing_are_refused(bad: float) -> None:
    given = torch.ones(2, 3)
    given[1, 2] = bad
    with pytest.raises(Unusable, match=r"\[1, 2\]"):
        decoded({"*": codes(SHAPE), "*_scale": given}, torch.bfloat16)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.names[1])
def test_parts_of_any_dtype_and_shape_are_a_source_or_refused(family: Family) -> None:
    """What a stranger's file may hold: nothing but a CheckpointError comes of it, or what GGUF's rare types need."""
    dtypes = [torch.float8_e4m3fn, torch.uint8, torch.int32, torch.float32]
    shapes = [(), (1,), (32,), (32, 16), (32, 1), (32, 0), (0, 32), (2, 32, 16), (2, 2, 1, 16)]
    random = Random(0)
    for _ in range(3000):
        names = random.sample(family.names, random.randint(1, min(4, len(family.names))))
        specs = {name: Spec(random.choice(dtypes), random.choice(shapes)) for name in names}
        with suppress(Unusable, MissingExtraError):
            source = family.recognise(
                specs, {"weight_block_size": random.choice([None, [16, 16], [0, 3], "x", [1 << 70, 1]])}
            )
            if source is not None:
                shape = source.shape(specs)
                source.unit(shape)
                assert str(source)
