"""Joining quantized weights: stacks of matrices, and matrices below one another, without touching a value.

Loaders that merge a mixture's experts call `torch.stack` and `torch.cat` on them. The result is a QTensor where whole
scale groups stay together; otherwise it is what joining the dequantized values gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .qtensor import QTensor, on_dequantized
from .table import OpTable

aten = torch.ops.aten
OPS = OpTable()


@OPS.implements(aten.stack.default)
def _stack(func: Any, weights: Sequence[Any], dim: int = 0) -> Any:
    if dim == 0 and _alike(weights, 2):
        return _joined(torch.stack, weights, dim)
    return on_dequantized(func, weights, dim)


@OPS.implements(aten.cat.default)
def _cat(func: Any, weights: Sequence[Any], dim: int = 0) -> Any:
    if _alike(weights, 2) or _alike(weights, 3):
        first = weights[0]
        fmt, row_dim = first.scheme.format, first.dim() - 2
        if dim % first.dim() < row_dim:
            return _joined(torch.cat, weights, dim)
        by_rows = dim % first.dim() == row_dim
        if by_rows and fmt.needs_whole_matrix and all(torch.equal(w.parts()[-1], first.parts()[-1]) for w in weights):
            *split, shared = zip(*(w.parts() for w in weights), strict=True)
            return first.with_parts(*(_bytes(torch.cat, parts, dim) for parts in split), shared[0].clone())
        if by_rows and not fmt.needs_whole_matrix and all(w.shape[row_dim] % fmt.block[0] == 0 for w in weights[:-1]):
            return _joined(torch.cat, weights, dim)
    return on_dequantized(func, weights, dim)


def _alike(weights: Sequence[Any], dims: int) -> bool:
    """Are they quantized matrices (or stacks) of one scheme and dtype, each with all of its scales?"""
    first = weights[0]
    return all(
        isinstance(w, QTensor)
        and w.dim() == dims
        and not w.transposed
        and (w.whole_units or w.scheme.format.needs_whole_matrix)
        and (w.scheme, w.dtype) == (first.scheme, first.dtype)
        for w in weights
    )


def _joined(join: Any, weights: Sequence[QTensor], dim: int) -> QTensor:
    parts = (_bytes(join, tensors, dim) for tensors in zip(*(w.parts() for w in weights), strict=True))
    return weights[0].with_parts(*parts, whole_units=True)


def _bytes(join: Any, tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The CPU joins no float8; bytes it does."""
    return join([t.view(torch.uint8) for t in tensors], dim).view(tensors[0].dtype)
