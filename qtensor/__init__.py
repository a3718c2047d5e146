"""qtensor: model weights that quantize themselves while any PyTorch loader fills them.

with online_quant(fp8):
    model = AutoModelForCausalLM.from_pretrained(path)
"""

from __future__ import annotations

from . import fsdp, joins, slices  # noqa: F401  operations of quantized weights
from .checkpoint import load_checkpoint, save_checkpoint
from .checksums import weight_checksums
from .counter import CopyCounter
from .coverage import Coverage
from .errors import (
    CheckpointError,
    ConfigError,
    IncompleteLoadError,
    LossyReadError,
    NonFiniteWeightError,
    QTensorError,
    WeightDtypeError,
    WeightShapeError,
)
from .lazy import LazyWeight
from .online import online_quant
from .progress import ProgressEvent
from .quantized import QTensor, quantize
from .reload import online_reload
from .report import LayerReport, LoadReport
from .scheme import (
    Scheme,
    fp8,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    int4_per_group,
    int8_per_channel,
    mxfp4,
    mxfp8,
    nvfp4,
)
from .selection import DEFAULT_IGNORE
from .session import Session
from .sharding import Sharding

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_IGNORE",
    "CheckpointError",
    "ConfigError",
    "CopyCounter",
    "Coverage",
    "IncompleteLoadError",
    "LayerReport",
    "LazyWeight",
    "LoadReport",
    "LossyReadError",
    "NonFiniteWeightError",
    "ProgressEvent",
    "QTensor",
    "QTensorError",
    "Scheme",
    "Session",
    "Sharding",
    "WeightDtypeError",
    "WeightShapeError",
    "fp8",
    "fp8_per_block",
    "fp8_per_channel",
    "fp8_per_tensor",
    "int4_per_group",
    "int8_per_channel",
    "load_checkpoint",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "online_quant",
    "online_reload",
    "quantize",
    "save_checkpoint",
    "weight_checksums",
]
