"""WriteErrors: what went wrong with writes to a weight, until the elements that were meant have been written.

A loader that swallows an error must not make it disappear, and one that tries again with good values is forgiven.
"""

from __future__ import annotations

import torch

from ..errors import QTensorError
from ..regions.coverage import Coverage
from ..regions.views import View, cover, uncover, whole


class WriteErrors:
    """first: the first error that still counts."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.first: QTensorError | None = None
        self._shape = shape
        self._wrong: Coverage | None = None

    def add(self, error: QTensorError, where: View | torch.Tensor | None) -> None:
        """An error kept a view (of anything else, all elements) from being written."""
        self.first = self.first or error
        self._wrong = self._wrong or Coverage(self._shape)
        cover(self._wrong, where if isinstance(where, View) else whole(self._shape))

    def start_over(self, error: QTensorError) -> None:
        """Nothing of the weight counts any more, for this reason. May be repeated."""
        self.first = error
        self._wrong = None  # It may have been left half changed.
        self.add(error, None)

    def forgive(self, where: View | torch.Tensor) -> None:
        """The view, or the elements where a mask is true, have been written."""
        if self._wrong is not None:
            uncover(self._wrong, where if isinstance(where, View) else where.cpu().numpy())
        if self._wrong is None or not self._wrong.covered:
            self.first = None
