"""What most tests need: a module around one weight, and equality with the oracle, byte for byte."""

from __future__ import annotations

import socket
from typing import Any

import torch
from torch import nn

from qtensor import QTensor, quantize
from qtensor.sessions import registration


class Experts(nn.Module):
    """A mixture's stack of expert matrices."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(shape, dtype=dtype))


def holder(weight: torch.Tensor) -> tuple[nn.Module, str]:
    """A module whose one weight has the shape and dtype of `weight`, and that weight's name."""
    if weight.dim() == 3:
        return Experts(tuple(weight.shape), weight.dtype), "w"
    rows, cols = weight.shape
    return nn.Linear(cols, rows, bias=False, dtype=weight.dtype), "weight"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_oracle(param: Any, full: torch.Tensor, scheme: Any) -> None:
    """The loaded weight is `quantize(full, scheme)`: the same bytes in data and scale."""
    assert type(param) is QTensor, type(param)
    expected = quantize(full, scheme)
    assert param.shape == full.shape
    assert param.dtype == full.dtype
    assert len(param.parts()) == len(expected.parts())
    for part, wanted in zip(param.parts(), expected.parts(), strict=True):
        assert part.dtype == wanted.dtype
        assert same_bytes(part, wanted)


def copy_unit(dst: QTensor, src: QTensor, e: int | None, first: int, last: int) -> None:
    """Overwrite one unit's bytes."""
    rows = (slice(first, last), dst.scheme.format.scale_rows(first, last), slice(None))
    for target, source, where in zip(dst.parts(), src.parts(), rows, strict=False):
        if e is not None:
            target, source = target[e], source[e]
        target[where] = source[where]


def assert_no_hooks() -> None:
    """No session left anything installed in the process."""
    assert not registration.installed()
