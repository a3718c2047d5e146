"""Quantizing finite matrices: one pass over rows finds the amax of each group, derives its scale and encodes what is in
cache by then. The loops are in `vectors`."""

from __future__ import annotations

import numpy as np
import torch

from ..formats import WeightFormat, ceil_div
from ..parts import Parts
from ..reference import gain_of, scale_of
from . import vectors
from .rows import adjacent, share, slabs, with_places


def quantize(source: torch.Tensor, parts: Parts, fmt: WeightFormat, amax: torch.Tensor) -> None:
    """Quantize one finite matrix with that largest magnitude (fp32 of no dimension)."""
    qdata, scale = parts.qdata, parts.scale
    target = qdata if adjacent(qdata) else torch.empty(qdata.shape, dtype=qdata.dtype, device="cpu")
    stored = scale if scale.is_contiguous() else torch.empty(scale.shape, dtype=scale.dtype, device="cpu")
    scales = stored.view(-1, scale.shape[-1])  # A stack that is quantized as one matrix has them by expert.
    gains = None
    if parts.global_scale is not None:
        gain = gain_of(amax, fmt, source.dtype)
        parts.global_scale.copy_(1.0 / gain)
        gains = torch.stack([gain, 1.0 / gain])
    elif fmt.granularity == "tensor":
        stored.copy_(scale_of(amax, fmt, source.dtype))
        divides = fmt.recipe is not None
        gains = stored.where(stored != 0.0, 1.0) if divides else (1.0 / stored).nan_to_num_(posinf=0.0)
    loop, unit = vectors.quantize_loop(fmt, source.dtype), fmt.block[0]
    for first, slab in slabs(source, unit):

        def work(start: int, stop: int, first: int = first, slab: torch.Tensor = slab) -> None:
            top, bottom = start * unit, min(stop * unit, slab.shape[0])
            with_places(
                loop,
                vectors.QUANTIZE,
                bottom - top,
                slab.shape[1],
                *_from(slab, top),
                *_from(target, first + top),
                *_from(scales, (first + top) // unit),
                0 if gains is None else gains.data_ptr(),
            )

        share(ceil_div(slab.shape[0], unit), slab.numel(), work)
    if stored is not scale:
        scale.copy_(stored)
    if target is not qdata:
        qdata.copy_(target)


def largest(loop: vectors.Loop, rows: torch.Tensor, start: int, stop: int) -> int:
    """The bits of the largest magnitude in rows start..stop of an `adjacent` matrix, by `vectors.amax_loop`; see
    `vectors.AMAX`."""
    found = np.zeros(1, np.int64)
    with_places(loop, vectors.AMAX, stop - start, rows.shape[1], *_from(rows, start), found.ctypes.data)
    return int(found[0])


def _from(matrix: torch.Tensor, row: int) -> tuple[int, int]:
    """The address of a row, and the bytes from one to the next."""
    stride = matrix.stride(0) * matrix.itemsize
    return matrix.data_ptr() + row * stride, stride
