"""ArmedWeight: one weight of one session, from the first write to the last.

It joins what the weight is (shape, dtype, device, the Parameters that stand for it) with what has arrived (coverage)
and where it went (store), under one lock. The session decides; this file only asks it, through `Host`. It is one file
because all of it is what may happen under that lock.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

import torch

from ..callers import initialising
from ..errors import IncompleteLoadError, NonFiniteWeightError, QTensorError, WeightDtypeError, WeightShapeError
from ..kernels import SOURCE_DTYPES, Audit, NonFinite
from ..regions.boxes import as_box
from ..regions.coverage import Box, Coverage
from ..regions.views import View, bounds, box_view, whole
from ..report.report import describe_boxes
from ..schemes.scheme import Scheme
from ..tensor.qtensor import QTensor, nonfinite_message
from .initial import Fill, Initial
from .plain_store import PlainStore
from .quant_store import QuantStore
from .sources import fitted, is_high_precision, unusable_source
from .store import NeverWritten, Store
from .write_errors import WriteErrors

if TYPE_CHECKING:
    from ..sources.collecting import Collector
    from ..sources.rooms import DecodedRows

UNDECIDED = object()
_serial = count()


class Host(Protocol):
    """What an armed weight asks of its session."""

    @property
    def on_missing(self) -> str: ...

    refuse_nonfinite: bool
    judges: bool
    """Weights are staged whole, and `judge` is asked before they become what was decided."""
    measure_sqnr: bool
    closed: str | None

    def decide(self, weight: ArmedWeight) -> Scheme | None: ...
    def judge(self, weight: ArmedWeight, sqnr: float) -> Scheme | None:
        """What a weight becomes whose scheme gave this signal-to-quantization-noise ratio, in dB; None for high
        precision."""

    def collector(self, weight: ArmedWeight, make: bool = False, view: View | None = None) -> Collector | None:
        """Who takes values that are quantized already, of a weight or a part of it; None where they mean nothing. make:
        they are sure to come."""

    def name_of(self, weight: ArmedWeight) -> str: ...
    def goes_anywhere(self, weight: ArmedWeight) -> bool: ...
    def touch(self, weight: ArmedWeight) -> None: ...
    def note_buffer(self, module: Any, name: str) -> None:
        """A loader registered a part of a weight as a buffer of that module."""

    @property
    def lossless_only(self) -> bool:
        """Are weights that arrive quantized refused where they would be quantized a second time?"""

    def note_source(self, weight: ArmedWeight, source: str, outcome: str) -> None:
        """Values of a weight came in that quantized format, all at once, and that became of them."""

    def staged(self, delta: int) -> None: ...
    def lossy_read(self, weight: ArmedWeight) -> None: ...
    def submit(self, weight: ArmedWeight) -> None: ...
    def completed(self, weight: ArmedWeight) -> None: ...
    def reopened(self, weight: ArmedWeight) -> None: ...
    def enroll(self, weight: ArmedWeight) -> None: ...
    def copied(self, module: torch.nn.Module, memo: dict[int, object]) -> bool: ...
    def hold(self, weight: ArmedWeight, sign: int = 1) -> None: ...


class ArmedWeight:
    """A weight that quantizes itself while it is written.

    params: the Parameter objects that stand for it (one, unless a library re-wrapped it).
    owner: the module it was registered in first (None once that is gone: a module that a constructor drops is gone as
        it is in a plain model, not when garbage is collected), and its name there.
    scheme: what it becomes; None keeps it in high precision; UNDECIDED until its full name is known.
    initial: what it holds before anyone loads it: for constructors that read it, and to fall back to when elements stay
        unwritten (on_missing "keep" or "init").
    writes: how often something was written.
    on_meta: it was made on the meta device, or moved there by `.to("meta")`, and nobody has given it memory or values
        since.
    was: its dtype when something was written, if it was cast since.
    copied: it was deep-copied. copy_of: the weight that this one was copied from, while that exists.
    assigned: the Parameter last assigned in its place, if someone else holds it still.
    in_place: its storage exists and stays (see `reloaded_weight.ReloadedWeight`). excluded: what is being loaded is for
        others, and nothing may be written to this one.
    shared: other ranks hold parts of what its scales are of; "closed" once they are being agreed on, None after that.
    """

    in_place = False
    excluded = False

    def __init__(
        self, host: Host, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: tuple[Any, str]
    ) -> None:
        self.host, self.shape, self.dtype, self.device = host, shape, dtype, device
        self._module, self._attribute = None if owner[0] is None else weakref.ref(owner[0]), owner[1]
        self.coverage = Coverage(shape)
        self.lock = threading.RLock()
        self.params: list[torch.Tensor] = []
        self.scheme: Any = UNDECIDED
        self.store: Store | None = None
        self.initial = Initial(shape, dtype, device)
        self.on_meta: bool | Literal["moved"] = False
        self.was: torch.dtype | None = None
        self._errors = WriteErrors(shape)
        self._cut_short: str | None = None  # by what, or perhaps by what: a write is under way, or was and did not end
        self.settled = self.was_settled = self.copied = self._sealed = False
        self.shared: bool | Literal["closed"] | None = False
        self.lossy_reads = self.writes = 0
        self.began: float | None = None  # by time.perf_counter(): the first element was written
        self.done: float | None = None  # the last was there
        self._refused_sqnr: float | None = None
        self.copy_of: weakref.ref[ArmedWeight] | None = None
        self.assigned: weakref.ref[torch.Tensor] | None = None
        # For tools that tell tensors apart by address: one that no memory has (it is not canonical on x86 or Arm).
        self.address = (1 << 62) + (next(_serial) << 42)
        host.enroll(self)

    @property
    def owner(self) -> tuple[Any, str]:
        return None if self._module is None else self._module(), self._attribute

    @property
    def name(self) -> str:
        return self.host.name_of(self)

    @property
    def error(self) -> QTensorError | None:
        """What went wrong, and has not been put right by writing the elements it was about."""
        return self._errors.first

    @property
    def target(self) -> str:
        """For people: what the weight is becoming."""
        if self.scheme is UNDECIDED:
            return "not decided yet"
        return f"to {self.scheme}" if self.scheme else "not quantized"

    @property
    def sqnr(self) -> float | None:
        """In dB, of all that was quantized so far, or of the weight that was refused; None if it is not measured."""
        return self.store.audit.sqnr if isinstance(self.store, QuantStore) else self._refused_sqnr

    @property
    def cast_from(self) -> torch.dtype | None:
        """The dtype in which some of it was quantized, of which a cast since then would have rounded the values."""
        return self.was if isinstance(self.store, QuantStore) and self.store.was_cast() else None

    def adopt(self, param: torch.Tensor) -> torch.Tensor:
        """Another Parameter of all of the weight. (One of a part of it becomes no quantized weight.)"""
        is_whole = View(tuple(param.shape), param.stride(), int(param.storage_offset())) == whole(self.shape)
        if is_whole and not any(known is param for known in self.params):
            self.params.append(param)
        return param

    def live_values(self, view: View) -> torch.Tensor:
        """The elements of a view as the model computes with them, of a weight that is `in_place`."""
        raise NotImplementedError

    # Writes

    def touch(self) -> None:
        """The calling thread is going to write to it."""
        self.host.touch(self)

    def open(self) -> None:
        """Have memory for what is going to be written, if there is none yet."""
        self.host.touch(self)
        with self.lock:
            self._require_open()
            self._end_cut_short()
            self._open_store()

    def write(self, view: View, source: torch.Tensor) -> None:
        """A loader wrote `source` to a view. Nothing of the source is kept once this returns."""
        if source.is_meta and self.is_still_meta():
            self.initial.forget()  # Whoever makes a model on the meta device copies nothing.
            return
        if 0 in view.size and source.shape == view.size:
            return  # Every second column of a last piece that has one: nothing, and so never too late.
        self.host.touch(self)
        with self.lock:
            if source.shape == view.size and 0 not in view.stride and not source.is_meta:
                self._require_open()
            else:
                source = self._fit(view, source)
            if 0 not in view.size:
                self._take(source, view)

    def write_masked(self, values: torch.Tensor, touched: torch.Tensor) -> None:
        """Write those elements of `values` (of the weight's shape) where `touched` is true, all at once."""
        if values.shape == self.shape and not touched.any():
            return
        self.host.touch(self)
        with self.lock:
            values = self._fit(whole(self.shape), values)
            if touched.any():
                self._take(values, touched)

    def write_decoded(self, view: View, rows: DecodedRows) -> bool:
        """Take rows that are decoded as they are quantized, a few at a time. False, and nothing was written, if they
        are to be written by `write`."""
        self.host.touch(self)
        with self.lock:
            self._require_open()
            self._end_cut_short()
            store = self._open_store()
            if not isinstance(store, QuantStore) or not store.takes_decoded(view):
                return False
            self._put(view, store.write_decoded, view, rows)
            return True

    def _take(self, source: torch.Tensor, where: View | torch.Tensor) -> None:
        """A write to a view or a mask, of values in high precision or parts of a quantized format."""
        is_plain = source.dtype in SOURCE_DTYPES or is_high_precision(source)
        if not is_plain and (collector := self.host.collector(self)) is not None:
            self._collect(collector, source, where)
            return
        if self._cut_short is not None:
            self._end_cut_short()
        store = self._open_store()
        if not is_plain and isinstance(store, QuantStore):
            self.fail(WeightDtypeError(unusable_source(self.name, source.dtype)), where)
        if isinstance(where, View):
            self._put(where, store.write, where, source)
        else:
            self._put(where, store.write_masked, source, where)

    def _put(self, where: View | torch.Tensor, write: Callable[..., None], *values: Any) -> None:
        """Let the store take a write to a view or a mask, and remember an error until its elements are written."""
        self.writes += 1
        self._cut_short = "an interrupt"
        try:
            write(*values)
        except QTensorError as error:
            if isinstance(error, NonFinite):
                error = NonFiniteWeightError(nonfinite_message(self.name, self.shape, error))
            self._errors.add(error, where)
            self._cut_short = None
            raise error from None
        except BaseException as error:
            self._cut_short = type(error).__name__
            raise
        else:
            if self._errors.first is not None:
                self._errors.forgive(where)
            self._cut_short = None
        finally:
            self._after_write()

    def _collect(self, collector: Collector, source: torch.Tensor, where: View | torch.Tensor) -> None:
        """Quantized values arrive in the weight's own place, and their scales elsewhere."""
        found = as_box(self.shape, *where) if isinstance(where, View) else None
        order = [d for d in found.order if d is not None] if found is not None else [1, 0]
        if found is None or order != sorted(order):
            self.fail(WeightDtypeError(f"{self.name}: values that are quantized already came transposed, or scattered"))
        collector.write("*", source.reshape([b - a for a, b in found.box]), found.box, self.shape)

    def accept(self, source: QTensor, view: View | None = None) -> bool:
        """Take values, of all of the weight or of a view, that are already in its final form. False if they are of
        another form, or the view is not of whole units."""
        self.host.touch(self)
        with self.lock:
            self._require_open()
            self._end_cut_short()
            store, view = self._open_store(), view or whole(self.shape)
            found = as_box(self.shape, *view)
            if found is None or source.shape != view.size:
                return False
            self._cut_short = "an interrupt"
            taken = store.accept(source, found.box)
            self._cut_short = None
            if not taken:
                return False
            self.writes += 1
            if self._errors.first is not None:
                self._errors.forgive(view)
            self._after_write()
            return True

    def take(self, values: QTensor) -> bool:
        """Become values that are in their final form already: their memory is the weight's from now on, and no rank is
        asked. False if anything was written before, or they are of another form."""
        self.host.touch(self)
        with self.lock:
            self._require_open()
            scheme = self.decided()
            form = tuple(values.shape), values.dtype, values.device.type, values.scheme.format
            if scheme is None or self.store is not None or values.transposed:
                return False
            if form != (self.shape, self.dtype, self.device.type, scheme.format):
                return False
            self.began = time.perf_counter()
            self.store, self.shared = self._quant_store(whole=False, result=values), False
            self.store.take_all()
            self.writes += 1
            self._after_write()
            return True

    def initialize(self, view: View, fill: Fill, replaces: bool = False) -> None:
        """An initialiser, not a loader, fills the view: recorded (or done, for a weight that stays plain), and of no
        consequence for coverage. replaces: it does not ask what is there."""
        with self.lock:
            if isinstance(self.store, PlainStore):
                self.writes += 1
                fill(self.store.at(view))
                self.store.initialised = True
            elif not self.coverage.covered:
                self.initial.fill(view, fill, replaces)

    def _require_open(self) -> None:
        if self._sealed or self.excluded or self.host.closed or self.shared is None or self.shared == "closed":
            self._refuse()

    def _refuse(self) -> None:
        """Nothing can be written now: raise QTensorError that says why."""
        if self.shared in ("closed", None):
            late = QTensorError(
                f"{self.name}: written again after all of it had arrived and its scales were agreed on with other "
                "ranks. Deliver every shard once, or load it in a new session."
            )
            if not self.host.closed:  # The session must not succeed without these values.
                self._errors.add(late, None)
            raise late
        if self.host.closed:
            raise QTensorError(f"{self.name}: {self.host.closed}; nothing can be written to this handle any more.")
        if self._sealed:
            raise QTensorError(
                f"{self.name}: written while its session ends; this write is not taken. Let all threads of a loader "
                "finish before the session does."
            )

    def _fit(self, view: View, source: torch.Tensor) -> torch.Tensor:
        self._require_open()
        if 0 in view.stride and 0 not in view.size and _repeats(view):
            message = f"{self.name}: a write to a view {list(view.size)} with the same element at several places"
            self.fail(WeightShapeError(f"{message} (expand); PyTorch refuses it for any tensor"), view)
        if source.shape == view.size and not source.is_meta:
            return source
        try:
            return fitted(self.name, self.shape, view, source)
        except WeightShapeError as error:
            self.fail(error, view)

    def fail(self, error: QTensorError, where: View | torch.Tensor | None = None) -> NoReturn:
        """Raise, and remember until the view (of anything else, all) has been written: a loader that swallows the error
        must not make it disappear."""
        self._errors.add(error, where)
        raise error from None

    def _end_cut_short(self) -> None:
        """If a write was cut short, nobody knows where: nothing of this weight counts any more.

        `_cut_short` is set before a write begins, and taken back when this or the write is through. So this may be
        stopped anywhere, too, and is done by whoever looks at the weight next.
        """
        if self._cut_short is None:
            return
        message = f"a write to it was cut short by {self._cut_short}; all of it has to be written again"
        self._errors.start_over(QTensorError(f"{self.name}: {message}"))
        self.coverage.clear()
        if self.store is not None:
            self.store.rollback()
        self._cut_short = None

    @property
    def refuses_nonfinite(self) -> bool:
        return self.host.refuse_nonfinite

    def decided(self) -> Scheme | None:
        """What it becomes."""
        if self.scheme is UNDECIDED:
            self.scheme = self.host.decide(self)
        found: Scheme | None = self.scheme
        return found

    def _open_store(self) -> Store:
        if self.store is not None:
            return self.store
        self.began = time.perf_counter()
        if self.decided() is None:
            store: Store = self.initial.plain_store(self.coverage, self.host.on_missing)
        else:
            store = self._quant_store(self.host.judges or bool(self.shared))
        self.store = store
        return store

    def _quant_store(self, whole: bool, result: QTensor | None = None) -> QuantStore:
        host = self.host
        audit = Audit(host.refuse_nonfinite, host.judges or host.measure_sqnr)
        return QuantStore(self.scheme, self.dtype, self.device, self.coverage, audit, host.staged, whole, result)

    def _after_write(self) -> None:
        if self._cut_short is not None:
            self._end_cut_short()
        if self.settled and not self.coverage.complete:
            self.settled = False
            self.host.reopened(self)
        elif self.coverage.complete:
            self.settle()

    def settle(self) -> None:
        """Every element is there."""
        if self.settled:
            return
        if self.shared:
            self.host.submit(self)
            return
        if isinstance(self.store, QuantStore) and self.store.whole_weight:
            self._judge(self.store)
        self.initial.forget()
        self.done = time.perf_counter()
        self.settled = self.was_settled = True
        self.host.completed(self)

    def close_for_agreement(self) -> torch.Tensor:
        """The amax of this rank's units, fp32 on the CPU. From here on the values stand."""
        with self.lock:
            assert isinstance(self.store, QuantStore)
            self.shared = "closed"
            return self.store.amax()

    def agree(self, amax: torch.Tensor) -> None:
        """All ranks have this amax: quantize with it. May be repeated."""
        with self.lock:
            self._end_cut_short()
            if self.error is not None:
                raise self.error
            assert isinstance(self.store, QuantStore)
            if self.shared is not None:
                self._cut_short = "an interrupt"
                self.store.quantize_shared(amax)
                self.shared = None
                self._cut_short = None
            self.settle()

    def _judge(self, store: QuantStore) -> None:
        """Quantize a weight that was staged whole, and again by another scheme, or not, if too much was lost."""
        self._cut_short = "an interrupt"
        try:
            values = store.quantize_whole()
            found = store.audit.sqnr
            chosen = self.host.judge(self, found) if self.host.judges and found is not None else self.scheme
            if chosen is None:
                self._refused_sqnr = found
                store.rollback()
                self.scheme, self.store = None, PlainStore(values, self.coverage)
            elif chosen != self.scheme:
                store.rollback()
                self.scheme = chosen
                self.store = again = self._quant_store(whole=True)
                again.write(whole(self.shape), values)
                again.quantize_whole()
            self._cut_short = None
        except BaseException as error:
            self._cut_short = type(error).__name__
            self._end_cut_short()
            raise

    # Reads

    def read(self, view: View) -> torch.Tensor:
        """The elements of a view, as far as they were written. Raises IncompleteLoadError, LossyReadError.

        Before anything is written, those who make the model (its constructors, initialisers) see what it holds then:
        its initial values, or none where it is on the meta device.
        """
        with self.lock:
            self._end_cut_short()
            if not self.coverage.covered and (found := self._before_load(view)) is not None:
                return found
            if self.store is None and 0 not in view.size:
                if self.host.closed:
                    raise QTensorError(f"{self.name}: {self.host.closed}, and nothing is left to read.")
                self._unwritten([bounds(self.shape, view)])
            try:
                values, lossy = self._open_store().read(view)
            except NeverWritten as error:
                self._unwritten(error.boxes)
            if lossy and not self.host.closed:
                self.host.lossy_read(self)
            return values

    def _before_load(self, view: View) -> torch.Tensor | None:
        if self.in_place or self.host.closed or self.store is not None:
            return None
        if self.is_still_meta():
            return torch.empty_strided(view.size, view.stride, dtype=self.dtype, device="meta")
        return self.initial.carried_out(view) if self.initial.known and initialising() else None

    def is_still_meta(self) -> bool:
        """Is it on the meta device for whoever asks? For those who make the model there, until it has memory or values.
        To loaders it is on the device where its values will be, unless somebody has moved it."""
        return bool(self.on_meta) and not self.coverage.covered and (self.on_meta == "moved" or initialising())

    def is_constructed(self) -> bool:
        """Does it hold what it was constructed with, and nothing of a loader? Arithmetic on that is initialisation."""
        return isinstance(self.store, PlainStore) and self.store.constructed and not self.coverage.covered

    def readable(self, view: View) -> bool:
        with self.lock:
            try:
                return self.store is not None and self.store.read(view) is not None
            except NeverWritten:
                return False

    def _unwritten(self, boxes: list[Box]) -> Any:
        message = f"{self.name}: read before it was written: {describe_boxes(self.shape, boxes)}."
        raise IncompleteLoadError(message, {self.name: boxes}) from None

    # Ending

    def settle_if_complete(self) -> None:
        """For the end of a session: an interrupt may have come between the last element and this, and to a weight
        without elements nothing was written."""
        with self.lock:
            self._end_cut_short()
            if not self.coverage.numel and not self.settled:
                self._open_store().take_nothing()
            if self.coverage.complete:
                self.settle()

    def seal(self) -> None:
        """The session is ending: what has arrived is what will be verified. A write under way is waited for."""
        with self.lock:
            self._end_cut_short()
            self._sealed = True

    def fill_missing(self, policy: str) -> bool:
        """Apply on_missing "zero", "keep" or "init" to the unwritten elements. False if there is nothing to use."""
        with self.lock:
            values = self.initial.fallback(policy)  # Of a weight that stays plain, its store forgets them.
            store = self._open_store()
            if policy == "zero":
                values = torch.zeros((), dtype=self.dtype, device="cpu").expand(self.shape)
            if values is not None:
                for box in self.coverage.missing():
                    store.write(box_view(self.shape, box), values[tuple(slice(*span) for span in box)])
            elif not store.fill():
                return False
            self._after_write()
            return self.coverage.complete

    def verify(self) -> None:
        """Raise what a device's kernels found and could not say while loading."""
        if self._cut_short is not None:
            self._end_cut_short()
            assert self.error is not None
            raise self.error
        if self.store is not None:
            try:
                self.store.verify()
            except NonFinite as error:
                raise NonFiniteWeightError(nonfinite_message(self.name, self.shape, error)) from None

    def release(self) -> None:
        """The writer moved on: what was retained for rereading goes."""
        if self._cut_short is None and (self.store is None or not self.store.retains):
            return  # A loader of experts moves on at every name.
        with self.lock:
            self._end_cut_short()
            if self.store is not None:
                self.store.release()

    def commit(self) -> None:
        """Make what was written live, of a weight that is in use. May be repeated."""
        with self.lock:
            if self.store is not None:
                self.store.commit()

    def discard(self) -> None:
        """Free everything: the session was aborted. May be repeated."""
        with self.lock:
            if self.store is not None:
                self.store.rollback()
            self.store, self.settled = None, False
            self.initial.forget()
            self.coverage.clear()

    def start_anew(self) -> None:
        """Nothing was written, and nothing is known."""
        self.discard()
        self._errors = WriteErrors(self.shape)
        self.was, self.on_meta, self.was_settled = None, False, False

    # Copies

    def clone(self, memo: dict[int, Any]) -> ArmedWeight:
        """For deepcopy: an independent weight of the same session, in the same state."""
        with self.lock:
            module, name = self.owner
            # Where a module is copied, its copy is in the memo already.
            other = ArmedWeight(self.host, self.shape, self.dtype, self.device, (memo.get(id(module), module), name))
            other.copy_of, self.copied = weakref.ref(self), True
            self.loads_copy(memo)
            other.scheme, other.initial, other.on_meta = self.scheme, self.initial.copy(), self.on_meta
            other.coverage, other.settled, other.was = self.coverage.copy(), self.settled, self.was
            other.store = self.store.copy(other.coverage) if self.store is not None else None
            return other

    def loads_copy(self, memo: dict[int, Any]) -> bool:
        """A deep copy is being made. Does the session load the module that has it?"""
        module, _ = self.owner
        return module is not None and self.host.copied(module, memo)

    def retyped(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] | None = None) -> ArmedWeight:
        """For `.to(dtype)`, `.to(device)` and sharding before the first write: the same weight as another type, or a
        part of it (whose initial values are then unknown, and whether its scales are split)."""
        other = ArmedWeight(self.host, shape or self.shape, dtype, device, self.owner)
        if shape is not None:
            other.scheme = UNDECIDED if self.scheme else self.scheme
            return other
        other.scheme = self.scheme
        other.initial, other.on_meta = self.initial.copy(), self.on_meta
        other.initial.cast(dtype, device)
        if isinstance(self.store, PlainStore):
            other.store = self.store.copy(other.coverage)
            other.store.cast(dtype, device)
        return other


def _repeats(view: View) -> bool:
    """Has the view an element of the weight at several places?"""
    return any(step == 0 and n > 1 for n, step in zip(view.size, view.stride, strict=True))
