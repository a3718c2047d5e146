"""Targets: the memory that a weight's final values go to, matrix by matrix (a weight that is not quantized is one).

A load writes to fresh memory. A reload makes a second copy of a matrix when it is first written to: of the new values,
beside the live ones until they are committed, or of the old ones, so that the new may be written in their place. Either
way a commit makes the new values live at the old addresses, and a rollback leaves the old ones, bit for bit.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, TypeVar

import torch

from ..tensor.rooms import room_for

ShadowKind = Literal["device", "host"]
Tensors = TypeVar("Tensors", bound=tuple[torch.Tensor, ...])


class Fresh(Generic[Tensors]):
    """Memory that nobody uses yet: what is written to it is there for good.

    matrix: the tensors of matrix e, or those of a run of a stack's matrices, by a slice. in_use: the model computes
    with them. early: a matrix is committed as soon as all of it has arrived, instead of at the end.
    """

    in_use = early = False

    def __init__(self, matrix: Callable[[Any], Tensors]) -> None:
        self._matrix = matrix
        self._live: dict[int, Tensors] = {}
        self._all: Tensors | None = None

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

    def memory(self, e: int) -> tuple[int, Tensors]:
        """Where new values of matrix e are written: the tensors of as many matrices as lie together, the same ones at
        each call, and the first of the matrices."""
        if self._all is None:
            self._all = self._matrix(slice(None))
        return 0, self._all

    def new_run(self, start: int, stop: int) -> Tensors | None:
        """Where new values of a stack's matrices start to stop are written, in one piece of memory for each tensor;
        None if they are not in one."""
        return self._matrix(slice(start, stop))

    @property
    def begun(self) -> list[int]:
        """The matrices that have a second copy."""
        return []

    def publish(self, e: int, part: Callable[[Tensors], Tensors]) -> None:
        """Make this part of a matrix's new values live. May be repeated."""

    def publish_all(self) -> bool:
        """Make all that have a second copy live at once; all of their values are new. False if that is not one copy.
        May be repeated."""
        return False

    def end(self, e: int) -> None:
        """All new values of matrix e are live: its second copy goes."""

    def end_all(self) -> None:
        """As `end`, of all."""

    def rollback(self) -> None:
        """The values in use are what they were before the first write. May be repeated."""


class _InUse(Fresh[Tensors]):
    """on_bytes: called with the change in bytes of second copies. matrices: of a stack, how many there are."""

    in_use = True

    def __init__(
        self,
        matrix: Callable[[Any], Tensors],
        on_bytes: Callable[[int], None],
        early: bool = False,
        matrices: int | None = None,
    ) -> None:
        super().__init__(matrix)
        self.early, self._matrices = early, None if early else matrices
        self._on_bytes, self._told, self._matrix_bytes = on_bytes, 0, 0
        self._copies: dict[int, Tensors | None] = {}  # None: in a block, and not cut out of it yet

    def new_run(self, start: int, stop: int) -> Tensors | None:
        if self._matrices is None:
            return None  # With `early`, one after the other: only matrices that arrived in part have a second copy.
        for e in range(start, stop):
            self.new(e)
        return self._matrix(slice(start, stop))

    @property
    def begun(self) -> list[int]:
        return list(self._copies)

    def end(self, e: int) -> None:
        self._copies.pop(e, None)
        self._tell()

    def end_all(self) -> None:
        self._copies.clear()
        self._tell()

    def rollback(self) -> None:
        self._copies.clear()
        self._tell()

    def _begin(self, e: int, copy: Tensors | None) -> None:
        self._copies[e] = copy
        if not self._matrix_bytes:
            self._matrix_bytes = sum([t.nbytes for t in self.live(e)])
        self._tell()

    def _tell(self) -> None:
        """All matrices are of one size, so the bytes follow from what is held, whatever was interrupted before."""
        nbytes = len(self._copies) * self._matrix_bytes
        change, self._told = nbytes - self._told, nbytes
        self._on_bytes(change)


class Beside(_InUse[Tensors]):
    """New values beside the live ones, on the same device.

    Those of a stack's matrices are in one piece of memory, if they come together or are on a host, where memory counts
    from when it is written to: each is made by a view then, and all go in one copy.
    """

    _block: tuple[int, int, Tensors] | None = None
    """First matrix, matrix after the last, their memory."""

    def latest(self, e: int) -> Tensors:
        return self.new(e) if e in self._copies else self.live(e)

    def memory(self, e: int) -> tuple[int, Tensors]:
        block = self._block
        if block is None or not block[0] <= e < block[1]:
            return e, self.new(e)  # The first one of a stack: from the next on there is a block.
        if e not in self._copies:
            self._begin(e, None)
        return block[0], block[2]

    def new(self, e: int) -> Tensors:
        if e not in self._copies:
            self._begin_one(e)
        copy = self._copies[e]
        if copy is None:
            assert self._block is not None
            first, _, memory = self._block
            copy = self._copies[e] = _like(memory, [part[e - first] for part in memory])
        return copy

    def _begin_one(self, e: int) -> None:
        if self._block is None and self._matrices is not None and not self._copies:
            self._open_block(0, self._matrices, on_host_only=True)
        block = self._block
        in_block = block is not None and block[0] <= e < block[1]
        self._begin(e, None if in_block else _like(self.live(e), map(_room_for, self.live(e))))

    def new_run(self, start: int, stop: int) -> Tensors | None:
        if self._matrices is None:
            return None
        if self._block is None and not self._copies:
            self._open_block(start, stop)
        block = self._block
        if block is None or not block[0] <= start < stop <= block[1]:
            return None
        first, _, memory = block
        self._copies.update(dict.fromkeys(range(start, stop)))
        self._begin(start, None)
        return _like(memory, [part[start - first : stop - first] for part in memory])

    def _open_block(self, start: int, stop: int, on_host_only: bool = False) -> None:
        live = self._matrix(slice(start, stop))
        on_host = live[0].device.type == "cpu"
        if on_host:
            room = [room_for(tuple(t.shape), t.dtype, t.device, mapped_bytes=mmap.PAGESIZE) for t in live]
        elif not on_host_only:
            room = [_room_for(t) for t in live]
        else:
            return
        self._block = start, stop, _like(live, room)

    def publish(self, e: int, part: Callable[[Tensors], Tensors]) -> None:
        if e in self._copies:
            _copy(part(self.new(e)), part(self.live(e)))

    def publish_all(self) -> bool:
        block = self._block
        if block is None or len(self._copies) != block[1] - block[0]:
            return False
        _copy(block[2], self._matrix(slice(block[0], block[1])))
        return True

    def end(self, e: int) -> None:
        super().end(e)
        if not self._copies:
            self._block = None

    def end_all(self) -> None:
        """As `end`, of all."""
        super().end_all()
        self._block = None

    def rollback(self) -> None:
        super().rollback()
        self._block = None


class InPlace(_InUse[Tensors]):
    """The old values in host memory (pinned where the live ones are on a GPU); the new are written in their place."""

    def memory(self, e: int) -> tuple[int, Tensors]:
        self.new(e)
        return super().memory(e)

    def new(self, e: int) -> Tensors:
        live = self.live(e)
        if e not in self._copies:
            saved = (torch.empty_like(t, device="cpu", pin_memory=t.is_cuda).copy_(t) for t in live)
            self._begin(e, _like(live, saved))
        return live

    def rollback(self) -> None:
        for e, saved in self._copies.items():
            assert saved is not None
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
