"""qtensor: model weights that quantize themselves while any PyTorch loader fills them.

with online_quant(fp8):
    model = AutoModelForCausalLM.from_pretrained(path)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .checkpoint import save_pretrained, transformers_table
from .errors import (
    CheckpointError,
    ConfigError,
    IncompleteLoadError,
    LossyReadError,
    LossySourceError,
    MissingExtraError,
    NonFiniteWeightError,
    QTensorError,
    SnapshotError,
    WeightDtypeError,
    WeightShapeError,
)
from .lazy import ops as lazy_ops
from .lazy.lazy_tensor import LazyWeight
from .lazy.low_rank import write_low_rank
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
    int4_asymmetric,
    int4_per_group,
    int4_per_group_32,
    int8_per_channel,
    mxfp4,
    mxfp8,
    nvfp4,
)
from .schemes.selection import DEFAULT_IGNORE
from .sessions.online import online_quant
from .sessions.reload import ReloadSession, online_reload
from .sessions.session import Session
from .tensor import ops as quantized_ops
from .tensor.checksums import changed_weights, weight_checksums, weight_root
from .tensor.qtensor import QTensor, quantize
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .checkpoint import (
        inspect_checkpoint,
        load_checkpoint,
        load_snapshot,
        save_checkpoint,
        save_snapshot,
        verify_checkpoint,
    )
    from .checkpoint.planning import plan
    from .checkpoint.quantization_config import QTensorConfig as QTensorConfig
    from .convert import quantize_checkpoint
    from .lazy.counter import CopyCounter
    from .schemes.plan import Plan
    from .schemes.planning import load_plan

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
    "LossySourceError",
    "MissingExtraError",
    "NonFiniteWeightError",
    "Plan",
    "ProgressEvent",
    "QTensor",
    "QTensorError",
    "ReloadSession",
    "Scheme",
    "Session",
    "Sharding",
    "SnapshotError",
    "WeightDtypeError",
    "WeightShapeError",
    "changed_weights",
    "fp8",
    "fp8_per_block",
    "fp8_per_channel",
    "fp8_per_tensor",
    "inspect_checkpoint",
    "int4_asymmetric",
    "int4_per_group",
    "int4_per_group_32",
    "int8_per_channel",
    "load_checkpoint",
    "load_plan",
    "load_snapshot",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "online_quant",
    "online_reload",
    "plan",
    "quantize",
    "quantize_checkpoint",
    "save_checkpoint",
    "save_snapshot",
    "verify_checkpoint",
    "weight_checksums",
    "weight_root",
    "write_low_rank",
]

quantized_ops.install()
lazy_ops.install()
transformers_table.install()
save_pretrained.install()


_FROM = {
    "CopyCounter": "qtensor.lazy.counter",
    "inspect_checkpoint": "qtensor.checkpoint",
    "Plan": "qtensor.schemes.plan",
    "load_checkpoint": "qtensor.checkpoint",
    "load_plan": "qtensor.schemes.planning",
    "load_snapshot": "qtensor.checkpoint",
    "plan": "qtensor.checkpoint.planning",
    "quantize_checkpoint": "qtensor.convert",
    "save_checkpoint": "qtensor.checkpoint",
    "save_snapshot": "qtensor.checkpoint",
    "verify_checkpoint": "qtensor.checkpoint",
}


def __getattr__(name: str) -> Any:
    """What reads and writes files, needs transformers, or watches loaders is imported when it is asked for."""
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    if name == "QTensorConfig":
        from .checkpoint import registering

        return registering.config_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
