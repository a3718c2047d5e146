"""Checkpoints: quantized weights as files that other tools read; `qtensor.convert` makes them file to file."""

from __future__ import annotations

import importlib
from typing import Any

from .inspecting import CheckpointReport, inspect_checkpoint
from .loading import load_checkpoint
from .saving import save_checkpoint
from .verify import problems, verify_checkpoint

__all__ = [
    "CheckpointReport",
    "inspect_checkpoint",
    "load_checkpoint",
    "problems",
    "save_checkpoint",
    "verify_checkpoint",
]

_IN_CONVERT = {
    "ConversionReport",
    "ShardTask",
    "convert_shard",
    "quantize_checkpoint",
    "quantize_on_ranks",
    "quantize_on_ray",
}


def __getattr__(name: str) -> Any:
    """Names that were here in 0.1 and are in `qtensor.convert` now, which imports this package."""
    if name in _IN_CONVERT:
        return getattr(importlib.import_module("qtensor.convert"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
