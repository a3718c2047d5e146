"""fp8 per tensor, channel and block: one pass finds the amax, derives the scale and encodes a row that is in cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..audit import Audit
from ..formats import NonFinite, WeightFormat, ceil_div
from ..parts import Parts
from . import jit
from .rows import ELEMENTS, Array, adjacent, flat_rows, share, slabs

_LOOPS = {"tensor": jit.quantize_rows, "channel": jit.quantize_groups, "block": jit.quantize_blocks}
_PIECES = {
    "tensor": jit.quantize_piece_per_tensor,
    "channel": jit.quantize_piece_per_channel,
    "block": jit.quantize_piece_per_block,
}
# The loops for small matrices that have been used, and an array of the element type of each.
_pieces: dict[tuple[str, torch.dtype], tuple[Callable[..., int], Array]] = {}


def is_fused(fmt: WeightFormat) -> bool:
    """Whether `jit` has loops that do all of the format's work in one pass."""
    return fmt.element == "e4m3" and fmt.granularity != "group"


def large_loop(fmt: WeightFormat) -> jit.Loop:
    """That of a format for large matrices."""
    return _LOOPS[fmt.granularity]


def piece_loop(fmt: WeightFormat) -> jit.Loop:
    """And for small ones."""
    return _PIECES[fmt.granularity]


def quantize_piece(source: torch.Tensor, parts: Parts, fmt: WeightFormat, origin: int) -> None:
    """A small matrix in one call: loaders that deliver a weight in many slices spend their time between the calls.

    All are `adjacent`, and the scales contiguous.
    """
    key = fmt.granularity, source.dtype
    try:
        loop, like = _pieces[key]
    except KeyError:
        like = np.empty(0, ELEMENTS[source.dtype])
        loop = piece_loop(fmt).of(like.dtype, purpose=fmt.name)
        _pieces[key] = loop, like
    qdata, scale, (rows, cols) = parts.qdata, parts.scale, source.shape
    bad = loop(
        source.data_ptr(),
        source.stride(0),
        like,
        qdata.data_ptr(),
        qdata.stride(0),
        scale.data_ptr(),
        scale.numel(),
        rows,
        cols,
    )
    if bad >= 0:
        raise NonFinite(origin + bad, float(source[bad // cols, bad % cols]))


def quantize(source: torch.Tensor, parts: Parts, fmt: WeightFormat, audit: Audit, amax: torch.Tensor) -> None:
    """Quantize one matrix; `amax`, fp32 of no dimension, is used per tensor only."""
    qdata, scale = parts.qdata, parts.scale
    target = qdata if adjacent(qdata) else torch.empty(qdata.shape, dtype=qdata.dtype, device="cpu")
    unit = fmt.block[0]
    # Written to a tensor of our own first: a loop over its rows need not know the strides of `scale`.
    scales = torch.empty(scale.shape, dtype=torch.float32, device="cpu")
    if fmt.granularity == "tensor":
        scales.copy_(fmt.scale_from_amax(amax))
    flat_scales = scales.view(-1, scales.shape[-1])
    for first, slab in slabs(source, unit):
        codes = target[first : first + slab.shape[0]]
        if fmt.granularity == "tensor":
            _run_rows(slab, codes, scales, audit, fmt.name)
        elif fmt.granularity == "channel":
            _run_groups(slab, codes, flat_scales[first : first + slab.shape[0]], slab.shape[1], True, audit, fmt.name)
        else:
            _run_blocks(slab, codes, flat_scales[first // unit :], audit, fmt.name)
    scale.copy_(scales)
    if target is not qdata:
        qdata.copy_(target)


def quantize_activation(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Backend.quantize_activation`, for an x that is not empty."""
    rows, cols = x.shape
    group = fmt.block[1] if fmt.granularity == "block" else cols
    q = torch.empty((rows, cols), dtype=fmt.dtype, device="cpu")
    scale = torch.empty((rows, ceil_div(cols, group)), dtype=torch.float32, device="cpu")
    _run_groups(x if adjacent(x) else x.contiguous(), q, scale, group, False, Audit(), fmt.name)
    return q, scale


def _run_rows(source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, audit: Audit, purpose: str) -> None:
    values, stride = flat_rows(source)
    loop = jit.quantize_rows.of(values.dtype, purpose=purpose)
    codes, codes_stride = flat_rows(qdata)
    rows, cols = source.shape
    scales = flat_rows(scale.reshape(1, 1))[0]
    _share_and_sum(
        rows,
        source.numel(),
        audit,
        lambda start, stop, sums: loop(
            values, stride, codes, codes_stride, cols, scales, start, stop, audit.measure_sqnr, sums
        ),
    )


def _run_groups(
    source: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    group: int,
    skip_nonfinite: bool,
    audit: Audit,
    purpose: str,
) -> None:
    values, stride = flat_rows(source)
    loop = jit.quantize_groups.of(values.dtype, purpose=purpose)
    codes, codes_stride = flat_rows(qdata)
    rows, cols = source.shape
    scales = flat_rows(scale.contiguous().view(1, -1))[0]
    _share_and_sum(
        rows,
        source.numel(),
        audit,
        lambda start, stop, sums: loop(
            values,
            stride,
            codes,
            codes_stride,
            cols,
            group,
            scales,
            start,
            stop,
            skip_nonfinite,
            audit.measure_sqnr,
            sums,
        ),
    )


def _run_blocks(source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, audit: Audit, purpose: str) -> None:
    values, stride = flat_rows(source)
    loop = jit.quantize_blocks.of(values.dtype, purpose=purpose)
    codes, codes_stride = flat_rows(qdata)
    rows, cols = source.shape
    scales = flat_rows(scale.contiguous().view(1, -1))[0]
    _share_and_sum(
        ceil_div(rows, jit.BLOCK),
        source.numel(),
        audit,
        lambda start, stop, sums: loop(
            values, stride, codes, codes_stride, rows, cols, scales, start, stop, audit.measure_sqnr, sums
        ),
    )


def _share_and_sum(count: int, elements: int, audit: Audit, work: Callable[[int, int, Array], None]) -> None:
    """`share`, with an array for work to add (signal, noise) to, which end up in `audit`."""
    parts: list[Array] = []

    def piece(start: int, stop: int) -> None:
        sums = np.zeros(2)
        work(start, stop, sums)
        parts.append(sums)

    share(count, elements, piece)
    if audit.measure_sqnr:
        signal, noise = np.sum(parts, axis=0)
        audit.signal += float(signal)
        audit.noise += float(noise)
