"""Where a QTensor pickled by version 0.1 looks for the function that builds it: `qtensor.tensor.qtensor` has it."""

from .tensor.qtensor import rebuild as _rebuild

__all__ = ["_rebuild"]
