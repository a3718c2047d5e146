"""Random loader programs: the ways a loader may cut, order, repeat and address the writes that fill a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from qtensor import (
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    int4_asymmetric,
    int4_per_group,
    int4_per_group_32,
    int8_per_channel,
    mxfp4,
    mxfp8,
    nvfp4,
)
from qtensor.schemes.scheme import Scheme

Box = tuple[tuple[int, int], ...]
_ROW_WISE = (fp8_per_channel, mxfp8, mxfp4, int8_per_channel, int4_per_group, int4_per_group_32)
PLAIN = (*_ROW_WISE, fp8_per_block, fp8_per_tensor, nvfp4)
RECIPES = tuple(scheme.by_recipe("compressed-tensors") for scheme in (int8_per_channel, mxfp8, fp8_per_block, nvfp4))
ROW_WISE = (*_ROW_WISE, int4_asymmetric, *(scheme.searched() for scheme in _ROW_WISE), *RECIPES[:2])
"""Schemes whose unit is a row."""
SCHEMES = (*ROW_WISE, fp8_per_block, fp8_per_tensor, nvfp4, fp8_per_block.searched(), nvfp4.searched(), *RECIPES[2:])


def largest_error(scheme: Scheme) -> float:
    """Of an element, as a share of the largest magnitude beside it. mxfp4 saturates from 6 to 7 in units of its scale;
    searched, twice as soon, and int4 from three quarters of the largest on."""
    element = scheme.format.element
    if scheme.is_searched and element in ("e2m1", "int4"):
        return 0.5 if element == "e2m1" else 0.25
    return {"e4m3": 0.07, "e2m1": 0.2, "int8": 0.02, "int4": 0.08}[element]


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """A weight, the scheme it is loaded into, and the dtype its loader delivers."""

    weight: torch.Tensor
    scheme: object
    source_dtype: torch.dtype


@st.composite
def cases(draw: st.DrawFn, schemes: tuple = SCHEMES) -> Case:
    rows = draw(st.sampled_from([1, 3, 16, 40, 129, 200]))
    cols = draw(st.sampled_from([1, 5, 32, 130]))
    shape = (draw(st.integers(1, 3)), rows, cols) if draw(st.booleans()) else (rows, cols)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([1e-6, 0.02, 30.0]))
    weight = (torch.randn(shape, generator=generator) * spread).to(draw(st.sampled_from(DTYPES)))
    # A source in a wider dtype than the weight would round on arrival; the oracle then quantizes the rounded values.
    wider = [torch.float32, torch.float64] if weight.dtype == torch.bfloat16 else [torch.float64]
    return Case(weight, draw(st.sampled_from(schemes)), draw(st.sampled_from([weight.dtype, *wider])))


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...], max_cuts: int = 5) -> list[Box]:
    """Disjoint boxes that make up the array."""
    boxes: list[Box] = [tuple((0, n) for n in shape)]
    for _ in range(draw(st.integers(0, max_cuts))):
        i = draw(st.integers(0, len(boxes) - 1))
        box = boxes[i]
        d = draw(st.integers(0, len(shape) - 1))
        start, stop = box[d]
        if stop - start > 1:
            cut = draw(st.integers(start + 1, stop - 1))
            boxes[i : i + 1] = [
                (*box[:d], (start, cut), *box[d + 1 :]),
                (*box[:d], (cut, stop), *box[d + 1 :]),
            ]
    return boxes


def row_partitions(shape: tuple[int, ...]) -> st.SearchStrategy[list[Box]]:
    """Partitions that never cut a row."""
    return partitions(shape[:-1]).map(lambda boxes: [(*box, (0, shape[-1])) for box in boxes])


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*span) for span in box)


def _narrow(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    view = param.data
    for d, (start, stop) in enumerate(box):
        view = view.narrow(d, start, stop - start)
    view.copy_(src)


def _setitem(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    with torch.no_grad():
        param[slices(box)] = src


def _transposed(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    param.data.mT[(*slices(box)[:-2], *slices(box)[:-3:-1])].copy_(src.mT)


def _row_by_row(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    view = param.detach()[slices(box)]
    for i in range(view.shape[0]):
        view[i].copy_(src[i])


def _split(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    view = param.data[slices(box)]
    for part, piece in zip(view.chunk(2, dim=-1), src.chunk(2, dim=-1), strict=True):
        part.copy_(piece)


def _flat(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    """Through a flattened view, as runs of the flat weight."""
    flat, index = param.data.view(-1), torch.arange(param.numel()).view(param.shape)[slices(box)]
    for where, values in zip(index.reshape(-1, index.shape[-1]), src.reshape(-1, src.shape[-1]), strict=True):
        flat[int(where[0]) : int(where[-1]) + 1] = values


def _strided(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    view = param.data[slices(box)]
    for phase in (0, 1):
        view[..., phase::2].copy_(src[..., phase::2])


def _foreach(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    torch._foreach_copy_(list(param.data[slices(box)].unbind(0)), list(src.unbind(0)))


def _index_copy(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    view = param.data[(slice(None), *slices(box)[1:])]
    order = torch.randperm(src.shape[0])
    view.index_copy_(0, order + box[0][0], src[order].to(param.dtype))


def _masked(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    mask = torch.zeros(param.shape, dtype=torch.bool)
    mask[slices(box)] = True
    param.data[mask] = src.reshape(-1).to(param.dtype)


def _speckled(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    """A random mask of the box, then the rest of it."""
    some = torch.rand(src.shape) < torch.rand(())
    for part in (some, ~some):
        mask = torch.zeros(param.shape, dtype=torch.bool)
        mask[slices(box)] = part
        param.data[mask] = src[part].to(param.dtype)


def _masked_view(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    """By `masked_scatter_` into every other column."""
    for phase in (0, 1):
        view, values = param.data[slices(box)][..., phase::2], src[..., phase::2].to(param.dtype)
        some = torch.rand(view.shape) < 0.5
        for mask in (some, ~some):
            view.masked_scatter_(mask, values[mask])


def _columns(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    order = torch.randperm(src.shape[-1])
    param.data[slices(box)].index_copy_(src.dim() - 1, order, src[..., order].to(param.dtype))


def _scatter(param: torch.Tensor, box: Box, src: torch.Tensor) -> None:
    order = torch.rand(src.shape).argsort(-1)
    param.data[slices(box)].scatter_(-1, order, src.gather(-1, order).to(param.dtype))


WRITERS: tuple[Callable[[torch.Tensor, Box, torch.Tensor], None], ...] = (
    _narrow,
    _setitem,
    _transposed,
    _row_by_row,
    _split,
    _flat,
    _strided,
    _foreach,
    _index_copy,
    _masked,
    _speckled,
    _masked_view,
    _columns,
    _scatter,
)
"""Ways to write `src` into the box of a parameter. The first five are what loaders do every day."""


def write(param: torch.Tensor, box: Box, full: torch.Tensor, source_dtype: torch.dtype, writer: Callable) -> None:
    """Deliver a box of `full` through `writer`, then scribble over the source as a reused buffer would be."""
    source = full[slices(box)].to(source_dtype, copy=True)
    writer(param, box, source)
    source.fill_(float("nan"))
