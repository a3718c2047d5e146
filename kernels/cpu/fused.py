"""fp8 per tensor, channel and block: one pass finds the amax, derives the scale and encodes a row that is in cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..audit import Audit
from ..formats import NonFinite, WeightFormat, ceil_div
from ..parts import Parts
from . import jit
from .rows import ELEMENTS, PIECE, Array, adjacent, flat_rows, share, slabs

_LOOPS = {"tensor": jit.quantize_rows, "channel": jit.quantize_groups, "block": jit.quantize_blocks}
_PIECES = {
    "tensor": jit.quantize_piece_per_tensor,
    "channel": jit.quantize_piece_per_channel,
    "block": jit.quantize_piece_per_block,
}
# The loops for small matrices that have been used, and an array of the element type of each.
_pieces: dict[tuple[str, torch.dtype], tuple[Callable[..., int], Array]] = {}


NARROW = 256
"""Columns below which the loops of `vectors` take longer than those for pieces: they have a start for each row."""


def is_fused(fmt: WeightFormat) -> bool:
    """Whether `jit` has loops that do all of the format's work in one pass."""
    return fmt.element == "e4m3" and fmt.granularity != "group"


def large_loop(fmt: WeightFormat) -> jit.Loop:
    """That of a format for large matrices."""
    return _LOOPS[fmt.granularity]


def piece_loop(fmt: WeightFormat) -> jit.Loop:
    """And for small ones."""
    return _PIECES[fmt.granularity]


def _piece_loop(fmt: WeightFormat, dtype: torch.dtype) -> tuple[Callable[..., int], Array]:
    """The loop for small matrices, and an array of its element type."""
    key = fmt.granularity, dtype
    if key not in _pieces:
        like: Array = np.empty(0, ELEMENTS[dtype])
        _pieces[key] = piece_loop(fmt).of(like.dtype, purpose=fmt.name), like
    return _pieces[key]


class Pieces:
    """As `parts.Pieces`, for a contiguous weight or stack: addresses are sums."""

    def __init__(self, parts: Parts, fmt: WeightFormat) -> None:
        self._held, self._fmt = parts, fmt  # Whoever has the addresses keeps the memory.
        self._cols = parts.qdata.shape[-1]
        self._codes, self._scales = parts.qdata.data_ptr(), parts.scale.data_ptr()
        self._scales_per_unit = parts.scale.shape[-1] if fmt.granularity == "block" else 1
        self._loops: dict[torch.dtype, tuple[Callable[..., int], Array]] = {}

    def write(self, source: torch.Tensor, row: int, unit: int, units: int, origin: int, most: int = PIECE) -> bool:
        """most: of elements."""
        dtype, (rows, cols), address = source.dtype, source.shape, source.data_ptr() if source.is_cpu else 1
        stride, step = source.stride()
        if address % dtype.itemsize or (step != 1 and cols != 1) or rows * cols > most:
            return False
        if source.is_neg() or dtype not in ELEMENTS:
            return False
        found = self._loops.get(dtype)
        if found is None:
            found = self._loops[dtype] = _piece_loop(self._fmt, dtype)
        loop, like = found
        scales, width = self._scales_per_unit, self._cols
        bad = loop(
            address,
            stride,
            like,
            self._codes + row * width,
            width,
            self._scales + unit * scales * 4,
            units * scales,
            rows,
            cols,
        )
        if bad >= 0:
            raise NonFinite(origin + bad, float(source[bad // cols, bad % cols]))
        return True


def quantize_piece(source: torch.Tensor, parts: Parts, fmt: WeightFormat, origin: int) -> None:
    """A small matrix in one call: loaders that deliver a weight in many slices spend their time between the calls.

    All are `adjacent`, and the scales contiguous.
    """
    loop, like = _piece_loop(fmt, source.dtype)
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


def is_narrow(source: torch.Tensor, parts: Parts, fmt: WeightFormat) -> bool:
    """Is `quantize_narrow` for this finite matrix? One with short rows, that lie together."""
    in_one = source.is_contiguous() and all(part.is_contiguous() for part in parts)
    return in_one and source.shape[1] < NARROW and fmt.granularity != "tensor" and adjacent(source)


def quantize_narrow(source: torch.Tensor, parts: Parts, fmt: WeightFormat) -> None:
    """Quantize it by the loop for pieces."""
    pieces, unit = Pieces(parts, fmt), fmt.block[0]

    def work(start: int, stop: int) -> None:
        rows = source[start * unit : stop * unit]
        pieces.write(rows, start * unit, start, stop - start, 0, most=rows.numel())

    share(ceil_div(source.shape[0], unit), source.numel(), work)


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
