"""What FSDP2 asks of a quantized weight that `fully_shard` splits: room for a padded shard, and views of one.

These operations mean something of their own where FSDP calls them. `QTensor.fsdp_pre_all_gather` and its partner hand
over the bytes to gather.
"""

from __future__ import annotations

from typing import Any

import torch

from ..callers import asked_by_fsdp
from ..errors import QTensorError
from .dequantized_view import view_of_values
from .ops_copies import alias, like
from .ops_slices import take_slice
from .qtensor import QTensor, empty
from .table import OpTable

aten = torch.ops.aten
OPS = OpTable()


@OPS.implements(aten.new_zeros.default)
def _new_zeros(func: Any, w: QTensor, size: Any, **kwargs: Any) -> Any:
    return _room(w, tuple(size)) if asked_by_fsdp() else like(func, w, size, **kwargs)


def _room(w: QTensor, size: tuple[int, ...]) -> QTensor:
    """Zeros in quantized form, of `size`, to hold a shard of `w` and its padding. Scales that no row owns are `w`'s."""
    if w._padded is not None and w._padded.shape == size:
        return w._padded
    if w.transposed or size[1:] != w.shape[1:]:
        raise QTensorError(
            f"fully_shard: a quantized weight {list(w.shape)} is split along its first dimension only (Shard(0))"
        )
    block = w.scheme.format.block[0] if w.dim() == 2 else 1
    if block > 1 and size[0] % block and size[0] != w.shape[0]:
        raise QTensorError(
            f"fully_shard: a shard of {size[0]} rows of a weight {list(w.shape)} ends inside a group of {block} with "
            f"one {w.scheme.name} scale. Choose another number of ranks, or a scheme with a scale per row."
        )
    room = empty(size, w.scheme, w.dtype, w.device)
    by_rows = {id(part) for part in w.parts_by_rows()}
    for mine, theirs in zip(room.parts(), w.parts(), strict=True):
        if id(theirs) in by_rows:
            mine.view(torch.uint8).zero_()
        else:
            mine.copy_(theirs)
    room._is_room = True
    return room


@OPS.implements(aten.view.default)
def _view(func: Any, w: QTensor, size: Any) -> Any:
    """FSDP keeps a flat view of a shard's memory, which it does not use where there are extensions."""
    if tuple(size) == (-1,) and asked_by_fsdp():
        return alias(aten.alias.default, w)
    return view_of_values(func, w, size)


@OPS.implements(aten.as_strided.default)
def _as_strided(func: Any, w: QTensor, size: Any, stride: Any, offset: int | None = None) -> Any:
    """The first rows of a gathered weight: those that are not padding."""
    size = tuple(size)
    in_rows = torch.empty(size, dtype=w.dtype, device="meta").stride()
    if w.transposed or size[1:] != w.shape[1:] or size[0] > w.shape[0] or tuple(stride) != in_rows or offset:
        return view_of_values(func, w, size, stride, offset)
    rows = take_slice(w, 0, slice(0, size[0], 1))
    return rows.with_parts(*rows.parts(), whole_units=w.whole_units)


@OPS.implements(aten.is_pinned.default)
def _is_pinned(func: Any, w: QTensor, device: Any = None) -> bool:
    return all(part.is_pinned() for part in w.parts())


@OPS.implements(aten._pin_memory.default)
def _pin_memory(func: Any, w: QTensor, device: Any = None) -> QTensor:
    return w.with_parts(*(part.pin_memory() for part in w.parts()))
