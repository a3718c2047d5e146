"""Memory for large tensors that come and go while others stay."""

from __future__ import annotations

import mmap
from math import prod

import torch

_MAPPED_BYTES = 1 << 20
PASSING_BYTES = 1 << 17
"""`mapped_bytes` for what is freed as soon as a weight is finished. The C allocator begins with this limit, too, and
raises it when something larger is freed: then what was between two weights stays, as a hole for each of them."""


def room_for(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mapped_bytes: int = _MAPPED_BYTES
) -> torch.Tensor:
    """Uninitialised memory. On a host large ones (of `mapped_bytes` and more) are mappings of their own, which go back
    to the system when they are freed; the C allocator would keep a second model's worth of memory between them. Of a
    mapping only the pages that were written to take memory."""
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < mapped_bytes or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, device=device)
    own = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(own, dtype=torch.uint8).view(dtype).view(shape)


def passing_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is going to be freed while what is allocated after it stays."""
    copy = room_for(tuple(tensor.shape), tensor.dtype, tensor.device, mapped_bytes=PASSING_BYTES)
    if tensor.itemsize == 1:  # 8-bit floats have slow copies.
        copy.view(torch.uint8).copy_(tensor.view(torch.uint8))
        return copy
    return copy.copy_(tensor)
