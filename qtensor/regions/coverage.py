"""Coverage: the exact set of elements of an n-dimensional array that have been written.

The set is a coordinate-compressed grid: per dimension a sorted list of cut positions, and one boolean per grid cell.
A box inserts at most two cuts per dimension; cuts that no longer separate anything are removed as the grid grows, so
loads that arrive shard by shard keep a handful of cells whatever the size of the weight. A region that is no box is
added by its boolean mask and is just as exact; the worst case (a checkerboard) degenerates to one boolean, a byte, per
element.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np

from ..errors import WeightShapeError
from .boxes import Box as Box
from .boxes import any_overlaps, is_empty, joined, split_run, volume

Region = Sequence[tuple[int, int] | slice]
_NO_CELLS: np.ndarray = np.zeros(0, dtype=bool)
_MOST_RUNS = 3  # that wait: rows of an expert, experts, and one more


class Coverage:
    """Which elements of an array of `shape` are covered. Not thread-safe: callers hold the weight's lock."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.numel = prod(self.shape)
        self.clear()

    def clear(self) -> None:
        """Forget everything: no element is covered."""
        self.covered = 0
        self._has_grid = False
        self._cuts: list[list[int]] = []
        self._cells: np.ndarray = _NO_CELLS
        self._tidy_above = 64
        self._runs: list[Box] = []  # disjoint, and outside of the grid's true cells
        self._gridded = False
        self._starts: list[int] = []  # of runs in row-major order, apart from each other, while nothing else is covered
        self._stops: list[int] = []

    @property
    def complete(self) -> bool:
        return self.covered == self.numel

    def add(self, region: Region) -> int:
        """Cover a box, one `(start, stop)` or slice per dimension. Returns how many elements were new."""
        box = self._box(region)
        return 0 if is_empty(box) else self.add_box(box)

    def add_run(self, start: int, stop: int) -> int:
        """`add` for the elements start:stop (some, all inside) in row-major order: whole rows, as most loaders write
        them, in any order. Cheap as long as all that was covered came so, and none twice."""
        if self._runs or self._gridded:
            return 0 if self.covered == self.numel else self._add_boxes(start, stop)
        starts, stops = self._starts, self._stops
        i = bisect_right(starts, start)
        if (i and stops[i - 1] > start) or (i < len(starts) and starts[i] < stop):
            return self._add_boxes(start, stop)
        continues, precedes = i > 0 and stops[i - 1] == start, i < len(starts) and starts[i] == stop
        if continues and precedes:
            stops[i - 1] = stops[i]
            del starts[i], stops[i]
        elif continues:
            stops[i - 1] = stop
        elif precedes:
            starts[i] = start
        else:
            starts.insert(i, start)
            stops.insert(i, stop)
        newly = stop - start
        self.covered += newly
        if self.covered == self.numel:
            self._be_complete()
        return newly

    def _add_boxes(self, start: int, stop: int) -> int:
        return sum([self.add_box(box) for box in split_run(self.shape, start, stop)])

    def add_box(self, box: Box) -> int:
        """`add` for a box that is known to be inside of the shape and not empty."""
        if self.covered == self.numel:
            return 0
        self._cut_up()
        if len(self._runs) > _MOST_RUNS:
            self._settle_runs()
        runs = self._runs
        grown = joined(runs[-1], box) if runs else None
        if grown is None and len(runs) == _MOST_RUNS:
            self._settle_runs()
        others = runs if grown is None else runs[:-1]
        if not ((self._gridded and self._in_grid(box)) or (others and any_overlaps(others, box))):
            # Most boxes continue the last one. Those wait as one run, which enters the grid when something else comes.
            # A run that continues the one before it joins that: rows make an expert, experts a stack.
            if grown is None:
                runs.append(box)
            else:
                runs[-1] = grown
                while len(runs) > 1 and (longer := joined(runs[-2], runs[-1])) is not None:
                    runs[-2:] = [longer]
            newly = volume(box)
        else:
            self._settle_runs()
            index = self._refine(box)
            newly = self._count(~self._cells[index], index)
            self._cells[index] = True
        self.covered += newly
        if self.covered == self.numel:
            self._be_complete()
        return newly

    def discard(self, region: Region) -> int:
        """Uncover a box. Returns how many elements were covered before."""
        box = self._box(region)
        if not self.covered or is_empty(box):
            return 0
        self._settle_runs()
        index = self._refine(box)
        removed = self._count(self._cells[index], index)
        self._cells[index] = False
        self.covered -= removed
        self._tidy()
        return removed

    def add_mask(self, mask: np.ndarray) -> int:
        """Cover the elements where `mask` (bool, of this shape) is true: the exact fallback for any region."""
        if mask.shape != self.shape:
            raise WeightShapeError(f"mask of shape {mask.shape} for coverage of shape {self.shape}")
        if not self.numel:
            return 0
        if not self.shape:
            return self.add(()) if mask else 0
        self._settle_runs()
        self._gridded = True
        cuts: list[list[int]] = []
        cells, sampled = self._cells, mask
        for d in reversed(range(mask.ndim)):
            old = self._cuts[d]
            full = len(old) == mask.shape[d] + 1
            new = np.asarray(old) if full else np.union1d(old, _changes(mask, d))
            cuts.insert(0, new.tolist())
            if len(new) != len(old):
                cells = cells.take(np.searchsorted(old, new[:-1], side="right") - 1, axis=d)
            if len(new) != mask.shape[d] + 1:
                sampled = sampled.take(new[:-1], axis=d)
        self._cuts, self._cells = cuts, cells
        index = tuple(slice(0, n) for n in self._cells.shape)
        newly = self._count(sampled & ~self._cells, index)
        self._cells = self._cells | sampled
        self.covered += newly
        self._tidy()
        return newly

    def discard_mask(self, mask: np.ndarray) -> None:
        """Uncover the elements where `mask` (bool, of this shape) is true."""
        kept = self.mask() & ~mask
        self.clear()
        self.add_mask(kept)

    def mask(self) -> np.ndarray:
        """True for each covered element; may share memory with the grid."""
        self._settle_runs()
        cells = self._cells
        for d, cuts in enumerate(self._cuts):
            if cells.shape[d] != self.shape[d]:
                cells = np.repeat(cells, np.diff(cuts), axis=d)
        return cells

    def covers(self, region: Region) -> bool:
        """Is every element of the box covered? True for an empty box."""
        box = self._box(region)
        if self.complete or is_empty(box):
            return True
        self._settle_runs()
        return bool(self._cells[self._touching(box)].all())

    def overlaps(self, region: Region) -> bool:
        """Is any element of the box covered?"""
        box = self._box(region)
        self._settle_runs()
        return not is_empty(box) and self._in_grid(box)

    def missing(self, within: Region | None = None) -> list[Box]:
        """Disjoint boxes that hold exactly the uncovered elements (of the box `within`), in row-major order."""
        if self.complete:
            return []
        box = self._box(within) if within is not None else tuple((0, n) for n in self.shape)
        if is_empty(box):
            return []
        self._settle_runs()
        return _clip(_boxes(~self._cells, self._cuts), box)

    def covered_boxes(self, within: Region | None = None) -> list[Box]:
        """Disjoint boxes that hold exactly the covered elements (of the box `within`)."""
        box = self._box(within) if within is not None else tuple((0, n) for n in self.shape)
        if not self.covered or is_empty(box):
            return []
        self._settle_runs()
        return _clip(_boxes(self._cells, self._cuts), box)

    def full_rows(self, lead: tuple[int, ...], start: int, stop: int) -> list[tuple[int, int]]:
        """Maximal runs of rows whose every element is covered.

        Args:
            lead: Which matrix of a shape `[*lead, N, K]`; `()` for a matrix.
            start: The first row.
            stop: The row after the last.

        Returns:
            Pairs of first row and row after the last.
        """
        if self.complete:
            return [(start, stop)] if start < stop else []
        self._settle_runs()
        at = tuple(bisect_right(self._cuts[d], i) - 1 for d, i in enumerate(lead))
        cuts = self._cuts[-2]
        first, last = bisect_right(cuts, start) - 1, bisect_left(cuts, stop)
        runs: list[tuple[int, int]] = []
        for i, full in enumerate(self._cells[at][first:last].all(axis=-1).tolist(), first):
            if not full:
                continue
            a, b = max(cuts[i], start), min(cuts[i + 1], stop)
            if runs and runs[-1][1] == a:
                runs[-1] = (runs[-1][0], b)
            else:
                runs.append((a, b))
        return runs

    def copy(self) -> Coverage:
        self._settle_runs()
        other = Coverage(self.shape)
        other.covered, other._gridded, other._has_grid = self.covered, True, True
        other._cuts = [list(c) for c in self._cuts]
        other._cells = self._cells.copy()
        return other

    def __repr__(self) -> str:
        return f"Coverage({list(self.shape)}, {self.covered} of {self.numel} elements)"

    def _box(self, region: Region) -> Box:
        if len(region) != len(self.shape):
            raise WeightShapeError(f"a region of {len(region)} dimensions for the shape {self.shape}")
        box = tuple([r.indices(n)[:2] if isinstance(r, slice) else r for r, n in zip(region, self.shape, strict=True)])
        for (start, stop), n in zip(box, self.shape, strict=True):
            if not 0 <= start <= n or stop > n:
                raise WeightShapeError(f"region {box} is outside of shape {self.shape}")
        return box

    def _refine(self, box: Box) -> tuple[slice, ...]:
        """Insert the cuts of `box`; the slice of cells that makes it up."""
        return tuple(slice(self._cut(d, start), self._cut(d, stop)) for d, (start, stop) in enumerate(box))

    def _cut(self, d: int, position: int) -> int:
        cuts = self._cuts[d]
        if position == 0:
            return 0
        if position == cuts[-1]:
            return len(cuts) - 1
        i = bisect_left(cuts, position)
        if cuts[i] != position:
            cuts.insert(i, position)
            lead = (slice(None),) * d
            cells = self._cells
            self._cells = np.concatenate((cells[(*lead, slice(0, i))], cells[(*lead, slice(i - 1, None))]), axis=d)
        return i

    def _tidy(self) -> None:
        """Remove cuts that separate equal slabs, each time the grid has doubled: a constant cost per region."""
        if self.complete:
            self._cuts = [[0, n] for n in self.shape]
            self._cells = np.ones((1,) * len(self.shape), dtype=bool)
        elif self._cells.size > self._tidy_above:
            for d in range(len(self.shape)):
                dead = np.setdiff1d(np.arange(1, self._cells.shape[d]), _changes(self._cells, d), assume_unique=True)
                if len(dead):
                    self._cells = np.delete(self._cells, dead, axis=d)
                    self._cuts[d] = np.delete(self._cuts[d], dead).tolist()
            self._tidy_above = max(64, 2 * self._cells.size)

    def _require_grid(self) -> None:
        """If all elements are covered, or none, it is made when it is asked for: most weights never ask."""
        if not self._has_grid:
            self._cuts = [[0, n] for n in self.shape]
            self._cells = np.full((1,) * len(self.shape), 0 < self.covered == self.numel)
            self._has_grid = True

    def _be_complete(self) -> None:
        self._runs.clear()
        self._starts, self._stops = [], []
        self._has_grid, self._cells = False, _NO_CELLS
        self._gridded = True

    def _cut_up(self) -> None:
        """Let runs in row-major order wait as boxes."""
        if self._starts:
            for start, stop in zip(self._starts, self._stops, strict=True):
                self._runs += split_run(self.shape, start, stop)
            self._starts, self._stops = [], []

    def _settle_runs(self) -> None:
        """Enter the waiting runs into the grid."""
        self._cut_up()
        self._require_grid()
        if self._runs:
            for run in self._runs:
                index = self._refine(run)  # replaces self._cells, so it has to come first
                self._cells[index] = True
            self._gridded = True
            self._runs.clear()
            self._tidy()

    def _in_grid(self, box: Box) -> bool:
        touching = self._touching(box)
        if all([part.stop - part.start == 1 for part in touching]):  # noqa: C419  a list is faster
            return self._cells.item(*[part.start for part in touching])
        return bool(self._cells[touching].any())

    def _touching(self, box: Box) -> tuple[slice, ...]:
        return tuple(
            [
                slice(bisect_right(cuts, start) - 1, bisect_left(cuts, stop))
                for cuts, (start, stop) in zip(self._cuts, box, strict=True)
            ]
        )

    def _count(self, cells: np.ndarray, index: tuple[slice, ...]) -> int:
        """Number of elements in the true cells of the sub-grid `index`."""
        if cells.size == self.numel:
            return int(np.count_nonzero(cells))
        count = cells.astype(np.int64)
        for cuts, part in zip(reversed(self._cuts), reversed(index), strict=True):
            count = count @ np.diff(cuts[part.start : part.stop + 1])
        return int(count)


def _changes(mask: np.ndarray, d: int) -> np.ndarray:
    """Where along dimension d a slab differs from the one before it."""
    lead = (slice(None),) * d
    differ = mask[(*lead, slice(1, None))] != mask[(*lead, slice(None, -1))]
    return np.flatnonzero(differ.any(axis=tuple(a for a in range(mask.ndim) if a != d))) + 1


def boxes_of(mask: np.ndarray) -> list[Box]:
    """Disjoint boxes that hold exactly the true elements of a boolean array, in row-major order."""
    return _boxes(mask, [range(n + 1) for n in mask.shape])


def _boxes(cells: np.ndarray, cuts: Sequence[Sequence[int]]) -> list[Box]:
    """True cells as boxes: equal neighbouring slabs of the first dimension are merged, then recursively inside."""
    if not cells.any():
        return []
    if cells.ndim == 0:
        return [()]
    borders = [0, *_changes(cells, 0).tolist(), len(cells)]
    if cells.ndim == 1:
        return [((cuts[0][a], cuts[0][b]),) for a, b in pairwise(borders) if cells[a]]
    boxes: list[Box] = []
    for a, b in pairwise(borders):
        span = (cuts[0][a], cuts[0][b])
        boxes += [(span, *rest) for rest in _boxes(cells[a], cuts[1:])]
    return boxes


def _clip(boxes: list[Box], limit: Box) -> list[Box]:
    clipped = (tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, limit, strict=True)) for box in boxes)
    return [box for box in clipped if not is_empty(box)]
