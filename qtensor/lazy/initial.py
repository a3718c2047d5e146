"""Initial: what a weight holds before a loader writes to it.

Initialisers are recorded, not run: a weight that is going to be loaded needs no random numbers. Where someone wants to
see what they would have left (a constructor that transforms its own weight, on_missing="init"), they are carried out
for that weight alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..interrupts import without_grad
from ..regions.coverage import Coverage
from ..regions.views import View, cover
from .plain_store import PlainStore, view_in

Fill = Callable[[torch.Tensor], object]


class Initial:
    """The values that a weight of `shape` and `dtype` was given, and what initialisers do to them afterwards.

    values: those it was given, as far as they are kept; those that were made of them, once somebody has asked.
    given: they are a model's own, not what memory held, or an initialiser made, when it was constructed.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.values: torch.Tensor | None = None
        self.given = False
        self._dtype = self._now = dtype  # of the values before the first step, and after the last
        self._steps: list[tuple[View, Fill, bool] | torch.dtype] = []

    def __bool__(self) -> bool:
        """Is there anything to begin with?"""
        return self.values is not None or any(isinstance(step, tuple) for step in self._steps)

    def fill(self, view: View, fill: Fill, replaces: bool) -> None:
        """An initialiser writes to a view; `replaces`: whatever the view holds."""
        self._steps.append((view, fill, replaces))

    def cast(self, dtype: torch.dtype, device: torch.device) -> None:
        self._steps.append(dtype)
        self._now, self.device = dtype, device

    def forget(self) -> None:
        """Nothing is known of it."""
        self.values, self.given, self._dtype = None, False, self._now
        self._steps.clear()

    @property
    def known(self) -> bool:
        """Is each element one that was given, or follows from initialisers alone?"""
        if self.values is not None:
            return True
        filled = Coverage(self.shape)
        for step in self._steps:
            if isinstance(step, tuple) and step[2]:
                cover(filled, step[0])
        return filled.complete

    def carried_out(self, view: View) -> torch.Tensor:
        """A view of the values, which are kept. Elements that nobody has given are zero."""
        return view_in(self._carry_out(), view)

    def fallback(self, policy: str) -> torch.Tensor | None:
        """What on_missing "init" or "keep" has for elements that no loader wrote: what initialisers leave, or the
        model's own values. None if there is nothing."""
        if policy == "init":
            return self._carry_out() if self else None
        return self.values if policy == "keep" and self.given else None

    def plain_store(self, coverage: Coverage, policy: str) -> PlainStore:
        """Where a weight that is not quantized is loaded to: these values, or memory as it comes."""
        values = self.fallback(policy)
        self.forget()
        if values is None:
            return PlainStore(torch.empty(self.shape, dtype=self._now, device=self.device), coverage)
        return PlainStore(values.to(device=self.device, dtype=self._now), coverage, initialised=True)

    def _carry_out(self) -> torch.Tensor:
        values = self.values
        if values is None:
            values = torch.zeros(self.shape, dtype=self._dtype, device=self.device)
        elif self._steps:
            values = values.to(self.device, copy=True)  # whoever gave them may hold them still
        values = without_grad(partial(self._take_steps, values))
        self.values, self._dtype = values, values.dtype
        return values

    def _take_steps(self, values: torch.Tensor) -> torch.Tensor:
        while self._steps:
            step = self._steps[0]
            if isinstance(step, tuple):
                view, fill, _ = step
                fill(view_in(values, view))
            else:
                values = values.to(step)
            del self._steps[0]
        return values

    def copy(self) -> Initial:
        other = Initial(self.shape, self._dtype, self.device)
        other.values, other.given, other._steps, other._now = self.values, self.given, list(self._steps), self._now
        return other
