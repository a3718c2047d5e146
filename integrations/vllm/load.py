"""Load: one model being filled by one of vLLM's loaders, in one worker.

It plays the session for the lazy weights of that model (see `lazy.weight.Host`): it arms them when vLLM's layers
create their weights, and at the end verifies that everything arrived, has each layer publish its quantized weights,
and keeps the report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from qtensor.lazy.counter import CopyCounter
from qtensor.lazy.lazy_tensor import LazyWeight, LiveQTensor, close, parameter
from qtensor.lazy.quant_store import QuantStore
from qtensor.lazy.weight import ArmedWeight
from qtensor.regions.coverage import Box
from qtensor.report.memory import resident_bytes
from qtensor.report.report import LoadReport
from qtensor.schemes.scheme import Scheme
from qtensor.sessions.transaction import State
from qtensor.tensor.qtensor import QTensor
from qtensor.text import printable

from . import compat, garbage, snapshots
from .incoming import Weights
from .layers import Published, Slot, aliases
from .missing import refuse_incomplete
from .reporting import announce, write
from .served import Filling, ServedModel, require_written

_ARMED = (LazyWeight, LiveQTensor)


class Load(Filling):
    """The armed weights of one model, from their creation to their publication.

    padding: a layer that is being built writes zeros where no checkpoint will.
    """

    why_closed: ClassVar[dict[State, str]] = {"finished": "its model has been loaded", "aborted": "its load failed"}

    def __init__(self, served: ServedModel) -> None:
        super().__init__(served)
        self.padding = False
        self._gaps: list[str] = []  # what is missing besides armed weights, a line for each
        self._published: list[Published] = []
        self._report: LoadReport | None = None
        self._resident_before = resident_bytes()[0]
        # vLLM's dummy loader "loads" random initial values.
        self.on_missing = "init" if served.setting.load_format == "dummy" else "error"
        served.open = self

    # Arming

    def arm(
        self,
        prefix: str,
        layer: nn.Module,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        scheme: Scheme,
        publish: Callable[[nn.Module], None],
        attributes: dict[str, Any],
        split: frozenset[int],
        read: Callable[[nn.Module], QTensor | None] | None = None,
    ) -> ArmedWeight:
        """Register a lazy parameter `name` on `layer`, with vLLM's `attributes` (weight_loader, input_dim, ...).

        split: the dimensions of its matrices that are split over ranks. read: see `Slot`.
        """
        device = torch.get_default_device()
        weight = ArmedWeight(self, shape, dtype, device, (layer, name))
        weight.scheme = scheme
        self.slots[weight] = slot = Slot(prefix, layer, name, publish, dict(attributes), split, read)
        self.share(weight, slot)
        param = parameter(weight, requires_grad=False)
        loader = attributes.get("weight_loader")
        param.__dict__.update(attributes)
        if loader is not None:
            param.weight_loader = self.served.incoming.guarded(slot, shape, loader)  # type: ignore[attr-defined]
        layer.register_parameter(name, param)  # type: ignore[arg-type]
        return weight

    def disarm(self, layer: nn.Module, name: str) -> None:
        """The model does without this weight after all: another layer's stands for it."""
        layer._parameters.pop(name)
        for weight in [w for w, slot in self.slots.items() if slot.layer is layer and slot.name == name]:
            del self.slots[weight]
            self._weights.discard(weight)
            weight.discard()

    # What armed weights ask (lazy.weight.Host)

    def touch(self, weight: ArmedWeight) -> None:
        if not self._writing and not self.padding:
            self._choice_is_settled()
        super().touch(weight)

    def completed(self, weight: ArmedWeight) -> None:
        super().completed(weight)
        risen = resident_bytes()[0] - self._resident_before
        self.served.resident_peak = max(self.served.resident_peak, risen)

    def _choice_is_settled(self) -> None:
        """All layers exist and no weight has been read: the moment to refuse patterns that match nothing."""
        if self.served.setting.all_layers:
            self.served.choice.require_all_used()

    # Loading

    def load_weights(self, inner: Callable[..., Any], weights: Weights, args: Any, kwargs: Any) -> Any:
        """The model's own `load_weights`, and the end of the load."""
        setting, root = self.served.setting, self.served.root
        garbage.leave_out_what_is_there()
        try:
            self._choice_is_settled()
            loaded = snapshots.load(self)
            if loaded is None:
                require_written(self.served)
                with CopyCounter(root) as counter:
                    loaded = self.served.incoming.load(inner, weights, args, kwargs)
                self._gaps = self._plain_gaps(counter, set(loaded or ()))
        except BaseException as error:
            self.abort(error)
            raise
        self.finish()
        if setting.load_format == "tensorizer":
            compat.process_like_other_loaders(root, setting.model_config)
        return loaded

    def _plain_gaps(self, counter: CopyCounter, loaded: set[str]) -> list[str]:
        """One line per parameter outside of our care that the loader left unwritten, as vLLM checks for unquantized
        models by name; here by element, so that a fused bias or an ignored layer with a part missing is found too."""
        root = self.served.root
        lines = []
        lent = self._lent()
        armed = {name for name, p in root.named_parameters(remove_duplicate=False) if isinstance(p, _ARMED)}
        params = dict(root.named_parameters(remove_duplicate=False))
        tied: dict[int, list[str]] = {}
        for name, param in params.items():
            tied.setdefault(id(param), []).append(name)
        for name, boxes in counter.missing().items():
            if name not in params or name in armed or not params[name].numel():
                continue
            param = params[name]
            twins = tied[id(param)]
            if name != twins[0] or (loaded.intersection(twins) and boxes == [tuple((0, n) for n in param.shape)]):
                continue  # Computed by the model's own load_weights, which reports it as loaded.
            module_name, _, own = name.rpartition(".")
            if module_name.rpartition(".")[2] in lent and boxes == [tuple((0, n) for n in param.shape)]:
                continue
            module = root.get_submodule(module_name)
            lines += self.served.names.describe(module_name, module, own, tuple(param.shape), boxes)
        return lines

    def _lent(self) -> set[str]:
        """The layers of a draft that vLLM replaces by its target's when both are loaded: its flags tell of tensors that
        came for them, and a model without flags never has its own."""
        setting, root = self.served.setting, self.served.root
        if not setting.draft:
            return set()
        lent = {"lm_head": "has_own_lm_head"} | (
            {"embed_tokens": "has_own_embed_tokens"} if setting.stages == 1 else {}
        )
        return {name for name, own in lent.items() if not getattr(root, own, False)}

    def _do_without_lent(self) -> None:
        """Layers of our care that the target's stand for, and nothing was written to."""
        lent = self._lent()
        for weight, slot in list(self.slots.items()):
            if slot.prefix.rpartition(".")[2] in lent and not weight.coverage.covered:
                self.disarm(slot.layer, slot.name)

    # The end

    def finish(self) -> None:
        """Verify and publish, for loaders that do not go through `model.load_weights` (sharded_state, dummy).

        Raises IncompleteLoadError naming the checkpoint's tensors that are missing.
        """
        if self.undecided:
            super().finish()

    def prepare(self) -> None:
        """Everything has to be there, and each layer gets its quantized weights in the form its kernel wants. After an
        error the model is of no use, and nothing was served before."""
        self._do_without_lent()
        self._verify()
        self.agree()
        self.served.aliases = aliases(self.served.root)
        self.served.plain = snapshots.plain_names(self.served.root)
        self._report = self._summary()
        for weight, slot in self.slots.items():
            compat.keep_plain_reload_record(slot.layer, slot.name, weight.shape, weight.dtype, slot.attributes)
        for layer, publish in {id(s.layer): (s.layer, s.publish) for s in self.slots.values()}.values():
            publish(layer)
        self._published = [
            Published.find(slot, weight, weight.store.result)
            for weight, slot in self.slots.items()
            if isinstance(weight.store, QuantStore)
        ]

    def commit(self) -> None:
        self.served.published = self._published
        for weight in self.slots:
            for param in weight.params:
                close(param)

    def roll_back(self) -> None:
        for weight in list(self._weights):
            weight.discard()

    def close(self, state: State) -> None:
        super().close(state)
        if state == "finished":
            self.slots.clear()
            self.served.report = self._report
        else:
            garbage.take_in_again()

    def tell(self) -> None:
        assert self._report is not None
        announce(self._report, self.served.resident_peak)
        where = self.served.choice.options.report
        if where:
            try:
                write(self._report, where)
            except OSError as error:
                compat.logger().warning(
                    "qtensor: the report could not be written to %s: %s", where, printable(str(error))
                )

    def _verify(self) -> None:
        lines = []
        boxes: dict[str, list[Box]] = {}
        names = self.served.names
        for weight, slot in self.slots.items():
            weight.release()
            if not weight.coverage.complete and not (self.on_missing == "init" and weight.fill_missing("init")):
                if weight.error is not None:
                    raise weight.error
                boxes[slot.full_name] = weight.coverage.missing()
                lines += names.describe(slot.prefix, slot.layer, slot.name, weight.shape, boxes[slot.full_name])
            weight.verify()
        lines += self._gaps
        if lines:
            refuse_incomplete("the checkpoint is incomplete, so the model was not loaded", lines, boxes)

    def _summary(self) -> LoadReport:
        schemes = sorted({str(w.scheme) for w in self.slots})
        report = self._summary_of("finished", ", ".join(schemes))
        mine: set[int] = set()
        for weight, slot in self.slots.items():
            mine.update(map(id, weight.params))
            if isinstance(weight.store, QuantStore):
                report.layers.append(self._layer(slot.full_name, weight.store.result, weight))
        for param in {id(p): p for p in self.served.root.parameters()}.values():
            if id(param) not in mine and not param.is_meta and not isinstance(param, _ARMED):
                report.passthrough_bytes += param.nbytes
        return self._sum_up(report)
