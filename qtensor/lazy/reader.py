"""Reader: what a loader that reads a weight back gets, of elements that are staged, quantized, or not there yet."""

from __future__ import annotations

import numpy as np
import torch

from ..regions.coverage import Box, Coverage, boxes_of
from ..regions.views import View, regions, view_mask
from .quantized_rows import QuantizedRows
from .staging import Staging
from .store import NeverWritten
from .units import OPEN, QUANTIZED, STAGED, Units


class Reader:
    """Reads of a weight whose elements are spread over these."""

    def __init__(self, coverage: Coverage, units: Units, staging: Staging, rows: QuantizedRows) -> None:
        self._coverage, self._units, self._staging, self._rows = coverage, units, staging, rows

    def read(self, view: View) -> tuple[torch.Tensor, bool]:
        """As `Store.read`, a new tensor."""
        found = regions(self._coverage.shape, view)
        if found is None:
            return self._read_masked(view)
        if gaps := [gap for box, _ in found for gap in self._gaps(box)]:
            raise NeverWritten(gaps)
        out, lossy = self._rows.empty(view.size), False
        for box, part in found:
            lossy |= self._read_box(box, part(out))
        return out, lossy

    def _read_masked(self, view: View) -> tuple[torch.Tensor, bool]:
        """The units that the view touches are gathered into a full-size tensor, of which the view is taken."""
        shape, units = self._coverage.shape, self._units
        mask = view_mask(shape, view)
        written = np.repeat((units.state & QUANTIZED) != 0, units.height, axis=1)[:, : units.n, None]
        gaps = mask & ~self._coverage.mask() & ~written.reshape(*mask.shape[:-1], 1)
        if gaps.any():
            raise NeverWritten(boxes_of(gaps))
        dense, lossy = self._rows.empty(shape), False
        starts = np.arange(0, units.n, units.height)
        for (e0, e1), (first, last) in boxes_of(
            np.logical_or.reduceat(mask.any(-1).reshape(units.e, -1), starts, axis=1)
        ):
            for e in range(e0, e1):
                box = units.box(e, (first * units.height, min(last * units.height, units.n)), (0, units.k))
                lossy |= self._read_box(box, dense[tuple(slice(*span) for span in box)])
        return dense.as_strided(*view).clone(), lossy

    def _read_box(self, box: Box, out: torch.Tensor) -> bool:
        (e0, e1), (start, stop), (left, right) = self._units.split(box)
        lossy, reopened = False, QUANTIZED | OPEN
        for e in range(e0, e1):
            target = out[e - e0] if self._units.stacked else out
            for first, last, staged in self._units.runs(e, start, stop, STAGED):
                if staged:
                    for a, b, rows in self._staging.held(e, first, last):
                        target[a - start : b - start] = rows[:, left:right]
                    lossy |= bool(((self._units.of(e, first, last) & reopened) == reopened).any())
                else:
                    target[first - start : last - start] = self._rows.read(e, first, last)[:, left:right]
                    lossy = True
        return lossy

    def _gaps(self, box: Box) -> list[Box]:
        """The parts of a box that were never written, neither in this session nor (re-opened units) before."""
        gaps = []
        for gap in self._coverage.missing(box):
            (e0, e1), (start, stop), cols = self._units.split(gap)
            for e in range(e0, e1):
                for a, b, known in self._units.runs(e, start, stop, QUANTIZED):
                    if not known:
                        gaps.append(self._units.box(e, (a, b), cols))
        return gaps
