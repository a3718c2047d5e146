"""What `kernels.Backend` asks of a backend: its operations with their arguments, and the reference's results."""

from __future__ import annotations

import inspect

import torch

from qtensor.kernels import SOURCE_DTYPES, Backend, Parts, WeightFormat
from qtensor.kernels.reference import TORCH

METHODS = tuple(name for name in vars(Backend) if inspect.isfunction(vars(Backend)[name]) and name[0] != "_")
OPERATIONS = tuple(name for name in METHODS if name != "compile")  # what gives bytes


def assert_has_the_operations(backend: Backend) -> None:
    """All of them with the Protocol's arguments, and `own` names those that are written for this backend."""
    for name in METHODS:
        asked = list(inspect.signature(vars(Backend)[name]).parameters.values())[1:]
        found = list(inspect.signature(getattr(backend, name)).parameters.values())
        assert found == asked, f"{backend.name}.{name}"
    assert backend.own == tuple(name for name in OPERATIONS if name in vars(type(backend)))


def assert_gives_the_references_results(backend: Backend, fmt: WeightFormat) -> None:
    """Equal bytes, and products within the rounding of x; a matrix, and a stack with an expert that has no rows."""
    for shape in ((130, 48), (3, 5, 131)):
        source = _normal(shape, 0).to(torch.bfloat16)
        parts, expected = Parts.of(shape, fmt), Parts.of(shape, fmt)
        backend.quantize_into(source, parts, fmt)
        TORCH.quantize_into(source, expected, fmt)
        for ours, reference in zip(parts, expected, strict=True):
            _assert_same_bytes(ours, reference)
        for dtype in SOURCE_DTYPES:
            _assert_same_bytes(backend.dequantize(parts, fmt, dtype), TORCH.dequantize(parts, fmt, dtype))
            out = torch.empty(shape, dtype=dtype)
            assert backend.dequantize(parts, fmt, dtype, out) is out
            _assert_same_bytes(out, TORCH.dequantize(parts, fmt, dtype, torch.empty_like(out)))
            x = _normal((7, shape[-1]), 1).to(dtype)
            for bias in (None, _normal(shape[:-1], 2).to(dtype)):
                if len(shape) == 2:
                    _assert_close(backend.linear(x, parts, fmt, bias), TORCH.linear(x, parts, fmt, bias))
                else:
                    rows = torch.tensor([3, 3, 7], dtype=torch.int32), bias
                    _assert_close(backend.experts(x, parts, fmt, *rows), TORCH.experts(x, parts, fmt, *rows))
            if fmt.element == "e4m3":  # Activations are quantized for fp8 products only.
                pairs = zip(backend.quantize_activation(x, fmt), TORCH.quantize_activation(x, fmt), strict=True)
                for ours, reference in pairs:
                    _assert_same_bytes(ours, reference)


def _normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _assert_same_bytes(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype)
    assert torch.equal(ours.contiguous().view(torch.uint8), reference.contiguous().view(torch.uint8))


def _assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    largest, tolerance = float(reference.abs().max()), 1e-5 if ours.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance * largest)
