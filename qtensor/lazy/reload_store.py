"""Stores of a reload: new values for weights that are in use, beside the live ones until they are committed.

The second copy is made matrix by matrix, when a matrix is first written to. `Shadow` collects new values next to the
live ones; `Undo` saves the live ones in host memory and lets the new ones be written in their place. Either way
`commit` makes the new values live at the old addresses, and `rollback` leaves the old ones, bit for bit.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import torch

from ..errors import QTensorError
from ..interrupts import in_spite_of_interrupts
from ..kernels import Audit, Parts
from ..kernels.formats import ceil_div
from ..regions.coverage import Box, Coverage
from ..regions.views import View, cover, whole
from ..tensor.qtensor import QTensor
from .plain_store import PlainStore
from .quant_store import QUANTIZED, QuantStore
from .weight import ArmedWeight

_MAPPED_BYTES = 1 << 20
_LIVE = 8  # a unit whose values are the live ones: nothing new has been quantized
ShadowKind = Literal["device", "host"]
Tensors = tuple[torch.Tensor, ...]
OnBytes = Callable[[int], None]


class SecondCopy(Protocol):
    """live: the tensors of one matrix. target: where its new values are written. nbytes: what the copy takes."""

    live: Tensors
    target: Tensors
    nbytes: int

    def publish(self, new: Tensors, live: Tensors) -> None: ...
    def rollback(self) -> None: ...


class Shadow:
    """New values beside the live ones, on the same device."""

    def __init__(self, live: Tensors) -> None:
        self.live = live
        self.target = tuple(_room_for(t) for t in live)
        self.nbytes = sum(t.nbytes for t in self.target)

    def publish(self, new: Tensors, live: Tensors) -> None:
        """Copy new values, whole or some rows of them, over the live ones."""
        for target, source in zip(live, new, strict=True):
            _bytes(target).copy_(_bytes(source))

    def rollback(self) -> None:
        pass


class Undo:
    """The old values in host memory (pinned where the live ones are on a GPU); the new are written in place."""

    def __init__(self, live: Tensors) -> None:
        self.live = self.target = live
        self._saved = tuple(torch.empty_like(t, device="cpu", pin_memory=t.is_cuda).copy_(t) for t in live)
        self.nbytes = sum(t.nbytes for t in self._saved)

    def publish(self, new: Tensors, live: Tensors) -> None:
        pass

    def rollback(self) -> None:
        for target, source in zip(self.live, self._saved, strict=True):
            target.copy_(source)


SECOND_COPIES: dict[ShadowKind, Callable[[Tensors], SecondCopy]] = {"device": Shadow, "host": Undo}


def _room_for(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory for an equal tensor. On a host large ones are mappings of their own, which go back to the
    system when they are freed; the C allocator would keep a second model's worth of memory between reloads."""
    if not tensor.is_cpu or tensor.nbytes < _MAPPED_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    own = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(own, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """float8 has slow copies, bytes have fast ones."""
    return tensor.view(torch.uint8) if tensor.is_contiguous() and tensor.dim() else tensor


class ReloadStore(QuantStore):
    """A quantized weight that takes new values, unit by unit.

    live: the weight as the model computes with it. early: commit each matrix when all of it has arrived, so that no
    more than the matrices being written have a second copy; otherwise `commit` is the session's.
    """

    def __init__(
        self,
        live: QTensor,
        coverage: Coverage,
        audit: Audit,
        on_staged: OnBytes,
        on_second_copy: OnBytes,
        kind: ShadowKind,
        early: bool,
        whole_weight: bool = False,
    ) -> None:
        super().__init__(live.scheme, live.dtype, live.device, coverage, audit, on_staged, whole_weight, live)
        self._second_copy, self._on_second_copy, self._early = SECOND_COPIES[kind], on_second_copy, early
        self._copies: dict[int, SecondCopy] = {}
        self._state[...] = QUANTIZED | _LIVE

    def write(self, view: View, source: torch.Tensor) -> None:
        super().write(view, source)
        self._commit_complete()

    def write_masked(self, values: torch.Tensor, touched: torch.Tensor) -> None:
        super().write_masked(values, touched)
        self._commit_complete()

    def accept(self, values: QTensor, box: Box) -> bool:
        """As the base's, except that a part of a matrix that has one scale is not taken: its other rows are live."""
        if self._unit == self._n and box[-2] != (0, self._n):
            return False
        accepted = super().accept(values, box)
        self._commit_complete()
        return accepted

    def stage_live(self) -> None:
        """Of a weight that is staged whole: what was not written keeps its live values."""
        for box in self.coverage.missing():
            (e0, e1), (start, stop), (left, right) = box if self._lead else ((0, 1), *box)
            for e in range(e0, e1):
                for key, a, b in self._group_spans(e, start, stop):
                    group = self._groups.get(key) or self._new_group(key)
                    rows = group.rows[a - group.first_row : b - group.first_row, left:right]
                    rows.copy_(self._dequantized(e, a, b)[:, left:right])
            self.coverage.add_box(box)

    def quantize_shared(self, amax: torch.Tensor) -> None:
        super().quantize_shared(amax)
        self._commit_complete()

    def take_nothing(self) -> None:
        """Scales that belong to the whole weight stay, too, unless ranks agree on new ones."""
        if self.whole_weight:
            super().take_nothing()

    def values(self) -> torch.Tensor:
        """What the model computes with: the live weight in high precision."""
        return self.result.dequantize()

    def commit(self) -> None:
        """Make all new values live. They are complete units, and verified."""
        for e in list(self._copies):
            self._commit(e)

    def rollback(self) -> None:
        """Give up all values that are not live yet."""
        for copy in self._copies.values():
            copy.rollback()
            self._on_second_copy(-copy.nbytes)
        self._copies.clear()
        self.discard_staging()
        self._state[...] = QUANTIZED | _LIVE

    def start_over(self) -> None:
        super().start_over()
        self.rollback()

    def copy(self, coverage: Coverage) -> NoReturn:
        raise QTensorError("a model whose weights are being reloaded cannot be deep-copied; finish the reload first")

    def _matrix(self, e: int) -> Parts:
        copy = self._copies.get(e)
        if copy is None:
            copy = self._copies[e] = self._second_copy(super()._matrix(e))
            self._on_second_copy(copy.nbytes)
        return Parts(*copy.target)

    def _quantize_rows(self, e: int, start: int, stop: int, rows: torch.Tensor) -> None:
        super()._quantize_rows(e, start, stop, rows)
        units = self._state[e, start // self._unit : ceil_div(stop, self._unit)]
        units &= ~np.uint8(_LIVE)

    def _lose(self, e: int, start: int, stop: int) -> None:
        super()._lose(e, start, stop)
        self._state[e, start // self._unit : ceil_div(stop, self._unit)] = QUANTIZED | _LIVE

    def _dequantized(self, e: int, start: int, stop: int) -> torch.Tensor:
        runs = list(self._runs(e, start, stop))
        parts = [self._dequantize_rows(self._source(e, live), a, b) for a, b, live in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _source(self, e: int, live: bool) -> Parts:
        return super()._matrix(e) if live or e not in self._copies else Parts(*self._copies[e].target)

    def _runs(self, e: int, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """Rows start:stop cut where units change between live and new: first row, last row, are they live."""
        if start == stop:  # A weight without rows may have a scale that it shares with other ranks.
            yield start, stop, False
            return
        first = start // self._unit
        live = (self._state[e, first : ceil_div(stop, self._unit)] & _LIVE) != 0
        borders = [0, *(np.flatnonzero(np.diff(live)) + 1).tolist(), len(live)]
        for a, b in pairwise(borders):
            yield max(start, (first + a) * self._unit), min(stop, (first + b) * self._unit), bool(live[a])

    def _commit_complete(self) -> None:
        if not self._early:
            return
        for e in list(self._copies):
            if list(self.coverage.full_rows((e,) if self._lead else (), 0, self._n)) == [(0, self._n)]:
                self.audit.verify()
                in_spite_of_interrupts(partial(self._commit, e))

    def _commit(self, e: int) -> None:
        copy = self._copies.get(e)
        if copy is None:  # An interrupt came when it was through.
            return
        for start, stop, live in self._runs(e, 0, self._n):
            if not live:
                copy.publish(self._rows(Parts(*copy.target), start, stop), self._rows(Parts(*copy.live), start, stop))
        self._state[e] |= _LIVE
        del self._copies[e]
        self._on_second_copy(-copy.nbytes)


class PlainReloadStore(PlainStore):
    """A high-precision weight that takes new values. Arguments as for `ReloadStore`; `tensor` is what is being
    written, `live` what the model computes with."""

    def __init__(
        self, live: torch.Tensor, coverage: Coverage, on_second_copy: OnBytes, kind: ShadowKind, early: bool
    ) -> None:
        super().__init__(live, coverage, initialised=True)
        # A view that a loader takes is a view of contiguous memory; live memory may be laid out otherwise.
        self._second_copy = SECOND_COPIES[kind if live.is_contiguous() else "device"]
        self.live, self._on_second_copy, self._early = live, on_second_copy, early
        self._copy: SecondCopy | None = None

    def write(self, view: View, source: torch.Tensor) -> None:
        if self._early and view == whole(self.coverage.shape):
            # Nothing can go wrong half-way, and the second copy of a large embedding is saved.
            self.rollback()
            self.live.copy_(source)
            cover(self.coverage, view)
            return
        self._begin()
        super().write(view, source)
        if self._early and self.coverage.complete:
            in_spite_of_interrupts(self.commit)

    def write_masked(self, values: torch.Tensor, touched: torch.Tensor) -> None:
        self._begin()
        super().write_masked(values, touched)
        if self._early and self.coverage.complete:
            in_spite_of_interrupts(self.commit)

    def _begin(self) -> None:
        if self._copy is None:
            self._copy = self._second_copy((self.live,))
            self._on_second_copy(self._copy.nbytes)
            (self.tensor,) = self._copy.target
            if self.tensor is not self.live:
                self.tensor.copy_(self.live)

    def read(self, view: View) -> tuple[torch.Tensor, bool]:
        if self.tensor.is_contiguous():
            return super().read(view)
        return self.tensor.contiguous().as_strided(*view), False

    def values(self) -> torch.Tensor:
        return self.live

    def commit(self) -> None:
        if self._copy is not None:
            self._copy.publish(self._copy.target, self._copy.live)
        self._drop()

    def rollback(self) -> None:
        if self._copy is not None:
            self._copy.rollback()
        self._drop()

    def start_over(self) -> None:
        self.rollback()

    def copy(self, coverage: Coverage) -> NoReturn:
        raise QTensorError("a model whose weights are being reloaded cannot be deep-copied; finish the reload first")

    def _drop(self) -> None:
        if self._copy is not None:
            self._on_second_copy(-self._copy.nbytes)
        self.tensor, self._copy = self.live, None


class ReloadedWeight(ArmedWeight):
    """An armed weight that the model is using: its storage exists, and stays where it is."""

    in_place = True
    store: ReloadStore | PlainReloadStore

    def live_values(self, view: View) -> torch.Tensor:
        with self.lock:
            values = self.store.values().contiguous()
        return values.as_strided(view.size, view.stride, values.storage_offset() + view.offset)

    def complete_shared(self, touched: bool) -> None:
        """No rank writes any more. If one has written, what this one did not write keeps its values and is quantized
        again, with scales that all agree on; otherwise all of it stays as it is."""
        with self.lock:
            assert isinstance(self.store, ReloadStore)
            if not touched:
                self.shared = self.store.whole_weight = False
            elif not self.coverage.complete:
                if self.error is not None:
                    raise self.error
                self.store.stage_live()
                self.settle()

    def initialize(self, view: View, fill: Callable[[torch.Tensor], None]) -> None:
        """An initialiser that runs on a finished model means what it does."""
        values = self.read(view).clone()
        fill(values)
        self.write(view, values)

    def clone(self, memo: dict[int, Any]) -> NoReturn:
        self.store.copy(self.coverage)
