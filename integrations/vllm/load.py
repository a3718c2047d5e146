"""Load: one model being filled by one of vLLM's loaders, in one worker.

It plays the session for the lazy weights of that model (see `lazy.weight.Host`): it arms them when vLLM's layers
create their weights, listens to `model.load_weights` for the names a checkpoint uses, and at the end verifies that
everything arrived, has each layer publish its quantized weights, and keeps the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from qtensor.callers import outermost_under_construction
from qtensor.checkpoint.reading import describe_truncated
from qtensor.errors import QTensorError, WeightShapeError
from qtensor.lazy.counter import CopyCounter
from qtensor.lazy.lazy_tensor import LazyWeight, LiveQTensor, close, parameter
from qtensor.lazy.quant_store import QuantStore
from qtensor.lazy.weight import ArmedWeight
from qtensor.regions.coverage import Box
from qtensor.report.memory import resident_bytes
from qtensor.report.report import LoadReport
from qtensor.schemes.scheme import Scheme

from . import compat
from .layers import Published, Slot, aliases
from .missing import Names, refuse_incomplete
from .options import Choice
from .parallel import RankHost
from .reporting import announce, rank, write

if TYPE_CHECKING:
    from .reload import Reload

_ATTRIBUTE = "_qtensor_load"
# What vLLM's loaders and PyTorch's copies raise for a tensor of another shape.
_MISFITS = (AssertionError, IndexError, RuntimeError, ValueError)


def load_of(choice: Choice) -> Load:
    """The load of the model that is being constructed by the caller's callers; begun if this is its first layer.

    vLLM gives a quantization method no handle on the model, so the model is taken from the stack: the outermost module
    whose `__init__` is running.
    """
    root = outermost_under_construction()
    if root is None:
        raise QTensorError("qtensor: vLLM created a layer outside of any model; the plugin does not know this route")
    load: Load | None = root.__dict__.get(_ATTRIBUTE)
    if load is None:
        from . import entry

        load = Load(root, choice)
        compat.add_worker_method("qtensor_report", worker_report)
        entry.take_over()
        compat.shield_llvmlite()
        object.__setattr__(root, _ATTRIBUTE, load)
    return load


def find_load(model: nn.Module) -> Load | None:
    """The load that filled `model`, if qtensor had any part in it."""
    for module in model.modules():
        load = module.__dict__.get(_ATTRIBUTE)
        if isinstance(load, Load):
            return load
    return None


class Load(RankHost):
    """The armed weights of one model, from their creation to their publication.

    padding: a layer that is being built writes zeros where no checkpoint will.
    """

    def __init__(self, root: nn.Module, choice: Choice) -> None:
        super().__init__()
        self.root, self.choice = root, choice
        self.refuse_nonfinite = choice.options.on_nonfinite == "error"
        self.names = Names()
        self.slots: dict[ArmedWeight, Slot] = {}
        self.published: list[Published] = []
        self.aliases: dict[tuple[int, str], torch.Tensor] = {}
        self.reload: Reload | None = None
        self.report: LoadReport | None = None
        self.resident_peak = 0
        self.padding = False
        self._resident_before = resident_bytes()[0]
        self._context = _Context()
        self._setting = _Setting.current()
        # vLLM's dummy loader "loads" random initial values.
        self.on_missing = "init" if self._setting.load_format == "dummy" else "error"
        self._listen()

    @property
    def dtype(self) -> torch.dtype | None:
        """What the model computes in."""
        return self._setting.model_config.dtype if self._setting.model_config is not None else None

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
    ) -> ArmedWeight:
        """Register a lazy parameter `name` on `layer`, with vLLM's `attributes` (weight_loader, input_dim, ...).

        split: the dimensions of its matrices that are split over ranks.
        """
        device = torch.get_default_device()
        weight = ArmedWeight(self, shape, dtype, device, (layer, name))
        weight.scheme = scheme
        self.slots[weight] = slot = Slot(prefix, layer, name, publish, dict(attributes), split)
        self.share(weight, slot)
        param = parameter(weight, requires_grad=False)
        loader = attributes.get("weight_loader")
        param.__dict__.update(attributes)
        if loader is not None:
            param.weight_loader = self.guarded(weight, loader)  # type: ignore[attr-defined]
        layer.register_parameter(name, param)  # type: ignore[arg-type]
        return weight

    def disarm(self, layer: nn.Module, name: str) -> None:
        """The model does without this weight after all: another layer's stands for it."""
        layer._parameters.pop(name)
        for weight in [w for w, slot in self.slots.items() if slot.layer is layer and slot.name == name]:
            del self.slots[weight]
            self._weights.discard(weight)
            weight.discard()

    def guarded(self, weight: ArmedWeight, loader: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's weight loader, whose errors name the tensor of the checkpoint, the layer and the remedy."""

        @functools.wraps(loader)
        def weight_loader(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs.get("loaded_weight", args[1] if len(args) > 1 else None)
            slot = self.slots.get(weight)
            if slot is None:
                return loader(*args, **kwargs)
            extra = {k: v for k, v in kwargs.items() if k in ("shard_id", "expert_id", "loaded_shard_id")}
            shard = extra.get("shard_id", extra.get("loaded_shard_id", args[2] if len(args) > 2 else None))
            shape = self._context.shape
            self.names.saw(slot.prefix, slot.name, shard, extra.get("expert_id"), self._context.current, shape)
            try:
                return loader(*args, **kwargs)
            except QTensorError:
                raise
            except Exception as error:
                found = f"{self._source(slot)} {list(tensor.shape) if isinstance(tensor, torch.Tensor) else ''}".strip()
                if isinstance(error, _MISFITS) and not isinstance(error, torch.OutOfMemoryError):
                    raise WeightShapeError(
                        f"{found} does not fit {slot.full_name} {list(weight.shape)}{_because(error)}. "
                        "Is this checkpoint made for this model's config.json and this parallel layout?"
                    ) from error
                raise QTensorError(f"{found} could not be written to {slot.full_name}{_because(error)}") from error

        return weight_loader

    def _source(self, slot: Slot) -> str:
        current = self._context.current
        return f"the checkpoint's tensor '{current}'" if current else "the tensor being loaded"

    # What armed weights ask (lazy.weight.Host)

    def decide(self, weight: ArmedWeight) -> Scheme | None:
        scheme: Scheme | None = weight.scheme
        return scheme

    def name_of(self, weight: ArmedWeight) -> str:
        """For messages: the checkpoint's name while one of its tensors is being written, and the layer's."""
        slot = self.slots.get(weight)
        name = slot.full_name if slot is not None else weight.owner[1]
        current = self._context.current
        return f"{name} (from the checkpoint's tensor '{current}')" if current else name

    def touch(self, weight: ArmedWeight) -> None:
        if not self._writing and not self.padding:
            self.choice_is_settled()
        super().touch(weight)

    def completed(self, weight: ArmedWeight) -> None:
        super().completed(weight)
        self.resident_peak = max(self.resident_peak, resident_bytes()[0] - self._resident_before)

    # The loader's call

    def _listen(self) -> None:
        """See every (name, tensor) that a loader hands to the model. A wrapper on this one model, not on its class."""
        inner = getattr(self.root, "load_weights", None)
        if inner is None:
            return

        @functools.wraps(inner)
        def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
            if self._context.active or (self.closed and self.report is None):
                return inner(weights, *args, **kwargs)
            if self.closed:
                from .entry import load_again

                return load_again(self, inner, weights, args, kwargs)
            self.choice_is_settled()
            try:
                with CopyCounter(self.root) as counter:
                    loaded = self.run(inner, weights, args, kwargs)
            except BaseException as error:
                self._abort(error)
                raise
            self._finish(self._plain_gaps(counter, set(loaded or ())))
            if self._setting.load_format == "tensorizer":
                compat.process_like_other_loaders(self.root, self._setting.model_config)
            return loaded

        object.__setattr__(self.root, "load_weights", load_weights)

    def run(
        self, inner: Callable[..., Any], weights: Iterable[tuple[str, torch.Tensor]], args: Any, kwargs: Any
    ) -> Any:
        """The model's own `load_weights`, whose errors name the tensor that was being loaded."""
        context = self._context
        context.active = True
        try:
            return inner(context.follow(weights), *args, **kwargs)
        except QTensorError:
            raise
        except Exception as error:
            self._reraise(error)
        finally:
            context.active = False
            context.current = None

    def _reraise(self, error: Exception) -> NoReturn:
        context = self._context
        if context.reading is error or type(error).__name__ == "SafetensorError":
            where = f" after '{context.last}'" if context.last else ""
            files = describe_truncated(self._setting.folder)
            raise QTensorError(
                f"the checkpoint could not be read{where}: {error}. {files} Download the checkpoint again, or convert "
                "it again."
            ) from error
        if context.current is None:
            raise error
        shape = list(context.shape) if context.shape is not None else ""
        raise QTensorError(
            f"the checkpoint's tensor '{context.current}' {shape} cannot be loaded into {type(self.root).__name__}"
            f"{_because(error)}. Either the checkpoint is not made for this config.json, or this tensor does not "
            "belong in it."
        ) from error

    def choice_is_settled(self) -> None:
        """All layers exist and no weight has been read: the moment to refuse patterns that match nothing."""
        if self._setting.all_layers:
            self.choice.require_all_used()

    def _plain_gaps(self, counter: CopyCounter, loaded: set[str]) -> list[str]:
        """One line per parameter outside of our care that the loader left unwritten, as vLLM checks for unquantized
        models by name; here by element, so that a fused bias or an ignored layer with a part missing is found too."""
        lines = []
        armed = {name for name, p in self.root.named_parameters(remove_duplicate=False) if isinstance(p, _ARMED)}
        params = dict(self.root.named_parameters(remove_duplicate=False))
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
            module = self.root.get_submodule(module_name)
            lines += self.names.describe(module_name, module, own, tuple(param.shape), boxes)
        return lines

    # The end

    def finish(self) -> None:
        """Verify and publish, for loaders that do not go through `model.load_weights` (sharded_state, dummy).

        Raises IncompleteLoadError naming the checkpoint's tensors that are missing.
        """
        if not self.closed:
            self._finish([])

    def _finish(self, gaps: list[str]) -> None:
        try:
            self._verify(gaps)
            self.agree()
        except BaseException as error:
            self._abort(error)
            raise
        self.report = self._summary("finished")
        self.aliases = aliases(self.root)
        slots, self.slots = self.slots, {}
        self._close("its model has been loaded")
        for weight, slot in slots.items():
            compat.keep_plain_reload_record(slot.layer, slot.name, weight.shape, weight.dtype, slot.attributes)
        for layer, publish in {id(s.layer): (s.layer, s.publish) for s in slots.values()}.values():
            publish(layer)
        for weight, slot in slots.items():
            if isinstance(weight.store, QuantStore):
                self.published.append(Published.find(slot, weight, weight.store.result))
            for param in weight.params:
                close(param)
        self._announce()

    def _verify(self, gaps: list[str]) -> None:
        lines = []
        boxes: dict[str, list[Box]] = {}
        for weight, slot in self.slots.items():
            weight.release()
            if not weight.coverage.complete and not (self.on_missing == "init" and weight.fill_missing("init")):
                if weight.error is not None:
                    raise weight.error
                boxes[slot.full_name] = weight.coverage.missing()
                lines += self.names.describe(slot.prefix, slot.layer, slot.name, weight.shape, boxes[slot.full_name])
            weight.verify()
        lines += gaps
        if lines:
            refuse_incomplete("the checkpoint is incomplete, so the model was not loaded", lines, boxes)

    def _abort(self, error: BaseException | None) -> None:
        self.withdraw(error)
        self._close("its load failed")
        for weight in list(self._weights):
            weight.discard()

    def _close(self, reason: str) -> None:
        self.closed = reason
        self._writing.clear()
        self._context.current = None

    # Reporting

    def _summary(self, state: str) -> LoadReport:
        schemes = sorted({str(w.scheme) for w in self.slots})
        report = self._summary_of(state, ", ".join(schemes))
        mine: set[int] = set()
        for weight, slot in self.slots.items():
            mine.update(map(id, weight.params))
            if isinstance(weight.store, QuantStore):
                report.layers.append(self._layer(slot.full_name, weight.store.result, weight))
        for param in {id(p): p for p in self.root.parameters()}.values():
            if id(param) not in mine and not param.is_meta and not isinstance(param, _ARMED):
                report.passthrough_bytes += param.nbytes
        return self._sum_up(report)

    def _announce(self) -> None:
        assert self.report is not None
        announce(self.report, self.resident_peak)
        if self.choice.options.report:
            write(self.report, self.choice.options.report)

    def as_dict(self) -> dict[str, Any]:
        """The report for other processes: plain data only."""
        report = self.report or self._summary("open")
        where = {"rank": rank()[0], "model": type(self.root).__name__, "resident_peak_bytes": self.resident_peak}
        return where | asdict(report)


_ARMED = (LazyWeight, LiveQTensor)


@dataclass(frozen=True)
class _Setting:
    """What the plugin needs of vLLM's configuration, which can be asked for only while a model is built.

    all_layers: the model has every layer, so that a pattern without a match is a mistake; a pipeline stage or a draft
    model has some of them.
    """

    load_format: str
    model_config: Any
    all_layers: bool

    @property
    def folder(self) -> str | None:
        return str(self.model_config.model) if self.model_config is not None else None

    @classmethod
    def current(cls) -> _Setting:
        from vllm.config import get_current_vllm_config
        from vllm.distributed import get_pp_group

        config = get_current_vllm_config()
        model = config.model_config
        if model is None:
            return cls("", None, all_layers=False)
        draft = getattr(model, "runner_type", "") == "draft"
        load_format = config.load_config.load_format
        whole = get_pp_group().world_size == 1 and not draft
        return cls(str(getattr(load_format, "value", load_format)), model, whole)


class _Context:
    """Which tensor of the checkpoint is being loaded: the one the model asked for last and has not finished with."""

    def __init__(self) -> None:
        self.active = False
        self.current: str | None = None
        self.last: str | None = None
        self.shape: torch.Size | None = None
        self.reading: Exception | None = None

    def follow(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        seen: set[str] = set()
        source = iter(weights)
        while True:
            # While the iterator runs no tensor is current: what fails then is the reading of the checkpoint.
            self.current = None
            try:
                item = next(source, None)
            except Exception as error:
                self.reading = error
                raise
            if item is None:
                return
            name, tensor = item
            if name in seen:
                raise QTensorError(
                    f"the checkpoint holds the tensor '{name}' {list(tensor.shape)} more than once, in different files "
                    "perhaps; which one is meant cannot be known. Remove stale files from the checkpoint's folder."
                )
            seen.add(name)
            self.current = self.last = name
            self.shape = tensor.shape
            yield item


def worker_report(worker: Any) -> dict[str, Any] | None:
    """What `collective_rpc("qtensor_report")` answers in each worker; None if qtensor had no part in its model."""
    load = find_load(worker.get_model() if hasattr(worker, "get_model") else worker.model_runner.get_model())
    return load.as_dict() if load is not None else None


def _because(error: Exception) -> str:
    return f": {str(error).rstrip('. ') or type(error).__name__}"
