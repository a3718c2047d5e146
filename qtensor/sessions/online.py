"""online_quant: quantize a model's weights while any loader fills them.

It turns weights lazy as a model is constructed (in the calling thread), or those of a given model, and at the end
takes in what was assigned where no hook could see it and gives every weight its final form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ConfigError, NonFiniteWeightError, QTensorError
from ..lazy.lazy_tensor import LazyWeight, LiveQTensor, close, parameter, reopen, swap, view_of
from ..lazy.plain_store import PlainStore
from ..lazy.weight import ArmedWeight
from ..modules import Owner, full_name, home, is_dtensor, local_tensor, parameters, rehome
from ..ranks.sharding import Agreements, Sharding
from ..ranks.vote import describe
from ..report.progress import ProgressLike
from ..report.report import LoadReport
from ..schemes.config import SchemeSpec
from ..schemes.scheme import Scheme, Targets
from ..schemes.selection import DEFAULT_IGNORE, Selection
from ..tensor.qtensor import QTensor, quantize
from . import registration
from .session import OnMissing, OnNonfinite, Session, attributes_of


def online_quant(
    scheme: SchemeSpec,
    model: nn.Module | None = None,
    *,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    targets: Targets | None = None,
    device: torch.device | str | None = None,
    on_missing: OnMissing = "error",
    on_nonfinite: OnNonfinite = "error",
    strict_reads: bool = False,
    process_group: dist.ProcessGroup | Sharding | None = None,
    min_sqnr: float | None = None,
    measure_sqnr: bool = False,
    progress: ProgressLike = None,
) -> Session:
    """Quantize weights while any loader fills them.

    Used as a context manager. Without `model`, every matching weight registered inside the block by the calling thread
    is armed as it is made. With `model`, its existing weights are armed now; it may be on the meta device, and
    whatever values it had are given up.

    scheme: a `Scheme` or its name, for nn.Linear and 3-d experts; `{pattern: scheme}`, for what the patterns match
        instead; or vLLM's quantization_config, a dictionary or JSON with `linear`, `moe`, `ignore`, `targets`.
    ignore, targets: patterns on the names a user sees (an exact name, "re:..." or a glob); `targets` replaces the
        default choice and may map patterns to schemes.
    device: where quantized weights live; by default where the weight was created, or the CPU if that was "meta".
    on_missing: what becomes of elements nobody wrote: "error" raises IncompleteLoadError, "zero" fills them, "keep"
        keeps the values the model had, "init" its random initialisation.
    on_nonfinite: "error" refuses NaN and infinity by name and index; "keep" stores them.
    strict_reads: raise LossyReadError when a loader reads back what is already quantized, instead of counting it.
    process_group: ranks that hold shards of the same weights. They agree on scales that are split among them, so that
        each holds the bytes of its part of the unsharded result; all of them open and finish the session, and if one
        fails all raise. A `Sharding` says which weights are split along which dimension.
    min_sqnr: in dB; a weight whose signal-to-quantization-noise ratio falls below stays in high precision. Weights are
        then staged whole.
    measure_sqnr: report every weight's signal-to-quantization-noise ratio. It is summed up as rows are quantized, and
        nothing is staged for it; a row that is written twice counts twice.
    progress: True shows a progress bar, False none; by default there is one only on a terminal. A callable is called
        with a `ProgressEvent` each time a weight is chosen or complete, and no bar is shown.
    """
    return OnlineSession(
        Selection(scheme, ignore, targets),
        model,
        device,
        on_missing,
        on_nonfinite,
        strict_reads,
        process_group,
        min_sqnr,
        measure_sqnr,
        progress,
    )


class OnlineSession(Session):
    """One load into weights that are quantized as they arrive."""

    opener = "online_quant"

    def __init__(
        self,
        selection: Selection,
        model: nn.Module | None,
        device: torch.device | str | None,
        on_missing: OnMissing,
        on_nonfinite: OnNonfinite,
        strict_reads: bool,
        process_group: dist.ProcessGroup | Sharding | None,
        min_sqnr: float | None,
        measure_sqnr: bool,
        progress: ProgressLike,
    ) -> None:
        super().__init__(model, str(selection.config), on_missing, on_nonfinite, strict_reads, progress)
        if on_missing not in ("error", "zero", "keep", "init"):
            raise ConfigError(f'on_missing is "error", "zero", "keep" or "init", not {on_missing!r}')
        if process_group is not None and min_sqnr is not None:
            raise ConfigError("min_sqnr decides by what one rank sees; it cannot be combined with process_group")
        self.min_sqnr, self.measure_sqnr = min_sqnr, measure_sqnr
        self._agreements = Agreements(process_group)
        self._selection = selection
        self._device = torch.device(device) if device is not None else None
        if model is not None:
            self._begin()
            try:
                self._arm_model(model)
                self._fsdp.let_go_of_values()
            except BaseException as error:
                self._abandon(error)
                raise

    def __enter__(self) -> Self:
        if self._state == "new":
            if registration.listening() is not None:
                raise QTensorError("online_quant is already active in this thread; sessions do not nest")
            self._begin()
            registration.listen(self)
        return super().__enter__()

    def _settings(self) -> dict[str, str]:
        targets = self._selection.targets
        return super()._settings() | {
            "ignore": ", ".join(self._selection.ignore),
            "targets": "nn.Linear and 3-d experts"
            if targets is None
            else ", ".join(f"{pattern} → {scheme}" for pattern, scheme in targets.items()),
            "device": str(self._device or "where each weight was created"),
            "min_sqnr": "none" if self.min_sqnr is None else f"{self.min_sqnr:g} dB",
            "measure_sqnr": str(self.measure_sqnr),
        }

    # Arming

    def constructed(self, module: nn.Module, name: str, param: nn.Parameter) -> torch.Tensor | None:
        """A parameter was registered by the thread this session listens to: arm it if it is being created."""
        self._tree.note(module)
        if not param.is_floating_point() or type(param) is not nn.Parameter or not registration.is_constructing(module):
            return None
        return self._lazy(module, name, param, trusted=False)

    def attached(self, parent: nn.Module, child: nn.Module | None) -> None:
        self._tree.note(parent)
        if child is not None:
            self._tree.note(child, parent)

    def _arm_model(self, model: nn.Module) -> None:
        seen: dict[int, list[Owner]] = {}
        tensors: dict[int, torch.Tensor] = {}
        for module_name, module, name, whole in parameters(model):
            param = local_tensor(whole)
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
        self._replace(param, lazy, owners)
        weight.params = [local_tensor(module._parameters[name])]
        if whole.is_meta and whole is not param:
            swap(whole, rehome(whole))

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
        target = self._device or device or home(param)
        weight = ArmedWeight(self, tuple(param.shape), param.dtype, target, (module, name))
        has_values = not param.is_meta and not isinstance(param, LazyWeight)
        values = param.detach().contiguous() if has_values else None
        if quantizable is None:
            quantizable = self._selection.candidate(module, name, param)
        if not quantizable:
            weight.scheme = None
            if values is not None:
                weight.store = PlainStore(values.to(target), weight.coverage, initialised=trusted)
        elif values is not None and (self.on_missing == "init" or (self.on_missing == "keep" and trusted)):
            weight.initial = values
        lazy = parameter(weight, param.requires_grad)
        lazy.__dict__.update(attributes_of(param))
        return lazy

    def touch(self, weight: ArmedWeight) -> None:
        self._agreements.advance()
        super().touch(weight)

    def submit(self, weight: ArmedWeight) -> None:
        self._agreements.submit(weight)

    def decide(self, weight: ArmedWeight) -> Scheme | None:
        owners = self._tree.owners(weight)
        _, module, name = owners[0]
        held = module._parameters.get(name)
        return self._decide(weight, owners, held if is_dtensor(held) and held is not None else weight.params[0])

    def _decide(self, weight: ArmedWeight, owners: Sequence[Owner], param: torch.Tensor) -> Scheme | None:
        scheme = self._selection.scheme_for(owners, param)
        if scheme is not None:
            self._progress.expect(1)
            if self._agreements.share(weight, owners, param, scheme.format) and self.min_sqnr is not None:
                raise ConfigError("min_sqnr decides by what one rank sees; it cannot be combined with split scales")
        return scheme

    # Finishing

    def _gather(self) -> None:
        self._retie()
        self._quantize_unseen()

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

    def _realise(self) -> None:
        """Lazy weights take their final form: QTensor, or an ordinary Parameter."""
        for _, module, name, buffer in list(self._tree.lazy_buffers()):
            store = buffer._armed.store
            if isinstance(store, PlainStore):
                # A buffer may be a view of a parameter, and goes on aliasing it.
                module._buffers[name] = store.at(view_of(buffer))
        live = self._tree.live(self)
        for weight, owners in live.items():
            held: list[torch.Tensor | None] = [local_tensor(m._parameters.get(n)) for _, m, n in owners]
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

    def _agree(self) -> None:
        self._agreements.finish()

    def _abandon(self, error: BaseException | None) -> None:
        if self._state == "open":
            self._agreements.fail(describe(error) if error is not None else "its session was aborted")
        super()._abandon(error)

    def _summary(self, state: str) -> LoadReport:
        report = super()._summary(state)
        report.collectives, report.collective_bytes = self._agreements.collectives, self._agreements.bytes
        return report

    def _undo(self) -> None:
        for weight in list(self._weights):
            kept = weight.store if isinstance(weight.store, PlainStore) and weight.store.initialised else None
            if kept is None:
                weight.discard()
            for param in weight.params:
                if isinstance(param, LiveQTensor):
                    reopen(param)
                elif kept is not None and isinstance(param, LazyWeight):
                    self._replace(param, _plain_parameter(param, kept.tensor))

    def _warn(self) -> None:
        assert self._report is not None
        unused = self._selection.unused_patterns()
        if unused:
            self._warnings.append(f"patterns that matched no weight: {', '.join(unused)}")
        if not self._report.layers:
            self._warnings.append(
                "nothing was quantized: no weight inside the block matched (nn.Linear and 3-d experts by default)"
            )
        super()._warn()


def _plain_parameter(lazy: LazyWeight, tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=lazy.requires_grad)
