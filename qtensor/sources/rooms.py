"""Where rows are decoded to that are quantized at once: the same memory for one chunk after the other, of each thread.

New memory for each would lie between finished weights, where the C allocator keeps a hole of a part of a megabyte for
every weight. `DecodedRows` is for who takes many chunks, one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

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
        out = kept_room(nbytes).view(dtype).view(shape)
        if source.decode_into(parts, shape, out):
            return out
    return source.decode(parts, shape, dtype)


def kept_room(nbytes: int) -> torch.Tensor:
    """Memory of the thread, uint8, until it asks again; new memory, if that is more than it keeps."""
    room: torch.Tensor | None = getattr(_own, "room", None)
    if room is None or room.numel() < nbytes:
        room = room_for((max(nbytes, 1 << 20),), torch.uint8, torch.device("cpu"))
        if nbytes <= _LARGEST:
            _own.room = room
    return room[:nbytes]


class DecodedRows:
    """Rows of a matrix that are decoded a few at a time, when they are asked for.

    cut: The parts that some of the rows need. count: Rows. step: Of them at a time.
    """

    def __init__(
        self,
        source: Source,
        cut: Callable[[int, int], Mapping[str, torch.Tensor]],
        shape: Matrix,
        dtype: torch.dtype,
        step: int,
    ) -> None:
        self._source, self._cut, self._dtype = source, cut, dtype
        (self.count, self._cols), self.step = shape, step

    def decode(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop, valid until the thread asks for others."""
        return decoded(self._source, self._cut(start, stop), (stop - start, self._cols), self._dtype)

    def amax(self) -> float | None:
        """The largest magnitude of all of them; None if only the decoded values tell."""
        return self._source.amax(self._cut(0, self.count), (self.count, self._cols), self._dtype)
