"""Sources for quantization kernels, places to quantize them into, and the comparison with the reference.

Bytes are compared exactly, except that any NaN byte equals any other: the sign of a NaN is not promised.
"""

from __future__ import annotations

import math

import pytest
import torch

from qtensor.kernels import Audit, Backend, NonFinite, Parts, WeightFormat
from qtensor.kernels.reference import TORCH

VALUES = ("normal", "zeros", "subnormal", "edges", "huge", "one outlier")
LAYOUTS = ("contiguous", "column slice", "transposed", "every other")


def make_values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "zeros":
        x = torch.zeros(shape) * x.sign()
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).tiny * 0.25
    elif kind == "edges":
        grid = torch.tensor([448.0, -448.0, 464.0, 432.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 2.0**-6, 0.0, -0.0, 17.0])
        x = grid[torch.randint(len(grid), shape, generator=generator)]
    elif kind == "huge":
        x = x.clamp(-1, 1) * torch.finfo(dtype).max
    elif kind == "one outlier" and x.numel():
        x.view(-1)[seed % x.numel()] = 1e4
    return x.to(dtype)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, reached by other strides."""
    if layout == "column slice":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), 77.0, dtype=x.dtype)
        wide[..., 2 : 2 + x.shape[-1]] = x
        return wide[..., 2 : 2 + x.shape[-1]]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every other":
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, ::2]
    return x


def destination(shape: tuple[int, ...], fmt: WeightFormat) -> tuple[Parts, torch.Tensor]:
    """Parts with values and scales as row ranges of larger tensors, and the larger values."""
    *lead, rows, _ = shape
    big = torch.full((*lead, rows + 3, fmt.qdata_shape(shape)[-1]), 0x55, dtype=torch.uint8)
    scale = torch.full(fmt.scale_shape(shape), 9.0).to(fmt.scale_dtype)
    if fmt.granularity in ("channel", "group"):
        scale = torch.full((*lead, rows + 3, scale.shape[-1]), 9.0).to(fmt.scale_dtype)[..., 1 : 1 + rows, :]
    whole = fmt.global_scale_shape(shape)
    whole_scale = None if whole is None else torch.full(whole, 9.0)
    return Parts(big[..., 1 : 1 + rows, :].view(fmt.dtype), scale, whole_scale), big


def canonical(codes: torch.Tensor) -> torch.Tensor:
    raw = codes.view(torch.uint8)
    if codes.dtype != torch.float8_e4m3fn:
        return raw
    return torch.where(raw & 0x7F == 0x7F, 0x7F, raw)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if actual.dtype == torch.float8_e4m3fn:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_equal_parts(actual: Parts, expected: Parts) -> None:
    assert_equal(canonical(actual.qdata.contiguous()), canonical(expected.qdata))
    for ours, wanted in zip(actual[1:], expected[1:], strict=True):
        assert_equal(ours, wanted)


def check_quantize(backend: Backend, source: torch.Tensor, fmt: WeightFormat, refuse: bool = True) -> None:
    """Equal bytes, nothing written around them, and the sums behind SQNR."""
    expected, _ = destination(source.shape, fmt)
    actual, around = destination(source.shape, fmt)
    old, new = Audit(refuse, measure_sqnr=True), Audit(refuse, measure_sqnr=True)
    TORCH.quantize_into(source, expected, fmt, old)
    backend.quantize_into(source, actual, fmt, new)
    new.verify()
    assert_equal_parts(actual, expected)
    assert (around[..., 0, :] == 0x55).all(), "wrote before its rows"
    assert (around[..., -2:, :] == 0x55).all(), "wrote past its rows"
    if math.isfinite(old.signal) and old.signal > 1e-30:
        assert math.isclose(new.signal, old.signal, rel_tol=1e-5)
        # The reference's restored values may overflow fp32 where a fused multiply-add does not.
        if math.isfinite(old.noise):
            assert math.isclose(new.noise, old.noise, rel_tol=1e-4, abs_tol=1e-12 * old.signal)


def check_nonfinite(backend: Backend, source: torch.Tensor, fmt: WeightFormat) -> None:
    """The first element that is not finite is named, once. What is stored is as if such elements were let through."""
    (expected, _), (parts, _) = (destination(source.shape, fmt) for _ in range(2))
    audit = Audit(measure_sqnr=True)
    TORCH.quantize_into(source, expected, fmt, Audit(refuse_nonfinite=False))
    backend.quantize_into(source, parts, fmt, audit, 1000)
    assert_equal_parts(parts, expected)
    first = int((~torch.isfinite(source.reshape(-1))).nonzero()[0])
    with pytest.raises(NonFinite) as refused:
        audit.verify()
    assert refused.value.index == 1000 + first
    assert str(refused.value.value) == str(float(source.reshape(-1)[first])).replace("-nan", "nan")
    audit.verify()  # reported once


def check_dequantize(
    backend: Backend, shape: tuple[int, ...], fmt: WeightFormat, dtype: torch.dtype, seed: int
) -> None:
    """Of arbitrary codes and scales, into the middle of a larger tensor."""
    generator = torch.Generator().manual_seed(seed)
    qdata = torch.randint(0, 256, fmt.qdata_shape(shape), generator=generator, dtype=torch.uint8).view(fmt.dtype)
    scale = torch.rand(fmt.scale_shape(shape), generator=generator) * 10.0 ** (seed % 9 - 4)
    if fmt.has_zero_point:
        scale = fmt.word(scale, torch.randint(-8, 8, scale.shape, generator=generator))
    elif fmt.scale_dtype == torch.bfloat16:
        scale = scale.bfloat16()
    elif fmt.scale_dtype != torch.float32:
        scale = torch.randint(0, 127, scale.shape, generator=generator, dtype=torch.uint8).view(fmt.scale_dtype)
    whole = fmt.global_scale_shape(shape)
    parts = Parts(qdata, scale, None if whole is None else torch.full(whole, 9.0))
    around = torch.full((*shape[:-2], shape[-2] + 2, shape[-1]), 77.0, dtype=dtype)
    out = around[..., 1:-1, :]
    assert backend.dequantize(parts, fmt, dtype, out) is out
    assert_equal(out, TORCH.dequantize(parts, fmt, dtype, torch.empty(shape, dtype=dtype)))
    assert (around[..., :: shape[-2] + 1, :] == 77).all(), "wrote beside its rows"
