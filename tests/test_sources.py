"""Quantized formats that checkpoints arrive in: decoded as their owners do, refused where they mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from random import Random
from typing import Any

import pytest
import torch

from qtensor import MissingExtraError
from qtensor.kernels import FORMATS, MXFP4, Parts, WeightFormat
from qtensor.kernels.codes import decode
from qtensor.sources.families import families, recognise
from qtensor.sources.scales import in_fp32
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


# The same numbers -----------------------------------------------------------------------------------------------------

EXPONENTS = torch.arange(255, dtype=torch.uint8)
FINITE = CODES[CODES.float().isfinite()]


def numbers(parts: Parts, fmt: WeightFormat) -> torch.Tensor:
    """What a weight's elements are, code times scale, in fp64: exactly."""
    values = decode(parts.qdata, fmt).double()
    scale = in_fp32(parts.scale).double() if fmt.has_e8m0_scale else parts.scale.double()
    scale = scale * parts.global_scale.double() if parts.global_scale is not None else scale
    if fmt.granularity in ("tensor", "channel"):
        return values * scale
    rows, cols = fmt.block
    wide = scale.repeat_interleave(rows, 0)[: values.shape[0]].repeat_interleave(cols, 1)[:, : values.shape[1]]
    return values * wide


def assert_same_numbers(parts: dict[str, torch.Tensor], scheme: str, expected: torch.Tensor) -> None:
    fmt, source = FORMATS[scheme], source_of(parts)
    assert source is not None
    shape = (expected.shape[0], expected.shape[1])
    moved = source.move(parts, shape, fmt)
    assert moved is not None
    found = numbers(moved, fmt)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


def test_every_fp8_code_times_every_power_of_two_is_the_same_in_mxfp8() -> None:
    values = FINITE.repeat(255, 1)[:, :224]
    values = torch.cat([values, FINITE[-32:].repeat(255, 1)], 1)
    for scales in (EXPONENTS.view(torch.float8_e8m0fnu), in_fp32(EXPONENTS)):
        blocks = scales.repeat_interleave(128).reshape(-1, 128)[:, :1].repeat(1, 2)
        parts = {"*": values.repeat_interleave(128, 0), "*_scale_inv": blocks}
        expected = parts["*"].double() * in_fp32(EXPONENTS).double().repeat_interleave(128)[:, None]
        assert_same_numbers(parts, "mxfp8", expected)
        assert_same_numbers(parts, "fp8_per_block", expected)


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8"])
def test_every_pair_of_e2m1_codes_times_every_power_of_two_is_the_same(scheme: str) -> None:
    pairs = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    parts = {"*_packed": pairs, "*_scale": EXPONENTS[:, None].repeat(1, 16)}
    expected = decode(pairs, MXFP4).double() * in_fp32(EXPONENTS).double()[:, None]
    assert_same_numbers(parts, scheme, expected)


def test_every_pair_of_powers_of_two_is_the_same_in_nvfp4_or_is_not_called_so() -> None:
    """All pairs of scales that a matrix may have, each with all codes: the same numbers, or no form at all."""
    pairs, known = (torch.arange(16, dtype=torch.uint8) * 0x11).repeat(2, 1), 0  # A group that has every code, twice.
    codes_of = decode(pairs, MXFP4).double()
    source = source_of({"*_packed": pairs, "*_scale": torch.zeros(2, 1, dtype=torch.uint8)})
    assert source is not None
    for high in range(255):
        for low in range(high + 1):
            scale = EXPONENTS[[high, low]]
            moved = source.move({"*_packed": pairs, "*_scale": scale[:, None]}, (2, 32), FORMATS["nvfp4"])
            assert (moved is not None) == (low >= 1 and high - low <= 17 and low >= max(high - 8, 1) - 9)
            if moved is not None:
                known += 1
                assert torch.equal(numbers(moved, FORMATS["nvfp4"]), codes_of * in_fp32(scale).double()[:, None])
    assert known > 4000


def test_a_group_of_zeros_has_any_scale() -> None:
    pairs = torch.zeros(2, 16, dtype=torch.uint8)
    pairs[0] = 0x80  # -0.0 and 0.0
    pairs[1, 0] = 0x31
    parts = {"*_packed": pairs, "*_scale": torch.tensor([[0], [127]], dtype=torch.uint8)}
    assert_same_numbers(parts, "nvfp4", decode(pairs, MXFP4).double())
