"""online_quant: quantize a model's weights while any loader fills them.

It turns weights lazy as a model is constructed (in the calling thread), or those of a given model, and at the end
takes in what was assigned where no hook could see it and gives every weight its final form. It is one file because what
arms a weight and what ends a load have to agree on each state that one can be in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..callers import builds_adapter, initialising, is_constructing
from ..errors import ConfigError, QTensorError
from ..kernels.cpu.compiling import Once
from ..lazy.lazy_tensor import LAZY, LazyWeight, LiveQTensor, attributes_of, parameter, reopen
from ..lazy.plain_store import PlainStore
from ..lazy.swap import Swap
from ..lazy.weight import ArmedWeight
from ..modules import Owner, full_name, home, is_dtensor, local_tensor, parameters, rehome
from ..ranks.sharding import Agreements, Sharding
from ..ranks.vote import describe
from ..report.progress import ProgressLike
from ..report.report import LoadReport
from ..schemes.config import SchemeSpec
from ..schemes.scheme import Scheme, SchemeLike, Targets
from ..schemes.selection import DEFAULT_IGNORE, Selection
from ..tensor.qtensor import QTensor
from . import registration
from .adapters import ADAPTER, adapter_parameters, is_low_rank
from .model_transaction import ModelTransaction, waits_for_its_end
from .options import LoadOptions, OnMissing, OnNonfinite, StrictSource, require_memory_on
from .replacing import WHEN_FINISHED, Replacement, final_step, plain_parameter, values_of
from .session import Session
from .transaction import State
from .unseen import quantized, unseen_weights

if TYPE_CHECKING:
    from ..schemes.plan import Plan, Tensor
    from .fitting import Fitting


def online_quant(
    scheme: SchemeSpec | Sequence[SchemeLike] | None = None,
    model: nn.Module | None = None,
    *,
    fit: int | str | None = None,
    reserve: int | str = 0,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    targets: Targets | None = None,
    recipe: str | None = None,
    device: torch.device | str | None = None,
    on_missing: OnMissing = "error",
    on_nonfinite: OnNonfinite = "error",
    strict_reads: bool = False,
    process_group: dist.ProcessGroup | Sharding | None = None,
    min_sqnr: float | None = None,
    measure_sqnr: bool = False,
    progress: ProgressLike = None,
    source: Mapping[str, Any] | None = None,
    strict_source: StrictSource = "any",
) -> Session:
    """Quantize weights while any loader fills them.

    Used as a context manager. Without `model`, every matching weight registered inside the block by the calling thread
    is armed as it is made. With `model`, its existing weights are armed now; it may be on the meta device, and
    whatever values it had are given up.

    Args:
        scheme: A `Scheme` or its name, for nn.Linear and 3-d experts; `{pattern: scheme}`, for what the patterns match
            instead; vLLM's quantization_config, a dictionary or JSON with `linear`, `moe`, `ignore`, `targets`; or a
            `Plan`. With `fit`, the schemes to choose from, by default fp8 and nvfp4.
        model: A model that exists. Nothing process-wide is installed for it before the block is entered.
        fit: Bytes that the model may take, as a number or as "10GB". Each weight then gets the best scheme that leaves
            room for the others, as `plan` chooses; embeddings and head are quantized, too. A little is kept back for
            weights that lose more than expected; weights are staged whole. `session.plan` is what was chosen.
        reserve: Of `fit`, bytes to leave free, for a KV cache and activations.
        ignore: Patterns on the names a user sees (an exact name, "re:..." or a glob) of weights to leave alone.
        targets: Patterns that replace the default choice; they may be mapped to schemes.
        recipe: Give every weight the bytes of another tool: "vllm", "compressed-tensors", "quark" or "torchao", as
            `Scheme.by_recipe`.
        device: Where quantized weights live; by default where the weight was created, or the CPU if that was "meta".
        on_missing: What becomes of elements nobody wrote: "error" raises IncompleteLoadError, "zero" fills them, "keep"
            keeps the values the model had, "init" its random initialisation.
        on_nonfinite: "error" refuses NaN and infinity by name and index; "keep" stores them.
        strict_reads: Raise LossyReadError when a loader reads back what is already quantized, instead of counting it.
        process_group: Ranks that hold shards of the same weights. They agree on scales that are split among them, so
            that each holds the bytes of its part of the unsharded result; all of them open and finish the session, and
            if one fails all raise. A `Sharding` says which weights are split along which dimension.
        min_sqnr: In dB; a weight whose signal-to-quantization-noise ratio falls below stays in high precision. Weights
            are then staged whole.
        measure_sqnr: Report every weight's signal-to-quantization-noise ratio. It is summed up as rows are quantized,
            and nothing is staged for it; a row that is written twice counts twice.
        progress: True shows a progress bar, False none; by default there is one only on a terminal. A callable is
            called with a `ProgressEvent` each time a weight is chosen or complete, and no bar is shown.
        source: The weights arrive quantized: config.json's "quantization_config", or {} where there is none.
        strict_source: "lossless" refuses a weight that arrives quantized and would be quantized a second time.

    Returns:
        The session, to be entered with `with`; with a `model`, `finish()` or `abort()` may be called instead.

    Raises:
        ConfigError: An option is unknown, or has a value it cannot have.
        QTensorError: The model is quantized already, or another session that is open loads it.
    """
    options = LoadOptions(
        on_missing=on_missing,
        on_nonfinite=on_nonfinite,
        strict_reads=strict_reads,
        process_group=process_group,
        progress=progress,
        device=device,  # type: ignore[arg-type]
        min_sqnr=min_sqnr,
        measure_sqnr=measure_sqnr,
        source=source,
        strict_source=strict_source,
    )
    return open_load(choose(scheme, ignore, targets, fit, reserve, options, recipe), model, options)


def choose(
    scheme: SchemeSpec | Sequence[SchemeLike] | None,
    ignore: Sequence[str],
    targets: Targets | None,
    fit: int | str | None,
    reserve: int | str,
    options: LoadOptions,
    recipe: str | None = None,
) -> Selection:
    """The rule for those arguments of `online_quant`. Raises ConfigError."""
    if fit is None:
        if scheme is None or (not isinstance(scheme, str) and isinstance(scheme, Sequence)):
            raise ConfigError(f"scheme is one scheme, or with fit= a list to choose from, not {scheme!r}")
        if reserve != 0:
            raise ConfigError(f"reserve={reserve!r} is kept free of what fit= gives, and there is no fit")
        return Selection(scheme, ignore, targets, recipe)
    if recipe is not None:
        raise ConfigError(f"fit= chooses by what our own formulas lose; recipe={recipe!r} has others; leave one out")
    if targets is not None or options.min_sqnr is not None or options.process_group is not None:
        raise ConfigError(
            "fit= chooses what becomes of each weight, by what one rank sees; it goes with neither targets, min_sqnr "
            "nor process_group. A plan that qtensor.plan has made goes with all of them"
        )
    if isinstance(scheme, Mapping):
        raise ConfigError("with fit=, give a list of schemes to choose from")
    fitting, default_schemes = _fitting()
    return fitting(default_schemes if scheme is None else scheme, ignore, fit, reserve)  # type: ignore[arg-type]


@Once
def _fitting() -> tuple[type[Fitting], Sequence[SchemeLike]]:
    """Imported when it is asked for, and here no interrupt comes."""
    from ..schemes.planning import DEFAULT_SCHEMES
    from .fitting import Fitting

    return Fitting, DEFAULT_SCHEMES


def open_load(selection: Selection, model: nn.Module | None, options: LoadOptions) -> Session:
    """A session of `online_quant`, whose weights are chosen by `selection`."""
    load = Load(selection, model, options)
    session = Session(load)  # From here on somebody ends what is begun.
    if model is not None:
        load.arm(model)
    return session


class Load(ModelTransaction):
    """One load into weights that are quantized as they arrive."""

    opener = "online_quant"
    options: LoadOptions

    def __init__(self, selection: Selection, model: nn.Module | None, options: LoadOptions) -> None:
        super().__init__(model, str(selection), options)
        self.min_sqnr, self.measure_sqnr = options.min_sqnr, options.measure_sqnr
        self.judges = self.min_sqnr is not None or selection.may_change
        self._agreements = Agreements()
        self._selection = selection
        self._arming: Replacement | None = None
        self._expected: set[tuple[int, str]] = set()
        self._unseen: list[tuple[torch.Tensor, list[Owner]]] = []
        self._steps: list[Callable[[], object]] = []

    def enter(self) -> None:
        """The `with` block begins: without a model, what this thread constructs in it is armed."""
        alone = self._tree.model is None
        if alone and registration.listening() is not None:
            raise QTensorError("online_quant is already active in this thread; sessions do not nest")
        try:
            if not self.begun:
                self.begin()
            registration.install(self)
            if alone:
                registration.listen(self)
        except BaseException as error:
            self.abort(error)
            raise

    def _settings(self) -> dict[str, str]:
        targets = self._selection.targets
        return super()._settings() | {
            "ignore": ", ".join(self._selection.ignore),
            "targets": "nn.Linear and 3-d experts"
            if targets is None
            else ", ".join(f"{pattern} → {scheme}" for pattern, scheme in targets.items()),
            "device": str(self.options.device or "where each weight was created"),
            "min_sqnr": "none" if self.min_sqnr is None else f"{self.min_sqnr:g} dB",
            "measure_sqnr": str(self.measure_sqnr),
        }

    def begin(self) -> None:
        require_memory_on(self.options.device)
        super().begin()
        self._agreements = Agreements(self.options.process_group)
        self._agreements.open()

    # Arming

    def arm(self, model: nn.Module) -> None:
        """Arm a model that exists."""
        try:
            self.begin()
            self._arm_model(model)
            self._fsdp.let_go_of_values()
        except BaseException as error:
            self.abort(error)
            raise

    def constructed(self, module: nn.Module, name: str, param: nn.Parameter) -> torch.Tensor | None:
        """A parameter was registered by the thread this session listens to: arm it if it is being created."""
        self._tree.note(module)
        if not param.is_floating_point() or type(param) is not nn.Parameter:
            return None
        if not (is_constructing(module) or (name not in module._parameters and initialising())):
            return None
        return None if is_low_rank(name) or builds_adapter() else self._lazy(module, name, param, trusted=False)

    def attached(self, parent: nn.Module, child: nn.Module | None) -> None:
        self._tree.note(parent)
        if child is not None:
            self._tree.note(child, parent)

    def _arm_model(self, model: nn.Module) -> None:
        self._selection.prepare(self._tensors)
        seen: dict[int, list[Owner]] = {}
        tensors: dict[int, torch.Tensor] = {}
        adapters = adapter_parameters(model)
        for module_name, module, name, whole in parameters(model):
            param = local_tensor(whole)
            if isinstance(param, QTensor):
                raise QTensorError(
                    f"{full_name((module_name, module, name))} is quantized already. Load new values with "
                    "`module.weight.copy_(...)`, or start from a high-precision model."
                )
            if isinstance(param, LAZY) and waits_for_its_end(param):
                raise QTensorError(
                    f"{full_name((module_name, module, name))} is armed by another session that is still open"
                )
            if param.is_floating_point() and id(whole) not in adapters:
                seen.setdefault(id(param), []).append((module_name, module, name))
                tensors[id(param)] = whole
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

    def _arm_existing(self, whole: torch.Tensor, owners: Sequence[Owner]) -> None:
        """Arm a model's parameter; of a DTensor, its local tensor."""
        _, module, name = owners[0]
        param = local_tensor(whole)
        quantizable = self._selection.scheme_for(owners, whole) is not None
        lazy = self._lazy(module, name, param, trusted=True, quantizable=quantizable, device=home(whole))
        weight = lazy._armed
        if param is not whole:
            whole.requires_grad_(whole.requires_grad and not quantizable)
        weight.scheme = self._decide(weight, owners, whole)
        self._arming = Replacement(param, lazy, owners)
        self._arming.do()
        self._arming = None
        weight.params = [local_tensor(module._parameters[name])]
        if whole.is_meta and whole is not param:
            Swap(whole, rehome(whole)).do()

    def _lazy(
        self,
        module: nn.Module,
        name: str,
        param: torch.Tensor,
        *,
        trusted: bool,
        quantizable: bool | None = None,
        device: torch.device | None = None,
    ) -> LazyWeight:
        """A lazy stand-in for `param`, which is given up unless the weight stays plain or its values may be needed.

        trusted: the values are a model's own, not whatever memory held when it was constructed.
        """
        target = self.options.device or device or home(param)
        weight = ArmedWeight(self, tuple(param.shape), param.dtype, target, (module, name))
        weight.on_meta = param.is_meta
        has_values = not param.is_meta and not isinstance(param, LazyWeight)
        values = param.detach().contiguous() if has_values else None
        if quantizable is None:
            quantizable = self._selection.candidate(module, name, param)
        if not quantizable:
            weight.scheme = None
            if values is not None:
                meant = trusted or self.on_missing == "init"
                weight.store = PlainStore(values.to(target), weight.coverage, initialised=meant, constructed=True)
        elif values is not None and (self.on_missing == "init" or (self.on_missing == "keep" and trusted)):
            weight.initial.values, weight.initial.given = values, trusted
        lazy = parameter(weight, param.requires_grad)
        lazy.__dict__.update(attributes_of(param))
        self._watch.over(module)
        return lazy

    def goes_anywhere(self, weight: ArmedWeight) -> bool:
        return self.options.device is None and weight.on_meta and not weight.coverage.covered

    def _why_left(self, owners: Sequence[Owner], values: torch.Tensor) -> str:
        return ADAPTER if is_low_rank(full_name(owners[0])) else self._selection.why_left(owners, values)

    def touch(self, weight: ArmedWeight) -> None:
        self._agreements.advance()
        super().touch(weight)

    def submit(self, weight: ArmedWeight) -> None:
        self._agreements.submit(weight)

    def decide(self, weight: ArmedWeight) -> Scheme | None:
        _, module, name = (owners := self._tree.owners(weight))[0]
        if module is None:  # Somebody writes to a Parameter of a module that is gone.
            return None
        held = module._parameters.get(name)
        self._selection.prepare(self._tensors)
        return self._decide(weight, owners, held if is_dtensor(held) and held is not None else weight.params[0])

    def _decide(self, weight: ArmedWeight, owners: Sequence[Owner], param: torch.Tensor) -> Scheme | None:
        if any(is_low_rank(full_name(owner)) for owner in owners):
            return None
        scheme = self._selection.scheme_for(owners, param)
        if scheme is not None:
            _, module, name = owners[0]
            self._progress.expect(int((id(module), name) not in self._expected))  # Of a shard, its weight was.
            self._expected.add((id(module), name))
            if self._agreements.share(weight, owners, param, scheme.format) and self.min_sqnr is not None:
                raise ConfigError("min_sqnr decides by what one rank sees; it cannot be combined with split scales")
        return scheme

    @property
    def plan(self) -> Plan | None:
        return self._selection.plan

    def _tensors(self) -> list[Tensor]:
        from ..schemes.planning import tensors_of

        named = []
        for owner_name, module, name, param in self._tree.parameters():
            named.append((weight := full_name((owner_name, module, name)), param))
            if is_dtensor(module._parameters.get(name)):
                raise ConfigError(
                    f"{weight} is split over ranks, and fit= chooses by what one rank sees: give all of them a plan "
                    "that qtensor.plan has made"
                )
        return tensors_of(named, self._tree.plain_buffers())

    def judge(self, weight: ArmedWeight, sqnr: float) -> Scheme | None:
        if not self._selection.may_change:
            return super().judge(weight, sqnr)
        chosen = self._selection.better(name := self.name_of(weight), weight.scheme, sqnr)
        if chosen != weight.scheme:
            self._notes[name] = f"{weight.scheme} gave {sqnr:.1f} dB, less than planned: {chosen or 'not quantized'}"
        return chosen

    # Finishing

    def _gather(self) -> None:
        """A Parameter put out of sight under one name and assigned to an armed weight under another is a tie, which
        accelerate makes this way: both names get the armed weight."""
        armed = {id(w.assigned()): w for w in self._weights if w.assigned is not None and w.assigned() is not None}
        for _, module, name, param in list(self._tree.parameters()) if armed else ():
            weight = armed.get(id(param))
            if weight is not None and type(param) is nn.Parameter:
                _, owner, held = self._tree.owners(weight)[0]
                module._parameters[name] = owner._parameters[held]

    def _agree(self) -> None:
        self._agreements.finish()

    def _build(self) -> None:
        self._quantize_unseen()
        self._steps = list(self._final_steps())
        self._steps += [partial(step, model) for model in self._tree.models() for step in WHEN_FINISHED]

    def _quantize_unseen(self) -> None:
        """Weights that were assigned where no hook could see them are quantized now, and freed one by one."""
        for param, owners in unseen_weights(self._tree):
            scheme = self._selection.scheme_for(owners, param)
            if scheme is not None:
                result = quantized(param, owners, scheme, self.options.on_nonfinite, self.options.device)
                self._unseen.append((param, owners))
                Replacement(param, result, owners).do()
                self._notes[full_name(owners[0])] = "assigned out of sight; quantized at finish"

    def _final_steps(self) -> Iterator[Callable[[], object]]:
        """Lazy weights take their final form: QTensor, or an ordinary Parameter."""
        for _, module, name, buffer in list(self._tree.lazy_buffers()):
            if buffer._armed.store is not None:
                yield partial(module._buffers.__setitem__, name, values_of(buffer))
        live = self._tree.live(self)
        for weight, owners in live.items():
            held: list[torch.Tensor | None] = [local_tensor(m._parameters.get(n)) for _, m, n in owners]
            for param in {id(p): p for p in held if p is not None}.values():
                yield final_step(weight, param, owners)
        for weight in [w for w in self._weights if w not in live and w.coverage.complete]:
            # Outside of every model: a deep copy, or a handle someone holds. It was loaded all the same.
            for param in [p for p in weight.params if getattr(p, "_armed", None) is weight]:
                yield final_step(weight, param, ())

    def vote(self) -> None:
        self._agreements.settle()

    def withdraw(self, error: BaseException | None) -> bool:
        return self._agreements.fail(describe(error) if error is not None else "its session was aborted")

    def commit(self) -> None:
        for step in self._steps:
            step()

    def close(self, state: State) -> None:
        super().close(state)
        if state == "finished":
            self._agreements.close()
        else:
            self._agreements.leave()
        self._steps, self._unseen, self._arming = [], [], None

    def _summary(self, state: str) -> LoadReport:
        report = super()._summary(state)
        report.collectives, report.collective_bytes = self._agreements.collectives, self._agreements.bytes
        return report

    def _undo(self) -> None:
        """Values that arrived are given up; the model can be armed again."""
        if self._arming is not None:
            self._arming.do()
        for param, owners in self._unseen:
            if not isinstance(param, LAZY):
                _, module, name = owners[0]
                lazy = self._lazy(module, name, param, trusted=False, quantizable=True)
                Replacement(param, lazy, owners).do()
        for weight in list(self._weights):
            kept = weight.store if isinstance(weight.store, PlainStore) and weight.store.initialised else None
            if kept is None:
                weight.discard()
            for param in weight.params:
                if isinstance(param, LiveQTensor):
                    reopen(param)
                elif kept is not None and isinstance(param, LazyWeight):
                    Replacement(param, plain_parameter(param, kept.tensor), ()).do()

    def _warn(self) -> None:
        assert self._report is not None
        if unused := self._selection.unused_patterns():
            self._warnings.append(f"patterns that matched no weight: {', '.join(unused)}")
        if not self._report.layers:
            self._warnings.append(
                "nothing was quantized: no weight inside the block matched (nn.Linear and 3-d experts by default)"
            )
        super()._warn()
