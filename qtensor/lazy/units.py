"""Units: how far each unit of a weight is.

A unit is the smallest run of rows whose scale depends on nothing outside it: a row, a band of 128, or a whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..kernels.formats import ceil_div
from ..regions.coverage import Box

QUANTIZED = 1
"""The unit has quantized values, new or old."""
STAGED = 2
"""Its high-precision values are in staging."""
OPEN = 4
"""While staged: it waits for more elements."""
CAST = 16
"""Its quantized values are those of a dtype that the weight had, and of which a cast has rounded since."""
LIVE = 8
"""Its quantized values are those in use: nothing new was quantized since the reload began, or since the commit."""


class Units:
    """The units of a weight `[n, k]` or `[e, n, k]`, of `height` rows each (the last of a matrix may be lower).

    state: `[e, units]`, the flags above. received: columns written to each unit so far, repeats included: until that
    reaches k the unit cannot be complete, and the exact answer need not be asked for. in_use: all units are QUANTIZED
    and LIVE before anything is written to them.
    """

    def __init__(self, shape: tuple[int, ...], height: int, in_use: bool) -> None:
        *lead, self.n, self.k = shape
        self.stacked, self.e, self.height = bool(lead), lead[0] if lead else 1, height
        self.untouched = QUANTIZED | LIVE if in_use else 0
        self.state = np.full((self.e, ceil_div(self.n, height)), self.untouched, dtype=np.uint8)
        self.received = np.zeros(self.state.shape, dtype=np.int64)

    def reset(self) -> None:
        """Nothing was written."""
        self.state[...] = self.untouched
        self.received[...] = 0

    def of(self, e: int, start: int, stop: int) -> np.ndarray:
        """The state of the units that rows start:stop of matrix e lie in, to be read and written."""
        return self.state[e, start // self.height : -(-stop // self.height)]

    def mark(self, e: int, start: int, stop: int, state: int) -> None:
        """Rows start:stop of matrix e, whole units, are in this state."""
        self.state[e, start // self.height : -(-stop // self.height)] = state

    def are_new(self, e: int | None = None) -> bool:
        """Were all units (of matrix e) quantized since the reload began, and is nothing else to be said of them? By
        bytes, in a tenth of numpy's time."""
        states = (self.state if e is None else self.state[e]).tobytes()
        return states.count(QUANTIZED) == len(states)

    def runs(self, e: int, start: int, stop: int, flag: int) -> Iterator[tuple[int, int, bool]]:
        """Rows start:stop cut where units differ in a flag: first row, row after the last, is it set? Of no rows one
        run, where it is not: a weight without rows may have a scale that it shares with other ranks."""
        if start == stop:
            yield start, stop, False
            return
        first, found = start // self.height, (self.of(e, start, stop) & flag) != 0
        borders = [0, *(np.flatnonzero(found[1:] != found[:-1]) + 1).tolist(), len(found)]
        for a, b in pairwise(borders):
            yield max(start, (first + a) * self.height), min(stop, (first + b) * self.height), bool(found[a])

    def rows_within(self, nbytes: int, itemsize: int) -> int:
        """The rows of as many whole units as so many bytes hold, and of at least one."""
        return self.height * max(1, nbytes // (self.height * max(1, self.k * itemsize)))

    def box(self, e: int, rows: tuple[int, int], cols: tuple[int, int]) -> Box:
        """Rows and columns of matrix e, in the weight's dimensions."""
        return ((e, e + 1), rows, cols) if self.stacked else (rows, cols)

    def split(self, box: Box) -> Box:
        """Matrices, rows and columns of a box in the weight's dimensions."""
        return box if self.stacked else ((0, 1), *box)

    def lead(self, e: int) -> tuple[int, ...]:
        """The index of matrix e in the dimensions before its rows."""
        return (e,) if self.stacked else ()

    def any(self, flag: int) -> bool:
        return bool((self.state & flag).any())

    def all(self, flag: int) -> bool:
        return bool((self.state & flag).all())
