"""The CPU path of the formats that are not fused (mx, nvfp4, int8, int4) against the reference: the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernels import assert_same_bytes, assert_same_values, dtypes, matrices
from test_cpu_kernels import relaxed as more

from qtensor.kernels import FORMATS, NonFinite, reference
from qtensor.kernels.audit import Audit
from qtensor.kernels.cpu import numba_backend
from qtensor.kernels.formats import WeightFormat

GROUPED = [fmt for fmt in FORMATS.values() if not numba_backend.is_fused(fmt)]
relaxed = settings(more, max_examples=max(20, settings().max_examples // 3))  # The reference is slow in these formats.
formats = pytest.mark.parametrize("fmt", GROUPED, ids=lambda f: f.name)
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def empty(fmt: WeightFormat, shape: tuple[int, ...]) -> Parts:
    whole = fmt.global_scale_shape(shape)
    data = torch.zeros(fmt.qdata_shape(shape), dtype=fmt.dtype)
    scale = torch.ones(fmt.scale_shape(shape)).to(fmt.scale_dtype)
    return data, scale, None if whole is None else torch.zeros(whole)


def quantized(backend: Any, source: torch.Tensor, fmt: WeightFormat, audit: Audit | None = None) -> Parts:
    data, scale, whole = empty(fmt, tuple(source.shape))
    backend.quantize_into(source, data, scale, fmt, audit, global_scale=whole)
    return data, scale, whole


def assert_same(got: Parts, want: Parts) -> None:
    for mine, theirs in zip(got, want, strict=True):
        if mine is not None and theirs is not None:
            assert_same_bytes(mine, theirs)


def assert_quantizes_alike(source: torch.Tensor, fmt: WeightFormat) -> None:
    assert_same(quantized(numba_backend, source, fmt), quantized(reference, source, fmt))


@formats
@relaxed
@given(source=matrices())
def test_quantize_equals_the_reference(fmt: WeightFormat, source: torch.Tensor) -> None:
    assert_quantizes_alike(source, fmt)


@formats
@relaxed
@given(source=matrices(nonfinite=True))
def test_nonfinite_values_that_are_kept(fmt: WeightFormat, source: torch.Tensor) -> None:
    keep = Audit(refuse_nonfinite=False)
    assert_same(quantized(numba_backend, source, fmt, keep), quantized(reference, source, fmt, keep))


@formats
@relaxed
@given(source=matrices(nonfinite=True))
def test_nonfinite_values_are_refused_before_anything_is_stored(fmt: WeightFormat, source: torch.Tensor) -> None:
    if source.isfinite().all():
        return
    parts = empty(fmt, tuple(source.shape))
    before = [part.clone() for part in parts if part is not None]
    with pytest.raises(NonFinite) as refused:
        numba_backend.quantize_into(source, *parts[:2], fmt, global_scale=parts[2])
    assert refused.value.index == int((~source.flatten().isfinite()).nonzero()[0])
    for part, old in zip(parts, before, strict=False):
        assert part is not None
        assert_same_bytes(part, old)


@formats
@relaxed
@given(source=matrices(), padding=st.integers(1, 3))
def test_destinations_inside_a_larger_weight(fmt: WeightFormat, source: torch.Tensor, padding: int) -> None:
    want = quantized(reference, source, fmt)
    got: list[torch.Tensor] = []
    for part in want[:2]:
        assert part is not None
        around = torch.zeros((*part.shape[:-1], part.shape[-1] + 2 * padding)).to(part.dtype)
        got.append(around.narrow(-1, padding, part.shape[-1]))
    whole = None if want[2] is None else torch.zeros_like(want[2])
    numba_backend.quantize_into(source, *got, fmt, global_scale=whole)
    assert_same((*got, whole), want)  # type: ignore[arg-type]


@formats
@dtypes
def test_a_large_weight_shared_among_threads(fmt: WeightFormat, dtype: torch.dtype) -> None:
    source = (torch.randn(1000, 1111, generator=torch.Generator().manual_seed(0)) * 0.03).to(dtype)
    for form in (source, source.mT, source[:896].view(7, 128, 1111)):
        assert_quantizes_alike(form, fmt)
        parts = quantized(reference, form, fmt)
        for target in (torch.bfloat16, torch.float32):
            arguments = (*parts[:2], fmt, target, None, parts[2])
            assert_same_bytes(numba_backend.dequantize(*arguments), reference.dequantize(*arguments))


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
        for fmt in GROUPED:
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
            want = reference.dequantize(data, scale, fmt, dtype, None if out is None else out.clone(), whole)
            assert_same_values(numba_backend.dequantize(data, scale, fmt, dtype, out, whole), want)


@formats
@pytest.mark.parametrize("batch", [0, 1, 17])
def test_linear(fmt: WeightFormat, batch: int) -> None:
    for rows, cols in ((1, 1), (7, 33), (257, 1000)):
        generator = torch.Generator().manual_seed(rows)
        data, scale, whole = quantized(reference, torch.randn(rows, cols, generator=generator), fmt)
        x, bias = torch.randn(batch, cols, generator=generator), torch.randn(rows, generator=generator)
        x.requires_grad_(batch == 17)
        exact = reference.dequantize(data, scale, fmt, torch.float32, torch.empty(rows, cols), whole)
        got = numba_backend.linear(x, data, scale, fmt, bias, whole)
        torch.testing.assert_close(got, x @ exact.T + bias, rtol=1e-4, atol=1e-4)
        if batch == 17:
            got.sum().backward()
            torch.testing.assert_close(x.grad, exact.sum(0).expand(17, -1), rtol=1e-4, atol=1e-4)


@formats
def test_weights_made_under_inference_mode(fmt: WeightFormat) -> None:
    """The loops run in threads that are not in that mode, and may not write to such tensors themselves."""
    with torch.inference_mode():
        source = torch.randn(1000, 600)
        assert_quantizes_alike(source, fmt)
        parts = quantized(numba_backend, source, fmt)
        numba_backend.dequantize(*parts[:2], fmt, torch.bfloat16, None, parts[2])
