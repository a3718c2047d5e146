"""Weights that arrive quantized: what has to become of them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import nn

from qtensor.schemes.scheme import SCHEMES
from support.helpers import assert_oracle, same_bytes
from support.sources import Tensors, whole

slow_data = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
NAMES = sorted(SCHEMES)
LOSSLESS = {
    ("fp8 tensor", "fp8_per_tensor"),
    ("fp8 tensor", "fp8_per_channel"),
    ("fp8 tensor", "fp8_per_block"),
    ("fp8 channel", "fp8_per_channel"),
    ("fp8 blocks", "fp8_per_block"),
    ("fp8 ue8m0 blocks", "fp8_per_block"),
    ("fp8 ue8m0 blocks", "mxfp8"),
    ("fp8 blocks of powers of two", "fp8_per_block"),
    ("fp8 blocks of powers of two", "mxfp8"),
    ("mxfp8", "mxfp8"),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8"),
    ("mxfp4", "nvfp4"),
    ("mxfp4 blocks", "mxfp4"),
    ("mxfp4 blocks", "mxfp8"),
    ("mxfp4 blocks", "nvfp4"),
    ("nvfp4 of ModelOpt", "nvfp4"),
    ("int8 channel", "int8_per_channel"),
    ("int8 words", "int8_per_channel"),
    ("int4 channel", "int8_per_channel"),
    ("int4 channel", "int4_per_group"),
    ("int4 channel", "fp8_per_channel"),
    ("torchao fp8", "fp8_per_channel"),
    ("torchao int8", "int8_per_channel"),
}
MOVED = {("nvfp4", "nvfp4"), ("bitsandbytes int8", "int8_per_channel")}


def layer(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(cols, rows, bias=False, dtype=dtype)


def named(parts: Tensors) -> Tensors:
    return {name.replace("*", "weight"): tensor for name, tensor in parts.items()}


def outcome(session: Any) -> str:
    """What the report says became of the numbers of the one weight."""
    return str(session.report().layers[0].source.rpartition(": ")[2])


def assert_arrived(weight: Any, parts: Tensors, became: str = "requantized") -> None:
    """What must have become of a matrix of those parts."""
    expected = whole(parts, weight.dtype, tuple(weight.shape))
    if became == "lossless":
        found = weight.dequantize()
        # Integers have no -0 where their scale is 0.
        assert torch.equal(found, expected) if "int" in weight.scheme.name else same_bytes(found, expected)
    elif became == "moved":
        assert torch.allclose(weight.dequantize().float(), expected.float(), rtol=2**-7, atol=0)
    else:
        assert_oracle(weight, expected, weight.scheme)


def expected_outcome(form: str, scheme: str) -> str:
    pair = (form, SCHEMES[scheme].name)
    return "lossless" if pair in LOSSLESS else "moved" if pair in MOVED else "requantized"
