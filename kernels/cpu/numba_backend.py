"""The backend for CPUs: the bytes of the reference, by loops that numba compiles.

Quantizing a finite source is one loop that does everything: `quantizing`, with loops in `vectors`. `fused`, with loops
in `jit`, does fp8 per tensor, channel and block where that cannot. What reads stored weights is the same for all:
`products`, with loops in `vectors`, too. `rows` shares a matrix out among threads.
"""

from __future__ import annotations

import numpy as np
import torch

from qtensor.errors import WeightDtypeError, WeightShapeError

from ..audit import Audit
from ..formats import SOURCE_DTYPES, NonFinite, WeightFormat
from ..parts import Parts, Pieces
from ..recipes import OWN
from ..reference import Torch, room
from . import fused, jit, mixtures, prepared, products, quantizing, stripes, vectors
from .rows import ELEMENTS, PIECE, adjacent, flat_rows, share, slabs
from .searching import is_searched_here

_INFINITY_BITS = 0x7F800000


class Numba(Torch):
    """The backend "numba"."""

    name = "numba"
    own: tuple[str, ...] = ("quantize_into", "dequantize", "linear", "experts", "quantize_activation")

    def quantize_into(
        self, source: torch.Tensor, parts: Parts, fmt: WeightFormat, audit: Audit | None = None, origin: int = 0
    ) -> None:
        """A source with NaN or infinity is refused before anything is stored."""
        audit = audit or Audit()
        _check(source, parts.qdata, fmt)
        if source.is_neg():  # The loops see memory, not torch's bit that says to negate what is there.
            source = source.resolve_neg()
        plain = audit.refuse_nonfinite and not audit.measure_sqnr
        is_fused = _is_fused(fmt)
        if source.numel() == 0 or not (is_fused or plain) or _takes_reference(fmt):
            super().quantize_into(source, parts, fmt, audit, origin)
            return
        small = source.dim() == 2 and source.numel() <= PIECE
        if is_fused and plain and small and _in_place(source, parts):
            fused.quantize_piece(source, parts, fmt, origin)
            return
        matrices = _matrices(source, parts, fmt)
        amax = torch.zeros(len(matrices), dtype=torch.float32, device="cpu")
        if audit.refuse_nonfinite or fmt.granularity == "tensor":
            for i, (matrix, _) in enumerate(matrices):
                amax[i] = _amax(matrix, audit, origin, fmt.name)
                origin += matrix.numel()
        for i, (matrix, own) in enumerate(matrices):
            if is_fused and plain and fused.is_narrow(matrix, own, fmt):
                fused.quantize_narrow(matrix, own, fmt)
            elif plain:
                quantizing.quantize(matrix, own, fmt, amax[i])
            else:
                fused.quantize(matrix, own, fmt, audit, amax[i])

    def pieces(self, parts: Parts, fmt: WeightFormat, audit: Audit) -> Pieces | None:
        plain = audit.refuse_nonfinite and not audit.measure_sqnr
        in_one = all(part.is_cpu and part.is_contiguous() for part in parts) and parts.qdata.numel()
        return fused.Pieces(parts, fmt) if plain and in_one and _is_fused(fmt) else None

    def raise_amax(
        self, source: torch.Tensor, amax: torch.Tensor, fmt: WeightFormat, audit: Audit, origin: int
    ) -> None:
        if source.numel():
            amax.clamp_(min=_amax(source.resolve_neg(), audit, origin, fmt.name))

    def quantize_rows(
        self, source: torch.Tensor, parts: Parts, fmt: WeightFormat, amax: torch.Tensor, audit: Audit, origin: int
    ) -> None:
        plain = audit.refuse_nonfinite and not audit.measure_sqnr
        if source.numel() == 0 or not plain or _takes_reference(fmt):
            super().quantize_rows(source, parts, fmt, amax, audit, origin)
            return
        _check(source, parts.qdata, fmt)
        quantizing.quantize(source.resolve_neg().detach(), parts, fmt, amax.view(()))

    def compile(self, fmt: WeightFormat, dtype: torch.dtype) -> None:
        is_fused = fused.is_fused(fmt)
        for loop in (*([fused.large_loop(fmt), fused.piece_loop(fmt)] if is_fused else []), jit.first_nonfinite):
            loop.of(ELEMENTS[dtype], purpose=fmt.name)
        vectors.amax_loop(dtype, fmt.name)
        vectors.quantize_loop(fmt, dtype)
        vectors.decode_loop(fmt, dtype)
        for x in (torch.bfloat16, torch.float32):  # What x may be.
            vectors.product_loop(fmt, stripes.way_of(fmt, x))
        prepared.compile_loops()
        mixtures.compile_loops()
        if vectors.has_tiles():
            vectors.tile_loop(fmt)
            vectors.pack_loop(fmt)

    def dequantize(
        self, parts: Parts, fmt: WeightFormat, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = room(parts, fmt, dtype) if out is None else out
        qdata = parts.qdata
        if qdata.numel() == 0 or out.dim() == 3 or out.dtype not in SOURCE_DTYPES:
            return super().dequantize(parts, fmt, dtype, out)
        parts = _in_order(parts)
        target = out if adjacent(out) else torch.empty(out.shape, dtype=out.dtype, device="cpu")
        products.dequantize(parts, fmt, target)
        return out if target is out else out.copy_(target)

    def linear(
        self, x: torch.Tensor, parts: Parts, fmt: WeightFormat, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._has_loops(x, parts):
            few = prepared.linear(x, parts, fmt, bias)
            return products.linear(x, _in_order(parts), fmt, bias) if few is None else few
        return super().linear(x, parts, fmt, bias)

    def experts(
        self,
        x: torch.Tensor,
        parts: Parts,
        fmt: WeightFormat,
        offsets: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._has_loops(x, parts):
            return products.experts(x, _in_order(parts), fmt, offsets, bias)
        return super().experts(x, parts, fmt, offsets, bias)

    def _has_loops(self, x: torch.Tensor, parts: Parts) -> bool:
        """A gradient of x needs the product that autograd sees; so do dtypes that the loops do not know."""
        needs_grad = x.requires_grad and torch.is_grad_enabled()
        return bool(x.numel() and parts.qdata.numel() and x.dtype in SOURCE_DTYPES and not needs_grad)

    def quantize_activation(self, x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
        if x.numel() == 0 or x.dtype not in SOURCE_DTYPES or not fused.is_fused(fmt):
            return super().quantize_activation(x, fmt)
        return fused.quantize_activation(x.resolve_neg(), fmt)


NUMBA = Numba()


def _is_fused(fmt: WeightFormat) -> bool:
    """Whether loops of `fused` do it, by the format's own formula."""
    return fused.is_fused(fmt) and fmt.search is None and fmt.recipe is None


def _takes_reference(fmt: WeightFormat) -> bool:
    """For a search or a recipe that the loops do not know."""
    if fmt.recipe is not None:
        return fmt.recipe not in OWN
    return fmt.search is not None and not is_searched_here(fmt)


def _check(source: torch.Tensor, qdata: torch.Tensor, fmt: WeightFormat) -> None:
    # Loaders send many small slices, and most formats store as many elements as they are given.
    if qdata.shape != (source.shape if fmt.element == "e4m3" else fmt.qdata_shape(tuple(source.shape))):
        raise WeightShapeError(f"source is {list(source.shape)} but qdata is {list(qdata.shape)}")
    if source.dtype not in SOURCE_DTYPES:
        raise WeightDtypeError(f"cannot quantize {source.dtype}; supported: {', '.join(map(str, SOURCE_DTYPES))}")
    if qdata.dtype != fmt.dtype:
        raise WeightDtypeError(f"{fmt.name} stores {fmt.dtype}, not {qdata.dtype}")


def _in_order(parts: Parts) -> Parts:
    """With stored elements of a row next to each other."""
    qdata = parts.qdata
    return parts if qdata.stride(-1) == 1 or qdata.shape[-1] == 1 else Parts(qdata.contiguous(), *parts[1:])


def _in_place(source: torch.Tensor, parts: Parts) -> bool:
    return adjacent(source) and adjacent(parts.qdata) and parts.scale.is_contiguous()


def _matrices(source: torch.Tensor, parts: Parts, fmt: WeightFormat) -> list[tuple[torch.Tensor, Parts]]:
    """The matrices to quantize one by one: the experts of a stack, or all of it if that is one."""
    source, qdata = source.detach(), parts.qdata.detach()
    parts = Parts(qdata, parts.scale, parts.global_scale)
    if source.dim() == 2:
        return [(source, parts)]
    experts, rows, _ = source.shape
    whole = not fmt.needs_whole_matrix and rows % fmt.block[0] == 0
    if whole and all(t.stride(0) == rows * t.stride(1) for t in (source, qdata)):
        return [(source.flatten(0, 1), Parts(qdata.flatten(0, 1), parts.scale))]
    return [(source[e], parts.matrix(e)) for e in range(experts)]


def _amax(source: torch.Tensor, audit: Audit, origin: int, purpose: str) -> float:
    """The largest finite magnitude; raises NonFinite if `audit` refuses what is not finite."""
    cols = source.shape[1]
    found: list[int] = []
    loop = vectors.amax_loop(source.dtype, purpose)
    finite_amax = None if audit.refuse_nonfinite else jit.amax_rows.of(ELEMENTS[source.dtype], purpose=purpose)
    for first, slab in slabs(source, 1):
        scanned = _widened(slab)

        def scan(start: int, stop: int, rows: torch.Tensor = scanned) -> None:
            bits = quantizing.largest(loop, rows, start, stop)
            if bits >= _INFINITY_BITS and finite_amax is not None:
                values, stride = flat_rows(rows)
                bits = int(finite_amax(values, stride, rows.shape[1], start, stop, True))
            found.append(bits)

        share(scanned.shape[0], slab.numel(), scan)
        if max(found) >= _INFINITY_BITS:
            values, stride = flat_rows(slab)
            first_nonfinite = jit.first_nonfinite.of(values.dtype, purpose=purpose)
            index = int(first_nonfinite(values, stride, slab.shape[0], cols))
            raise NonFinite(origin + first * cols + index, float(slab[index // cols, index % cols]))
    return float(np.uint32(max(found)).view(np.float32))


def _widened(rows: torch.Tensor) -> torch.Tensor:
    """The same elements in fewer and longer rows where these are short and lie together: a loop has a start for each
    row, which takes as long as a few hundred elements."""
    count, cols = rows.shape
    if cols >= fused.NARROW or not rows.is_contiguous():
        return rows
    together = next((n for n in (64, 32, 16, 8, 4, 2) if count % n == 0), 1)
    return rows.view(count // together, cols * together)
