"""The formats that are not fused (mx, nvfp4, int8, int4): the scales are the reference's own, between a loop that finds
the amax of each group and one that encodes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .. import reference
from ..formats import WeightFormat
from ..parts import Parts
from . import jit
from .rows import ELEMENTS, PIECE, adjacent, as_array, flat_rows, share, slabs

_ELEMENTS = {"e4m3": jit.E4M3, "e2m1": jit.E2M1, "int8": jit.INT8, "int4": jit.INT4}


def loops(fmt: WeightFormat) -> tuple[jit.Loop, jit.Loop]:
    """Those of a format: one that finds the amax of groups, and one that encodes."""
    return jit.amax_groups, jit.encode_groups[_ELEMENTS[fmt.element]]


def quantize(source: torch.Tensor, parts: Parts, fmt: WeightFormat, amax: torch.Tensor) -> None:
    """Quantize one finite matrix with that largest magnitude (fp32 of no dimension)."""
    qdata, scale = parts.qdata, parts.scale
    target = qdata if adjacent(qdata) else torch.empty(qdata.shape, dtype=qdata.dtype, device="cpu")
    stored = torch.empty(scale.shape, dtype=scale.dtype, device="cpu")
    scales = (stored.view(torch.uint8) if scale.dtype.itemsize == 1 else stored).view(-1, scale.shape[-1])
    gain = None
    if parts.global_scale is not None:
        gain = fmt.gain_from_amax(amax)
        parts.global_scale.copy_(1.0 / gain)
    compiled = [loop.of(ELEMENTS[source.dtype], purpose=fmt.name) for loop in loops(fmt)]
    for first, slab in slabs(source, 1):
        rows = slice(first, first + slab.shape[0])
        work = functools.partial(_encode_rows, compiled, slab, target[rows], scales[rows], fmt, gain)
        share(slab.shape[0], slab.numel(), work)
    scale.copy_(stored)
    if target is not qdata:
        qdata.copy_(target)


def _encode_rows(
    loops: list[Callable[..., None]],
    source: torch.Tensor,
    qdata: torch.Tensor,
    scales: torch.Tensor,
    fmt: WeightFormat,
    gain: torch.Tensor | None,
    start: int,
    stop: int,
) -> None:
    """Rows start..stop, in bands that stay in cache. `scales` are those to store, one byte as uint8."""
    amax_groups, encode_groups = loops
    cols = source.shape[1]
    (values, stride), (codes, codes_stride) = flat_rows(source), flat_rows(qdata)
    stored = as_array(scales)  # This thread may not write to a tensor that was made under inference mode.
    for band in reference.row_chunks(stop - start, cols, 1, PIECE):
        rows, count = slice(start + band.start, start + band.stop), band.stop - band.start
        here, codes_here = values[rows.start * stride :], codes[rows.start * codes_stride :]
        amax = torch.empty((count, scales.shape[1]), dtype=torch.float32, device="cpu")
        amax_groups(here, stride, cols, _group(fmt, cols), as_array(amax.view(-1)), 0, count)
        new = reference.scale_of(amax, fmt, source.dtype, gain)
        stored[rows] = as_array(new.view(scales.dtype))
        steps = reference.step_of(new, fmt, None if gain is None else 1.0 / gain).reshape(-1)
        encode_groups(
            fmt.divides,
            here,
            stride,
            codes_here,
            codes_stride,
            cols,
            _group(fmt, cols),
            as_array(steps),
            0,
            count,
        )


def _group(fmt: WeightFormat, cols: int) -> int:
    """How many columns share a scale."""
    return fmt.block[1] if fmt.granularity == "group" else cols
