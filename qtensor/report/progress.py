"""Progress of long work, in weights and bytes: a tqdm bar on a terminal, or a call per weight for engines.

Every session and command takes `progress=`: True shows a bar, False nothing, None a bar only on a terminal, and a
callable gets each `ProgressEvent` instead. Without tqdm there is no bar.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProgressEvent:
    """What has been done so far.

    Attributes:
        description: What is being done, such as "quantizing".
        done: Weights.
        total: Weights; it grows as a load turns up more of them.
        bytes: Of the weights that are done, as they are kept.
    """

    description: str
    done: int
    total: int
    bytes: int


ProgressLike = bool | Callable[[ProgressEvent], None] | None


class Progress:
    """Counts weights as they are expected and done, and shows it. Thread-safe; events come one at a time."""

    def __init__(self, show: ProgressLike = None, description: str = "quantizing", total: int = 0) -> None:
        self._call = show if callable(show) else None
        self._bar_wanted = sys.stderr.isatty() if show is None else show is True
        self._description, self._done, self._total, self._bytes = description, 0, 0, 0
        self._bar: Any = None
        self._lock = threading.RLock()
        self.expect(total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def expect(self, weights: int) -> None:
        """So many more weights are going to be done."""
        if not weights or not (self._call or self._bar_wanted):
            return
        with self._lock:
            self._total += weights
            if self._call:
                self._call(self._event())
                return
            if self._bar is None:
                self._bar = _tqdm(self._description)
                self._bar_wanted = self._bar is not None
            if self._bar is not None:
                self._bar.total = self._total
                self._bar.refresh()

    def advance(self, nbytes: int) -> None:
        """One more weight is done, and takes `nbytes`."""
        if not self._call and self._bar is None:
            return
        with self._lock:
            self._done += 1
            self._bytes += nbytes
            if self._call:
                self._call(self._event())
            else:
                self._bar.set_postfix_str(f"{self._bytes / 1e9:.2f} GB", refresh=False)
                self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _event(self) -> ProgressEvent:
        return ProgressEvent(self._description, self._done, self._total, self._bytes)


def _tqdm(description: str) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=0, desc=description, unit="weight", dynamic_ncols=True)
