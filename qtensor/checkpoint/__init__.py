"""Checkpoints: quantized weights as files that other tools read; `qtensor.convert` makes them file to file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inspecting import CheckpointReport, inspect_checkpoint
    from .loading import load_checkpoint
    from .saving import save_checkpoint
    from .snapshots import load_snapshot, save_snapshot
    from .verify import problems, verify_checkpoint

__all__ = [
    "CheckpointReport",
    "inspect_checkpoint",
    "load_checkpoint",
    "load_snapshot",
    "problems",
    "save_checkpoint",
    "save_snapshot",
    "verify_checkpoint",
]

_FROM = {
    "CheckpointReport": "qtensor.checkpoint.inspecting",
    "inspect_checkpoint": "qtensor.checkpoint.inspecting",
    "load_checkpoint": "qtensor.checkpoint.loading",
    "load_snapshot": "qtensor.checkpoint.snapshots",
    "problems": "qtensor.checkpoint.verify",
    "save_checkpoint": "qtensor.checkpoint.saving",
    "save_snapshot": "qtensor.checkpoint.snapshots",
    "verify_checkpoint": "qtensor.checkpoint.verify",
    # These were here in 0.1; what converts files imports this package.
    "ConversionReport": "qtensor.convert",
    "ShardTask": "qtensor.convert",
    "convert_shard": "qtensor.convert",
    "quantize_checkpoint": "qtensor.convert",
    "quantize_on_ranks": "qtensor.convert",
    "quantize_on_ray": "qtensor.convert",
}


def __getattr__(name: str) -> Any:
    """Each is imported when it is asked for: a load by others' code needs none of them."""
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
