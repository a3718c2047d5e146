"""QuantizedRows: the quantized half of a weight that is being loaded. Whole units go in, and come out dequantized.

What is between a store and the kernels: which rows of which target memory a call is about.
"""

from __future__ import annotations

from typing import cast

import torch

from .. import kernels
from ..kernels import Audit, Parts
from ..kernels.parts import Pieces
from ..kernels.reference import Torch
from ..regions.boxes import WholeUnits
from ..schemes.scheme import Scheme
from .target import Fresh
from .units import LIVE, Units


class QuantizedRows:
    """The rows of a weight's matrices in `target`, as kernels write and read them."""

    def __init__(
        self,
        units: Units,
        target: Fresh[Parts],
        scheme: Scheme,
        dtype: torch.dtype,
        device: torch.device,
        audit: Audit,
    ) -> None:
        self._units, self.target, self._format = units, target, scheme.format
        self._dtype, self._device, self._audit = dtype, device, audit
        self._chosen: Torch | None = None
        self._memory: Parts | None = None
        self._pieces: Pieces | None = None  # of that memory

    @property
    def _kernels(self) -> Torch:
        """Chosen when they are needed: a weight that is mapped needs none, and numba takes a while to import."""
        found = self._chosen
        if found is None:
            found = self._chosen = cast(Torch, kernels.choose(self._device))  # Every backend is a subclass of it.
        return found

    def write(self, e: int, start: int, rows: torch.Tensor) -> None:
        """Quantize whole units that begin at row `start` of matrix e."""
        origin = (e * self._units.n + start) * self._units.k
        parts = self.target.new(e).rows(start, start + rows.shape[0], self._format)
        self._kernels.quantize_into(rows, parts, self._format, self._audit, origin)

    def write_piece(self, at: WholeUnits, rows: torch.Tensor) -> bool:
        """As `write`, of rows that the backend may take with less ado. False, with nothing written, if it does not."""
        first, memory = self.target.memory(at.matrix)
        if memory is not self._memory:
            self._pieces = self._kernels.pieces(memory, self._format, self._audit)
            self._memory = memory
        if self._pieces is None:
            return False
        units, row = self._units, at.matrix * self._units.n + at.rows[0]
        unit = at.units[0] - first * units.state.shape[1]
        return self._pieces.write(rows, row - first * units.n, unit, at.units[1] - at.units[0], row * units.k)

    def write_run(self, first: int, matrices: torch.Tensor) -> bool:
        """Quantize neighbouring matrices in one call of the kernel. False, and nothing is written, if their memory is
        not one piece."""
        parts = self.target.new_run(first, first + len(matrices))
        if parts is None:
            return False
        origin = first * self._units.n * self._units.k
        self._kernels.quantize_into(matrices, parts, self._format, self._audit, origin)
        return True

    def raise_amax(self, e: int, start: int, rows: torch.Tensor, amax: torch.Tensor) -> None:
        """Raise `amax` (fp32 `[1]`) to the largest finite magnitude of these rows of matrix e."""
        self._kernels.raise_amax(rows, amax, self._format, self._audit, (e * self._units.n + start) * self._units.k)

    def write_part(self, e: int, start: int, rows: torch.Tensor, amax: torch.Tensor) -> None:
        """Quantize some rows of matrix e, which is one unit, by the largest magnitude in all of it."""
        origin = (e * self._units.n + start) * self._units.k
        parts = self.target.new(e).rows(start, start + rows.shape[0], self._format)
        self._kernels.quantize_rows(rows, parts, self._format, amax, self._audit, origin)

    def write_shared(self, e: int, start: int, rows: torch.Tensor, amax: torch.Tensor) -> None:
        """Quantize with scales from `amax`, one for each row or one for all, instead of the rows' own.

        A column (a row, where one scale is for all) that holds the amax is quantized along with the values, and
        dropped: every format and kernel gives the bytes that it gives a weight with such elements.
        """
        if self._format.granularity == "channel":
            wider = torch.cat([rows, amax[:, None]], 1)
        else:
            carrier = torch.zeros(1, max(self._units.k, 1), dtype=self._dtype, device=self._device)
            carrier[0, 0] = amax
            wider = torch.cat([rows if self._units.k else carrier[:0], carrier])
        made = Parts.of(tuple(wider.shape), self._format, self._device)
        self._kernels.quantize_into(wider, made, self._format, self._audit)
        for target, source in zip(self.target.new(e).rows(start, start + len(rows), self._format), made, strict=True):
            target.copy_(source[tuple(map(slice, target.shape))])

    def read(self, e: int, start: int, stop: int) -> torch.Tensor:
        """Rows of matrix e dequantized: the new ones where there are any, else those in use."""
        runs = self._units.runs(e, start, stop, LIVE)
        parts = [self._dequantized(self.target.live(e) if live else self.target.latest(e), a, b) for a, b, live in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def publish(self, e: int) -> None:
        """Make the new rows of matrix e live, and let its second copy go. May be repeated."""
        if self._units.are_new(e):
            self.target.publish(e, lambda parts: parts)
        else:
            for start, stop, live in self._units.runs(e, 0, self._units.n, LIVE):
                if not live:
                    self.target.publish(e, lambda parts, a=start, b=stop: parts.rows(a, b, self._format))  # type: ignore[misc]
        self._units.state[e] |= LIVE
        self.target.end(e)
        self.forget()

    def publish_all(self) -> None:
        """As `publish`, of all matrices that have a second copy."""
        if self._units.are_new() and self.target.publish_all():
            self._units.state |= LIVE
            self.target.end_all()
            self.forget()
            return
        for e in self.target.begun:
            self.publish(e)

    def forget(self) -> None:
        """What rows were written to last is no target any more, and may go."""
        self._memory = self._pieces = None

    def _dequantized(self, matrix: Parts, start: int, stop: int) -> torch.Tensor:
        height = self._format.block[0]
        first = start // height * height
        out, rows = self.empty((stop - first, self._units.k)), matrix.rows(first, stop, self._format)
        return self._kernels.dequantize(rows, self._format, self._dtype, out)[start - first :]

    def empty(self, size: tuple[int, ...]) -> torch.Tensor:
        """Memory for high-precision values."""
        return torch.empty(size, dtype=self._dtype, device=self._device)
