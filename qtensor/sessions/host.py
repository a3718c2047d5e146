"""What every host of armed weights keeps count of: who is writing, what is held and staged, what was read with loss.

A host is one load or reload (see `lazy.weight.Host`): the sessions here, and those of the engines that build on
it.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakSet

from torch import nn

from ..errors import LossyReadError
from ..lazy.lazy_tensor import reopen, settle
from ..lazy.quant_store import QuantStore
from ..lazy.weight import ArmedWeight
from ..regions.views import View
from ..report.report import LayerReport, LoadReport
from ..report.timeline import MemoryTimeline
from ..schemes.scheme import Scheme
from ..sources import LOSSLESS
from ..tensor.qtensor import QTensor
from .incoming import Incoming

if TYPE_CHECKING:
    from ..sources.collecting import Collector


class LoadHost:
    """The common half of `lazy.weight.Host`.

    refuse_nonfinite, min_sqnr, measure_sqnr, strict_reads: as `online_quant` takes them. closed: why nothing can be
    written any more.
    """

    min_sqnr: float | None = None
    judges = False
    measure_sqnr = False
    strict_reads = False
    refuse_nonfinite = True

    def __init__(self) -> None:
        self.closed: str | None = None
        self._weights: WeakSet[ArmedWeight] = WeakSet()
        self._writing: dict[int, ArmedWeight] = {}
        self._counters = threading.RLock()
        self._memory = MemoryTimeline()
        self._lossy_reads = 0
        self._second_copies = self._peak_second_copies = 0
        self.incoming = Incoming(None, False, self.staged)

    def enroll(self, weight: ArmedWeight) -> None:
        self._weights.add(weight)

    def copied(self, module: nn.Module, memo: dict[int, object]) -> bool:
        """A module of armed weights is being deep-copied, with this `memo`. Is the copy loaded?"""
        return False

    def judge(self, weight: ArmedWeight, sqnr: float) -> Scheme | None:
        return None if self.min_sqnr is not None and sqnr < self.min_sqnr else weight.scheme

    def goes_anywhere(self, weight: ArmedWeight) -> bool:
        """Has nobody said yet which device the weight belongs on?"""
        return False

    def touch(self, weight: ArmedWeight) -> None:
        """The calling thread writes to `weight` now; what it wrote before is not going to be read back."""
        thread = threading.get_ident()
        last = self._writing.get(thread)
        if last is not weight:
            self._turned_to(weight)
            self._writing[thread] = weight
            if last is not None:
                last.release()
                if self.incoming.collects:
                    self.incoming.release(last)

    def _turned_to(self, weight: ArmedWeight) -> None:
        """A thread is going to write to another weight than before."""

    def collector(self, weight: ArmedWeight, make: bool = False, view: View | None = None) -> Collector | None:
        """Who takes values of a weight that are quantized already: if anybody said that they come, or parts have."""
        return self.incoming.of(weight, view, make or self.incoming.config is not None)

    def note_buffer(self, module: nn.Module, name: str) -> None:
        """A loader registered a part of a weight as a buffer, which goes when the session is over."""
        self.incoming.buffers.append((weakref.ref(module), name))

    @property
    def lossless_only(self) -> bool:
        """Are weights that arrive quantized refused where they would be quantized a second time?"""
        return self.incoming.lossless

    def note_source(self, weight: ArmedWeight, source: str, outcome: str) -> None:
        """Values of a weight came in that quantized format, all at once, and that became of them."""
        self.incoming.note(weight, source, outcome)

    def staged(self, delta: int) -> None:
        """Bytes that wait for the rest of their unit changed by so much: in high precision, or as parts of a source."""
        self._memory.stage(delta)

    def second_copy(self, delta: int) -> None:
        """Bytes of a reload's second copies changed by so much."""
        with self._counters:
            self._second_copies += delta
            self._peak_second_copies = max(self._peak_second_copies, self._second_copies)

    def lossy_read(self, weight: ArmedWeight) -> None:
        """A loader reads elements that are quantized already."""
        if self.strict_reads:
            raise LossyReadError(
                f"{weight.name}: the loader reads elements that are quantized already, and strict_reads is on. Read "
                "them before their scale group is complete, or accept the loss with strict_reads=False."
            )
        with self._counters:
            self._lossy_reads += 1
            weight.lossy_reads += 1

    def submit(self, weight: ArmedWeight) -> None:
        """All of this rank's part of a shared weight is there."""
        raise NotImplementedError("this host shares no scales with other ranks")

    def completed(self, weight: ArmedWeight) -> None:
        """The last element arrived: the Parameters become quantized weights."""
        self.hold(weight)
        if isinstance(weight.store, QuantStore):
            for param in weight.params:
                settle(param, weight.store.result)

    def reopened(self, weight: ArmedWeight) -> None:
        """Some elements have to be written again."""
        self.hold(weight, -1)
        for param in weight.params:
            reopen(param)

    def hold(self, weight: ArmedWeight, sign: int = 1) -> None:
        """On the timeline: the bytes of a weight that is complete, or (sign -1) is so no longer."""
        store = weight.store
        if isinstance(store, QuantStore):
            self._memory.hold(quantized=sign * store.nbytes)
        elif store is not None:
            self._memory.hold(passthrough=sign * store.nbytes)

    def _layer(self, name: str, w: QTensor, weight: ArmedWeight | None = None, note: str = "") -> LayerReport:
        """A quantized weight for the report; `weight` where it was loaded by this host."""
        source_bytes = w.numel() * w.dtype.itemsize
        layer = LayerReport(name, str(w.scheme), tuple(w.shape), w.nbytes, source_bytes, note=note)
        if weight is None:
            return layer
        began, done = (t - self._memory.started if t is not None else None for t in (weight.began, weight.done))
        if weight.cast_from is not None:
            cast_from, dtype = (str(d).removeprefix("torch.") for d in (weight.cast_from, w.dtype))
            cast = f"cast to {dtype} after it was quantized; the bytes are of its {cast_from} values"
            layer = replace(layer, cast_from=cast_from, note="; ".join(filter(None, (note, cast))))
        source, outcome = self.incoming.told(weight)
        if source:
            layer = replace(layer, source=f"{source}: {outcome}")
        sqnr = math.inf if outcome == LOSSLESS else weight.sqnr
        return replace(layer, sqnr=sqnr, lossy_reads=weight.lossy_reads, began=began, done=done)

    def _summary_of(self, state: str, scheme: str) -> LoadReport:
        """What the host itself knows of its load; the caller fills in the weights."""
        report = LoadReport(state, scheme, peak_staged_bytes=self._memory.peak_staged, lossy_reads=self._lossy_reads)
        report.seconds = time.perf_counter() - self._memory.started
        report.peak_second_copy_bytes = self._peak_second_copies
        return report

    def _sum_up(self, report: LoadReport) -> LoadReport:
        """The weights are in: their sum, and what was held over time."""
        report.quantized_bytes = sum(layer.bytes for layer in report.layers)
        report.timeline = self._memory.points(report.quantized_bytes, report.passthrough_bytes)
        return report

    def _release_all(self) -> None:
        for weight in list(self._weights):
            weight.release()
