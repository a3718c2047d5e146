"""QuantStore: where the elements of one weight go while it is being loaded, and how they come back when read.

Whole units are quantized the moment they arrive; parts of units are staged. It is asked in terms of views (size,
stride, offset over the contiguous weight) and shares the weight's `Coverage`. Which element goes where, and when, is
decided here; units, staging and quantized rows have files of their own. It is one file because every write and end
looks at the same state of each unit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..interrupts import in_spite_of_interrupts
from ..kernels import Audit, NonFinite, Parts, upload
from ..kernels.formats import ceil_div
from ..regions.boxes import WholeUnits, as_box, as_whole_units
from ..regions.coverage import Box, Coverage
from ..regions.views import View, regions, scattered
from ..schemes.scheme import Scheme
from ..tensor.qtensor import QTensor, empty
from . import staging
from .quantized_rows import QuantizedRows
from .reader import Reader
from .sources import nonfinite_at
from .staging import Staging, merge
from .target import Fresh
from .units import CAST, LIVE, OPEN, QUANTIZED, STAGED, Units

if TYPE_CHECKING:
    from ..sources.rooms import DecodedRows

_WORTH_A_RING = 1 << 20  # bytes
_TakeRows = Callable[[int, int, torch.Tensor, torch.Tensor], None]


class QuantStore:
    """A weight `[N, K]` or `[E, N, K]` that is quantized as its units complete (see `store.Store`).

    on_staged: called with the change in staged bytes.
    whole_weight: stage everything until the entire weight is there: to decide by its SQNR, or to agree on its scales
        with other ranks.
    result: the quantized weight as it will be used; new memory by default.
    target: how new values get into `result`.
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
        target: Callable[[Callable[[int], Parts]], Fresh[Parts]] = Fresh,
    ) -> None:
        self.scheme, self.dtype, self.device = scheme, dtype, device
        self.coverage, self.audit, self._on_staged = coverage, audit, on_staged
        self.result = empty(coverage.shape, scheme, dtype, device) if result is None else result
        self.target = target(partial(_matrix, self.result))
        self._on_cpu = device.type == "cpu"
        self._units = units = Units(coverage.shape, scheme.format.unit_rows(coverage.shape[-2]), self.target.in_use)
        self._e, self._n, self._k, self._unit = units.e, units.n, units.k, units.height
        self._staging = Staging(units, dtype, device, on_staged, whole_weight)
        self._open_rows()
        self._chunk_rows = units.rows_within(staging.CHUNK_BYTES, dtype.itemsize)
        self._accepted: set[int] = set()  # per tensor: matrices whose written rows all came quantized

    def _open_rows(self) -> None:
        self._rows = QuantizedRows(self._units, self.target, self.scheme, self.dtype, self.device, self.audit)
        self._reader = Reader(self.coverage, self._units, self._staging, self._rows)

    @property
    def nbytes(self) -> int:
        return self.result.nbytes

    @property
    def whole_weight(self) -> bool:
        return self._staging.whole

    # Writing

    def write(self, view: View, source: torch.Tensor) -> None:
        """As `Store.write`. Raises NonFinite before the offending chunk is stored."""
        self._staging.clock += 1
        rows = as_whole_units(self.coverage.shape, self._unit, *view)
        if rows is None or not self._write_piece(rows, source):
            self._write_view(view, source)
        if self._staging.retained:
            self._staging.trim()
        if self.target.early:
            self._commit_complete()

    def _write_piece(self, rows: WholeUnits, source: torch.Tensor) -> bool:
        """Whole units of one matrix, by a kernel that knows their memory: of a large mixture of experts tens of
        thousands come. False, and nothing is written, if it takes no such rows."""
        if self._staging.whole or source.dtype != self.dtype:
            return False
        try:
            if not self._rows.write_piece(rows, source):
                return False
        except NonFinite:
            self._lose(rows.matrix, *rows.rows)
            raise
        self._taken(rows.matrix, *rows.rows)
        return True

    def _write_view(self, view: View, source: torch.Tensor) -> None:
        found = as_box(self.coverage.shape, *view)
        if found is not None and len(view.size) == 2 and found.order[-2:] == (0, 1):
            # A matrix, or rows and columns of one expert: what loaders write all day.
            rows, cols = found.box[-2:]
            self._write_matrix(found.box[0][0] if self._units.stacked else 0, rows, cols, source)
        else:
            parts = regions(self.coverage.shape, view)
            if parts is None:
                self._write_masked(*scattered(self.coverage.shape, view, source))
            for box, part in parts or ():
                (e0, e1), rows, cols = self._units.split(box)
                values = part(source)
                if e1 - e0 > 1 and (rows, cols) == ((0, self._n), (0, self._k)) and self._write_run(e0, e1, values):
                    continue
                for e in range(e0, e1):
                    self._write_matrix(e, rows, cols, values[e - e0] if self._units.stacked else values)

    def takes_decoded(self, view: View) -> bool:
        """May `write_decoded` be given such a view? Of whole units of one matrix, that are quantized at once, here."""
        if not self._on_cpu or self._staging.whole:
            return False
        return as_whole_units(self.coverage.shape, self._unit, *view) is not None

    def write_decoded(self, view: View, rows: DecodedRows) -> None:
        """Rows that are decoded a few at a time, and quantized while a cache has them. What needs the largest magnitude
        of all of a matrix takes it from the codes, or decodes them twice, and never holds them. Raises NonFinite."""
        self._staging.clock += 1
        found = as_whole_units(self.coverage.shape, self._unit, *view)
        assert found is not None
        e, (start, stop) = found.matrix, found.rows
        steps = [(a, min(a + rows.step, rows.count)) for a in range(0, rows.count, rows.step)]
        try:
            if self.scheme.format.needs_whole_matrix:
                told = rows.amax()
                amax = torch.full((1,), told or 0.0, dtype=torch.float32, device=self.device)
                for a, b in steps if told is None else ():
                    self._rows.raise_amax(e, start + a, rows.decode(a, b), amax)
                for a, b in steps:
                    self._rows.write_part(e, start + a, rows.decode(a, b), amax)
            else:
                for a, b in steps:
                    self._rows.write(e, start + a, rows.decode(a, b))
        except NonFinite:
            self._lose(e, start, stop)
            raise
        self._taken(e, start, stop)
        if self._staging.retained:
            self._staging.trim()
        if self.target.early:
            self._commit_complete()

    def write_masked(self, values: torch.Tensor, touched: torch.Tensor) -> None:
        """As `Store.write_masked`, however scattered they are. Values elsewhere are finite. Raises NonFinite before
        anything is stored, or as `write` does."""
        self._staging.clock += 1
        self._write_masked(values, touched)
        self._commit_complete()

    def _write_masked(self, values: torch.Tensor, touched: torch.Tensor) -> None:
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
            for first, last in pairwise([0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)]):
                rows = (first * self._unit, min(last * self._unit, self._n))
                if kind[first] == 2:
                    self._write_matrix(e, rows, (0, self._k), values[e, slice(*rows)])
                elif kind[first]:
                    self._stage_rows(e, rows, (0, self._k), values[e, slice(*rows)], touched[e, slice(*rows)])
                    staged.append((e, first, last, some[first:last]))
        self.coverage.add_mask(mask)
        for received in staged:
            self._receive(*received)

    def _write_matrix(self, e: int, rows: tuple[int, int], cols: tuple[int, int], source: torch.Tensor) -> None:
        start, stop = rows
        if self._on_cpu and cols == (0, self._k) and not self._staging.whole and stop - start <= self._chunk_rows:
            unit = self._unit
            if start % unit == 0 and (stop == self._n or stop % unit == 0):  # what most loaders write, sooner told
                self._take_rows(e, start, source)
                return
        first, last = stop, stop
        if cols == (0, self._k) and not self._staging.whole:
            first = min(ceil_div(start, self._unit) * self._unit, stop)
            last = stop if stop == self._n else max(stop // self._unit * self._unit, first)
        if first < last:
            self._quantize_source(e, first, last, _rows_of(source, first - start, last - start))
        else:
            first = last = stop
        for a, b in ((start, first), (last, stop)):
            if a < b:
                self._stage(e, (a, b), cols, _rows_of(source, a - start, b - start))

    def _write_run(self, first: int, last: int, values: torch.Tensor) -> bool:
        """Neighbouring matrices, in as few calls of the kernel as there are bounded chunks to convert: one, if nothing
        has to be. False, and nothing is written, if they are to be taken one by one."""
        if self._staging.whole or self._comes_by_ring(values):
            return False
        as_it_is = values.dtype == self.dtype and values.device == self.device
        step = last - first if as_it_is else max(1, self._chunk_rows // max(1, self._n))
        for e in range(first, last, step):
            part = values[e - first : e - first + step]
            if not as_it_is:
                part = part.to(device=self.device, dtype=self.dtype)
            run = range(e, e + len(part))
            try:
                if not self._rows.write_run(e, part):
                    return False  # of the first: the memory of all is of one kind
            except NonFinite:
                for each in run:
                    self._lose(each, 0, self._n)
                raise
            self.coverage.add_box(((run.start, run.stop), (0, self._n), (0, self._k)))
            self._units.state[run.start : run.stop] = QUANTIZED
            for each in run if self._staging.groups else ():
                self._staging.free_unused(each, 0, self._n)
            self._accepted.difference_update(run)
        return True

    def _quantize_source(self, e: int, start: int, stop: int, source: torch.Tensor) -> None:
        """Rows start:stop, whole units, from the source itself, one bounded chunk at a time."""
        if self._comes_by_ring(source):
            if self.scheme.format.needs_whole_matrix and source.nbytes > upload.CHUNK_BYTES:
                self._upload_matrix(e, source)
                return
            upload.upload_rows(
                source, self.device, lambda rows, first: self._take_rows(e, start + first, rows), self._unit
            )
            return
        if stop - start <= self._chunk_rows:
            self._take_rows(e, start, source)
            return
        for first in range(0, stop - start, self._chunk_rows):
            self._take_rows(e, start + first, source[first : first + self._chunk_rows])

    def _comes_by_ring(self, source: torch.Tensor) -> bool:
        return not self._on_cpu and source.is_cpu and self.device.type == "cuda"

    def _upload_matrix(self, e: int, source: torch.Tensor) -> None:
        """A matrix that is one unit, in chunks: they go to the device once for its largest magnitude, and once more to
        be quantized by it. All of it at once would hold two matrices there, with nothing on its way meanwhile."""
        amax = torch.zeros(1, dtype=torch.float32, device=self.device)
        for take in (self._rows.raise_amax, self._rows.write_part):

            def consume(rows: torch.Tensor, first: int, take: _TakeRows = take) -> None:
                take(e, first, rows.to(self.dtype), amax)

            try:
                upload.upload_rows(source, self.device, consume)
            except NonFinite:
                self._lose(e, 0, self._n)
                raise
        self._taken(e, 0, self._n)

    def _take_rows(self, e: int, start: int, rows: torch.Tensor) -> None:
        """Quantize whole units that begin at row `start`; whatever was staged of them is obsolete."""
        stop = start + rows.shape[0]
        if rows.dtype != self.dtype or not (rows.is_cpu and self._on_cpu):
            rows = rows.to(device=self.device, dtype=self.dtype)
        try:
            self._rows.write(e, start, rows)
        except NonFinite:
            self._lose(e, start, stop)
            raise
        self._taken(e, start, stop)

    def _taken(self, e: int, start: int, stop: int) -> None:
        """Rows start:stop are quantized."""
        first = e * self._n
        self.coverage.add_run((first + start) * self._k, (first + stop) * self._k)
        self._units.mark(e, start, stop, QUANTIZED)
        self._accepted.discard(e)
        if self._staging.groups:
            self._staging.free_unused(e, start, stop)

    def _lose(self, e: int, start: int, stop: int) -> None:
        """An invalid source was half-way written over rows start:stop: they count as unwritten."""
        self.coverage.discard(self._units.box(e, (start, stop), (0, self._k)))
        self._units.mark(e, start, stop, self._units.untouched)
        self._staging.free_unused(e, start, stop)

    def _stage(self, e: int, rows: tuple[int, int], cols: tuple[int, int], source: torch.Tensor) -> None:
        self._refuse_nonfinite(e, rows, cols, source)
        self._stage_rows(e, rows, cols, source)
        self.coverage.add_box(self._units.box(e, rows, cols))
        self._receive(e, rows[0] // self._unit, ceil_div(rows[1], self._unit), cols[1] - cols[0])

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
        for first, last, staged in self._staging.opened(e, lo, hi):
            self._open_units(e, first, last, staged)
            a, b = max(first, rows[0]), min(last, rows[1])
            target = staged[a - first : b - first, cols[0] : cols[1]]
            part = _rows_of(source, a - rows[0], b - rows[0])
            if touched is None:
                self._copy(part, target)
            else:
                merge(target, part, _rows_of(touched, a - rows[0], b - rows[0]))

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Large sources in CPU memory take the upload ring to a GPU: a plain copy of them makes the host wait."""
        if source.nbytes >= _WORTH_A_RING and self._comes_by_ring(source):

            def consume(rows: torch.Tensor, first: int) -> None:
                target[first : first + len(rows)].copy_(rows)

            upload.upload_rows(source, self.device, consume)
        else:
            target.copy_(source)

    def _receive(self, e: int, first: int, last: int, columns: int | np.ndarray) -> None:
        """Units first:last were sent so many columns more. `_settle`, if that can have completed one of them."""
        received = self._units.received[e, first:last]
        received += columns
        # argmax: a third of the time that max takes for so few
        if not self._staging.whole and received.item(received.argmax()) >= self._k:
            self._settle(e, first * self._unit, min(last * self._unit, self._n))

    def _open_units(self, e: int, start: int, stop: int, staged: torch.Tensor) -> None:
        """Mark units as staged. One that was quantized and no longer staged is re-opened: its other elements have to
        be written again, and until then they read as their dequantized values."""
        if e in self._accepted:
            self._accepted.remove(e)
            self.coverage.discard(self._units.box(e, (0, self._n), (0, self._k)))
        units = self._units.of(e, start, stop)
        if (states := units.tobytes()).count(STAGED | OPEN) == len(states):
            return  # Most often all of them are open already, and bytes tell so in a tenth of numpy's time.
        if (finished := (units & (QUANTIZED | STAGED)) == QUANTIZED).any():
            for u in (np.flatnonzero(finished) + start // self._unit).tolist():
                a, b = u * self._unit, min((u + 1) * self._unit, self._n)
                staged[a - start : b - start] = self._rows.read(e, a, b)
                self.coverage.discard(self._units.box(e, (a, b), (0, self._k)))
                self._units.received[e, u] = 0
        units |= STAGED | OPEN

    def _settle(self, e: int, start: int, stop: int) -> None:
        """Quantize the staged units within rows start:stop that are complete by now."""
        for a, b in self.coverage.full_rows(self._units.lead(e), start, stop):
            a = ceil_div(a, self._unit) * self._unit
            b = b if b == self._n else b // self._unit * self._unit
            for first, last, staged in self._staging.held(e, a, max(a, b)):
                self._rows.write(e, first, staged)
                units = self._units.of(e, first, last)
                units |= QUANTIZED
                units &= ~np.uint8(OPEN | LIVE | CAST)
                self._staging.retain(e, first)

    def _refuse_nonfinite(self, e: int, rows: tuple[int, int], cols: tuple[int, int], source: torch.Tensor) -> None:
        """Staged values are checked as they arrive, on the host; on a GPU the kernel checks when the unit completes."""
        if not self.audit.refuse_nonfinite or not source.is_cpu:
            return
        if at := nonfinite_at(source):
            raise NonFinite((e * self._n + rows[0] + at[0]) * self._k + cols[0] + at[1], float(source[at]))

    def accept(self, values: QTensor, box: Box) -> bool:
        """Take rows that are quantized already, bytes unchanged. False if they are of another form, are not whole units
        of this weight, or are a part of a matrix that has one scale, and bring another than the parts before them.
        (During a reload no such part is taken: the matrix's other rows are live.)"""
        fmt = self.scheme.format
        if self._staging.whole or values.scheme.format.plain != fmt.plain or values.transposed:
            return False
        (e0, e1), (start, stop), cols = self._units.split(box)
        aligned = start % self._unit == 0 and (stop % self._unit == 0 or stop == self._n)
        if cols != (0, self._k) or not (aligned or (fmt.needs_whole_matrix and not self.target.in_use)):
            return False
        for e in range(e0, e1):
            given = _matrix(values, e - e0)
            if not aligned and not self._shares_scale(e, given[-1]):
                return False
            if aligned:
                self._accepted.discard(e)
            for ours, theirs in zip(self.target.new(e).rows(start, stop, fmt), given, strict=True):
                ours.copy_(theirs)
            self.coverage.add_box(self._units.box(e, (start, stop), cols))
            if aligned or self._is_complete(e):
                self._units.mark(e, start, stop, QUANTIZED)
            self._staging.free_unused(e, start, stop)
        self._commit_complete()
        return True

    def _shares_scale(self, e: int, scale: torch.Tensor) -> bool:
        """May rows of this scale be accepted into a matrix that has one? Not beside accepted rows of another."""
        ours = self.target.new(e)[-1]
        if e in self._accepted:
            return torch.equal(ours, scale.to(ours.device))
        self._accepted.add(e)
        self._lose(e, 0, self._n)
        return True

    # Completing

    def has_open_units(self) -> bool:
        """Is there a unit of which only a part has been written?"""
        return self._units.any(OPEN)

    def fill(self) -> bool:
        if not self._units.all(QUANTIZED):
            return False
        self.coverage.add([(0, n) for n in self.coverage.shape])
        for e in range(self._e):
            self._settle(e, 0, self._n)
        return True

    def verify(self) -> None:
        self.audit.verify()

    @property
    def retains(self) -> bool:
        return bool(self._staging.retained)

    def release(self) -> None:
        self._staging.release()

    def read(self, view: View) -> tuple[torch.Tensor, bool]:
        return self._reader.read(view)

    def values(self) -> torch.Tensor:
        return self.result.dequantize()

    def commit(self) -> None:
        self._rows.publish_all()

    def rollback(self) -> None:
        self.target.rollback()
        self._rows.forget()
        self._staging.discard()
        self._units.reset()
        self._accepted.clear()

    def _commit_complete(self) -> None:
        for e in self.target.begun if self.target.early else ():
            if self._is_complete(e):
                self.audit.verify()
                in_spite_of_interrupts(partial(self._rows.publish, e))

    def _is_complete(self, e: int) -> bool:
        return self.coverage.full_rows(self._units.lead(e), 0, self._n) == [(0, self._n)]

    def copy(self, coverage: Coverage) -> QuantStore:
        """As `Store.copy`, sharing nothing but the audit's settings."""
        audit = Audit(self.audit.refuse_nonfinite, self.audit.measure_sqnr)
        other = QuantStore(self.scheme, self.dtype, self.device, coverage, audit, self._on_staged, self.whole_weight)
        for twin_part, part in zip(other.result.parts(), self.result.parts(), strict=True):
            twin_part.copy_(part)
        other._units.state[...], other._units.received[...] = self._units.state, self._units.received
        other._accepted = set(self._accepted)
        other._staging.copy_from(self._staging)
        return other

    def cast(self, dtype: torch.dtype, device: torch.device) -> None:
        """As `Store.cast`. What is staged is cast, complete units of it quantized again; others keep their bytes."""
        rounds, moves = dtype not in (self.dtype, torch.float32), device != self.device
        self.dtype, self.device, self._on_cpu = dtype, device, device.type == "cpu"
        self.result = self.result.with_parts(*(part.to(device) for part in self.result.parts()), dtype=dtype)
        if moves:
            self.target = Fresh(partial(_matrix, self.result))
        self._staging.cast(dtype, device)
        self._open_rows()
        if rounds:
            self._units.state[(self._units.state & QUANTIZED) != 0] |= CAST
            for e in range(self._e if not self._staging.whole else 0):
                self._settle(e, 0, self._n)

    def was_cast(self) -> bool:
        """Is there a unit whose bytes are of values that a cast has rounded since?"""
        return self._units.any(CAST)

    # A weight that is staged as a whole

    def stream(self) -> None:
        """From now on its units are quantized as they complete."""
        self._staging.stream()

    def quantize_whole(self) -> torch.Tensor:
        """Quantize it; from now on its writes stream. Returns the staged values."""
        for e in range(self._e):
            self._settle(e, 0, self._n)
        values = self._staging.memory().view(self.coverage.shape)
        self.stream()
        return values

    def take_all(self) -> None:
        """`result` holds the values of all of the weight."""
        self._units.state[...] = QUANTIZED
        self.coverage.add([(0, n) for n in self.coverage.shape])

    def take_nothing(self) -> None:
        """A weight without elements is complete as it is. If it is in use its scales stay, unless ranks agree on new
        ones."""
        if not self.target.in_use or self._staging.whole:
            for e in range(self._e):
                self._rows.write(e, 0, self._staging.memory()[e])

    def stage_missing(self) -> None:
        """Let what was not written keep the values in use, which are quantized anew along with the others."""
        for box in self.coverage.missing():
            (e0, e1), (start, stop), (left, right) = self._units.split(box)
            for e in range(e0, e1):
                for a, b, staged in self._staging.opened(e, start, stop):
                    staged[:, left:right].copy_(self._rows.read(e, a, b)[:, left:right])
            self.coverage.add_box(box)

    @property
    def shared_units(self) -> int:
        """How many scales of this weight ranks have to agree on."""
        return self._e if self.scheme.format.needs_whole_matrix else self._e * self._n

    def amax(self) -> torch.Tensor:
        """The largest finite magnitude of each unit: fp32, CPU, `[shared_units]`."""
        return self._staging.amax(self.shared_units)

    def quantize_shared(self, amax: torch.Tensor) -> None:
        """Quantize it with scales from `amax` `[shared_units]` instead of its own; from now on its writes stream."""
        amax = amax.to(device=self.device, dtype=self.dtype).view(self._e, -1)
        by_row = self.scheme.format.granularity == "channel"
        step = self._chunk_rows if by_row else self._n
        for e in range(self._e):
            for start in range(0, self._n, step) if by_row else (0,):
                part = slice(start, start + step)
                self._rows.write_shared(e, start, self._staging.memory()[e, part], amax[e, part] if by_row else amax[e])
        self._staging.discard()
        self._units.state[...] = QUANTIZED
        self.stream()
        self._commit_complete()


def _matrix(weight: QTensor, e: int) -> Parts:
    return weight.parts().matrix(e) if weight.dim() == 3 else weight.parts()


def _rows_of(source: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """source[start:stop], without a view of its own where that is all of it: one costs a microsecond."""
    return source if stop - start == source.shape[0] else source[start:stop]
