"""Staging: the high-precision rows of units that are not whole yet.

Rows are staged in groups of neighbouring units of one matrix, about two megabytes each. A group whose units are all
quantized is retained until the writer moves on, so that a loader that reads back or rewrites what it just wrote meets
exact values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from .units import OPEN, STAGED, Units

CHUNK_BYTES = 32 << 20
_GROUP_BYTES = 2 << 20
_Key = tuple[int, int]  # matrix, number of the group in it
Span = tuple[int, int, torch.Tensor]
"""First row, row after the last, and the staged values of these rows."""


class Staging:
    """on_bytes: called with the change in staged bytes. whole: the weight is staged as a whole, in one piece.
    clock: the number of the write. retained: complete groups, and the write that completed each."""

    def __init__(
        self, units: Units, dtype: torch.dtype, device: torch.device, on_bytes: Callable[[int], None], whole: bool
    ) -> None:
        self._units, self._dtype, self._device, self._on_bytes = units, dtype, device, on_bytes
        self._group_rows = units.rows_within(_GROUP_BYTES, dtype.itemsize)
        self.groups: dict[_Key, torch.Tensor] = {}
        self.retained: dict[_Key, int] = {}
        self.clock = 0
        self.whole = whole
        self._memory: torch.Tensor | None = None

    def opened(self, e: int, start: int, stop: int) -> list[Span]:
        """Rows start:stop of matrix e cut at the borders of the groups, with memory to stage them in."""
        spans = []
        for key, a, b in self._cut(e, start, stop):
            group = self.groups.get(key)
            group = self._new_group(key) if group is None else group
            self.retained.pop(key, None)
            border = key[1] * self._group_rows
            spans.append((a, b, group if b - a == group.shape[0] else group[a - border : b - border]))
        return spans

    def held(self, e: int, start: int, stop: int) -> Iterator[Span]:
        """The staged ones among rows start:stop."""
        for first, last, staged in self._units.runs(e, start, stop, STAGED):
            for key, a, b in self._cut(e, first, last) if staged else ():
                border = key[1] * self._group_rows
                yield a, b, self.groups[key][a - border : b - border]

    def cast(self, dtype: torch.dtype, device: torch.device) -> None:
        """What is staged has this dtype, and is there, from now on."""
        self._dtype, self._device = dtype, device
        if self._memory is not None:
            self._memory = self._memory.to(device, dtype)
        for (e, g), group in list(self.groups.items()):
            first, whole = g * self._group_rows, self._memory
            now = group.to(device, dtype) if whole is None else whole[e, first : first + len(group)]
            self.groups[e, g] = now
            self._on_bytes(now.nbytes - group.nbytes)

    def retain(self, e: int, row: int) -> None:
        """Units around a row were quantized. If that was all of the group, it is kept for a while."""
        key = (e, row // self._group_rows)
        if not (self._units_of(key) & OPEN).any():
            self.retained[key] = self.clock

    def free_unused(self, e: int, start: int, stop: int) -> None:
        """Free the groups of rows start:stop that hold nothing any more."""
        for key, _, _ in self._cut(e, start, stop):
            if key in self.groups and not (self._units_of(key) & STAGED).any():
                self._free(key)

    def trim(self) -> None:
        """Retained groups beyond one chunk go, oldest first; those of the last write stay."""
        held = sum(self.groups[key].nbytes for key in self.retained)
        for key, since in sorted(self.retained.items(), key=lambda item: item[1]):
            if held <= CHUNK_BYTES or since == self.clock:
                return
            held -= self.groups[key].nbytes
            self._free(key)

    def release(self) -> None:
        """Free what was retained."""
        for key in list(self.retained):
            self._free(key)

    def discard(self) -> None:
        """Free everything, complete or not."""
        for key in list(self.groups):
            self._free(key)
        self._memory = None

    def stream(self) -> None:
        """The weight is staged as a whole no longer."""
        self.whole, self._memory = False, None

    def memory(self) -> torch.Tensor:
        """`[e, n, k]` of a weight that is staged as a whole."""
        if self._memory is None:
            shape = (self._units.e, self._units.n, self._units.k)
            self._memory = torch.empty(shape, dtype=self._dtype, device=self._device)
        return self._memory

    def amax(self, parts: int) -> torch.Tensor:
        """The largest finite magnitude in each of so many equal parts of the whole: fp32, CPU."""
        rows = self.memory()
        if not rows.numel():
            return torch.zeros(parts, dtype=torch.float32, device="cpu")
        rows = rows.view(parts, -1)
        step = max(1, CHUNK_BYTES // max(1, rows.shape[1] * self._dtype.itemsize))
        found = [rows[at : at + step].abs().nan_to_num_(0, 0, 0).amax(1) for at in range(0, len(rows), step)]
        return torch.cat(found).float().cpu()

    def copy_from(self, other: Staging) -> None:
        """Hold what another staging of an equal weight holds."""
        self.clock, self.retained = other.clock, dict(other.retained)
        for key, group in other.groups.items():
            self._new_group(key).copy_(group)

    def _cut(self, e: int, start: int, stop: int) -> list[tuple[_Key, int, int]]:
        """Rows start:stop at the borders of the groups: most often they are of one."""
        size, first = self._group_rows, start // self._group_rows
        if start < stop <= (first + 1) * size:
            return [((e, first), start, stop)]
        numbers = range(first, -(-stop // size))
        return [((e, g), max(start, g * size), min(stop, (g + 1) * size)) for g in numbers]

    def _new_group(self, key: _Key) -> torch.Tensor:
        e, g = key
        first, last = g * self._group_rows, min((g + 1) * self._group_rows, self._units.n)
        if self.whole:
            rows = self.memory()[e, first:last]
        else:
            rows = torch.empty(last - first, self._units.k, dtype=self._dtype, device=self._device)
        self.groups[key] = rows
        self._on_bytes(rows.nbytes)
        return rows

    def _units_of(self, key: _Key) -> np.ndarray:
        e, g = key
        return self._units.of(e, g * self._group_rows, min((g + 1) * self._group_rows, self._units.n))

    def _free(self, key: _Key) -> None:
        units = self._units_of(key)
        units &= ~np.uint8(STAGED | OPEN)  # first: an interrupt must not leave units staged that have no group
        self.retained.pop(key, None)
        self._on_bytes(-self.groups.pop(key).nbytes)


def merge(target: torch.Tensor, source: torch.Tensor, touched: torch.Tensor) -> None:
    """Copy the touched elements, bit by bit: `torch.where` takes six times as long on a CPU."""
    bits = torch.int16 if target.dtype.itemsize == 2 else torch.int32
    old, new = target.view(bits), source.to(target).view(bits)
    old ^= (old ^ new) & -touched.to(target.device, bits)
