"""Checkpoints quantized file to file: on one machine, by several ranks, or on a Ray cluster."""

from .converting import ConversionReport, ShardTask, convert_shard, quantize_checkpoint
from .launch import quantize_on_ranks, quantize_on_ray

__all__ = [
    "ConversionReport",
    "ShardTask",
    "convert_shard",
    "quantize_checkpoint",
    "quantize_on_ranks",
    "quantize_on_ray",
]
