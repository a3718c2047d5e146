"""QuantStore: where the elements of one weight go while it is being loaded, and how they come back when read.

It quantizes whole units the moment they arrive and stages the parts of units that are not complete yet. It is asked in
terms of views (size, stride, offset over the contiguous weight) and shares the weight's `Coverage`, as the `PlainStore`
of a weight that is not quantized does. Callers hold the weight's lock. It is one file because every write, read and end
looks at the same state of each unit: quantized, staged, open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from .. import kernels
from ..kernels import Audit, NonFinite, Parts
from ..kernels.formats import ceil_div
from ..kernels.upload import upload_rows
from ..regions.boxes import as_box
from ..regions.coverage import Box, Coverage, boxes_of
from ..regions.views import View, regions, scattered, view_mask
from ..schemes.scheme import Scheme
from ..tensor.qtensor import QTensor, empty
from .plain_store import NeverWritten

CHUNK_BYTES = 32 << 20
_STAGING_GROUP_BYTES = 2 << 20

# What a unit's bytes are: quantized in qdata, present in staging, and (while staged) waiting for more elements.
QUANTIZED, _STAGED, _OPEN = 1, 2, 4


class _Group(NamedTuple):
    """High-precision rows of some neighbouring units of one matrix."""

    first_row: int
    rows: torch.Tensor


class QuantStore:
    """A weight `[N, K]` or `[E, N, K]` that is quantized as its units complete.

    Whole units in a write are quantized straight from the source. Parts of units are staged, in groups of about two
    megabytes, until the unit is complete. A completed group is retained until the writer moves on (see
    `release`), so that a loader that reads back or rewrites what it just wrote meets exact values.

    on_staged: called with the change in staged bytes.
    whole_weight: stage everything until the entire weight is there (needed to decide by SQNR).
    result: where the quantized values go; new memory by default.
    """

    def __init__(
        self,
        scheme: Scheme,
        dtype: torch.dtype,
        device: torch.device,
        coverage: Coverage,
        audit: Audit,
        on_staged: Callable[[int], None],
        whole_weight: bool = False,
        result: QTensor | None = None,
    ) -> None:
        self.scheme, self.dtype, self.device = scheme, dtype, device
        self.coverage, self.audit, self._on_staged = coverage, audit, on_staged
        self.whole_weight = whole_weight
        self._on_cpu = device.type == "cpu"
        self._kernels = kernels.choose(device)
        *lead, self._n, self._k = coverage.shape
        self._lead = bool(lead)
        self._e = lead[0] if lead else 1
        self._unit = scheme.format.unit_rows(self._n)
        row_bytes = max(1, self._k * dtype.itemsize)
        self._group_rows = self._unit * max(1, _STAGING_GROUP_BYTES // (self._unit * row_bytes))
        self._chunk_rows = self._unit * max(1, CHUNK_BYTES // (self._unit * row_bytes))
        self._state = np.zeros((self._e, ceil_div(self._n, self._unit)), dtype=np.uint8)
        # Columns written to each unit so far, repeats included: until that reaches K the unit cannot be complete, and
        # the exact answer need not be asked for.
        self._received = np.zeros(self._state.shape, dtype=np.int64)
        self._groups: dict[tuple[int, int], _Group] = {}
        self._retained: dict[tuple[int, int], int] = {}  # complete group → the write that completed it
        self._staged_whole: torch.Tensor | None = None
        self._accepted: set[int] = set()  # per tensor: matrices whose written rows all came quantized
        self._clock = 0
        self._matrices: dict[int, Parts] = {}
        self.result = empty(coverage.shape, scheme, dtype, device) if result is None else result

    # Writing

    def write(self, view: View, source: torch.Tensor) -> None:
        """Take `source` (of the view's size) into the view. Raises NonFinite before the offending chunk is stored."""
        self._clock += 1
        found = as_box(self.coverage.shape, *view)
        if found is not None and len(view.size) == 2 and found.order[-2:] == (0, 1):
            # A matrix, or rows and columns of one expert: what loaders write all day.
            rows, cols = found.box[-2:]
            self._write_matrix(found.box[0][0] if self._lead else 0, rows, cols, source)
        else:
            parts = regions(self.coverage.shape, view)
            if parts is None:
                self.write_masked(*scattered(self.coverage.shape, view, source))
            for box, part in parts or ():
                (e0, e1), rows, cols = box if self._lead else ((0, 1), *box)
                values = part(source)
                for e in range(e0, e1):
                    self._write_matrix(e, rows, cols, values[e - e0] if self._lead else values)
        if self._retained:
            self._trim()

    def write_masked(self, values: torch.Tensor, touched: torch.Tensor) -> None:
        """Take those elements of `values` (of the weight's shape) where `touched` is true, in one go however scattered
        they are. Values elsewhere are finite. Raises NonFinite before anything is stored, or as `write` does."""
        self._clock += 1
        shape = (self._e, self._n, self._k)
        values, touched, mask = values.view(shape), touched.view(shape), touched.cpu().numpy()
        for e in range(self._e):
            self._refuse_nonfinite(e, (0, self._n), (0, self._k), values[e])
        counts = mask.reshape(shape).sum(axis=2, dtype=np.uint32)
        starts = np.arange(0, self._n, self._unit)
        staged = []
        for e in range(self._e):
            some, every = np.maximum.reduceat(counts[e], starts), np.minimum.reduceat(counts[e], starts)
            kind = np.where(every == self._k, 2, some > 0)
            partial = []
            for first, last in pairwise([0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)]):
                rows = (first * self._unit, min(last * self._unit, self._n))
                if kind[first] == 2:
                    self._write_matrix(e, rows, (0, self._k), values[e, slice(*rows)])
                elif kind[first]:
                    self._stage_rows(e, rows, (0, self._k), values[e, slice(*rows)], touched[e, slice(*rows)])
                    self._received[e, first:last] += some[first:last]
                    partial.append(rows)
            staged.append(partial)
        self.coverage.add_mask(mask)
        for e, partial in enumerate(staged):
            for rows in partial:
                self._settle_received(e, *rows)

    def _write_matrix(self, e: int, rows: tuple[int, int], cols: tuple[int, int], source: torch.Tensor) -> None:
        start, stop = rows
        first, last = stop, stop
        if cols == (0, self._k) and not self.whole_weight:
            first = min(ceil_div(start, self._unit) * self._unit, stop)
            last = stop if stop == self._n else max(stop // self._unit * self._unit, first)
        if first < last:
            self._quantize_source(e, first, last, _rows_of(source, first - start, last - start))
        else:
            first = last = stop
        for a, b in ((start, first), (last, stop)):
            if a < b:
                self._stage(e, (a, b), cols, _rows_of(source, a - start, b - start))

    def _quantize_source(self, e: int, start: int, stop: int, source: torch.Tensor) -> None:
        """Rows start:stop, whole units, from the source itself, one bounded chunk at a time."""
        if not self._on_cpu and source.is_cpu and self.device.type == "cuda":
            upload_rows(source, self.device, lambda rows, first: self._take_rows(e, start + first, rows), self._unit)
            return
        if stop - start <= self._chunk_rows:
            self._take_rows(e, start, source)
            return
        for first in range(0, stop - start, self._chunk_rows):
            self._take_rows(e, start + first, source[first : first + self._chunk_rows])

    def _take_rows(self, e: int, start: int, rows: torch.Tensor) -> None:
        """Quantize whole units that begin at row `start`; whatever was staged of them is obsolete."""
        stop = start + rows.shape[0]
        if rows.dtype != self.dtype or not (rows.is_cpu and self._on_cpu):
            rows = rows.to(device=self.device, dtype=self.dtype)
        try:
            self._quantize_rows(e, start, stop, rows)
        except NonFinite:
            self._lose(e, start, stop)
            raise
        self.coverage.add_box(self._box(e, (start, stop), (0, self._k)))
        self._state[e, start // self._unit : ceil_div(stop, self._unit)] = QUANTIZED
        self._accepted.discard(e)
        if self._groups:
            self._free_unused(e, start, stop)

    def _lose(self, e: int, start: int, stop: int) -> None:
        """An invalid source was half-way written over rows start:stop: they count as unwritten."""
        self.coverage.discard(self._box(e, (start, stop), (0, self._k)))
        self._state[e, start // self._unit : ceil_div(stop, self._unit)] = 0
        self._free_unused(e, start, stop)

    def _quantize_rows(self, e: int, start: int, stop: int, rows: torch.Tensor) -> None:
        parts = self._rows(self._matrix(e), start, stop)
        origin = (e * self._n + start) * self._k
        self._kernels.quantize_into(rows, parts, self.scheme.format, self.audit, origin)

    def _rows(self, matrix: Parts, start: int, stop: int) -> Parts:
        """Rows start:stop, whole units, of a matrix's quantized values and scales."""
        return matrix if stop - start == self._n else matrix.rows(start, stop, self.scheme.format)

    def _matrix(self, e: int) -> Parts:
        """The parts of matrix e."""
        found = self._matrices.get(e)
        if found is None:
            parts = self.result.parts()
            found = self._matrices[e] = parts.matrix(e) if self._lead else parts
        return found

    def _stage(self, e: int, rows: tuple[int, int], cols: tuple[int, int], source: torch.Tensor) -> None:
        self._refuse_nonfinite(e, rows, cols, source)
        self._stage_rows(e, rows, cols, source)
        self.coverage.add_box(self._box(e, rows, cols))
        first, last = rows[0] // self._unit, ceil_div(rows[1], self._unit)
        self._received[e, first:last] += cols[1] - cols[0]
        self._settle_received(e, first * self._unit, min(last * self._unit, self._n))

    def _stage_rows(
        self,
        e: int,
        rows: tuple[int, int],
        cols: tuple[int, int],
        source: torch.Tensor,
        touched: torch.Tensor | None = None,
    ) -> None:
        """Copy a source, or what of it is touched, to the staging of its rows, whose units are open from now on."""
        lo, hi = rows[0] // self._unit * self._unit, min(ceil_div(rows[1], self._unit) * self._unit, self._n)
        for key, a, b in self._group_spans(e, lo, hi):
            group = self._groups.get(key) or self._new_group(key)
            self._retained.pop(key, None)
            self._open_units(e, a, b, group)
            a, b = max(a, rows[0]), min(b, rows[1])
            target = group.rows[a - group.first_row : b - group.first_row, cols[0] : cols[1]]
            part = _rows_of(source, a - rows[0], b - rows[0])
            if touched is None:
                target.copy_(part)
            else:
                _merge(target, part, _rows_of(touched, a - rows[0], b - rows[0]))

    def _settle_received(self, e: int, start: int, stop: int) -> None:
        """`_settle`, unless too little was received for any unit to be complete."""
        received = self._received[e, start // self._unit : ceil_div(stop, self._unit)]
        if not self.whole_weight and received.max() >= self._k:
            self._settle(e, start, stop)

    def _open_units(self, e: int, start: int, stop: int, group: _Group) -> None:
        """Mark units as staged. One that was quantized and no longer staged is re-opened: its other elements have to
        be written again, and until then they read as their dequantized values."""
        if e in self._accepted:
            self._accepted.remove(e)
            self.coverage.discard(self._box(e, (0, self._n), (0, self._k)))
        first, last = start // self._unit, ceil_div(stop, self._unit)
        units = self._state[e, first:last]
        if (finished := (units & (QUANTIZED | _STAGED)) == QUANTIZED).any():
            for u in (np.flatnonzero(finished) + first).tolist():
                a, b = u * self._unit, min((u + 1) * self._unit, self._n)
                group.rows[a - group.first_row : b - group.first_row] = self._dequantized(e, a, b)
                self.coverage.discard(self._box(e, (a, b), (0, self._k)))
                self._received[e, u] = 0
        units |= _STAGED | _OPEN

    def _settle(self, e: int, start: int, stop: int) -> None:
        """Quantize the staged units within rows start:stop that are complete by now."""
        for a, b in self.coverage.full_rows((e,) if self._lead else (), start, stop):
            a = ceil_div(a, self._unit) * self._unit
            b = b if b == self._n else b // self._unit * self._unit
            for key, first, last in self._staged_spans(e, a, b):
                group = self._groups[key]
                self._quantize_rows(e, first, last, group.rows[first - group.first_row : last - group.first_row])
                units = self._state[e, first // self._unit : ceil_div(last, self._unit)]
                units |= QUANTIZED
                units &= ~np.uint8(_OPEN)
                if not (self._units_of(key) & _OPEN).any():
                    self._retained[key] = self._clock

    def _staged_spans(self, e: int, start: int, stop: int) -> Iterator[tuple[tuple[int, int], int, int]]:
        """The staged rows within start:stop, cut at the borders of the staging groups."""
        while start < stop:
            staged, end = self._state_run(e, start, stop)
            if staged:
                yield from self._group_spans(e, start, end)
            start = end

    def _refuse_nonfinite(self, e: int, rows: tuple[int, int], cols: tuple[int, int], source: torch.Tensor) -> None:
        """Staged values are checked as they arrive, on the host; on a GPU the kernel checks when the unit completes."""
        if not self.audit.refuse_nonfinite or not source.is_cpu:
            return
        # One pass without temporaries, in the source's dtype: with a cast a bf16 sum is eight times as slow. The sum of
        # finite values may overflow, so only a finite sum is an answer.
        if math.isfinite(source.sum().item()) or torch.isfinite(source).all():
            return
        r, c = (~torch.isfinite(source)).nonzero()[0].tolist()
        raise NonFinite((e * self._n + rows[0] + r) * self._k + cols[0] + c, float(source[r, c]))

    def accept(self, values: QTensor, box: Box) -> bool:
        """Take rows that are quantized already, bytes unchanged. False if they are not whole units of this weight, or
        are a part of a matrix that has one scale, and bring another than the parts before them."""
        (e0, e1), (start, stop), cols = box if self._lead else ((0, 1), *box)
        aligned = start % self._unit == 0 and (stop % self._unit == 0 or stop == self._n)
        if cols != (0, self._k) or not (aligned or self.scheme.format.needs_whole_matrix):
            return False
        for e in range(e0, e1):
            given = values.parts().matrix(e - e0) if values.dim() == 3 else values.parts()
            target = self._rows(self._matrix(e), start, stop) if aligned else self._shared(e, start, stop, given[-1])
            if target is None:
                return False
            if aligned:
                self._accepted.discard(e)
            for ours, theirs in zip(target, given, strict=True):
                ours.copy_(theirs)
            self.coverage.add_box(self._box(e, (start, stop), cols))
            if aligned or self.coverage.full_rows((e,) if self._lead else (), 0, self._n) == [(0, self._n)]:
                self._state[e, start // self._unit : ceil_div(stop, self._unit)] = QUANTIZED
            if self._groups:
                self._free_unused(e, start, stop)
        return True

    def _shared(self, e: int, start: int, stop: int, new_scale: torch.Tensor) -> Parts | None:
        """Where rows of a matrix that has one scale are accepted; None if the rows before them had another."""
        matrix = self._matrix(e)
        if e in self._accepted and not torch.equal(matrix[-1], new_scale.to(matrix[-1].device)):
            return None
        if e not in self._accepted:
            self._accepted.add(e)
            self._lose(e, 0, self._n)
        return self._rows(matrix, start, stop)

    # Staging

    def _group_spans(self, e: int, start: int, stop: int) -> Iterator[tuple[tuple[int, int], int, int]]:
        """Rows start:stop of matrix e cut at the borders of the staging groups."""
        while start < stop:
            g = start // self._group_rows
            end = min((g + 1) * self._group_rows, stop)
            yield (e, g), start, end
            start = end

    def _new_group(self, key: tuple[int, int]) -> _Group:
        e, g = key
        first = g * self._group_rows
        last = min(first + self._group_rows, self._n)
        if self.whole_weight:
            if self._staged_whole is None:
                self._staged_whole = torch.empty(self._e, self._n, self._k, dtype=self.dtype, device=self.device)
            rows = self._staged_whole[e, first:last]
        else:
            rows = torch.empty(last - first, self._k, dtype=self.dtype, device=self.device)
        self._groups[key] = group = _Group(first, rows)
        self._on_staged(rows.nbytes)
        return group

    def _units_of(self, key: tuple[int, int]) -> np.ndarray:
        e, g = key
        per_group = self._group_rows // self._unit
        return self._state[e, g * per_group : (g + 1) * per_group]

    def _free(self, key: tuple[int, int]) -> None:
        self._on_staged(-self._groups.pop(key).rows.nbytes)
        self._retained.pop(key, None)
        units = self._units_of(key)
        units &= ~np.uint8(_STAGED | _OPEN)

    def _free_unused(self, e: int, start: int, stop: int) -> None:
        """Free the groups of rows start:stop that hold nothing any more."""
        for key, _, _ in self._group_spans(e, start, stop):
            if key in self._groups and not (self._units_of(key) & _STAGED).any():
                self._free(key)

    def _trim(self) -> None:
        """Retained groups beyond one chunk go, oldest first; those of the last write stay."""
        held = sum(self._groups[key].rows.nbytes for key in self._retained)
        for key, since in sorted(self._retained.items(), key=lambda item: item[1]):
            if held <= CHUNK_BYTES or since == self._clock:
                return
            held -= self._groups[key].rows.nbytes
            self._free(key)

    def release(self) -> None:
        """Free what was retained: the writer has moved on."""
        for key in list(self._retained):
            self._free(key)

    def discard_staging(self) -> None:
        """Free all staging, complete or not: the session was aborted."""
        for key in list(self._groups):
            self._free(key)
        self._staged_whole = None

    def start_over(self) -> None:
        """Forget everything that was written."""
        self.discard_staging()
        self._state[...] = 0
        self._received[...] = 0
        self._accepted.clear()

    # Completing

    def quantize_whole(self) -> torch.Tensor:
        """Quantize a weight that was staged as a whole; from now on its writes stream. Returns the staged values."""
        assert self._staged_whole is not None
        for e in range(self._e):
            self._settle(e, 0, self._n)
        values = self._staged_whole.view(self.coverage.shape)
        self.whole_weight, self._staged_whole = False, None
        return values

    def take_nothing(self) -> None:
        """A weight without elements is complete as it is."""
        self._staged_whole = torch.empty(self._e, self._n, self._k, dtype=self.dtype, device=self.device)
        for e in range(self._e):
            self._quantize_rows(e, 0, self._n, self._staged_whole[e])

    @property
    def shared_units(self) -> int:
        """How many scales of this weight ranks have to agree on."""
        return self._e if self.scheme.format.needs_whole_matrix else self._e * self._n

    def amax(self) -> torch.Tensor:
        """The largest finite magnitude of each unit of a weight that was staged whole: fp32, CPU, `[shared_units]`."""
        assert self._staged_whole is not None
        if not self.coverage.numel:
            return torch.zeros(self.shared_units, dtype=torch.float32, device="cpu")
        rows = self._staged_whole.view(self.shared_units, -1)
        step = max(1, CHUNK_BYTES // max(1, rows.shape[1] * self.dtype.itemsize))
        parts = [rows[at : at + step].abs().nan_to_num_(0, 0, 0).amax(1) for at in range(0, len(rows), step)]
        return torch.cat(parts).float().cpu()

    def quantize_shared(self, amax: torch.Tensor) -> None:
        """Quantize a weight that was staged as a whole with scales from `amax` `[shared_units]` instead of its own.

        A column (a row, per tensor) that holds the amax is quantized along with the values, and dropped: every format
        and kernel gives the bytes that it gives a weight with such elements.
        """
        assert self._staged_whole is not None
        amax = amax.to(device=self.device, dtype=self.dtype).view(self._e, -1)
        for e in range(self._e):
            if self.scheme.format.granularity != "channel":
                carrier = torch.zeros(1, max(self._k, 1), dtype=self.dtype, device=self.device)
                carrier[0, 0] = amax[e]
                rows = self._staged_whole[e] if self._k else carrier[:0]
                self._quantize_carried(e, 0, self._n, torch.cat([rows, carrier]))
                continue
            for start in range(0, self._n, self._chunk_rows):
                stop = min(start + self._chunk_rows, self._n)
                values = torch.cat([self._staged_whole[e, start:stop], amax[e, start:stop, None]], 1)
                self._quantize_carried(e, start, stop, values)
        self.discard_staging()
        self._state[...] = QUANTIZED

    def _quantize_carried(self, e: int, start: int, stop: int, values: torch.Tensor) -> None:
        fmt = self.scheme.format
        wide = Parts.of(tuple(values.shape), fmt, self.device)
        self._kernels.quantize_into(values, wide, fmt, self.audit)
        for target, source in zip(self._rows(self._matrix(e), start, stop), wide, strict=True):
            target.copy_(source[tuple(map(slice, target.shape))])

    def copy(self, coverage: Coverage) -> QuantStore:
        """An independent store in the same state, sharing nothing but the audit's settings."""
        audit = Audit(self.audit.refuse_nonfinite, self.audit.measure_sqnr)
        other = QuantStore(self.scheme, self.dtype, self.device, coverage, audit, self._on_staged, self.whole_weight)
        for twin_part, part in zip(other.result.parts(), self.result.parts(), strict=True):
            twin_part.copy_(part)
        other._state, other._clock = self._state.copy(), self._clock
        other._received, other._retained = self._received.copy(), dict(self._retained)
        other._accepted = set(self._accepted)
        for key, group in self._groups.items():
            twin = other._new_group(key)
            twin.rows.copy_(group.rows)
        return other

    def has_open_units(self) -> bool:
        """Is there a unit of which only a part has been written?"""
        return bool((self._state & _OPEN).any())

    def keep_missing(self) -> bool:
        """Let unwritten elements keep their earlier quantized values. False if some have none."""
        if not bool((self._state & QUANTIZED).all()):
            return False
        self.coverage.add([(0, n) for n in self.coverage.shape])
        for e, g in list(self._groups):
            start = g * self._group_rows
            self._settle(e, start, min(start + self._group_rows, self._n))
        return True

    # Reading

    def read(self, view: View) -> tuple[torch.Tensor, bool]:
        """The elements of a view as a new tensor, and whether any of them had been quantized already."""
        found = regions(self.coverage.shape, view)
        if found is None:
            return self._read_masked(view)
        if gaps := [gap for box, _ in found for gap in self._gaps(box)]:
            raise NeverWritten(gaps)
        out, lossy = torch.empty(view.size, dtype=self.dtype, device=self.device), False
        for box, part in found:
            lossy |= self._read_box(box, part(out))
        return out, lossy

    def _read_masked(self, view: View) -> tuple[torch.Tensor, bool]:
        """The units that the view touches are gathered into a full-size tensor, of which the view is taken."""
        mask = view_mask(self.coverage.shape, view)
        written = np.repeat((self._state & QUANTIZED) != 0, self._unit, axis=1)[:, : self._n, None]
        gaps = mask & ~self.coverage.mask() & ~written.reshape(*mask.shape[:-1], 1)
        if gaps.any():
            raise NeverWritten(boxes_of(gaps))
        dense, lossy = torch.empty(self.coverage.shape, dtype=self.dtype, device=self.device), False
        units = np.logical_or.reduceat(mask.any(-1).reshape(self._e, -1), np.arange(0, self._n, self._unit), axis=1)
        for matrices, (first, last) in boxes_of(units):
            rows = (first * self._unit, min(last * self._unit, self._n))
            box = (matrices, rows, (0, self._k))[not self._lead :]
            lossy |= self._read_box(box, dense[tuple(slice(*span) for span in box)])
        return dense.as_strided(*view).clone(), lossy

    def _read_box(self, box: Box, out: torch.Tensor) -> bool:
        (e0, e1), (start, stop), cols = box if self._lead else ((0, 1), *box)
        lossy = False
        for e in range(e0, e1):
            target = out[e - e0] if self._lead else out
            first = start
            while first < stop:
                staged, last = self._state_run(e, first, stop)
                if staged:
                    for key, a, b in self._group_spans(e, first, last):
                        group = self._groups[key]
                        rows = group.rows[a - group.first_row : b - group.first_row, cols[0] : cols[1]]
                        target[a - start : b - start] = rows
                        lossy |= bool((self._state[e, a // self._unit] & (QUANTIZED | _OPEN)) == QUANTIZED | _OPEN)
                else:
                    target[first - start : last - start] = self._dequantized(e, first, last)[:, cols[0] : cols[1]]
                    lossy = True
                first = last
        return lossy

    def _state_run(self, e: int, start: int, stop: int) -> tuple[bool, int]:
        """Whether row `start` is staged, and where the run of rows that are the same in that ends (at most `stop`)."""
        staged = (self._state[e, start // self._unit : ceil_div(stop, self._unit)] & _STAGED) != 0
        others = np.flatnonzero(staged != staged[0])
        if not len(others):
            return bool(staged[0]), stop
        return bool(staged[0]), min(stop, (start // self._unit + int(others[0])) * self._unit)

    def _gaps(self, box: Box) -> list[Box]:
        """The parts of a box that were never written, neither in this session nor (re-opened units) before."""
        gaps = []
        for gap in self.coverage.missing(box):
            (e0, e1), (a, b), cols = gap if self._lead else ((0, 1), *gap)
            for e in range(e0, e1):
                units = (self._state[e, a // self._unit : ceil_div(b, self._unit)] & QUANTIZED) == 0
                edges = np.flatnonzero(np.diff(units, prepend=False, append=False)) + a // self._unit
                for first, last in edges.reshape(-1, 2).tolist():
                    rows = (max(a, first * self._unit), min(b, last * self._unit))
                    gaps.append(self._box(e, rows, cols))
        return gaps

    def _dequantized(self, e: int, start: int, stop: int) -> torch.Tensor:
        return self._dequantize_rows(self._matrix(e), start, stop)

    def _dequantize_rows(self, matrix: Parts, start: int, stop: int) -> torch.Tensor:
        fmt = self.scheme.format
        first = start // fmt.block[0] * fmt.block[0]
        out = torch.empty((stop - first, self._k), dtype=self.dtype, device=self.device)
        return self._kernels.dequantize(matrix.rows(first, stop, fmt), fmt, self.dtype, out)[start - first :]

    def _box(self, e: int, rows: tuple[int, int], cols: tuple[int, int]) -> Box:
        return ((e, e + 1), rows, cols) if self._lead else (rows, cols)


def _rows_of(source: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """source[start:stop], without a view of its own where that is all of it: one costs a microsecond."""
    return source if stop - start == source.shape[0] else source[start:stop]


def _merge(target: torch.Tensor, source: torch.Tensor, touched: torch.Tensor) -> None:
    """Copy the touched elements, bit by bit: `torch.where` takes six times as long on a CPU."""
    bits = torch.int16 if target.dtype.itemsize == 2 else torch.int32
    old, new = target.view(bits), source.to(target).view(bits)
    old ^= (old ^ new) & -touched.to(target.device, bits)
