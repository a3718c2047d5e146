"""Reload: new weights into a model that vLLM is serving, all or nothing, at the same addresses.

While one of vLLM's loaders runs, lazy weights take the place of the parameters, with what loaders look for; between
chunks and until the end the published ones are back, and serve the old values. Who begins and ends a reload is in
`entry`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import nn

from qtensor.errors import QTensorError
from qtensor.interrupts import in_spite_of_interrupts as insist
from qtensor.lazy.lazy_tensor import LazyWeight, parameter
from qtensor.lazy.quant_store import QuantStore
from qtensor.lazy.reloaded_weight import ReloadedWeight
from qtensor.lazy.weight import ArmedWeight
from qtensor.regions.coverage import Box
from qtensor.regions.views import whole
from qtensor.report.report import LoadReport
from qtensor.sessions.snapshot import Snapshot
from qtensor.sessions.transaction import State
from qtensor.tensor.qtensor import QTensor
from qtensor.text import printable

from . import compat
from .incoming import Weights
from .layers import Processed, Published, Slot
from .missing import refuse_incomplete
from .processing import Processing
from .served import Filling, ServedModel, require_written


class Reload(Filling):
    """The armed weights of one reload of one model.

    whole_checkpoint: everything must arrive. Otherwise what does not arrive keeps its bytes.
    one_call: all ranks begin and end it in one call, so that at its end they can agree on the outcome.
    """

    on_missing = "keep"
    why_closed: ClassVar[dict[State, str]] = {
        "finished": "its reload is over",
        "aborted": "its reload was given up",
    }

    def __init__(self, served: ServedModel, *, whole_checkpoint: bool, one_call: bool) -> None:
        super().__init__(served)
        options = served.choice.options
        self.whole_checkpoint, self.one_call = whole_checkpoint, one_call
        self.atomic, self.keep_parts = options.reload == "atomic", options.reload_partial == "keep"
        self._names_loaded: set[str] = set()
        self._warnings: list[str] = []
        self._weights_of: dict[nn.Module, dict[str, ArmedWeight]] = {}
        self._at_load: list[tuple[nn.Module, dict[str, Any]]] = []
        self._published = {(id(p.slot.layer), p.slot.name): p for p in served.published}
        self._processing = Processing(served, self._weights_of, self.slots, self.atomic)
        self._processed: list[Processed] = []
        self._report: LoadReport | None = None
        self._ending = self._told = self._voted = False
        self._before = Snapshot(served.root, values=self.atomic)
        try:
            self._arm()
        except BaseException as error:
            self.abort(error)
            raise
        served.open = self

    # Arming

    def _arm(self) -> None:
        lazy: dict[int, LazyWeight] = {}
        for prefix, module in self.served.root.named_modules():
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
        if isinstance(weight, ReloadedWeight) and live is not None:
            weight.open_on(live, self.second_copy, early=not self.atomic)
        lazy = _lazy(weight)
        lazy.__dict__.update(slot.attributes)
        loader = slot.attributes.get("weight_loader")
        if loader is not None:
            lazy.weight_loader = self.served.incoming.guarded(slot, weight.shape, loader)  # type: ignore[attr-defined]
        return lazy

    def _armed(self, prefix: str, module: nn.Module, name: str, like: torch.Tensor) -> LazyWeight:
        live: torch.Tensor | None = module._parameters.get(name)
        shape, dtype = tuple(like.shape), like.dtype
        # Experts and convolutions may have been repacked into the same shape.
        repacked = live is None or live.shape != like.shape or (live.dim() == 3 and compat.processing_method(module))
        alias = self.served.aliases.get((id(module), name))
        if repacked and alias is not None and alias.dtype == dtype:
            live, repacked = alias.view(shape), False
        made: type[ArmedWeight] = ArmedWeight if repacked else ReloadedWeight
        device = _device_of(module) if live is None else live.device
        weight = made(self, shape, dtype if repacked else live.dtype, device, (module, name))  # type: ignore[union-attr]
        weight.scheme = None
        self.slots[weight] = Slot(prefix, module, name, lambda _: None, {})
        if isinstance(weight, ReloadedWeight):
            weight.open_on(cast(torch.Tensor, live).detach(), self.second_copy, early=not self.atomic)
        lazy = _lazy(weight)
        lazy.__class__ = _lazy_class(type(like))
        lazy.__dict__.update(like.__dict__)
        return lazy

    # What armed weights ask (lazy.weight.Host)

    def completed(self, weight: ArmedWeight) -> None:
        self.hold(weight)  # A loader sees a lazy weight to the end; the layer serves what it has published.

    def reopened(self, weight: ArmedWeight) -> None:
        self.hold(weight, -1)

    # Loading

    def load_weights(self, inner: Any, weights: Weights, args: Any, kwargs: Any) -> Any:
        """One chunk: the model's own `load_weights`, with lazy weights in place. An error ends the reload."""
        try:
            if self.whole_checkpoint:
                require_written(self.served)
            with self._lazy_in_place():
                loaded = self.served.incoming.load(inner, weights, args, kwargs)
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

    def prepare(self) -> None:
        """What serves has its old values still, or those that `absorb` can take back."""
        self._ending = True
        self._release_all()
        self._verify()
        self.agree()
        self._processed = list(self._processing.made()) if self.atomic else []
        self._processing.absorb()
        self._report = self._summary()

    def vote(self) -> None:
        """All ranks of the engine, those that share no scales included."""
        super().vote()
        self._told = True
        problems = compat.tell_all_ranks(None)
        if problems:
            raise _told(QTensorError("the new weights were not taken: " + "; ".join(problems)))
        self._voted = True

    def withdraw(self, error: BaseException | None) -> bool:
        """The other ranks may be waiting at the end of the call, or of all calls."""
        super().withdraw(error)
        if not self._told and (self._ending or (error is not None and self.one_call)):
            self._told = True
            compat.tell_all_ranks((str(error) or type(error).__name__) if error is not None else "it was given up")
            if error is not None:
                _told(error)
        return not self._voted

    def commit(self) -> None:
        """With `per_weight` layers still make what they keep here."""
        for weight in self._weights:
            weight.commit()
        for layer in self._processed if self.atomic else self._processing.made():
            layer.place()
        self._processing.keep()

    def roll_back(self) -> None:
        for weight in self._weights:
            weight.discard()
        self._processing.take_back()
        self._before.restore()
        if not self.atomic:
            # Weights that are live already have new values, and what is derived from them follows.
            for processed in self._processing.made():
                processed.place()
            self._processing.absorb()

    def close(self, state: State) -> None:
        super().close(state)
        self.slots.clear()
        self._at_load.clear()
        self._weights_of.clear()
        self._processed.clear()
        if state == "finished" and self._report is not None:
            self._report.seconds = time.perf_counter() - self._memory.started
            self.served.report = self._report

    def tell(self) -> None:
        report = self._report
        assert report is not None
        for warning in report.warnings:
            compat.logger().warning("qtensor: %s", printable(warning))
        compat.logger().info(
            "qtensor: reloaded %d weights in %.2f seconds; peak second copy %.1f MiB, peak staging %.1f MiB",
            len(report.layers) - len(set(report.untouched) & {layer.name for layer in report.layers}),
            report.seconds,
            report.peak_second_copy_bytes / 2**20,
            report.peak_staged_bytes / 2**20,
        )

    def _verify(self) -> None:
        lines: list[str] = []
        boxes: dict[str, list[Box]] = {}
        for weight, slot in self.slots.items():
            if not weight.coverage.complete:
                if weight.error is not None:
                    raise weight.error
                if self._must_be_whole(weight) and weight.coverage.numel and not self._was_computed(weight):
                    boxes[slot.full_name] = weight.coverage.missing()
                    lines += self.served.names.describe(
                        slot.prefix, slot.layer, slot.name, weight.shape, boxes[slot.full_name]
                    )
                elif weight.in_place and _has_open_units(weight):
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
        if weight.in_place and weight.scheme is not None:
            # What ranks share is quantized by all of them together, or not at all.
            return _has_open_units(weight) and not (self.keep_parts and weight.shared is False)
        # A kernel that keeps its own form of the weights takes all of a layer's at once.
        return weight.scheme is not None and any(
            w.coverage.covered for w in self._processing.quantized(weight.owner[0])
        )

    def _was_computed(self, weight: ArmedWeight) -> bool:
        """The model's own `load_weights` reports it as loaded, and wrote nothing: it stands for another parameter."""
        if weight.scheme is not None or weight.coverage.covered:
            return False
        return self.slots[weight].full_name in self._names_loaded

    def _summary(self) -> LoadReport:
        first = self.served.report
        assert first is not None
        report = self._summary_of("finished", first.scheme)
        report.layers = [replace(layer, lossy_reads=0, began=None, done=None) for layer in first.layers]
        report.passthrough_bytes = first.passthrough_bytes
        report.warnings = list(self._warnings)
        for weight, slot in self.slots.items():
            if not weight.coverage.covered:
                report.untouched.append(slot.full_name)
            elif not weight.coverage.complete:
                report.missing[slot.full_name] = weight.coverage.missing()
        return self._sum_up(report)


def _told(error: BaseException) -> BaseException:
    """All ranks know of this error (see `entry._raise_on_the_last_rank`)."""
    error.told_all_ranks = True  # type: ignore[attr-defined]
    return error


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


def _has_open_units(weight: ArmedWeight) -> bool:
    return isinstance(weight.store, QuantStore) and weight.store.has_open_units()


def _device_of(module: nn.Module) -> torch.device:
    found = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), None)
    return found or torch.get_default_device()
