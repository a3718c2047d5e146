"""MemoryTimeline: what a session held over time, in a bounded number of points.

It is told of two things: that a weight is complete, and that staging grew or shrank. Neither happens more than once
per weight or staging group, so that recording costs a loader call nothing. Between two completed weights only the
highest staging is kept; when there are too many points, neighbours are merged, again keeping the higher staging. So
the last point and the peak stay exact, however long the load.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

MAX_POINTS = 512


@dataclass(frozen=True)
class MemoryPoint:
    """Bytes held at one moment.

    Attributes:
        seconds: After the session began.
        quantized_bytes: Of complete quantized weights, values and scales.
        passthrough_bytes: Of complete weights that stay as they are.
        staged_bytes: High-precision values that wait for the rest of their unit.
    """

    seconds: float
    quantized_bytes: int
    passthrough_bytes: int
    staged_bytes: int


class MemoryTimeline:
    """Thread-safe. staged: bytes in staging now. peak_staged: the most at any time."""

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.peak_staged = 0
        self._max_points = max(4, max_points)
        self._lock = threading.RLock()
        self.start()

    def start(self) -> None:
        """Time counts from here."""
        self.started = time.perf_counter()
        self._quantized = self._passthrough = self.staged = 0
        self._points = [MemoryPoint(0.0, 0, 0, 0)]
        self._crest, self._crest_at = 0, self.started

    def stage(self, delta: int) -> None:
        """Staging grew or shrank by so many bytes."""
        with self._lock:
            self.staged += delta
            if self.staged > self._crest:
                self._crest, self._crest_at = self.staged, time.perf_counter()
                self.peak_staged = max(self.peak_staged, self.staged)

    def stage_nothing(self) -> None:
        """Whatever was staged is gone."""
        with self._lock:
            self.staged = 0

    def hold(self, quantized: int = 0, passthrough: int = 0) -> None:
        """A weight of so many bytes is complete; with negative bytes, one is incomplete again."""
        with self._lock:
            self._add_crest()
            self._quantized += quantized
            self._passthrough += passthrough
            self._add(time.perf_counter(), self.staged)
            self._crest, self._crest_at = self.staged, time.perf_counter()

    def points(self, quantized: int | None = None, passthrough: int | None = None) -> list[MemoryPoint]:
        """The points so far, and one for now; with the given totals, where they are known from elsewhere."""
        with self._lock:
            self._add_crest()
            self._crest = self.staged
            now = MemoryPoint(
                time.perf_counter() - self.started,
                self._quantized if quantized is None else quantized,
                self._passthrough if passthrough is None else passthrough,
                self.staged,
            )
            return [*self._points, now]

    def _add_crest(self) -> None:
        if self._crest > max(self.staged, self._points[-1].staged_bytes):
            self._add(self._crest_at, self._crest)

    def _add(self, at: float, staged: int) -> None:
        self._points.append(MemoryPoint(at - self.started, self._quantized, self._passthrough, staged))
        if len(self._points) >= self._max_points:
            first, *rest = self._points
            pairs = zip(rest[::2], rest[1::2], strict=False)
            merged = [replace(b, staged_bytes=max(a.staged_bytes, b.staged_bytes)) for a, b in pairs]
            self._points = [first, *merged, *(rest[-1:] if len(rest) % 2 else [])]
