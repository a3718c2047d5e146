"""The ends of the number ranges, sources that are not what their memory says, experts: every backend gives the same."""

from __future__ import annotations

import pytest
import torch

from qtensor import kernels, online_quant, quantize
from qtensor.kernels import FORMATS, FP8_PER_CHANNEL, MXFP4, SOURCE_DTYPES, Backend, Parts, WeightFormat, choose
from qtensor.kernels.compiled import TRACED
from qtensor.kernels.reference import TORCH

CPU = torch.device("cpu")
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def backends() -> list[Backend]:
    return [TORCH, TRACED, choose(CPU)]


@formats
@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
def test_finite_weights_stay_finite(fmt: WeightFormat, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    fractions = torch.linspace(0.4, 1, 97, dtype=torch.float64)
    weight = (fractions[:, None] * torch.cat([fractions, -fractions]) * largest).to(dtype)
    weight[0, 0], weight[1, 1] = largest, -largest
    parts = Parts.of(tuple(weight.shape), fmt)
    TORCH.quantize_into(weight, parts, fmt)
    wanted = TORCH.dequantize(parts, fmt, dtype)
    assert wanted.isfinite().all()
    for backend in backends():
        assert torch.equal(backend.dequantize(parts, fmt, dtype), wanted), backend.name


def test_mxfp4_follows_its_rule_to_the_end_of_the_range() -> None:
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 0] = 1.74 * 2.0**127, 1.76 * 2.0**127
    for backend in backends():
        parts = Parts.of((2, 32), MXFP4)
        backend.quantize_into(weight, parts, MXFP4)
        assert parts.scale.flatten().tolist() == [252, 253], backend.name


@formats
@pytest.mark.parametrize("rows", [4, 4000], ids=["small", "large"])
def test_a_negative_bit_is_not_lost(fmt: WeightFormat, rows: int) -> None:
    plain = torch.randn(rows, 96)
    source = torch._neg_view(-plain)
    assert source.is_neg()
    expected = quantize(plain, fmt.name)
    layer = torch.nn.Linear(96, rows, bias=False)
    with online_quant(fmt.name, layer):
        for start in range(0, rows, 3):
            layer.weight.data[start : start + 3].copy_(source[start : start + 3])
    for found in (quantize(source, fmt.name), layer.weight):
        for ours, wanted in zip(found.parts(), expected.parts(), strict=True):  # type: ignore[union-attr, operator]
            assert torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8))
    activations = [kernels.quantize_activation(x, FP8_PER_CHANNEL) for x in (source, plain)]
    for ours, wanted in zip(*activations, strict=True):
        assert torch.equal(ours.float(), wanted.float())


@formats
def test_each_row_meets_its_expert(fmt: WeightFormat) -> None:
    stack, x, bias = torch.randn(4, 40, 96), torch.randn(11, 96), torch.randn(4, 40)
    offsets = torch.tensor([3, 3, 10, 11])  # The second expert has no rows.
    parts = quantize(stack, fmt.name).parts()
    weight = TORCH.dequantize(parts, fmt, torch.float32)
    expert = [0] * 3 + [2] * 7 + [3]
    wanted = torch.stack([weight[e] @ row + bias[e] for e, row in zip(expert, x, strict=True)])
    for backend in backends():
        torch.testing.assert_close(backend.experts(x, parts, fmt, offsets, bias), wanted, rtol=1e-4, atol=1e-3)
    found = kernels.experts(x, parts.qdata, parts.scale, fmt, offsets, bias, parts.global_scale)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
