"""What the quantizer of one weight saw besides the bytes: the first non-finite element, and the sums behind SQNR.

Backends that run on the host raise `NonFinite` before they store anything. A GPU backend must not wait for the device
at every write, so its kernels leave both findings in a small buffer on the device, one per stream that wrote; the host
reads it when someone asks: `verify()`, `signal` or `noise`.

Buffer: int64 `[1 + 2 * SLOTS]`, zero when fresh. Word 0 holds the largest `NO_FINDING - (4 * flat_index + kind)` (so
that zero means nothing found and a maximum is the first index; kind 0 NaN, 1 +inf, 2 -inf). The others, read as
float64, are SLOTS pairs of partial sums (signal, noise): spread out, so that the programs of a kernel do not queue.
"""

from __future__ import annotations

from math import inf, log10
from typing import Any

import torch

from .formats import NonFinite

SLOTS = 64
NO_FINDING = (1 << 63) - 1
_VALUES = (float("nan"), float("inf"), float("-inf"))


class Audit:
    """Findings about one weight, accumulated over all its writes.

    Attributes:
        refuse_nonfinite: Raise `NonFinite` for NaN or infinity: at once on a host backend, in `verify()` on a GPU. When
            False a NaN element is stored as NaN, an infinite one saturates, and neither enters a scale.
        measure_sqnr: Accumulate `signal` = Σx² and `noise` = Σ(x - dequantized)².
    """

    def __init__(self, refuse_nonfinite: bool = True, measure_sqnr: bool = False) -> None:
        self.refuse_nonfinite = refuse_nonfinite
        self.measure_sqnr = measure_sqnr
        self._signal = 0.0
        self._noise = 0.0
        self._buffers: dict[Any, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"Audit(refuse_nonfinite={self.refuse_nonfinite}, measure_sqnr={self.measure_sqnr})"

    @property
    def signal(self) -> float:
        """Σx² over everything quantized so far. Waits for the device when the weight is on one."""
        self._drain_sums()
        return self._signal

    @signal.setter
    def signal(self, value: float) -> None:
        self._signal = value

    @property
    def noise(self) -> float:
        """Σ(x - dequantized)² over everything quantized so far. Waits for the device when the weight is on one."""
        self._drain_sums()
        return self._noise

    @noise.setter
    def noise(self, value: float) -> None:
        self._noise = value

    @property
    def sqnr(self) -> float | None:
        """Of everything quantized so far, by `sqnr_db`. None if it is not measured."""
        self._drain_sums()
        return sqnr_db(self._signal, self._noise) if self.measure_sqnr else None

    def verify(self) -> None:
        """Raise `NonFinite` for the first element that was refused on a device; waits for that device.

        Nothing to do for host backends, which raised already. The finding is cleared, so that a repaired weight
        passes afterwards.
        """
        if not self.refuse_nonfinite:
            return
        found = 0
        for stream, buffer in self._buffers.items():
            with torch.cuda.stream(stream):  # Reading it there waits for that stream, once. None changes nothing.
                first = int(buffer[0])
                if first:
                    buffer[0] = 0
            found = max(found, first)
        if found:
            index, kind = divmod(NO_FINDING - found, 4)
            raise NonFinite(index, _VALUES[kind])

    def device_buffer(self, device: torch.device) -> torch.Tensor | None:
        """The buffer that a kernel launched now on `device`'s current stream writes to; None when nothing is asked."""
        if not (self.refuse_nonfinite or self.measure_sqnr):
            return None
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        buffer = self._buffers.get(stream)
        if buffer is None:
            buffer = torch.zeros(1 + 2 * SLOTS, dtype=torch.int64, device=device)
            self._buffers[stream] = buffer
        return buffer

    def _drain_sums(self) -> None:
        if not self.measure_sqnr:
            return
        for stream, buffer in self._buffers.items():
            with torch.cuda.stream(stream):
                sums = buffer[1:].view(torch.float64)
                signal, noise = sums.view(SLOTS, 2).sum(0).tolist()
                sums.zero_()
            self._signal += signal
            self._noise += noise


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio, 10·log10(Σx² / Σ(x - x̂)²), in dB. Infinite where nothing was lost, which
    holds for a weight of zeros, too."""
    if noise == 0:
        return inf
    return 10 * log10(signal / noise) if signal else -inf
