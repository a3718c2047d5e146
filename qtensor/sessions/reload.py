"""online_reload: new weights into a model that is quantized already, at the same addresses, all or nothing.

The Parameters stay what and where they are. While the reload is open, any loader writes to them; the model goes on
computing with the old values until `finish` commits the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ConfigError, QTensorError, WeightShapeError
from ..kernels import Audit
from ..lazy.lazy_tensor import LAZY, LazyWeight, LiveQTensor, close, parameter, swap
from ..lazy.reload_store import SECOND_COPIES, PlainReloadStore, ReloadedWeight, ReloadStore, ShadowKind
from ..lazy.weight import ArmedWeight
from ..modules import Owner, full_name, local_tensor, parameters
from ..ranks.fsdp import reshard
from ..ranks.sharding import Agreements, Sharding, session_vote
from ..ranks.vote import describe
from ..regions.views import whole
from ..report.progress import ProgressLike
from ..report.report import LoadReport
from ..schemes.scheme import Scheme
from ..tensor.qtensor import QTensor
from .session import OnMissing, OnNonfinite, Session, attributes_of


def online_reload(
    model: nn.Module,
    *,
    atomic: bool = True,
    shadow: ShadowKind = "device",
    on_missing: OnMissing = "keep",
    on_nonfinite: OnNonfinite = "error",
    strict_reads: bool = False,
    process_group: dist.ProcessGroup | Sharding | None = None,
    assert_identity: bool = False,
    progress: ProgressLike = None,
) -> ReloadSession:
    """Load new high-precision values into a quantized model, in place.

    The reload begins with this call. Used as a context manager it ends with the block; without `with`, call `finish()`
    or `abort()` on the session that is returned. In between, any loader, in any number of chunks, in any order and from
    any thread, writes to the model's parameters: `load_state_dict`, `copy_`, assignment of new Parameters, ...

    Whatever the loader leaves out keeps its bytes. Where it writes a part of what shares a scale (one of the shards of
    a fused per-tensor weight, half a row), the rest is quantized again from its quantized values, which costs accuracy;
    the report and a warning name such weights.

    atomic: an exception anywhere (in the loader, an invalid value, something missing, KeyboardInterrupt) leaves every
        parameter, buffer and attribute as it was, bit for bit. Needs a second copy of what is written: at most the
        bytes of the quantized model. With False each matrix is replaced as soon as all of it has arrived, and only
        those that have arrived in part have a second copy; after an exception each is all old or all new.
    shadow: where the second copy lives. "device" keeps new values beside the old ones until they are committed.
        "host" saves the old ones in host memory (pinned, for a GPU) and writes in place, so the device needs no extra
        memory; the model must not be used until the reload is over.
    on_missing: what becomes of elements nobody wrote: "keep", "zero", or "error" to raise IncompleteLoadError.
    on_nonfinite, strict_reads, progress: as `online_quant` takes them.
    process_group: ranks that hold shards of the same weights, as `online_quant` takes it; those of DTensors are known.
        They agree on scales, and all commit or none does: if one fails, all raise, and keep the old values.
    assert_identity: check at the end that every Parameter is the same object, at the same address, with the same
        attributes and ties, and raise QTensorError if one is not.
    """
    return ReloadSession(
        model, atomic, shadow, on_missing, on_nonfinite, strict_reads, process_group, assert_identity, progress
    )


class ReloadSession(Session):
    """One reload. See `online_reload`."""

    opener = "online_reload"

    def __init__(
        self,
        model: nn.Module,
        atomic: bool,
        shadow: ShadowKind,
        on_missing: OnMissing,
        on_nonfinite: OnNonfinite,
        strict_reads: bool,
        process_group: dist.ProcessGroup | Sharding | None,
        assert_identity: bool,
        progress: ProgressLike,
    ) -> None:
        if on_missing not in ("error", "zero", "keep"):
            raise ConfigError(f'on_missing of a reload is "error", "zero" or "keep", not {on_missing!r}')
        if shadow not in SECOND_COPIES:
            raise ConfigError(f'shadow is "device" or "host", not {shadow!r}')
        reshard(model)
        schemes = sorted({str(p.scheme) for p in _held(model) if isinstance(p, QTensor)})
        if not schemes:
            raise QTensorError("online_reload: no weight of this model is quantized; load it with online_quant(...)")
        super().__init__(model, ", ".join(schemes), on_missing, on_nonfinite, strict_reads, progress)
        self.atomic, self._shadow, self._assert_identity = atomic, shadow, assert_identity
        self._armed: dict[ArmedWeight, torch.Tensor] = {}  # weight → the other half of a swap, for plain ones
        self._touched: set[ArmedWeight] = set()
        self._finished_layers: dict[tuple[str, nn.Module], None] = {}
        self._refuse_what_cannot_be_reloaded(model)
        self._before = Snapshot(model, atomic)
        self._vote = session_vote(model, process_group)
        self._agreements = Agreements(process_group, self._vote)
        self._late: BaseException | None = None
        self._begin()
        try:
            self._arm(model)
        except BaseException as error:
            self._abandon(error)
            raise

    # Arming

    def _refuse_what_cannot_be_reloaded(self, model: nn.Module) -> None:
        for module_name, module, name, held in parameters(model):
            param, full = local_tensor(held), full_name((module_name, module, name))
            if isinstance(param, LAZY):
                state = "another session that is still open" if not param._armed.host.closed else "an aborted load"
                raise QTensorError(f"{full} is armed by {state}; finish it, or load the model with online_quant first")
            if isinstance(param, QTensor) and (param.transposed or not param.whole_units):
                raise QTensorError(f"{full} is a view of a quantized weight; it cannot be reloaded on its own")

    def _arm(self, model: nn.Module) -> None:
        seen: dict[int, tuple[torch.Tensor, list[Owner]]] = {}
        for module_name, module, name, param in parameters(model):
            seen.setdefault(id(param), (param, []))[1].append((module_name, module, name))
        for held, owners in seen.values():
            param = local_tensor(held)
            if isinstance(param, QTensor):
                self._arm_quantized(param, owners, held)
            elif param.is_floating_point() and not param.is_meta:
                self._arm_plain(param, owners)
        self._tree.changed()

    def _weight(self, param: torch.Tensor, owner: Owner) -> ReloadedWeight:
        return ReloadedWeight(self, tuple(param.shape), param.dtype, param.device, (owner[1], owner[2]))

    def _arm_quantized(self, param: QTensor, owners: list[Owner], held: torch.Tensor) -> None:
        weight = self._weight(param, owners[0])
        weight.scheme = param.scheme
        live, audit = cast(QTensor, param.detach()), Audit(self.refuse_nonfinite)
        shared = self._agreements.share(weight, owners, held, param.scheme.format)
        weight.store = ReloadStore(
            live, weight.coverage, audit, self.staged, self.second_copy, self._kind, self._early, shared
        )
        armed = cast(Any, param)
        armed.__class__ = LiveQTensor
        armed._armed, armed._meta = weight, torch.empty(param.shape, dtype=param.dtype, device="meta")
        weight.adopt(armed)
        self._armed[weight] = live
        self._progress.expect(1)

    def _arm_plain(self, param: torch.Tensor, owners: list[Owner]) -> None:
        weight = self._weight(param, owners[0])
        weight.scheme = None
        weight.store = PlainReloadStore(param.detach(), weight.coverage, self.second_copy, self._kind, self._early)
        lazy = parameter(weight, param.requires_grad)
        lazy.__dict__.update(attributes_of(param))
        try:
            swap(param, lazy)
        except RuntimeError:
            # C++ holds a weak reference: it stays as it is, and a loader writes to it directly.
            self._before.watch(param)
            weight.params.clear()
            return
        weight.params = [param]
        self._armed[weight] = lazy

    @property
    def _kind(self) -> ShadowKind:
        return self._shadow if self.atomic else "device"

    @property
    def _early(self) -> bool:
        return not self.atomic

    # What armed weights ask (lazy.weight.Host)

    def decide(self, weight: ArmedWeight) -> Scheme | None:
        raise AssertionError("the weights of a reload are decided on")

    def touch(self, weight: ArmedWeight) -> None:
        self._agreements.advance()
        self._touched.add(weight)
        super().touch(weight)

    def submit(self, weight: ArmedWeight) -> None:
        self._agreements.submit(weight)

    def completed(self, weight: ArmedWeight) -> None:
        self._hold(weight)
        if isinstance(weight.store, ReloadStore):
            self._progress.advance(weight.store.result.nbytes)
        if weight in self._touched and self._layer_hooks:
            self._run_layer_hooks(weight)

    def reopened(self, weight: ArmedWeight) -> None:
        self._hold(weight, -1)  # The Parameter stands for the live values, which are whole.

    def _run_layer_hooks(self, weight: ArmedWeight) -> None:
        if self.atomic and self._state == "open":
            self._finished_layers.update({(name, module): None for name, module, _ in self._tree.owners(weight)})
        else:
            super()._run_layer_hooks(weight)

    # Finishing

    def _gather(self) -> None:
        """What was put into a module in place of its Parameter or buffer is taken as new values for it."""
        for owner, original, current in self._before.replaced():
            _, module, name = owner
            if not isinstance(current, torch.Tensor) or current.shape != original.shape or current.is_meta:
                found = list(current.shape) if isinstance(current, torch.Tensor) else current
                raise WeightShapeError(
                    f"{full_name(owner)} {list(original.shape)} was replaced by {found} during the reload; write new "
                    "values of the same shape"
                )
            if isinstance(original, LAZY):
                original._armed.write(whole(original._armed.shape), current.detach())
            else:
                with torch.no_grad():
                    original.copy_(current)
            _put(module, name, original)

    def _complete(self) -> None:
        shared = self._agreements.weights
        written = {weight.name for weight in shared if weight in self._touched}
        if self._vote is not None and shared and self.on_missing == "keep":
            written = self._vote.union("written", written)
        for weight in self._armed:
            store = weight.store
            if not isinstance(store, ReloadStore) or self.on_missing != "keep":
                continue
            in_part = store.has_open_units()
            if weight in shared and weight.shared is True:
                in_part = weight.name in written and not weight.coverage.complete
                cast(ReloadedWeight, weight).complete_shared(weight.name in written)
            if in_part:
                self._notes[weight.name] = "a part was rewritten: what shares its scales was quantized a second time"
                self._warnings.append(
                    f"{weight.name}: only a part of what shares a {weight.scheme} scale was written; the rest was "
                    "quantized again from its quantized values. Write the whole of it to keep full accuracy."
                )
        super()._complete()

    def _agree(self) -> None:
        """All ranks commit, or none. Once all have said that they can, it is too late to be interrupted."""
        self._agreements.finish()
        if self._vote is None:
            return
        try:
            self._vote.settle()
        except BaseException as error:
            if self._vote.fail(describe(error)):
                raise
            self._late = error
        self._agreements.close()

    def _abandon(self, error: BaseException | None) -> None:
        if self._state == "open" and self._vote is not None:
            self._vote.fail(describe(error) if error is not None else "its session was aborted")
        super()._abandon(error)

    def _realise(self) -> None:
        try:
            insist(self._commit)
            if self._late is not None:
                raise self._late
            if self._assert_identity:
                self._before.require_same()
        except BaseException:
            self._close("finished", "the session has finished")
            self._fsdp.release()
            raise

    def _commit(self) -> None:
        for weight in self._armed:
            with weight.lock:
                cast(ReloadedWeight, weight).store.commit()
        for weight in self._armed:
            self._disarm(weight)

    def _close(self, state: str, reason: str) -> None:
        layers = list(self._finished_layers) if state == "finished" else []
        super()._close(state, reason)
        for name, module in layers:
            for hook in self._layer_hooks:
                hook(name, module)

    def _undo(self) -> None:
        insist(self._roll_back)

    def _roll_back(self) -> None:
        for weight in self._armed:
            with weight.lock:
                cast(ReloadedWeight, weight).store.rollback()
        self._before.restore()
        for weight in self._armed:
            self._disarm(weight)

    def _disarm(self, weight: ArmedWeight) -> None:
        """The Parameter is again the object it was before the reload."""
        other = self._armed[weight]
        for param in weight.params:
            if isinstance(param, LiveQTensor):
                close(param)
            elif isinstance(param, LazyWeight):
                other.__dict__.update(attributes_of(param))
                swap(param, other)

    def _settings(self) -> dict[str, str]:
        told = {"atomic": self.atomic, "shadow": self._shadow, "assert_identity": self._assert_identity}
        return super()._settings() | {key: str(value) for key, value in told.items()}

    def _summary(self, state: str) -> LoadReport:
        report = super()._summary(state)
        report.collectives, report.collective_bytes = self._agreements.collectives, self._agreements.bytes
        return report


def insist(action: Callable[[], object]) -> None:
    """Do it, whatever the keyboard says: an interrupt is raised when it is done. The action may be begun again."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


class Snapshot:
    """What a model was before a reload: its Parameters and buffers as objects, their addresses and attributes, and
    (with `values`) the bytes of those tensors that no store looks after."""

    def __init__(self, model: nn.Module, values: bool) -> None:
        self._values = values
        self._entries: list[tuple[Owner, torch.Tensor]] = []
        self._attributes: dict[int, tuple[torch.Tensor, dict[str, Any], tuple[int, ...]]] = {}
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        for module_name, module in model.named_modules():
            for entries in (module._parameters, module._buffers):
                for name, tensor in entries.items():
                    if tensor is not None:
                        self._entries.append(((module_name, module, name), tensor))
                        self._attributes[id(tensor)] = (tensor, attributes_of(tensor), _addresses(tensor))
            for buffer in module._buffers.values():
                if buffer is not None:
                    self.watch(buffer)
        for param in _held(model):
            if not isinstance(param, QTensor) and not param.is_floating_point():
                self.watch(param)

    def watch(self, tensor: torch.Tensor) -> None:
        """Nobody else looks after this one's values."""
        if self._values and not tensor.is_meta:
            self._saved.append((tensor, tensor.detach().clone()))

    def replaced(self) -> Iterator[tuple[Owner, Any, Any]]:
        """Entries of modules that hold another object now: owner, the original, what is there."""
        for (module_name, module, name), original in self._entries:
            current = _entries(module, name).get(name)
            if current is not original:
                yield (module_name, module, name), original, current

    def restore(self) -> None:
        for (_, module, name), original in self._entries:
            if _entries(module, name).get(name) is not original:
                _put(module, name, original)
        for tensor, values in self._saved:
            with torch.no_grad():
                tensor.copy_(values)
        for tensor, attributes, _ in self._attributes.values():
            for key in attributes_of(tensor).keys() - attributes.keys():
                del tensor.__dict__[key]
            tensor.__dict__.update(attributes)

    def require_same(self) -> None:
        """Raise QTensorError unless objects, addresses and attributes are what they were."""
        for owner, original, _ in self.replaced():
            raise QTensorError(f"assert_identity: {full_name(owner)} {list(original.shape)} is another object now")
        for owner, original in self._entries:
            tensor, attributes, addresses = self._attributes[id(original)]
            if _addresses(tensor) != addresses:
                raise QTensorError(f"assert_identity: {full_name(owner)} has moved to another address")
            now = attributes_of(tensor)
            if now.keys() != attributes.keys() or any(now[key] is not attributes[key] for key in now):
                raise QTensorError(f"assert_identity: {full_name(owner)} has other attributes now")


def _held(model: nn.Module) -> Iterator[Any]:
    """What this rank holds of every parameter."""
    for *_, param in parameters(model):
        yield local_tensor(param)


def _addresses(tensor: torch.Tensor) -> tuple[int, ...]:
    local = local_tensor(tensor)
    return tuple(part.data_ptr() for part in (local.parts() if isinstance(local, QTensor) else (local,)))


def _entries(module: nn.Module, name: str) -> dict[str, Any]:
    return module._parameters if name in module._parameters else module._buffers


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Place a tensor where a module keeps its kind, past every hook."""
    isparam = isinstance(tensor, nn.Parameter)
    (module._buffers if isparam else module._parameters).pop(name, None)
    (module._parameters if isparam else module._buffers)[name] = tensor  # type: ignore[assignment]
