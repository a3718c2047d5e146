"""Reload: new weights into a model that vLLM is serving, all or nothing, at the same addresses.

While one of vLLM's loaders runs, lazy weights take the place of the parameters, with what loaders look for; between
chunks and until the end the published ones are back, and serve the old values. Who begins and ends a reload is in
`entry`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from qtensor.errors import QTensorError
from qtensor.interrupts import in_spite_of_interrupts as insist
from qtensor.kernels import Audit
from qtensor.lazy.lazy_tensor import LazyWeight, parameter
from qtensor.lazy.plain_store import PlainStore
from qtensor.lazy.quant_store import QuantStore
from qtensor.lazy.reload_store import PlainReloadStore, ReloadedWeight, ReloadStore
from qtensor.lazy.weight import ArmedWeight
from qtensor.regions.coverage import Box
from qtensor.regions.views import whole
from qtensor.report.report import LoadReport
from qtensor.schemes.scheme import Scheme
from qtensor.sessions.snapshot import Snapshot
from qtensor.tensor.qtensor import QTensor

from . import compat
from .layers import Processed, Published, Slot, absorb_again, process, read_back
from .load import Load
from .missing import refuse_incomplete
from .parallel import RankHost


class Reload(RankHost):
    """The armed weights of one reload of one model.

    whole_checkpoint: everything must arrive. Otherwise what does not arrive keeps its bytes.
    one_call: all ranks begin and end it in one call, so that at its end they can agree on the outcome.
    """

    on_missing = "keep"

    def __init__(self, load: Load, *, whole_checkpoint: bool, one_call: bool) -> None:
        super().__init__()
        options = load.choice.options
        self.load, self.whole_checkpoint, self.one_call = load, whole_checkpoint, one_call
        self.slots = load.slots
        self.atomic, self.keep_parts = options.reload == "atomic", options.reload_partial == "keep"
        self.refuse_nonfinite = load.refuse_nonfinite
        self._names_loaded: set[str] = set()
        self._warnings: list[str] = []
        self._weights_of: dict[nn.Module, dict[str, ArmedWeight]] = {}
        self._at_load: list[tuple[nn.Module, dict[str, Any]]] = []
        self._published = {(id(p.slot.layer), p.slot.name): p for p in load.published}
        self._undo: list[Callable[[], None]] = []
        self._before = Snapshot(load.root, values=self.atomic)
        try:
            self._arm()
        except BaseException:
            self._close()
            raise

    # Arming

    def _arm(self) -> None:
        lazy: dict[int, LazyWeight] = {}
        for prefix, module in self.load.root.named_modules():
            at_load: dict[str, Any] = {name: None for name, p in module._parameters.items() if p is None}
            for name, like in compat.load_time_parameters(module).items():
                live = module._parameters.get(name)
                published = self._published.get((id(module), name))
                if like.is_meta and live is not None and live.is_meta:
                    at_load[name] = live  # A layer of another pipeline stage.
                    continue
                known = lazy.get(id(live)) if live is not None and published is None else None
                if known is None:
                    known = self._armed_published(published) if published else self._armed(prefix, module, name, like)
                    if live is not None:
                        lazy[id(live)] = known
                at_load[name] = known
                self._weights_of.setdefault(module, {})[name] = known._armed
            if at_load:
                self._at_load.append((module, at_load))

    def _armed_published(self, published: Published) -> LazyWeight:
        slot, live = published.slot, published.live()
        made: type[ArmedWeight] = ReloadedWeight if live is not None else ArmedWeight
        device = live.device if live is not None else _device_of(slot.layer)
        weight = made(self, published.shape, published.dtype, device, (slot.layer, slot.name))
        weight.scheme = published.scheme
        self.slots[weight] = slot
        self.share(weight, slot)
        if live is not None:
            audit, whole_weight = Audit(self.refuse_nonfinite), bool(weight.shared)
            weight.store = ReloadStore(
                live, weight.coverage, audit, self.staged, self.second_copy, "device", not self.atomic, whole_weight
            )
        lazy = _lazy(weight)
        lazy.__dict__.update(slot.attributes)
        loader = slot.attributes.get("weight_loader")
        if loader is not None:
            lazy.weight_loader = self.load.guarded(weight, loader)  # type: ignore[attr-defined]
        return lazy

    def _armed(self, prefix: str, module: nn.Module, name: str, like: torch.Tensor) -> LazyWeight:
        live: torch.Tensor | None = module._parameters.get(name)
        shape, dtype = tuple(like.shape), like.dtype
        # Experts and convolutions may have been repacked into the same shape.
        repacked = live is None or live.shape != like.shape or (live.dim() == 3 and compat.processing_method(module))
        alias = self.load.aliases.get((id(module), name))
        if repacked and alias is not None and alias.dtype == dtype:
            live, repacked = alias.view(shape), False
        made: type[ArmedWeight] = ArmedWeight if repacked else ReloadedWeight
        device = _device_of(module) if live is None else live.device
        weight = made(self, shape, dtype if repacked else live.dtype, device, (module, name))  # type: ignore[union-attr]
        weight.scheme = None
        self.slots[weight] = Slot(prefix, module, name, lambda _: None, {})
        if not repacked:
            values = cast(torch.Tensor, live).detach()
            weight.store = PlainReloadStore(values, weight.coverage, self.second_copy, "device", not self.atomic)
        lazy = _lazy(weight)
        lazy.__class__ = _lazy_class(type(like))
        lazy.__dict__.update(like.__dict__)
        return lazy

    # What armed weights ask (lazy.weight.Host)

    def decide(self, weight: ArmedWeight) -> Scheme | None:
        scheme: Scheme | None = weight.scheme
        return scheme

    def name_of(self, weight: ArmedWeight) -> str:
        return self.load.name_of(weight)

    def completed(self, weight: ArmedWeight) -> None:
        self._hold(weight)  # A loader sees a lazy weight to the end; the layer serves what it has published.

    def reopened(self, weight: ArmedWeight) -> None:
        self._hold(weight, -1)

    # Loading

    def load_weights(self, inner: Any, weights: Iterable[tuple[str, torch.Tensor]], args: Any, kwargs: Any) -> Any:
        """One chunk: the model's own `load_weights`, with lazy weights in place. An error ends the reload."""
        try:
            with self._lazy_in_place():
                loaded = self.load.run(inner, weights, args, kwargs)
            self._names_loaded.update(loaded or ())
        except BaseException as error:
            self.abort(error)
            raise
        return loaded

    @contextlib.contextmanager
    def _lazy_in_place(self) -> Iterator[None]:
        serving = [(module, module._parameters) for module, _ in self._at_load]
        try:
            for module, at_load in self._at_load:
                module.__dict__["_parameters"] = dict(at_load)
            yield
            for module, at_load in self._at_load:
                for name, lazy in at_load.items():
                    given = module._parameters.get(name)
                    if given is not lazy and given is not None and isinstance(lazy, LazyWeight):
                        lazy._armed.write(whole(lazy._armed.shape), given.detach())
        finally:
            insist(lambda: [module.__dict__.update(_parameters=p) for module, p in serving])

    # The end

    def finish(self) -> None:
        """Verify, make everything live, report. After an error the old weights serve, as if nothing had been sent."""
        problem: BaseException | None = None
        try:
            self._release_all()
            self._verify()
            self.agree()
            processed = list(self._process()) if self.atomic else []
            self._absorb()
        except BaseException as error:
            problem = error
            self.withdraw(error)
        problems = compat.tell_all_ranks(None if problem is None else str(problem) or type(problem).__name__)
        if problems:
            problem = problem or QTensorError("the new weights were not taken: " + "; ".join(problems))
            problem.told_all_ranks = True  # type: ignore[attr-defined]
            self.abort()
            raise problem
        try:
            insist(lambda: self._commit(processed))
        finally:
            report = self._summary("finished")
            self._close()
            self.load.report = report
            compat.logger().info(
                "qtensor: reloaded %d weights in %.2f seconds; peak second copy %.1f MiB, peak staging %.1f MiB",
                len(report.layers) - len(set(report.untouched) & {layer.name for layer in report.layers}),
                report.seconds,
                report.peak_second_copy_bytes / 2**20,
                report.peak_staged_bytes / 2**20,
            )

    def abort(self, error: BaseException | None = None) -> None:
        """Give up what is not live. error: why, for the other ranks, which may be waiting at the end of the call."""
        if self.closed:
            return
        self.closed = "its reload was given up"
        self.withdraw(error)
        insist(self._roll_back)
        self._close()
        if error is not None and self.one_call:
            compat.tell_all_ranks(str(error) or type(error).__name__)
            error.told_all_ranks = True  # type: ignore[attr-defined]

    def _roll_back(self) -> None:
        for weight in self._weights:
            with weight.lock:
                if isinstance(weight.store, (ReloadStore, PlainReloadStore)):
                    weight.store.rollback()
                else:
                    weight.discard()
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self._before.restore()
        if not self.atomic:
            # Weights that are live already have new values, and what is derived from them follows.
            for processed in self._process():
                processed.place()
            self._absorb()

    def _close(self) -> None:
        self.closed = self.closed or "its reload is over"
        self._writing.clear()
        self.slots.clear()
        self.load.reload = None
        self._at_load.clear()
        self._weights_of.clear()

    def _verify(self) -> None:
        lines: list[str] = []
        boxes: dict[str, list[Box]] = {}
        for weight, slot in self.slots.items():
            if not weight.coverage.complete:
                if weight.error is not None:
                    raise weight.error
                if self._must_be_whole(weight) and weight.coverage.numel and not self._was_computed(weight):
                    boxes[slot.full_name] = weight.coverage.missing()
                    lines += self.load.names.describe(
                        slot.prefix, slot.layer, slot.name, weight.shape, boxes[slot.full_name]
                    )
                elif isinstance(weight.store, ReloadStore) and weight.store.has_open_units():
                    self._warnings.append(
                        f"{slot.full_name}: only a part of what shares a {weight.scheme} scale was sent; the rest was "
                        "quantized again from its quantized values"
                    )
                    weight.fill_missing("keep")
            weight.verify()
        if not lines:
            return
        if self.whole_checkpoint:
            refuse_incomplete("the checkpoint is incomplete, so the weights were not reloaded", lines, boxes)
        refuse_incomplete(
            "the update is incomplete, so nothing of it was taken", lines, boxes, "What shares a scale, or is packed "
            "together by vLLM, has to be sent together: send these tensors too, or set the option "
            'reload_partial="keep" to accept the loss where there is a scale.'
        )  # fmt: skip

    def _must_be_whole(self, weight: ArmedWeight) -> bool:
        if self.whole_checkpoint:
            return True
        if isinstance(weight.store, ReloadStore):
            # What ranks share is quantized by all of them together, or not at all.
            return weight.store.has_open_units() and not (self.keep_parts and weight.shared is False)
        # A kernel that keeps its own form of the weights takes all of a layer's at once.
        return weight.scheme is not None and any(w.coverage.covered for w in self._quantized(weight.owner[0]))

    def _was_computed(self, weight: ArmedWeight) -> bool:
        """The model's own `load_weights` reports it as loaded, and wrote nothing: it stands for another parameter."""
        if weight.scheme is not None or weight.coverage.covered:
            return False
        return self.slots[weight].full_name in self._names_loaded

    def _touched(self, module: nn.Module) -> list[ArmedWeight]:
        return [w for w in self._weights_of.get(module, {}).values() if w.coverage.covered]

    def _process(self) -> Iterator[Processed]:
        """What the layers with new values make of them. Nothing is live before it is placed."""
        for module in list(self._weights_of):
            touched = self._touched(module)
            ours = self._quantized(module) if touched else []
            if any(not isinstance(w, ReloadedWeight) and w.coverage.covered for w in ours):
                yield self._processed(module, self.slots[ours[0]].publish)
            elif touched and not self._quantized(module) and compat.processing_method(module) is not None:
                yield self._processed(module, compat.process_again)

    def _processed(self, module: nn.Module, run: Callable[[nn.Module], None]) -> Processed:
        values = self._values(module)
        made = process(module, values, run)
        for name, weight in self._weights_of[module].items():
            same = made.parameters[name] is values[name] and isinstance(weight.store, PlainReloadStore)
            if same and values[name].data_ptr() == cast(PlainReloadStore, weight.store).tensor.data_ptr():
                del made.parameters[name]  # Processing left it alone: its store makes it live.
        return made

    def _quantized(self, module: nn.Module) -> list[ArmedWeight]:
        return [w for w in self._weights_of.get(module, {}).values() if w.scheme is not None]

    def _values(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The parameters of a layer as after loading, before processing."""
        like = compat.load_time_parameters(module)
        values: dict[str, torch.Tensor] = {}
        for name, weight in self._weights_of[module].items():
            store = weight.store
            if isinstance(store, QuantStore):
                values[name] = nn.Parameter(store.result, requires_grad=False)
                continue
            tensor = store.tensor if isinstance(store, PlainReloadStore) else self._completed(module, name, weight)
            param = nn.Parameter(tensor, requires_grad=False)
            if name in like:
                param.__class__ = type(like[name])  # type: ignore[assignment]
                param.__dict__ = dict(like[name].__dict__)
            values[name] = param
        return values

    def _completed(self, module: nn.Module, name: str, weight: ArmedWeight) -> torch.Tensor:
        """A repacked weight with what was not sent read back from the layer."""
        store = weight._open_store()
        assert isinstance(store, PlainStore)
        if not weight.coverage.complete:
            live = module._parameters.get(name)
            old = read_back(module, weight.shape, weight.dtype) if name == "weight" else None
            if old is None and live is not None and live.shape == weight.shape and live.dim() < 3:
                old = live.detach().to(weight.dtype)
            if old is None:
                slot, missing = self.slots[weight], weight.coverage.missing()
                lines = self.load.names.describe(slot.prefix, slot.layer, slot.name, weight.shape, missing)
                refuse_incomplete(
                    "the update is incomplete, so nothing of it was taken", lines, {slot.full_name: missing},
                    "vLLM has packed this weight for its kernel; it can only be replaced as a whole."
                )  # fmt: skip
            for box in weight.coverage.missing():
                part = tuple(slice(*span) for span in box)
                store.tensor[part] = old[part]
        return store.tensor

    def _absorb(self) -> None:
        """Attention layers that keep copies of other layers' weights: those weights become live first, and the copies
        are made again, in such a way that all of it can be taken back."""
        dtype = self.load.dtype
        for attention in compat.attention_layers(self.load.root):
            feeding = self._touched(attention)
            if isinstance(getattr(attention, "kv_b_proj", None), nn.Module):
                feeding += self._touched(attention.kv_b_proj)
            if not feeding or dtype is None:
                continue
            saved: list[tuple[torch.Tensor, torch.Tensor]] = []
            for weight in feeding if self.atomic else []:
                live = _live_parts(weight)
                saved += [(part, part.clone()) for part in live]

            def take_back(attention: Any = attention, saved: Any = saved) -> None:
                for part, old in saved:
                    part.copy_(old)
                absorb_again(attention, dtype)

            if self.atomic:
                self._undo.append(take_back)
            for weight in feeding:
                if isinstance(weight.store, (ReloadStore, PlainReloadStore)):
                    weight.store.commit()
            absorb_again(attention, dtype)

    def _commit(self, processed: list[Processed]) -> None:
        for weight in self._weights:
            with weight.lock:
                if isinstance(weight.store, (ReloadStore, PlainReloadStore)):
                    weight.store.commit()
        for layer in processed if self.atomic else self._process():
            layer.place()
        self._undo.clear()

    # Reporting

    def _summary(self, state: str) -> LoadReport:
        first = self.load.report
        assert first is not None
        report = self._summary_of(state, first.scheme)
        report.layers = [replace(layer, lossy_reads=0, began=None, done=None) for layer in first.layers]
        report.passthrough_bytes = first.passthrough_bytes
        report.warnings = list(self._warnings)
        for weight, slot in self.slots.items():
            if not weight.coverage.covered:
                report.untouched.append(slot.full_name)
            elif not weight.coverage.complete:
                report.missing[slot.full_name] = weight.coverage.missing()
        for warning in self._warnings:
            compat.logger().warning("qtensor: %s", warning)
        return self._sum_up(report)


def _live_parts(weight: ArmedWeight) -> tuple[torch.Tensor, ...]:
    store = weight.store
    if isinstance(store, ReloadStore):
        return store.result.parts()
    return (store.live,) if isinstance(store, PlainReloadStore) else ()


def _lazy(weight: ArmedWeight) -> LazyWeight:
    """A lazy parameter for loaders alone: it reads back what they wrote. The weight does not know it, since the model
    computes with what its layer has published."""
    lazy = parameter(weight, requires_grad=False)
    weight.params.clear()
    return lazy


@functools.cache
def _lazy_class(cls: type) -> type:
    """LazyWeight with the methods of vLLM's parameter class `cls`, whose loaders are methods of the parameter."""
    if cls in (nn.Parameter, torch.Tensor) or issubclass(cls, (LazyWeight, QTensor)):
        return LazyWeight
    meta: Any = type(cls)
    return cast(type, meta(f"Lazy{cls.__name__}", (LazyWeight, cls), {}))


def _device_of(module: nn.Module) -> torch.device:
    found = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), None)
    return found or torch.get_default_device()
