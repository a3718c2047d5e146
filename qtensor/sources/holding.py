"""The parts of one matrix: which of their elements are held, and which rows of the matrix they are enough for.

A unit of rows is decoded as soon as all of its parts are there: straight out of the loader's tensor where that brings
the last of them. What waits is held as the quantized bytes that arrived, and let go as soon as its unit is decoded; all
parts but the largest stay until the matrix is whole, so that values that come again meet their scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import lcm, prod

import numpy as np
import torch

from ..kernels.formats import ceil_div
from ..regions.coverage import Box, Coverage
from ..regions.views import View
from ..tensor.rooms import PASSING_BYTES, room_for
from .source import ANY, PartSpec

CHUNK_BYTES = 4 << 20
"""Of decoded rows at a time: few enough to stay in a cache until they are quantized, and so many that what is done once
for each chunk takes no time."""
EVEN_ROWS = 128
"""Chunks are of so many rows, or a multiple, so that the weight's blocks are whole in each."""

Decode = Callable[["MatrixParts", int, int, Mapping[str, torch.Tensor]], None]


class MatrixParts:
    """One matrix: its parts, as far as they are held, and which of its units are decoded.

    view: of the weight, in the orientation of the source. unit: rows that are decoded together.
    keeps: what is decoded stays held, until `release`: a part may come that gives it another meaning.
    movable: nobody knows yet that it cannot be moved.
    """

    def __init__(self, parts: Mapping[str, PartSpec], view: View, unit: int, keeps: bool = False) -> None:
        self.keeps = keeps
        self.view, self._n, self._unit = view, view.size[0], max(unit, 1)
        self._parts = {name: HeldPart(spec) for name, spec in parts.items() if spec.needed}
        self._bulk = max(self._parts, key=lambda name: prod(self._parts[name].spec.shape))
        self._done = np.zeros(ceil_div(self._n, self._unit), dtype=bool)
        self.movable = True

    def beside_values(self) -> dict[str, torch.Tensor] | None:
        """All parts but the largest, if they are whole, and nothing of that has come."""
        others = {name: part for name, part in self._parts.items() if name != self._bulk}
        begun = self._done.any() or self._parts[self._bulk].nbytes
        if begun or any(part.coverage is None or not part.coverage.complete for part in others.values()):
            return None
        return {name: part.held(0, self._n) for name, part in others.items()}

    def in_units(self, unit: int) -> None:
        """Of a matrix that waited to be moved as a whole: it is not going to be, and is decoded unit by unit."""
        self.movable, self._unit = False, max(unit, 1)
        self._done = np.zeros(ceil_div(self._n, self._unit), dtype=bool)

    @property
    def is_one_unit(self) -> bool:
        return self._unit >= self._n

    @property
    def held(self) -> int:
        return sum(part.nbytes for part in self._parts.values())

    def rows(self, start: int, stop: int) -> View:
        """These rows, as a view of the weight."""
        size, stride, offset = self.view
        return View((stop - start, size[1]), stride, offset + start * stride[0])

    def chunk(self, itemsize: int, unit: int = 0) -> int:
        """Rows to decode at a time: whole units, or of that many rows, and whole blocks of any format."""
        even = lcm(unit or self._unit, EVEN_ROWS)
        return max(1, CHUNK_BYTES // max(1, even * self.view.size[1] * itemsize)) * even

    def cut(self, name: str, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The entries for rows start:stop, of a tensor with those of a part from a unit's first row, row 0, on."""
        return self._parts[name].spec.cut(tensor, start, stop)

    def take(self, name: str, box: Box, tensor: torch.Tensor, decode: Decode) -> None:
        """Values of a part arrived: decode the units that are whole with them, and hold the rest."""
        part = self._parts[name]
        if not tensor.dim():
            tensor, box = tensor.reshape(1), ((0, 1),)
        if part.has(box, tensor):
            return
        first, last = part.rows_touched(box, self._n)
        self._done[first // self._unit : ceil_div(last, self._unit)] = False
        for rest in self._pass_through(name, box, tensor, decode):
            inside = (slice(a - c, b - c) for (a, b), (c, _) in zip(rest, box, strict=True))
            part.hold(rest, tensor[tuple(inside)])
        for start, stop in self._runs(self._ready() & ~self._done, 0, self._n):
            self._emit(start, stop, decode, {name: part.held(start, stop) for name, part in self._parts.items()})
        self._let_go()

    def release(self) -> None:
        """Nothing gives what is decoded another meaning any more."""
        self.keeps = False
        for start, stop in self._runs(self._done, 0, self._n):
            self._parts[self._bulk].forget(start, stop)
        self._let_go()

    def _let_go(self) -> None:
        if self._done.all() and not self.keeps:
            for each in self._parts.values():
                each.free()

    def held_boxes(self) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """All that is held."""
        for name, part in self._parts.items():
            for box in part.boxes():
                yield name, box, part.at(box)

    def _pass_through(self, name: str, box: Box, tensor: torch.Tensor, decode: Decode) -> list[Box]:
        """Decode what can be straight out of the caller's tensor. Returns the boxes that are left."""
        part = self._parts[name]
        axis = part.spec.span.axis
        others = (span for d, span in enumerate(zip(box, part.shape, strict=True)) if d != axis)
        if name != self._bulk or axis is None or self.keeps or any(span != (0, n) for span, n in others):
            return [box]
        first, last = part.rows_inside(box, self._n, self._unit)
        at, left = box[axis][0], []
        for start, stop in self._runs(self._ready(but=name), first, last):
            a, b = part.entries(start, stop)
            mine = tensor.narrow(axis, a - box[axis][0], b - a)
            others_held = {n: p.held(start, stop) for n, p in self._parts.items() if n != name}
            self._emit(start, stop, decode, {name: part.in_form(mine), **others_held})
            left.append((at, a))
            at = b
        left.append((at, box[axis][1]))
        return [(*box[:axis], span, *box[axis + 1 :]) for span in left if span[0] < span[1]]

    def _emit(self, start: int, stop: int, decode: Decode, parts: Mapping[str, torch.Tensor]) -> None:
        place = parts[self._bulk].device
        decode(self, start, stop, {name: part.to(place) for name, part in parts.items()})
        self._done[start // self._unit : ceil_div(stop, self._unit)] = True
        if not self.keeps:
            self._parts[self._bulk].forget(start, stop)

    def _ready(self, but: str = "") -> np.ndarray:
        """The units of which every part is held, leaving one out."""
        ready = np.ones(len(self._done), dtype=bool)
        for name, part in self._parts.items():
            for first, last in part.lacking_rows(self._n) if name != but else ():
                ready[first // self._unit : ceil_div(last, self._unit)] = False
        return ready

    def _runs(self, ready: np.ndarray, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs of rows whose units are ready, within first:last, which begins and ends with a unit, or is empty."""
        low, high = ceil_div(first, self._unit), ceil_div(last, self._unit)
        if high > low:
            borders = np.flatnonzero(np.diff(ready[low:high], prepend=False, append=False)) + low
            for a, b in zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True):
                yield a * self._unit, min(b * self._unit, self._n)

    def lacking(self) -> Iterator[tuple[str, Box]]:
        """What is missing of parts that units wait for."""
        for u in np.flatnonzero(~self._done)[:1].tolist():
            start, stop = u * self._unit, min((u + 1) * self._unit, self._n)
            for name, part in self._parts.items():
                yield from ((name, box) for box in part.lacking(start, stop))


class HeldPart:
    """One part of one matrix, as far as it is held."""

    def __init__(self, spec: PartSpec) -> None:
        self.spec, self.shape = spec, spec.shape or (1,)
        self.coverage = None if ANY in self.shape else Coverage(self.shape)
        self._memory: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of what is held."""
        return 0 if self._memory is None or self.coverage is None else self.coverage.covered * self._memory.itemsize

    def entries(self, start: int, stop: int) -> tuple[int, int]:
        assert self.spec.span.axis is not None
        return self.spec.span.entries(start, stop, self.shape[self.spec.span.axis])

    def held(self, start: int, stop: int) -> torch.Tensor:
        """The entries for rows start:stop."""
        assert self._memory is not None
        return self.in_form(self.spec.cut(self._memory, start, stop))

    def in_form(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.spec.shape else tensor.reshape(())

    def has(self, box: Box, tensor: torch.Tensor) -> bool:
        """Is this held already, bit for bit?"""
        if self._memory is None or self.coverage is None or not self.coverage.covers(box):
            return False
        held = self.at(box)
        return torch.equal(_bits(held), _bits(tensor.to(held.device)))

    def boxes(self) -> list[Box]:
        """What is held of it."""
        return [] if self._memory is None or self.coverage is None else self.coverage.covered_boxes()

    def at(self, box: Box) -> torch.Tensor:
        assert self._memory is not None
        return self._memory[tuple(slice(*span) for span in box)]

    def hold(self, box: Box, tensor: torch.Tensor) -> None:
        if self.coverage is None:
            self.shape = tuple(b for _, b in box)
            self.coverage = Coverage(self.shape)
        if self._memory is None:
            self._memory = room_for(self.shape, tensor.dtype, tensor.device, mapped_bytes=PASSING_BYTES)
        _bits(self.at(box)).copy_(_bits(tensor))
        self.coverage.add(box)

    def rows_touched(self, box: Box, n: int) -> tuple[int, int]:
        """The rows that need an entry of the box."""
        axis, items, rows = self.spec.span
        if axis is None:
            return 0, n
        a, b = box[axis]
        return a // items * rows if items > 1 else a * rows, min(ceil_div(b, items) * rows, n)

    def rows_inside(self, box: Box, n: int, unit: int) -> tuple[int, int]:
        """The rows of whole units, all of whose entries are in the box."""
        axis, items, rows = self.spec.span
        assert axis is not None
        a, b = box[axis]
        last = n if b == self.shape[axis] else b // items * rows // unit * unit
        first = ceil_div(ceil_div(a, items) * rows, unit) * unit
        return min(first, last), last

    def lacking_rows(self, n: int) -> list[tuple[int, int]]:
        """Runs of rows that need an entry that is not held."""
        if self.coverage is None:
            return [(0, n)]
        if self.coverage.complete:
            return []
        return [self.rows_touched(box, n) for box in self.coverage.missing()]

    def lacking(self, start: int, stop: int) -> list[Box]:
        """The boxes that are not held, of what rows start:stop need."""
        if self.coverage is None:
            return [tuple((0, max(n, 0)) for n in self.shape)]
        axis = self.spec.span.axis
        within = [(0, n) for n in self.shape]
        if axis is not None:
            within[axis] = self.entries(start, stop)
        return self.coverage.missing(within)

    def forget(self, start: int, stop: int) -> None:
        """These rows are decoded."""
        if self.coverage is not None and self._memory is not None:
            axis = self.spec.span.axis
            box = [(0, n) for n in self.shape]
            if axis is not None:
                box[axis] = self.entries(start, stop)
            self.coverage.discard(box)
            if not self.coverage.covered:
                self._memory = None

    def free(self) -> None:
        self._memory = None
        if self.coverage is not None:
            self.coverage.clear()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers: 8-bit floats have slow copies and no comparison, and NaN is not equal to itself."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor if tensor.dtype == size else tensor.view(size)
