"""Views: which elements of a weight a loader addresses, as (size, stride, offset), and the boxes they make up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from .boxes import as_box, contiguous_strides, is_flat_run, split_run
from .coverage import Box, Coverage, boxes_of


class View(NamedTuple):
    """A strided view of a contiguous weight, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def whole(shape: tuple[int, ...]) -> View:
    return View(shape, contiguous_strides(shape), 0)


Part = Callable[[torch.Tensor], torch.Tensor]


def regions(shape: tuple[int, ...], view: View) -> list[tuple[Box, Part]] | None:
    """The boxes that make up a view, each with a function that cuts its part out of a tensor of the view's size.

    The part has the box's extents. It aliases the tensor unless a flattened view has to be copied to be split. None for
    a view with steps or overlaps: it may be as many boxes as it has elements, so it is told by its `view_mask`.
    """
    if 0 in view.size:
        return []
    found = as_box(shape, *view)
    if found is not None:
        dims = [d for d in found.order if d is not None]
        dims += [d for d in range(len(view.size)) if d not in dims]
        extents = [b - a for a, b in found.box]
        return [(found.box, lambda src: src.permute(dims).reshape(extents))]
    if not is_flat_run(view.size, view.stride):
        return None
    parts: list[tuple[Box, Part]] = []
    at = 0
    for box in split_run(shape, view.offset, view.offset + prod(view.size)):
        extents = [b - a for a, b in box]
        parts.append((box, partial(_flat_part, start=at, extents=extents)))
        at += prod(extents)
    return parts


def _flat_part(source: torch.Tensor, start: int, extents: list[int]) -> torch.Tensor:
    return source.reshape(-1)[start : start + prod(extents)].reshape(extents)


def view_mask(shape: tuple[int, ...], view: View) -> np.ndarray:
    """True where the view touches the weight."""
    mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    mask.as_strided(*view).fill_(True)
    return mask.numpy()


def scattered(shape: tuple[int, ...], view: View, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a write to a view without `regions` does to an array of `shape`: the values, and where they are (bool)."""
    values = torch.zeros(shape, dtype=source.dtype, device=source.device)
    values.as_strided(*view).copy_(source)
    return values, torch.from_numpy(view_mask(shape, view)).to(source.device)


def cover(coverage: Coverage, view: View) -> None:
    """Mark all elements of a view as covered."""
    found = regions(coverage.shape, view)
    if found is None:
        coverage.add_mask(view_mask(coverage.shape, view))
    for box, _ in found or ():
        coverage.add_box(box)


def uncover(coverage: Coverage, where: View | np.ndarray) -> None:
    """Mark the elements of a view, or those where a mask is true, as not covered."""
    found = regions(coverage.shape, where) if isinstance(where, View) else None
    if found is None:
        coverage.discard_mask(view_mask(coverage.shape, where) if isinstance(where, View) else where)
    for box, _ in found or ():
        coverage.discard(box)


def box_view(shape: tuple[int, ...], box: Box) -> View:
    """The elements of a box as a view."""
    strides = contiguous_strides(shape)
    offset = sum(start * step for (start, _), step in zip(box, strides, strict=True))
    return View(tuple(stop - start for start, stop in box), strides, offset)


def bounds(shape: tuple[int, ...], view: View) -> Box:
    """The smallest box that holds all elements of a view."""
    found = as_box(shape, *view)
    if found is not None:
        return found.box
    boxes = boxes_of(view_mask(shape, view))
    return tuple((min(b[d][0] for b in boxes), max(b[d][1] for b in boxes)) for d in range(len(shape)))
