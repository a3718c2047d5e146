"""Targets: the memory that a weight's final values go to, matrix by matrix (a weight that is not quantized is one).

A load writes to fresh memory. A reload makes a second copy of a matrix when it is first written to: of the new values,
beside the live ones until they are committed, or of the old ones, so that the new may be written in their place. Either
way a commit makes the new values live at the old addresses, and a rollback leaves the old ones, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, Literal, TypeVar

import torch

from ..tensor.rooms import room_for

ShadowKind = Literal["device", "host"]
Tensors = TypeVar("Tensors", bound=tuple[torch.Tensor, ...])


class Fresh(Generic[Tensors]):
    """Memory that nobody uses yet: what is written to it is there for good.

    matrix: the tensors of matrix e. in_use: the model computes with them. early: a matrix is committed as soon as all
    of it has arrived, instead of at the end.
    """

    in_use = early = False

    def __init__(self, matrix: Callable[[int], Tensors]) -> None:
        self._matrix = matrix
        self._live: dict[int, Tensors] = {}

    def live(self, e: int) -> Tensors:
        """The tensors of matrix e at their final addresses."""
        return self._live.get(e) or self._made(e)

    def latest(self, e: int) -> Tensors:
        """Where new values are read, as far as there are any."""
        return self.live(e)

    def new(self, e: int) -> Tensors:
        """Where new values are written."""
        return self._live.get(e) or self._made(e)

    def _made(self, e: int) -> Tensors:
        made = self._live[e] = self._matrix(e)
        return made

    @property
    def begun(self) -> list[int]:
        """The matrices that have a second copy."""
        return []

    def publish(self, e: int, part: Callable[[Tensors], Tensors]) -> None:
        """Make this part of a matrix's new values live. May be repeated."""

    def end(self, e: int) -> None:
        """All new values of matrix e are live: its second copy goes."""

    def rollback(self) -> None:
        """The values in use are what they were before the first write. May be repeated."""


class _InUse(Fresh[Tensors]):
    """on_bytes: called with the change in bytes of second copies."""

    in_use = True

    def __init__(self, matrix: Callable[[int], Tensors], on_bytes: Callable[[int], None], early: bool = False) -> None:
        super().__init__(matrix)
        self.early = early
        self._on_bytes, self._told, self._matrix_bytes = on_bytes, 0, 0
        self._copies: dict[int, Tensors] = {}

    @property
    def begun(self) -> list[int]:
        return list(self._copies)

    def end(self, e: int) -> None:
        self._copies.pop(e, None)
        self._tell()

    def rollback(self) -> None:
        self._copies.clear()
        self._tell()

    def _begin(self, e: int, copy: Tensors) -> None:
        self._copies[e] = copy
        self._matrix_bytes = sum(t.nbytes for t in copy)
        self._tell()

    def _tell(self) -> None:
        """All matrices are of one size, so the bytes follow from what is held, whatever was interrupted before."""
        nbytes = len(self._copies) * self._matrix_bytes
        change, self._told = nbytes - self._told, nbytes
        self._on_bytes(change)


class Beside(_InUse[Tensors]):
    """New values beside the live ones, on the same device."""

    def latest(self, e: int) -> Tensors:
        return self._copies[e] if e in self._copies else self.live(e)

    def new(self, e: int) -> Tensors:
        if e not in self._copies:
            self._begin(e, _like(self.live(e), map(_room_for, self.live(e))))
        return self._copies[e]

    def publish(self, e: int, part: Callable[[Tensors], Tensors]) -> None:
        if e in self._copies:
            _copy(part(self._copies[e]), part(self.live(e)))


class InPlace(_InUse[Tensors]):
    """The old values in host memory (pinned where the live ones are on a GPU); the new are written in their place."""

    def new(self, e: int) -> Tensors:
        live = self.live(e)
        if e not in self._copies:
            saved = (torch.empty_like(t, device="cpu", pin_memory=t.is_cuda).copy_(t) for t in live)
            self._begin(e, _like(live, saved))
        return live

    def rollback(self) -> None:
        for e, saved in self._copies.items():
            _copy(saved, self.live(e))
        super().rollback()


SHADOWS: dict[ShadowKind, type[Beside[tuple[torch.Tensor, ...]]] | type[InPlace[tuple[torch.Tensor, ...]]]] = {
    "device": Beside,
    "host": InPlace,
}


def _room_for(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory for an equal tensor."""
    return room_for(tuple(tensor.shape), tensor.dtype, tensor.device)


def _like(tensors: Tensors, others: Iterable[torch.Tensor]) -> Tensors:
    """The same kind of tuple of other tensors."""
    return tuple.__new__(type(tensors), others)


def _copy(sources: tuple[torch.Tensor, ...], targets: tuple[torch.Tensor, ...]) -> None:
    for source, target in zip(sources, targets, strict=True):
        if _is_run_of_bytes(source) and _is_run_of_bytes(target):
            source, target = source.view(torch.uint8), target.view(torch.uint8)  # float8 has slow copies, bytes fast
        target.copy_(source)


def _is_run_of_bytes(tensor: torch.Tensor) -> bool:
    """A dimension of one element may have any stride, and `view` to bytes wants 1 of the last."""
    return tensor.is_contiguous() and tensor.dim() > 0 and tensor.stride(-1) == 1
