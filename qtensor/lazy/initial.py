"""Initial: what a weight was before it was loaded, for elements that no loader writes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..regions.coverage import Coverage
from ..regions.views import View
from .plain_store import PlainStore


class Initial:
    """values: the weight's own, if they may be needed. Initialisers that ran since are recorded, not carried out."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self.values: torch.Tensor | None = None
        self._recorded: list[tuple[View, Callable[[torch.Tensor], None]]] = []

    def record(self, view: View, fill: Callable[[torch.Tensor], None]) -> None:
        """An initialiser wants to fill a view."""
        self._recorded.append((view, fill))

    def settle(self, initialise: bool) -> torch.Tensor | None:
        """The values, with the recorded initialisers done on top if `initialise`; None if there is nothing."""
        values = self.values
        if initialise and self._recorded:
            values = torch.zeros(self._shape, dtype=self._dtype, device=self._device) if values is None else values
            for view, fill in self._recorded:
                fill(values.as_strided(view.size, view.stride, values.storage_offset() + view.offset))
        return values

    def plain_store(self, coverage: Coverage, initialise: bool) -> PlainStore:
        """Where a weight that is not quantized is loaded to: these values, or memory as it comes."""
        values = self.settle(initialise)
        self.forget()
        if values is None:
            return PlainStore(torch.empty(self._shape, dtype=self._dtype, device=self._device), coverage)
        return PlainStore(values.to(device=self._device, dtype=self._dtype), coverage, initialised=True)

    def forget(self) -> None:
        self.values = None
        self._recorded.clear()

    def copy(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Initial:
        """The same for a copy of the weight, perhaps of another type or on another device."""
        other = Initial(self._shape, dtype or self._dtype, device or self._device)
        other.values = self.values if self.values is None or dtype is None else self.values.to(dtype)
        other._recorded = list(self._recorded)
        return other
