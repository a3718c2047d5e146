"""What every host of armed weights keeps count of: who is writing, what is staged, what was read with loss.

A host is one load or reload (see `armed.Host`): the sessions of this package, and those of the engines that build on
it.
"""

from __future__ import annotations

import threading
from weakref import WeakSet

from .armed import ArmedWeight
from .errors import LossyReadError
from .lazy import reopen, settle
from .store import QuantStore


class LoadHost:
    """The common half of `armed.Host`.

    refuse_nonfinite, min_sqnr, strict_reads: as `online_quant` takes them. closed: why nothing can be written any more.
    """

    min_sqnr: float | None = None
    strict_reads = False
    refuse_nonfinite = True

    def __init__(self) -> None:
        self.closed: str | None = None
        self._weights: WeakSet[ArmedWeight] = WeakSet()
        self._writing: dict[int, ArmedWeight] = {}
        self._counters = threading.Lock()
        self._staged = self._peak_staged = self._lossy_reads = 0

    def enroll(self, weight: ArmedWeight) -> None:
        self._weights.add(weight)

    def touch(self, weight: ArmedWeight) -> None:
        """The calling thread writes to `weight` now; what it wrote before is not going to be read back."""
        thread = threading.get_ident()
        last = self._writing.get(thread)
        if last is not weight:
            self._writing[thread] = weight
            if last is not None:
                last.release()

    def staged(self, delta: int) -> None:
        """High-precision bytes that wait for the rest of their unit changed by so much."""
        with self._counters:
            self._staged += delta
            self._peak_staged = max(self._peak_staged, self._staged)

    def lossy_read(self, weight: ArmedWeight) -> None:
        """A loader reads elements that are quantized already."""
        if self.strict_reads:
            raise LossyReadError(
                f"{weight.name}: the loader reads elements that are quantized already, and strict_reads is on. Read "
                "them before their scale group is complete, or accept the loss with strict_reads=False."
            )
        with self._counters:
            self._lossy_reads += 1

    def submit(self, weight: ArmedWeight) -> None:
        """All of this rank's part of a shared weight is there."""
        raise NotImplementedError("this host shares no scales with other ranks")

    def completed(self, weight: ArmedWeight) -> None:
        """The last element arrived: the Parameters become quantized weights."""
        if isinstance(weight.store, QuantStore):
            for param in weight.params:
                settle(param, weight.store.result)

    def reopened(self, weight: ArmedWeight) -> None:
        """Some elements have to be written again."""
        for param in weight.params:
            reopen(param)

    def _release_all(self) -> None:
        for weight in list(self._weights):
            weight.release()
