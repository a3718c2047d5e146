"""Checkpoints: quantized weights as files that other tools read, from memory or from high-precision files, and back."""

from . import pretrained  # noqa: F401  transformers' from_pretrained inside a session
from .checking import problems
from .converting import ConversionReport, ShardTask, convert_shard, quantize_checkpoint
from .distributed import quantize_on_ranks, quantize_on_ray
from .inspecting import CheckpointReport, inspect_checkpoint
from .loading import load_checkpoint
from .saving import save_checkpoint

__all__ = [
    "CheckpointReport",
    "ConversionReport",
    "ShardTask",
    "convert_shard",
    "inspect_checkpoint",
    "load_checkpoint",
    "problems",
    "quantize_checkpoint",
    "quantize_on_ranks",
    "quantize_on_ray",
    "save_checkpoint",
]
