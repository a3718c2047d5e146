"""Progress of a load on the terminal: weights done and bytes held, by tqdm, where there is a terminal and tqdm."""

from __future__ import annotations

import sys
import threading
from typing import Any


class Progress:
    """A bar that grows as weights are decided on and completed. `enabled` None means: only on a terminal."""

    def __init__(self, enabled: bool | None) -> None:
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._bar: Any = None
        self._bytes = 0
        self._lock = threading.Lock()

    def expect(self, weights: int) -> None:
        """So many more weights are going to be quantized."""
        if not self._enabled:
            return
        with self._lock:
            if self._bar is None:
                self._bar = _tqdm()
                self._enabled = self._bar is not None
            if self._bar is not None:
                self._bar.total = (self._bar.total or 0) + weights
                self._bar.refresh()

    def advance(self, nbytes: int) -> None:
        """One more weight is complete, at `nbytes` in quantized form."""
        if self._bar is None:
            return
        with self._lock:
            self._bytes += nbytes
            self._bar.set_postfix_str(f"{self._bytes / 1e9:.2f} GB", refresh=False)
            self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=0, desc="quantizing", unit="weight", dynamic_ncols=True)
