"""Views: which elements of a weight a loader addresses, as (size, stride, offset), and the boxes they make up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from .boxes import as_box, contiguous_strides, is_flat_run, split_run
from .coverage import Box, Coverage


class View(NamedTuple):
    """A strided view of a contiguous weight, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def whole(shape: tuple[int, ...]) -> View:
    return View(shape, contiguous_strides(shape), 0)


def regions(shape: tuple[int, ...], view: View) -> Iterator[tuple[Box, Callable[[torch.Tensor], torch.Tensor]]]:
    """The boxes that make up a view, each with a function that cuts its part out of a tensor of the view's size.

    The part has the box's extents. It aliases the tensor unless a flattened view has to be copied to be split.
    """
    if 0 in view.size:
        return
    found = as_box(shape, *view)
    if found is not None:
        dims = [d for d in found.order if d is not None]
        dims += [d for d in range(len(view.size)) if d not in dims]
        extents = [b - a for a, b in found.box]
        yield found.box, lambda src: src.permute(dims).reshape(extents)
        return
    if is_flat_run(view.size, view.stride):
        at = 0
        for box in split_run(shape, view.offset, view.offset + prod(view.size)):
            extents = [b - a for a, b in box]
            count = prod(extents)
            yield box, lambda src, at=at, n=count, ext=extents: src.reshape(-1)[at : at + n].reshape(ext)  # type: ignore[misc]
            at += count
        return
    touched = Coverage(shape)
    touched.add_mask(view_mask(shape, view))

    def scattered(src: torch.Tensor, box: Box) -> torch.Tensor:
        dense = torch.empty(shape, dtype=src.dtype, device=src.device)
        dense.as_strided(*view).copy_(src)
        return dense[tuple(slice(*span) for span in box)]

    for box in touched.covered_boxes():
        yield box, partial(scattered, box=box)


def view_mask(shape: tuple[int, ...], view: View) -> np.ndarray:
    """True where the view touches the weight."""
    mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    mask.as_strided(*view).fill_(True)
    return mask.numpy()


def cover(coverage: Coverage, view: View) -> None:
    """Mark all elements of a view as covered."""
    for box, _ in regions(coverage.shape, view):
        coverage.add_box(box)
