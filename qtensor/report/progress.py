"""Progress of long work, in weights or bytes: a tqdm bar on a terminal, or a call per step for engines.

Every session and command takes `progress=`: True shows a bar, False nothing, None a bar only on a terminal, and a
callable gets each `ProgressEvent` instead. Without tqdm there is no bar. What the work has to wait for before it can
begin, a compilation, is said in the same way.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from ..kernels.cpu import compiling
from ..kernels.cpu.compiling import Once


@dataclass(frozen=True)
class ProgressEvent:
    """What has been done so far.

    Attributes:
        description: What is being done, such as "quantizing", or what is waited for: "compiling CPU loops for
            fp8_per_channel (once per machine)".
        done: How many of `unit`.
        total: How many there are of `unit`; it grows as a load turns up more weights.
        bytes: Of the weights that are done, as they are kept; where the unit is bytes, these.
        unit: "weight", or "byte" of a checkpoint's files that are worked through.
    """

    description: str
    done: int
    total: int
    bytes: int
    unit: str = "weight"


ProgressLike = bool | Callable[[ProgressEvent], None] | None


class Progress:
    """Counts weights, or what else `unit` says, as they are expected and done, and shows it. Thread-safe; events come
    one at a time. Raises ConfigError for a `show` of another kind."""

    def __init__(
        self, show: ProgressLike = None, description: str = "quantizing", total: int = 0, unit: str = "weight"
    ) -> None:
        if not (show is None or isinstance(show, bool) or callable(show)):
            raise ConfigError(f"progress is True, False, None or a callable that takes events, not {show!r}")
        self._call = show if callable(show) else None
        self._bar_wanted = bool(sys.stderr and sys.stderr.isatty()) if show is None else show is True
        self._description, self._unit = description, unit
        self._done = self._total = self._bytes = 0
        self._bar: Any = None
        self._lock = threading.RLock()
        self._said: set[str] = set()
        if self._call or self._bar_wanted:
            compiling.listeners.add(self)
        self.expect(total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def expect(self, count: int) -> None:
        """So many more are going to be done."""
        if not count or not (self._call or self._bar_wanted):
            return
        with self._lock:
            self._total += count
            if self._call:
                self._call(self._event())
                return
            if self._bar is None:
                self._bar = _bar(self._description, self._unit)
                self._bar_wanted = self._bar is not None
            if self._bar is not None:
                self._bar.total = self._total
                self._bar.refresh()

    def advance(self, nbytes: int = 0) -> None:
        """One more is done, and takes `nbytes`; where bytes are counted, these are done."""
        if not self._call and self._bar is None:
            return
        with self._lock:
            step = nbytes if self._unit == "byte" else 1
            self._done += step
            self._bytes += nbytes
            if self._call:
                self._call(self._event())
                return
            if self._bytes and self._unit != "byte":
                self._bar.set_postfix_str(f"{self._bytes / 1e9:.2f} GB", refresh=False)
            self._bar.update(step)

    def compiling(self, text: str) -> None:
        """The work waits for loops to be compiled (see `kernels.cpu.compiling`)."""
        with self._lock:
            if text in self._said:
                return
            self._said.add(text)
            if self._call:
                self._call(replace(self._event(), description=text))
            elif self._bar is not None:
                self._bar.write(f"{text} …", file=sys.stderr)
            elif sys.stderr:
                print(f"{text} …", file=sys.stderr)

    def close(self) -> None:
        compiling.listeners.discard(self)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _event(self) -> ProgressEvent:
        return ProgressEvent(self._description, self._done, self._total, self._bytes, self._unit)


def from_bytes(on_bytes: Callable[[int, int], None]) -> Callable[[ProgressEvent], None]:
    """`progress` for what 0.1 took instead: a callable that is given the bytes just done, and how many there are."""
    heard = 0

    def hear(event: ProgressEvent) -> None:
        nonlocal heard
        fresh, heard = event.done - heard, event.done
        if fresh:
            on_bytes(fresh, event.total)

    return hear


@Once
def _tqdm() -> Any:
    """Its class; None if it is not installed. Imported where no interrupt comes."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    tqdm.get_lock()  # It imports, too.
    return tqdm


def _bar(description: str, unit: str) -> Any:
    if (tqdm := _tqdm()) is None:
        return None
    in_bytes = unit == "byte"
    return tqdm(total=0, desc=description, unit="B" if in_bytes else unit, unit_scale=in_bytes, dynamic_ncols=True)
