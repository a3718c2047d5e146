"""Geometry: which elements of a contiguous array a strided view touches. Integers only, no tensor.

A view is (size, stride, offset) over an array of `shape`. Almost every view a loader takes (narrow, select, slice,
chunk, split, transpose, permute, and any chain of them) is a box, perhaps with its dimensions in another order.
Flattened views are runs of the flat array, which split into at most a few boxes. All else is left to a boolean mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from math import prod
from typing import NamedTuple

Box = tuple[tuple[int, int], ...]
"""Per dimension the first position, and the one after the last."""


class BoxView(NamedTuple):
    """A view that is the box `box`. `order[d]` is the view dimension that walks array dimension d, or None if the
    view has none (the box is one element thick there)."""

    box: Box
    order: tuple[int | None, ...]


@cache
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


@lru_cache(1 << 14)  # The layers of a model are written alike: most views were met in the layer before.
def as_box(shape: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> BoxView | None:
    """The view as a box of the array, or None if it is not one (a step, a flattened range, an overlap)."""
    matched = _match(shape, size, stride)
    if matched is None:
        return None
    order, extents = matched
    box = []
    for n, step, extent in zip(shape, contiguous_strides(shape), extents, strict=True):
        start, offset = divmod(offset, step)
        if start + extent > n:
            return None
        box.append((start, start + extent))
    return BoxView(tuple(box), order)


@lru_cache(4096)
def _match(
    shape: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int | None, ...], tuple[int, ...]] | None:
    """Which view dimension walks each array dimension, and how far, wherever the view begins."""
    extents = [1] * len(shape)
    order: list[int | None] = [None] * len(shape)
    for view_dim, (n, step) in enumerate(zip(size, stride, strict=True)):
        if n == 1:
            continue
        for d, s in enumerate(contiguous_strides(shape)):
            if s == step and shape[d] > 1 and order[d] is None and n <= shape[d]:
                extents[d], order[d] = n, view_dim
                break
        else:
            return None
    return tuple(order), tuple(extents)


def is_flat_run(size: tuple[int, ...], stride: Sequence[int]) -> bool:
    """Does the view walk one gapless run of the flat array in order?"""
    return all(n == 1 or s == c for n, s, c in zip(size, stride, contiguous_strides(size), strict=True))


def split_run(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The flat range `start:stop` of an array of `shape` as boxes in order: partial, whole and partial slabs."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start, stop),)] if shape else [()]
    slab = prod(shape[1:])
    first, last = start // slab, (stop - 1) // slab
    if first == last and not (start == first * slab and stop == (first + 1) * slab):
        inner = split_run(shape[1:], start - first * slab, stop - first * slab)
        return [((first, first + 1), *box) for box in inner]
    boxes: list[Box] = []
    if start > first * slab:
        boxes += split_run(shape, start, (first + 1) * slab)
        first += 1
    tail = stop < (last + 1) * slab
    whole_stop = last if tail else last + 1
    if first < whole_stop:
        boxes.append(((first, whole_stop), *((0, n) for n in shape[1:])))
    if tail:
        boxes += split_run(shape, last * slab, stop)
    return boxes


def joined(a: Box, b: Box) -> Box | None:
    """The box that two boxes make up if one continues the other along one dimension, else None."""
    found = -1
    for d, span in enumerate(a):
        if span != b[d]:
            if found >= 0:
                return None
            found = d
    if found < 0:
        return None
    (start, stop), (first, last) = a[found], b[found]
    if stop == first:
        return (*a[:found], (start, last), *a[found + 1 :])
    return (*a[:found], (first, stop), *a[found + 1 :]) if last == start else None


def any_overlaps(runs: list[Box], box: Box) -> bool:
    for run in runs:
        for (start, stop), (first, last) in zip(run, box, strict=True):
            if stop <= first or last <= start:
                break
        else:
            return True
    return False


def is_empty(box: Box) -> bool:
    return any(start >= stop for start, stop in box)


def volume(box: Box) -> int:
    volume = 1
    for start, stop in box:
        volume *= stop - start
    return volume


class WholeUnits(NamedTuple):
    """A view that is whole units of one matrix: which matrix, its rows, and its units among those of all matrices."""

    matrix: int
    rows: tuple[int, int]
    units: tuple[int, int]


@lru_cache(1 << 14)
def as_whole_units(
    shape: tuple[int, ...], height: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> WholeUnits | None:
    """The view as units (of so many rows; the last of a matrix may be lower) of an array `[N, K]` or `[E, N, K]`; None
    if it is anything else, or has another order, or no elements."""
    found = as_box(shape, size, stride, offset) if len(size) == 2 and 0 not in size else None
    if found is None or found.order[-2:] != (0, 1):
        return None
    (start, stop), cols = found.box[-2:]
    n, k = shape[-2:]
    if cols != (0, k) or start % height or (stop % height and stop != n):
        return None
    matrix = found.box[0][0] if len(shape) == 3 else 0
    first = matrix * -(-n // height)
    return WholeUnits(matrix, (start, stop), (first + start // height, first - (-stop // height)))
