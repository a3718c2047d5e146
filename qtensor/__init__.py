"""qtensor: model weights that quantize themselves while any PyTorch loader fills them.

with online_quant(fp8):
    model = AutoModelForCausalLM.from_pretrained(path)
"""

from __future__ import annotations

from .checkpoint import load_checkpoint, save_checkpoint
from .errors import (
    CheckpointError,
    ConfigError,
    IncompleteLoadError,
    LossyReadError,
    MissingExtraError,
    NonFiniteWeightError,
    QTensorError,
    WeightDtypeError,
    WeightShapeError,
)
from .lazy import ops as lazy_ops
from .lazy.counter import CopyCounter
from .lazy.lazy_tensor import LazyWeight
from .ranks.sharding import Sharding
from .regions.coverage import Coverage
from .report.progress import ProgressEvent
from .report.report import LayerReport, LoadReport
from .schemes.scheme import (
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
from .schemes.selection import DEFAULT_IGNORE
from .sessions.online import online_quant
from .sessions.reload import online_reload
from .sessions.session import Session
from .tensor import ops as quantized_ops
from .tensor.checksums import weight_checksums
from .tensor.qtensor import QTensor, quantize
from .version import __version__ as __version__

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
    "MissingExtraError",
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

quantized_ops.install()
lazy_ops.install()
