"""PlainStore: a weight that is not quantized, in an ordinary tensor, that knows which of its elements were written."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..interrupts import in_spite_of_interrupts
from ..regions.coverage import Box, Coverage, boxes_of
from ..regions.views import View, cover, regions, view_mask, whole
from ..tensor.qtensor import QTensor
from .store import NeverWritten
from .target import Fresh

_Tensor = tuple[torch.Tensor]


class PlainStore:
    """A weight that stays in high precision: a real tensor of the weight's shape (see `store.Store`).

    initialised: the tensor held meaningful values before any load, which may stay where no loader writes.
    constructed: it is the memory that the weight was constructed with. What a loader has not written yet may be read:
        it is what an ordinary Parameter would hold.
    target: how new values get into the tensor.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        coverage: Coverage,
        initialised: bool = False,
        target: Callable[[Callable[[int], _Tensor]], Fresh[_Tensor]] = Fresh,
        constructed: bool = False,
    ) -> None:
        self.coverage = coverage
        self.target = target(lambda _: (tensor,))
        self.initialised, self.constructed = initialised or self.target.in_use, constructed
        self._replaced: list[tuple[Fresh[_Tensor], torch.Tensor]] = []

    @property
    def tensor(self) -> torch.Tensor:
        """What is written to: during a reload, the second copy if there is one."""
        return self.target.latest(0)[0]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def at(self, view: View) -> torch.Tensor:
        """The elements of a view, where they are. The tensor is contiguous; it may be a part of a larger one."""
        return view_in(self.tensor, view)

    def write(self, view: View, source: torch.Tensor) -> None:
        if self.target.early and view == whole(self.coverage.shape):
            # Nothing can go wrong half-way, and the second copy of a large embedding is saved.
            self.target.rollback()
            self.target.live(0)[0].copy_(source)
            cover(self.coverage, view)
            return
        self._begin()
        self.at(view).copy_(source)
        cover(self.coverage, view)
        self._commit_complete()

    def write_masked(self, values: torch.Tensor, touched: torch.Tensor) -> None:
        self._begin()
        tensor = self.tensor
        tensor.copy_(torch.where(touched.to(tensor.device), values.to(tensor), tensor))
        self.coverage.add_mask(touched.cpu().numpy())
        self._commit_complete()

    def accept(self, values: QTensor, box: Box) -> bool:
        return False

    def read(self, view: View) -> tuple[torch.Tensor, bool]:
        """As `Store.read`: a live view of what is written to, where that is contiguous."""
        if not (self.initialised or self.constructed):
            _require_covered(self.coverage, view)
        return view_in(self.tensor.contiguous(), view), False

    def values(self) -> torch.Tensor:
        return self._replaced[-1][1] if self._replaced else self.target.live(0)[0]

    def cast(self, dtype: torch.dtype, device: torch.device) -> None:
        """As `Store.cast`. Values in use are in memory of their own then; what was in use is what a rollback goes back
        to."""
        tensor, live = self.tensor.to(device, dtype), self.values()
        if self.target.in_use or self._replaced:
            self._replaced.append((self.target, live.to(device, dtype)))
            tensor = tensor.clone() if tensor is self.target.latest(0)[0] else tensor
        self.target = Fresh(lambda _: (tensor,))

    def fill(self) -> bool:
        if self.initialised:
            self.coverage.add([(0, n) for n in self.coverage.shape])
        return self.initialised

    def take_nothing(self) -> None:
        pass

    @property
    def retains(self) -> bool:
        return False

    def release(self) -> None:
        pass

    def verify(self) -> None:
        pass

    def commit(self) -> None:
        self.target.publish(0, lambda whole: whole)
        self.target.end(0)

    def rollback(self) -> None:
        """Of fresh memory: the values that were there before are gone, too."""
        while self._replaced:
            self.target, _ = self._replaced[-1]
            self._replaced.pop()
        self.target.rollback()
        self.initialised, self.constructed = self.target.in_use, False

    def copy(self, coverage: Coverage) -> PlainStore:
        return PlainStore(self.tensor.clone(), coverage, self.initialised, constructed=self.constructed)

    def _begin(self) -> None:
        """A second copy begins as a copy: its elements arrive one by one, and all of them are committed."""
        if self.target.in_use and not self.target.begun:
            (new,), (live,) = self.target.new(0), self.target.live(0)
            if new is not live:
                new.copy_(live)

    def _commit_complete(self) -> None:
        if self.target.early and self.coverage.complete:
            in_spite_of_interrupts(self.commit)


def view_in(tensor: torch.Tensor, view: View) -> torch.Tensor:
    return tensor.as_strided(view.size, view.stride, tensor.storage_offset() + view.offset)


def _require_covered(coverage: Coverage, view: View) -> None:
    if coverage.complete:
        return
    found = regions(coverage.shape, view)
    if found is None:
        boxes = boxes_of(view_mask(coverage.shape, view) & ~coverage.mask())
    else:
        boxes = [gap for box, _ in found for gap in coverage.missing(box)]
    if boxes:
        raise NeverWritten(boxes)
