"""Store: what holds the values of one weight while a loader writes them.

    ArmedWeight ── Store ─┬─ PlainStore ── Target
                          └─ QuantStore ─┬─ Units           how far each unit is
                                         ├─ Staging         high-precision rows of units that are not whole
                                         ├─ QuantizedRows ── Target
                                         └─ Reader          what a read gets from all of these

A `Target` is where final values go: fresh memory (a load), beside the values in use, or in their place (a reload).
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..errors import QTensorError
from ..regions.coverage import Box, Coverage
from ..regions.views import View
from ..tensor.qtensor import QTensor


class NeverWritten(QTensorError):
    """A read touched elements that were never written. `boxes` holds them, in the weight's dimensions."""

    def __init__(self, boxes: list[Box]) -> None:
        super().__init__(boxes)
        self.boxes = boxes


class Store(Protocol):
    """Callers hold the weight's lock. A store keeps the weight's `Coverage` up to date as it takes values."""

    @property
    def nbytes(self) -> int:
        """Of the weight in its final form."""

    def write(self, view: View, source: torch.Tensor) -> None:
        """Take `source` (of the view's size) into the view, and keep nothing of it."""

    def write_masked(self, values: torch.Tensor, touched: torch.Tensor) -> None:
        """Take those elements of `values` (of the weight's shape) where `touched` is true, all at once."""

    def accept(self, values: QTensor, box: Box) -> bool:
        """Take a part that has its final form already, bytes unchanged. False if it cannot be taken as it is."""

    def read(self, view: View) -> tuple[torch.Tensor, bool]:
        """The elements of a view as far as they were written, and whether any of them had been quantized. Raises
        NeverWritten."""

    def values(self) -> torch.Tensor:
        """The whole weight in high precision; during a reload, what the model computes with."""

    def fill(self) -> bool:
        """Let what was not written keep the values it had. False, with nothing changed, if some had none."""

    def take_nothing(self) -> None:
        """The weight has no elements, and is complete."""

    def cast(self, dtype: torch.dtype, device: torch.device) -> None:
        """`module.to(...)`: values have this dtype, and are there, from now on."""

    @property
    def retains(self) -> bool:
        """Is anything held that `release` frees?"""

    def release(self) -> None:
        """The writer has moved on: free what was retained for reading it back."""

    def verify(self) -> None:
        """Raise NonFinite if a device's kernels met what they could not report at once."""

    def commit(self) -> None:
        """Make all new values the ones in use. They are complete, and verified. May be repeated."""

    def rollback(self) -> None:
        """Forget everything that was written; what was in use before stays, bit for bit. May be repeated."""

    def copy(self, coverage: Coverage) -> Store:
        """An independent store in the same state, for a load's weight that is deep-copied."""
