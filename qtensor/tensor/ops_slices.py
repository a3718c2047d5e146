"""Slices of quantized weights: parts that take whole scale groups stay quantized, and alias the weight.

A part that cuts through a scale group is a slice of the dequantized values (`DequantizedView`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.formats import ceil_div
from .dequantized_view import view_of_values
from .qtensor import QTensor
from .table import OpTable

aten = torch.ops.aten
OPS = OpTable()


@OPS.implements(aten.select.int)
def select(func: Any, w: QTensor, dim: int, index: int) -> Any:
    if w.dim() == 3 and dim % 3 == 0:
        return w.with_parts(*(part[index] for part in w.parts()))
    return view_of_values(func, w, dim, index)


@OPS.implements(aten.slice.Tensor)
def _slice(func: Any, w: QTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    dim, part = dim % w.dim(), slice(*slice(start, end, step).indices(w.shape[dim]))
    if w._is_room and dim == part.start == 0 and part.step == 1:
        rows = take_slice(w, 0, part)
        shard = rows.with_parts(*rows.parts(), whole_units=True)
        shard._padded = w
        return shard
    return take_slice(w, dim, part) if sliceable(w, dim, part) else view_of_values(func, w, dim, start, end, step)


@OPS.implements(aten.split.Tensor, aten.unsafe_split.Tensor)
def _split(func: Any, w: QTensor, size: int, dim: int = 0) -> Any:
    sizes = [min(size, w.shape[dim] - at) for at in range(0, max(w.shape[dim], 1), size)]
    return _split_with_sizes(func, w, sizes, dim)


@OPS.implements(aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default)
def _split_with_sizes(func: Any, w: QTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    parts, at = [], 0
    for size in sizes:
        parts.append(_slice(aten.slice.Tensor, w, dim, at, at + size))
        at += size
    return parts


@OPS.implements(aten.unbind.int)
def _unbind(func: Any, w: QTensor, dim: int = 0) -> Any:
    return [select(aten.select.int, w, dim, i) for i in range(w.shape[dim])]


@OPS.implements(aten.index.Tensor)
def _index(func: Any, w: QTensor, indices: Sequence[Any]) -> Any:
    if w.dim() == 3 and len(indices) == 1 and indices[0].dim() == 1:
        return _gather(w, indices[0])
    return func(w.dequantize(), indices)


@OPS.implements(aten.index_select.default)
def _index_select(func: Any, w: QTensor, dim: int, index: torch.Tensor) -> Any:
    return _gather(w, index) if w.dim() == 3 and dim % 3 == 0 else func(w.dequantize(), dim, index)


def _gather(w: QTensor, experts: torch.Tensor) -> QTensor:
    """The matrices `experts` (indices or mask, 1-d) of a stack."""
    return w.with_parts(*(index_rows(part, experts) for part in w.parts()), whole_units=True)


def sliceable(w: QTensor, dim: int, part: slice) -> bool:
    """Do the slice's scales come as a slice, too? Steps and cuts inside a block do not."""
    if w.dim() == 3 and dim == 0:
        return True
    block = w.scheme.format.block[_stored_dim(w, dim) - w.dim() + 2]
    return block == 1 or (
        part.step == 1 and part.start % block == 0 and (part.stop % block == 0 or part.stop == w.shape[dim])
    )


def _stored_dim(w: QTensor, dim: int) -> int:
    """The dimension of qdata that a logical dimension names."""
    if not w.transposed or dim < w.dim() - 2:
        return dim
    return 2 * w.dim() - 3 - dim


def take_slice(w: QTensor, dim: int, part: slice) -> QTensor:
    fmt, size = w.scheme.format, len(range(part.start, part.stop, part.step))
    everything, logical, dim = size == w.shape[dim], dim, _stored_dim(w, dim)
    before, row_dim = (slice(None),) * dim, w.dim() - 2
    if dim < row_dim:
        return w.with_parts(*(tensor[(*before, part)] for tensor in w.parts()))
    whole, scale, stored, cols = w.whole_units, w.scale, part, w.cols
    block = fmt.block[dim - row_dim]
    if fmt.granularity == "tensor" or (fmt.granularity == "channel" and dim > row_dim):
        whole = whole and everything
    else:
        scale = scale[(*before, slice(part.start // block, ceil_div(part.stop, block), part.step))]
        whole = whole and (everything or not fmt.needs_whole_matrix)
    if dim > row_dim:
        cols, stored = size, slice(part.start // fmt.per_byte, ceil_div(part.stop, fmt.per_byte), part.step)
    taken = w.with_parts(w.qdata[(*before, stored)], scale, w.global_scale, whole_units=whole, cols=cols)
    if not whole:
        taken._part_of = (w, logical, part)
    return taken


def index_rows(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`t[index]`, as bytes where elements are bytes: CPU has no indexing for float8."""
    return t[index] if t.dtype.itemsize > 1 else t.view(torch.uint8)[index].view(t.dtype)
