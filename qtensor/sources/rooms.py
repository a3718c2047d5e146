"""Where rows are decoded to that are quantized at once: the same memory for one chunk after the other, of each thread.

New memory for each would lie between finished weights, where the C allocator keeps a hole of a part of a megabyte for
every weight.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from ..tensor.rooms import room_for
from .source import Matrix, Source

_LARGEST = 4 << 20
"""Bytes that a thread keeps."""
_own = threading.local()


def decoded(source: Source, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """As `source.decode`, for who is done with the rows when the thread asks for the next ones."""
    nbytes = shape[0] * shape[1] * dtype.itemsize
    if nbytes <= _LARGEST and all(part.is_cpu for part in parts.values()):
        room: torch.Tensor | None = getattr(_own, "room", None)
        if room is None or room.numel() < nbytes:
            room = _own.room = room_for((max(nbytes, 1 << 20),), torch.uint8, torch.device("cpu"))
        out = room[:nbytes].view(dtype).view(shape)
        if source.decode_into(parts, shape, out):
            return out
    return source.decode(parts, shape, dtype)
