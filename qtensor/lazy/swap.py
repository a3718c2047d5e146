"""Swap: an exchange of what two tensor objects are, by which a weight becomes another and stays the object it was."""

from __future__ import annotations

from typing import Any

import torch


class Swap:
    """An exchange of what two tensor objects are, so that everyone who holds one of them sees the change.

    As `torch.utils.swap_tensors`, which refuses where a graph or a Python weak reference holds one of them. Those keep
    meaning the tensor, or the object, that they took. `do` and `undo` may be repeated, and called after an interrupt
    has stopped the other anywhere.
    """

    def __init__(self, a: Any, b: Any) -> None:
        self._a, self._b = a, b
        self._was = [(t._cdata, t.__class__, t.__dict__) for t in (a, b)]

    def do(self) -> bool:
        """False, with nothing changed, where PyTorch refuses because C++ holds a weak reference."""
        try:
            self._become(*reversed(self._was))
        except RuntimeError:
            if self._a._cdata != self._was[0][0]:
                raise
            return False
        return True

    def undo(self) -> None:
        """The objects are what they were."""
        self._become(*self._was)

    def _become(self, a: Any, b: Any) -> None:
        if self._a._cdata != a[0]:
            torch._C._swap_tensor_impl(self._a, self._b)  # type: ignore[attr-defined]
        (_, self._a.__class__, self._a.__dict__), (_, self._b.__class__, self._b.__dict__) = a, b
