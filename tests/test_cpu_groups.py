"""The loops that quantize finite sources, of all formats and recipes, and those that dequantize, against the reference:
the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernels import assert_same_bytes, assert_same_values, dtypes, matrices
from test_cpu_kernels import relaxed as more

from qtensor.kernels import FORMATS, RECIPES, Audit, Backend, NonFinite, Parts, WeightFormat
from qtensor.kernels.cpu import numba_backend
from qtensor.kernels.cpu.numba_backend import NUMBA
from qtensor.kernels.reference import TORCH

relaxed = settings(more, max_examples=max(20, settings().max_examples // 3))  # The reference is slow in these formats.
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
BY_RECIPE = [
    replace(FORMATS[name], recipe=own) for tool in RECIPES.values() for name, own in tool.items() if own is not None
]
recipes = pytest.mark.parametrize("fmt", BY_RECIPE, ids=lambda f: f"{f.name}:{f.recipe.tool}")


@pytest.fixture(autouse=True)
def _small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp8 has others for those (`test_cpu_kernels.py`)."""
    monkeypatch.setattr(numba_backend, "PIECE", 0)


def empty(fmt: WeightFormat, shape: tuple[int, ...]) -> Parts:
    return Parts.of(shape, fmt).map(lambda part: part.fill_(0))


def quantized(backend: Backend, source: torch.Tensor, fmt: WeightFormat, audit: Audit | None = None) -> Parts:
    parts = empty(fmt, tuple(source.shape))
    backend.quantize_into(source, parts, fmt, audit)
    return parts


def assert_same(got: Parts, want: Parts) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert_same_bytes(mine, theirs)


def assert_quantizes_alike(source: torch.Tensor, fmt: WeightFormat) -> None:
    assert_same(quantized(NUMBA, source, fmt), quantized(TORCH, source, fmt))


@formats
@relaxed
@given(source=matrices())
def test_quantize_equals_the_reference(fmt: WeightFormat, source: torch.Tensor) -> None:
    assert_quantizes_alike(source, fmt)


@recipes
@relaxed
@given(source=matrices(), spread=st.sampled_from([0, 40, 140]), sign=st.sampled_from([0, 0, 1, -1]))
def test_recipes_equal_the_reference(fmt: WeightFormat, source: torch.Tensor, spread: int, sign: int) -> None:
    """Elements of many sizes beside each other, down to quotients that vanish in the weight's dtype, of both signs or
    of one; a fifth of them zeros."""
    generator = torch.Generator().manual_seed(source.numel())
    wide = (source.abs() * sign if sign else source).float()
    wide = wide * torch.exp2(-spread * torch.rand(source.shape, generator=generator))
    wide[torch.rand(source.shape, generator=generator) < 0.2] *= 0.0
    assert_quantizes_alike(wide.to(source.dtype), fmt)
    keep = Audit(refuse_nonfinite=False)
    assert_same(quantized(NUMBA, source, fmt, keep), quantized(TORCH, source, fmt, keep))


def test_a_recipe_of_nobody_is_left_to_the_reference() -> None:
    fmt = replace(FORMATS["int8_per_channel"], recipe=replace(BY_RECIPE[0].recipe, levels=100.0))  # type: ignore[type-var]
    assert_quantizes_alike(torch.randn(40, 300), fmt)


@formats
@relaxed
@given(source=matrices(nonfinite=True))
def test_nonfinite_values_that_are_kept(fmt: WeightFormat, source: torch.Tensor) -> None:
    keep = Audit(refuse_nonfinite=False)
    assert_same(quantized(NUMBA, source, fmt, keep), quantized(TORCH, source, fmt, keep))


@formats
@relaxed
@given(source=matrices(nonfinite=True))
def test_nonfinite_values_are_refused_before_anything_is_stored(fmt: WeightFormat, source: torch.Tensor) -> None:
    if source.isfinite().all():
        return
    parts = empty(fmt, tuple(source.shape))
    before = parts.map(torch.clone)
    with pytest.raises(NonFinite) as refused:
        NUMBA.quantize_into(source, parts, fmt)
    assert refused.value.index == int((~source.flatten().isfinite()).nonzero()[0])
    assert_same(parts, before)


@pytest.mark.parametrize("fmt", [*FORMATS.values(), *BY_RECIPE[::3]], ids=lambda f: f.name)
@relaxed
@given(source=matrices(), padding=st.integers(1, 3))
def test_destinations_inside_a_larger_weight(fmt: WeightFormat, source: torch.Tensor, padding: int) -> None:
    want = quantized(TORCH, source, fmt)
    inside = [torch.zeros((*part.shape[:-1], part.shape[-1] + 2 * padding)).to(part.dtype) for part in want[:2]]
    inside = [around.narrow(-1, padding, part.shape[-1]) for around, part in zip(inside, want, strict=False)]
    got = Parts(*inside, None if want.global_scale is None else torch.zeros_like(want.global_scale))
    NUMBA.quantize_into(source, got, fmt)
    assert_same(got, want)


@pytest.mark.parametrize("fmt", [*FORMATS.values(), *BY_RECIPE], ids=lambda f: f.name)
@dtypes
def test_a_large_weight_shared_among_threads(fmt: WeightFormat, dtype: torch.dtype) -> None:
    source = (torch.randn(1000, 1111, generator=torch.Generator().manual_seed(0)) * 0.03).to(dtype)
    for form in (source, source.mT, source[:896].view(7, 128, 1111)):
        assert_quantizes_alike(form, fmt)
        parts = quantized(TORCH, form, fmt)
        for target in (torch.bfloat16, torch.float32):
            assert_same_bytes(NUMBA.dequantize(parts, fmt, target), TORCH.dequantize(parts, fmt, target))


@dtypes
def test_encode_is_exact_for_every_value(dtype: torch.dtype) -> None:
    """All 65,536 bf16 and fp16 values, a dense sample of fp32, beside amax values that put them everywhere in range."""
    if dtype == torch.float32:
        values = torch.arange(-(2**31), 2**31, 40_009, dtype=torch.int64).to(torch.int32).view(torch.float32)
        # Both sides of each midpoint of e2m1, int4 and int8, times the powers of two a step can be.
        middles = torch.arange(0.25, 130, 0.25) * torch.tensor([2.0**-20, 1.0, 2.0**20]).unsqueeze(1)
        around = middles.flatten().view(torch.int32)
        around = torch.cat([around - 1, around, around + 1]).view(torch.float32)
        values = torch.cat([values, around, -around])
    else:
        values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    for amax in (448.0, 6.0, 1e-38):
        found = values[values.abs() <= amax]
        for fmt in (*FORMATS.values(), *BY_RECIPE):
            group = fmt.block[1] if fmt.block[1] > 1 else found.numel() + 1
            rows = found[: found.numel() // (group - 1) * (group - 1)].view(-1, group - 1)
            largest = torch.full((rows.shape[0], 1), amax, dtype=dtype)
            assert_quantizes_alike(torch.cat([rows, largest], 1).view(1, -1), fmt)


@formats
@dtypes
@pytest.mark.parametrize("cols", [1, 31, 64, 255])
def test_dequantize_every_code(fmt: WeightFormat, dtype: torch.dtype, cols: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(300, 2)[:, : fmt.qdata_shape((1, cols))[1]].contiguous()
    generator = torch.Generator().manual_seed(1)
    scale = (torch.rand(fmt.scale_shape((300, cols)), generator=generator) * 3).to(fmt.scale_dtype)
    if fmt.has_e8m0_scale:
        scale = torch.randint(0, 256, scale.shape, generator=generator).to(torch.uint8)
    whole = torch.tensor([0.37]) if fmt.has_global_scale else None
    for data in (codes.view(fmt.dtype), codes.view(fmt.dtype).t().contiguous().t()):
        for out in (None, torch.empty(300, cols, dtype=dtype), torch.empty(cols, 300, dtype=dtype).t()):
            parts = Parts(data, scale, whole)
            want = TORCH.dequantize(parts, fmt, dtype, None if out is None else out.clone())
            assert_same_values(NUMBA.dequantize(parts, fmt, dtype, out), want)


@formats
def test_weights_made_under_inference_mode(fmt: WeightFormat) -> None:
    """The loops run in threads that are not in that mode, and may not write to such tensors themselves."""
    with torch.inference_mode():
        source = torch.randn(1000, 600)
        assert_quantizes_alike(source, fmt)
        NUMBA.dequantize(quantized(NUMBA, source, fmt), fmt, torch.bfloat16)
