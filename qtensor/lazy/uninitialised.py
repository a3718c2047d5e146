"""Uninitialised memory, recognised when it comes back.

`empty_like(weight)` and `weight.new_empty(...)` give whoever asks an ordinary tensor. If it is then put in the weight's
place with nothing in it, the weight has not been loaded; but `nn.Parameter(t)`, `.data` and `detach()` make other
objects of it, and writes through those leave no trace. So such memory is marked where it begins and ends, with bits
that no loader writes, and is uninitialised as long as one of the marks is there.
"""

from __future__ import annotations

import torch

_MARKS = {2: (torch.int16, 0x7FE5), 4: (torch.int32, 0x7FE5A5E5)}
"""By element size: NaNs, of bf16, fp16 and fp32, with a payload that no arithmetic gives."""
_given: set[int] = set()
_MOST = 100_000


def mark(tensor: torch.Tensor) -> torch.Tensor:
    """Memory that was allocated, for a caller who is going to write to it."""
    ends = _ends(tensor)
    if ends is not None:
        if len(_given) >= _MOST:
            _given.clear()
        _given.add(tensor.data_ptr())
        ends.fill_(_MARKS[tensor.dtype.itemsize][1])
    return tensor


def is_untouched(tensor: torch.Tensor) -> bool:
    """Is it memory that was marked, and not written to in full?"""
    if not _given or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    if tensor.is_meta or tensor.data_ptr() not in _given:
        return False
    ends = _ends(tensor)
    if ends is not None and bool((ends == _MARKS[tensor.dtype.itemsize][1]).any()):
        return True
    _given.discard(tensor.data_ptr())
    return False


def forget() -> None:
    """No session is open any more."""
    _given.clear()


def _ends(tensor: torch.Tensor) -> torch.Tensor | None:
    """The first and the last element as integers; None of what has no such bits."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta or not tensor.is_floating_point():
        return None
    if not tensor.numel() or tensor.dtype.itemsize not in _MARKS or not tensor.is_contiguous():
        return None
    bits = tensor.detach().view(-1).view(_MARKS[tensor.dtype.itemsize][0])
    return bits[:: max(1, len(bits) - 1)]
