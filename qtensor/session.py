"""Sessions: from arming a model's weights to the verdict on its load.

`online_quant` turns weights lazy (as a model is constructed, or a given model's), lets any loader fill them, and at
the end sees to what the loader left: unwritten elements, weights assigned where no hook could see, tensors still on
the meta device. Whatever happens, it leaves no hook behind.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from . import hooks, lazy_ops  # noqa: F401  lazy_ops fills the table of operations
from .armed import ArmedWeight
from .coverage import Box
from .errors import IncompleteLoadError, LossyReadError, NonFiniteWeightError, QTensorError
from .kernels import pipeline
from .lazy import LAZY, LazyWeight, LiveQTensor, close, parameter, reopen, settle, view_of
from .progress import Progress
from .quantized import QTensor, quantize
from .report import LayerReport, LoadReport, describe_missing
from .scheme import Scheme, SchemeLike, Targets
from .selection import DEFAULT_IGNORE, Owner, Selection
from .store import PlainStore, QuantStore
from .tree import ModuleTree, full_name, parameters

logger = logging.getLogger("qtensor")
OnMissing = Literal["error", "zero", "keep", "init"]
OnNonfinite = Literal["error", "keep"]
# Attributes that make a tensor lazy or quantized; all others belong to the user and follow the Parameter.
_OWN = {"_armed", "_meta", "_is_param", "qdata", "scale", "scheme", "transposed", "whole_units"}


def online_quant(
    scheme: SchemeLike,
    model: nn.Module | None = None,
    *,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    targets: Targets | None = None,
    device: torch.device | str | None = None,
    on_missing: OnMissing = "error",
    on_nonfinite: OnNonfinite = "error",
    strict_reads: bool = False,
    min_sqnr: float | None = None,
    progress: bool | None = None,
) -> Session:
    """Quantize weights while any loader fills them.

    Used as a context manager. Without `model`, every matching weight registered inside the block by the calling thread
    is armed as it is made. With `model`, its existing weights are armed now; it may be on the meta device, and
    whatever values it had are given up.

    scheme: a `Scheme` or its name. ignore, targets: patterns on the names a user sees (an exact name, "re:..." or a
        glob); `targets` may map patterns to schemes and replaces the default choice (nn.Linear and 3-d experts).
    device: where quantized weights live; by default where the weight was created, or the CPU if that was "meta".
    on_missing: what becomes of elements nobody wrote: "error" raises IncompleteLoadError, "zero" fills them, "keep"
        keeps the values the model had, "init" its random initialisation.
    on_nonfinite: "error" refuses NaN and infinity by name and index; "keep" stores them.
    strict_reads: raise LossyReadError when a loader reads back what is already quantized, instead of counting it.
    min_sqnr: in dB; a weight whose signal-to-quantization-noise ratio falls below stays in high precision. Weights are
        then staged whole.
    progress: a progress bar; by default only on a terminal.
    """
    return Session(
        Selection(scheme, ignore, targets), model, device, on_missing, on_nonfinite, strict_reads, min_sqnr, progress
    )


class Session:
    """One load. `finish()` runs when the `with` block ends, `abort()` when it raises."""

    def __init__(
        self,
        selection: Selection,
        model: nn.Module | None,
        device: torch.device | str | None,
        on_missing: OnMissing,
        on_nonfinite: OnNonfinite,
        strict_reads: bool,
        min_sqnr: float | None,
        progress: bool | None,
    ) -> None:
        if on_missing not in ("error", "zero", "keep", "init"):
            raise ValueError(f'on_missing is "error", "zero", "keep" or "init", not {on_missing!r}')
        if on_nonfinite not in ("error", "keep"):
            raise ValueError(f'on_nonfinite is "error" or "keep", not {on_nonfinite!r}')
        self.on_missing, self.strict_reads, self.min_sqnr = on_missing, strict_reads, min_sqnr
        self.refuse_nonfinite = on_nonfinite == "error"
        self.closed: str | None = None
        self._selection = selection
        self._device = torch.device(device) if device is not None else None
        self._state = "new"
        self._weights: WeakSet[ArmedWeight] = WeakSet()
        self._tree = ModuleTree(model)
        self._last_names: WeakKeyDictionary[ArmedWeight, str] = WeakKeyDictionary()
        self._staged, self._peak_staged, self._lossy_reads = 0, 0, 0
        self._counters = threading.Lock()
        self._writing: dict[int, ArmedWeight] = {}
        self._layer_hooks: list[Callable[[str, nn.Module], None]] = []
        self._notes: dict[str, str] = {}
        self._filled: dict[str, list[Box]] = {}
        self._report: LoadReport | None = None
        self._progress = Progress(progress)
        self._started = time.perf_counter()
        if model is not None:
            self._begin()
            try:
                self._arm_model(model)
            except BaseException:
                self.abort()
                raise

    def __enter__(self) -> Session:
        if self._state == "new":
            if hooks.listening() is not None:
                raise QTensorError("online_quant is already active in this thread; sessions do not nest")
            self._begin()
            hooks.listen(self)
        elif self._state != "open":
            raise QTensorError(f"this session is {self._state}; start a new one with online_quant(...)")
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._state != "open":
            return
        if kind is None:
            self.finish()
        else:
            self.abort()

    def on_layer_quantized(self, hook: Callable[[str, nn.Module], None]) -> None:
        """Call `hook(name, module)` each time all weights of a module that are to be quantized are there."""
        self._layer_hooks.append(hook)

    # Life

    def _begin(self) -> None:
        hooks.install()
        self._state = "open"
        self._started = time.perf_counter()

    def finish(self) -> LoadReport:
        """End the load: complete what `on_missing` allows, turn lazy weights into their final form, report.

        Raises IncompleteLoadError naming every weight and range that is missing, or the error that an unfinished
        weight met while loading. After an error the session is over, and the model can be armed again.
        """
        self._require_open()
        self._stop_listening()
        try:
            self._release_all()
            self._retie()
            self._quantize_unseen()
            self._complete()
        except BaseException:
            self.abort()
            raise
        self._report = self._summary("finished")
        self._realise()
        self._close("finished", "the session has finished")
        self._warn()
        return self._report

    def abort(self) -> None:
        """Give up: staging and half-loaded weights are freed, hooks removed. The model can be armed again."""
        if self._state != "open":
            return
        report = self._summary("aborted")
        self._close("aborted", "its load was aborted")
        for weight in list(self._weights):
            kept = weight.store if isinstance(weight.store, PlainStore) and weight.store.initialised else None
            if kept is None:
                weight.discard()
            for param in weight.params:
                if isinstance(param, LiveQTensor):
                    reopen(param)
                elif kept is not None and isinstance(param, LazyWeight):
                    self._replace(param, _plain_parameter(param, kept.tensor))
        self._report = report

    def report(self) -> LoadReport:
        """What has happened so far; after the end, the final account."""
        return self._report or self._summary(self._state)

    def _require_open(self) -> None:
        if self._state != "open":
            raise QTensorError(f"this session is {self._state}, not open")

    def _close(self, state: str, reason: str) -> None:
        # A session may outlive its model, for its report: it keeps names alone.
        self._last_names = WeakKeyDictionary({weight: self.name_of(weight) for weight in self._weights})
        self._state, self.closed = state, reason
        self._tree.forget()
        self._stop_listening()
        hooks.uninstall()
        pipeline.release()
        self._writing.clear()
        self._progress.close()

    def _stop_listening(self) -> None:
        if hooks.listening() is self:
            hooks.listen(None)

    # Arming

    def constructed(self, module: nn.Module, name: str, param: nn.Parameter) -> torch.Tensor | None:
        """A parameter was registered by the thread this session listens to: arm it if it is being created."""
        self._tree.note(module)
        if not param.is_floating_point() or type(param) is not nn.Parameter or not hooks.is_constructing(module):
            return None
        return self._lazy(module, name, param, trusted=False)

    def attached(self, parent: nn.Module, child: nn.Module | None) -> None:
        self._tree.note(parent)
        if child is not None:
            self._tree.note(child, parent)

    def _arm_model(self, model: nn.Module) -> None:
        seen: dict[int, list[Owner]] = {}
        tensors: dict[int, torch.Tensor] = {}
        for module_name, module, name, param in parameters(model):
            if isinstance(param, QTensor):
                raise QTensorError(
                    f"{full_name((module_name, module, name))} is quantized already. Load new values with "
                    "`module.weight.copy_(...)`, or start from a high-precision model."
                )
            if isinstance(param, LazyWeight) and not param._armed.host.closed:
                raise QTensorError(
                    f"{full_name((module_name, module, name))} is armed by another session that is still open"
                )
            if param.is_floating_point():
                seen.setdefault(id(param), []).append((module_name, module, name))
                tensors[id(param)] = param
        for key, owners in seen.items():
            self._arm_existing(tensors[key], owners)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                left = isinstance(buffer, LazyWeight) and buffer._armed.owner == (module, name)  # by an aborted session
                on_meta = buffer is not None and buffer.is_meta and name not in module._non_persistent_buffers_set
                if buffer is not None and (left or on_meta):
                    lazy = self._lazy(module, name, buffer, trusted=False, quantizable=False)
                    del lazy._is_param  # type: ignore[attr-defined]
                    module._buffers[name] = lazy
        self._tree.changed()

    def _arm_existing(self, param: torch.Tensor, owners: Sequence[Owner]) -> None:
        scheme = self._selection.scheme_for(owners, param)
        _, module, name = owners[0]
        lazy = self._lazy(module, name, param, trusted=True, quantizable=scheme is not None)
        weight = lazy._armed
        weight.scheme = scheme
        self._progress.expect(scheme is not None)
        self._replace(param, lazy, owners)
        weight.params = [cast(torch.Tensor, module._parameters[name])]

    def _lazy(
        self, module: nn.Module, name: str, param: torch.Tensor, *, trusted: bool, quantizable: bool | None = None
    ) -> LazyWeight:
        """A lazy stand-in for `param`, which is given up unless the weight stays plain or its values may be needed.

        trusted: the values are a model's own, not whatever memory held when it was constructed.
        """
        target = self._device or torch.device("cpu" if param.is_meta else param.device)
        weight = ArmedWeight(self, tuple(param.shape), param.dtype, target, (module, name))
        has_values = not param.is_meta and not isinstance(param, LazyWeight)
        values = param.detach() if has_values else None
        if quantizable is None:
            quantizable = self._selection.candidate(module, name, param)
        if not quantizable:
            weight.scheme = None
            if values is not None:
                weight.store = PlainStore(values.to(target), weight.coverage, initialised=trusted)
        elif values is not None and (self.on_missing == "init" or (self.on_missing == "keep" and trusted)):
            weight.initial = values
        lazy = parameter(weight, param.requires_grad)
        lazy.__dict__.update(_attributes(param))
        return lazy

    # What armed weights ask (armed.Host)

    def enroll(self, weight: ArmedWeight) -> None:
        self._weights.add(weight)
        self._tree.changed()

    def decide(self, weight: ArmedWeight) -> Scheme | None:
        scheme = self._selection.scheme_for(self._tree.owners(weight), weight.params[0])
        if scheme is not None:
            self._progress.expect(1)
        return scheme

    def name_of(self, weight: ArmedWeight) -> str:
        if self.closed:
            return self._last_names.get(weight, weight.owner[1])
        return full_name(self._tree.owners(weight)[0])

    def touch(self, weight: ArmedWeight) -> None:
        """The calling thread writes to `weight` now; what it wrote before is not going to be read back."""
        thread = threading.get_ident()
        last = self._writing.get(thread)
        if last is not weight:
            self._writing[thread] = weight
            if last is not None:
                last.release()

    def staged(self, delta: int) -> None:
        with self._counters:
            self._staged += delta
            self._peak_staged = max(self._peak_staged, self._staged)

    def lossy_read(self, weight: ArmedWeight) -> None:
        if self.strict_reads:
            raise LossyReadError(
                f"{weight.name}: the loader reads elements that are quantized already, and strict_reads is on. Read "
                "them before their scale group is complete, or accept the loss with strict_reads=False."
            )
        with self._counters:
            self._lossy_reads += 1

    def completed(self, weight: ArmedWeight) -> None:
        store = weight.store
        if not isinstance(store, QuantStore):
            return
        for param in weight.params:
            settle(param, store.result)
        self._progress.advance(store.result.nbytes)
        if self._layer_hooks:
            self._run_layer_hooks(weight)

    def reopened(self, weight: ArmedWeight) -> None:
        for param in weight.params:
            reopen(param)

    def _run_layer_hooks(self, weight: ArmedWeight) -> None:
        for module_name, module, _ in self._tree.owners(weight):
            armed: list[Any] = [p for p in module._parameters.values() if isinstance(p, LazyWeight)]
            if not any(p._armed.scheme is not None for p in armed):
                for hook in self._layer_hooks:
                    hook(module_name, module)

    # Finishing

    def _release_all(self) -> None:
        for weight in list(self._weights):
            weight.release()

    def _retie(self) -> None:
        """A Parameter put out of sight under one name and assigned to an armed weight under another is a tie, which
        accelerate makes this way: both names get the armed weight."""
        armed = {id(w.assigned()): w for w in self._weights if w.assigned is not None and w.assigned() is not None}
        for _, module, name, param in list(self._tree.parameters()) if armed else ():
            weight = armed.get(id(param))
            if weight is not None and type(param) is nn.Parameter:
                standing = [p for p in weight.params if getattr(p, "_armed", None) is weight]
                module._parameters[name] = cast(nn.Parameter, standing[0])

    def _quantize_unseen(self) -> None:
        """Weights that were assigned where no hook could see them are quantized now."""
        found: dict[int, tuple[torch.Tensor, list[Owner]]] = {}
        for module_name, module, name, param in self._tree.parameters():
            if type(param) is nn.Parameter and not param.is_meta and param.is_floating_point():
                found.setdefault(id(param), (param, []))[1].append((module_name, module, name))
        for param, owners in found.values():
            scheme = self._selection.scheme_for(owners, param)
            if scheme is None:
                continue
            name = full_name(owners[0])
            try:
                result = quantize(param, scheme, on_nonfinite="error" if self.refuse_nonfinite else "keep")
            except NonFiniteWeightError as error:
                raise NonFiniteWeightError(str(error).replace("weight", name, 1)) from None
            if self._device is not None:
                result = result.to(self._device)  # type: ignore[assignment]
            self._replace(param, nn.Parameter(result, requires_grad=False), owners)
            self._notes[name] = "assigned out of sight; quantized at finish"

    def _complete(self) -> None:
        """Apply on_missing, then raise for whatever is still not there."""
        missing: list[str] = []
        boxes: dict[str, Any] = {}
        for weight, owners in self._tree.live(self).items():
            name = full_name(owners[0])
            if not weight.coverage.complete:
                if weight.error is not None:
                    raise weight.error
                gaps = weight.coverage.missing()
                self._notes[name] = f"unwritten elements: {self.on_missing}"
                if self.on_missing == "error" or not weight.fill_missing(self.on_missing):
                    boxes[name] = gaps
                    missing.append(describe_missing(name, weight.shape, gaps, reopened=weight.was_settled))
                else:
                    self._filled[name] = gaps
            weight.verify()
        for name, tensor in self._on_meta():
            boxes[name] = [tuple((0, n) for n in tensor.shape)]
            missing.append(f"{name}: still on the meta device; no loader gave it values")
        if missing:
            advice = (
                'Pass on_missing="zero" to fill them.'
                if self.on_missing == "error"
                else (f'on_missing="{self.on_missing}" has nothing to fill them with.')
            )
            raise IncompleteLoadError(_bullets(missing) + f" {advice}", boxes)

    def _on_meta(self) -> Iterator[tuple[str, torch.Tensor]]:
        for module_name, module, name, param in self._tree.parameters():
            if not isinstance(param, LAZY) and param.is_meta:
                yield full_name((module_name, module, name)), param
        for name, buffer in self._tree.plain_buffers():
            if buffer.is_meta:
                yield name, buffer

    def _realise(self) -> None:
        """Lazy weights take their final form: QTensor, or an ordinary Parameter."""
        for _, module, name, buffer in list(self._tree.lazy_buffers()):
            store = buffer._armed.store
            if isinstance(store, PlainStore):
                # A buffer may be a view of a parameter, and goes on aliasing it.
                module._buffers[name] = store.tensor.as_strided(*view_of(buffer))
        live = self._tree.live(self)
        for weight, owners in live.items():
            held: list[torch.Tensor | None] = [m._parameters.get(n) for _, m, n in owners]
            for param in {id(p): p for p in held if p is not None}.values():
                self._realise_parameter(weight, param, owners)
        for weight in [w for w in self._weights if w not in live and w.coverage.complete]:
            # Outside of every model: a deep copy, or a handle someone holds. It was loaded all the same.
            for param in [p for p in weight.params if getattr(p, "_armed", None) is weight]:
                self._realise_parameter(weight, param)

    def _realise_parameter(self, weight: ArmedWeight, param: torch.Tensor, owners: Sequence[Owner] = ()) -> None:
        if isinstance(weight.store, PlainStore) and isinstance(param, LazyWeight):
            self._replace(param, _plain_parameter(param, weight.store.tensor), owners)
        else:
            close(param)

    def _replace(self, param: torch.Tensor, new: torch.Tensor, owners: Sequence[Owner] = ()) -> None:
        """Make the Python object `param` be `new`, so that everyone who holds it sees the change.

        Where PyTorch refuses to swap (someone holds a weak reference or a graph), the owners get the new object.
        """
        new.__dict__.update(_attributes(param))
        try:
            torch.utils.swap_tensors(param, new)
        except RuntimeError:
            for _, module, name in owners:
                module._parameters[name] = new  # type: ignore[assignment]

    # Reporting

    def _summary(self, state: str) -> LoadReport:
        report = LoadReport(state, str(self._selection.scheme), peak_staged_bytes=self._peak_staged)
        report.lossy_reads, report.seconds = self._lossy_reads, time.perf_counter() - self._started
        seen: set[int] = set()
        # By address and size: a buffer that is a view of all of a parameter is the same bytes.
        plain: dict[tuple[int, int], int] = {}
        live = self._tree.live(self) if self._state == "open" else {}
        for weight, owners in live.items():
            name = full_name(owners[0])
            if not weight.coverage.complete or name in self._filled:
                report.missing[name] = self._filled.get(name) or weight.coverage.missing()
                if report.missing[name] == [tuple((0, n) for n in weight.shape)]:
                    report.untouched.append(name)
            if weight.store is None:
                continue
            if isinstance(weight.store, QuantStore):
                report.layers.append(_layer(name, weight.store.result, weight.sqnr, self._notes.get(name, "")))
            else:
                plain[weight.store.tensor.data_ptr(), weight.store.tensor.nbytes] = weight.store.tensor.nbytes
                report.passthrough[name] = _why_plain(weight, self.min_sqnr)
        for module_name, module, name, param in self._tree.parameters():
            if isinstance(param, LAZY) or id(param) in seen:
                continue
            seen.add(id(param))
            name = full_name((module_name, module, name))
            if isinstance(param, QTensor):
                report.layers.append(_layer(name, param, None, self._notes.get(name, "")))
            elif not param.is_meta:
                plain[param.data_ptr(), param.nbytes] = param.nbytes
                report.passthrough[name] = ""
        for _, buffer in self._tree.plain_buffers():
            if not buffer.is_meta:
                plain[buffer.data_ptr(), buffer.nbytes] = buffer.nbytes
        report.passthrough_bytes = sum(plain.values())
        report.quantized_bytes = sum(layer.bytes for layer in report.layers)
        return report

    def _warn(self) -> None:
        assert self._report is not None
        unused = self._selection.unused_patterns()
        if unused:
            self._report.warnings.append(f"patterns that matched no weight: {', '.join(unused)}")
        if not self._report.layers:
            self._report.warnings.append(
                "nothing was quantized: no weight inside the block matched (nn.Linear and 3-d experts by default)"
            )
        for warning in self._report.warnings:
            warnings.warn(f"online_quant: {warning}", stacklevel=4)
        logger.info(
            "quantized %d weights to %d bytes in %.2f s",
            len(self._report.layers),
            self._report.quantized_bytes,
            self._report.seconds,
        )


def _attributes(param: torch.Tensor) -> dict[str, Any]:
    return {k: v for k, v in param.__dict__.items() if k not in _OWN}


def _plain_parameter(lazy: LazyWeight, tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=lazy.requires_grad)


def _layer(name: str, w: QTensor, sqnr: float | None, note: str) -> LayerReport:
    source_bytes = w.qdata.numel() * w.dtype.itemsize
    return LayerReport(name, str(w.scheme), tuple(w.qdata.shape), w.nbytes, source_bytes, sqnr, note)


def _why_plain(weight: ArmedWeight, min_sqnr: float | None) -> str:
    if weight.sqnr is not None and min_sqnr is not None:
        return f"SQNR {weight.sqnr:.1f} dB is below min_sqnr={min_sqnr:g}"
    return ""


def _bullets(lines: list[str]) -> str:
    if len(lines) == 1:
        return lines[0] + "."
    shown = lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])
    return f"{len(lines)} weights are incomplete.\n  " + "\n  ".join(shown) + "\n "
