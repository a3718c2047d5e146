"""Arithmetic and writes in finished quantized weights, by which adapters are merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import NonFiniteWeightError, QTensor, QTensorError, WeightShapeError, quantize
from qtensor.schemes.scheme import SCHEMES

ARITHMETIC: dict[str, Callable[[Any, torch.Tensor], object]] = {
    "+=": lambda w, d: w.add_(d),
    "+= with alpha": lambda w, d: w.add_(d, alpha=-0.5),
    "-=": lambda w, d: w.sub_(d),
    "*=": lambda w, d: w.mul_(d),
    "/=": lambda w, d: w.div_(d.abs() + 1),
    "+= number": lambda w, d: w.add_(0.25),
    "*= number": lambda w, d: w.mul_(1.5),
    "+= row": lambda w, d: w.add_(d[..., :1, :]),
    "data +=": lambda w, d: w.data.add_(d),
}
"""In place, on a weight and on plain values alike."""


def same_bytes(a: QTensor, b: QTensor) -> bool:
    return all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in zip(a.parts(), b.parts(), strict=True))


schemes = st.sampled_from(sorted({scheme.name for scheme in SCHEMES.values()}))
shapes = st.one_of(
    st.tuples(st.integers(1, 280), st.integers(1, 280)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)),
)


@settings(max_examples=60)
@given(
    name=schemes,
    shape=shapes,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    steps=st.lists(st.sampled_from(sorted(ARITHMETIC)), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_arithmetic_is_the_quantized_result_of_the_dequantized_values(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, steps: list[str], seed: int
) -> None:
    torch.manual_seed(seed)
    weight = nn.Parameter(quantize(torch.randn(shape).to(dtype), name), requires_grad=False)
    addresses = [part.data_ptr() for part in weight.parts()]
    for step in steps:
        delta = torch.randn(shape).to(dtype) / 8
        plain = weight.dequantize()
        ARITHMETIC[step](plain, delta)
        ARITHMETIC[step](weight, delta)
        assert same_bytes(weight, quantize(plain, name))
    assert [part.data_ptr() for part in weight.parts()] == addresses, "the memory is the weight's own"


@st.composite
def parts_of(draw: Any, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Any slices of a weight."""
    bounds = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape]
    return tuple(slice(start, stop) for start, stop in bounds)


@settings(max_examples=60)
@given(data=st.data(), name=schemes, shape=shapes)
def test_assigning_to_any_part_is_seen(data: Any, name: str, shape: tuple[int, ...]) -> None:
    """What shares scales with the part is quantized anew, and the rest keeps its bytes. A part that is no slice of the
    quantized form, because it cuts through groups, has all of the weight quantized anew."""
    torch.manual_seed(0)
    weight = quantize(torch.randn(shape).bfloat16(), name)
    where, plain, before = data.draw(parts_of(shape)), weight.dequantize(), weight.dequantize()
    values = torch.randn(plain[where].shape).bfloat16()
    sliced = [weight[where[:k]] for k in range(len(where), 0, -1)]
    whole = [len(where) - i for i, w in enumerate(sliced) if isinstance(w, QTensor) and w.whole_units]
    anew = where[: whole[0]] if whole and isinstance(sliced[0], QTensor) else ()
    weight[where] = values
    plain[where] = values
    outside = torch.ones(shape, dtype=torch.bool)
    outside[anew] = False
    assert torch.equal(weight.dequantize()[outside], before[outside])
    assert torch.equal(weight.dequantize()[anew], quantize(plain[anew], name).dequantize())


def test_views_that_share_scales_write_through_too() -> None:
    weight = quantize(torch.randn(64, 64), "fp8_per_channel")
    plain = weight.dequantize()
    for write in (lambda w: w[:, :32].mul_(2), lambda w: w.t()[:8].fill_(1), lambda w: w.data[:, 32:].sub_(1)):
        plain = weight.dequantize()
        write(plain)
        write(weight)
        assert same_bytes(weight, quantize(plain, "fp8_per_channel"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_leaves_the_weight_as_it_was(value: float) -> None:
    weight = quantize(torch.randn(300, 64), "fp8_per_channel")
    before = weight.dequantize()
    delta = torch.zeros(300, 64)
    delta[299, 63] = value
    with pytest.raises(NonFiniteWeightError):
        weight.add_(delta)
    assert torch.equal(weight.dequantize(), before)


def test_data_takes_quantized_and_plain_values() -> None:
    old, new = (quantize(torch.randn(32, 32), "nvfp4") for _ in range(2))
    weight = nn.Parameter(old, requires_grad=False)
    weight.data = new
    assert same_bytes(weight, new)
    values = torch.randn(32, 32)
    weight.data = values
    assert same_bytes(weight, quantize(values, "nvfp4"))
    weight.data = weight.data.to(torch.bfloat16)
    assert weight.dtype == weight.data.dtype == weight.dequantize().dtype == torch.bfloat16
    with pytest.raises(WeightShapeError):
        weight.data = torch.randn(32, 31)


def test_lists_of_weights_are_written_like_weights() -> None:
    """What PyTorch calls foreach was carried out on dequantized values, and lost."""
    weights, values = [quantize(torch.randn(8, 8), "fp8") for _ in range(2)], [torch.randn(8, 8) for _ in range(2)]
    torch._foreach_copy_(weights, values)
    assert all(same_bytes(w, quantize(v, "fp8")) for w, v in zip(weights, values, strict=True))
    with pytest.raises(QTensorError, match="modify a quantized weight"):
        torch._foreach_add_(weights, values)


def test_an_optimizer_is_refused() -> None:
    weight = nn.Parameter(quantize(torch.randn(8, 8), "fp8"))
    weight.grad = torch.ones(8, 8)
    with pytest.raises(QTensorError, match=r"Train adapters|modify a quantized weight"):
        torch.optim.SGD([weight], lr=0.1, foreach=False).step()
    with pytest.raises(QTensorError, match="modify a quantized weight"):
        torch.optim.SGD([weight], lr=0.1, foreach=True).step()
