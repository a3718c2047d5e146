"""online_reload: new weights into a model that is quantized already, at the same addresses, all or nothing.

The Parameters stay what and where they are. While the reload is open, any loader writes to them; the model goes on
computing with the old values until `finish` commits the new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import QTensorError, WeightShapeError
from ..interrupts import without_grad
from ..lazy.lazy_tensor import LAZY
from ..lazy.quant_store import QuantStore
from ..lazy.reloaded_weight import ReloadedWeight
from ..lazy.target import ShadowKind
from ..lazy.weight import ArmedWeight
from ..modules import Owner, full_name, local_parameters, local_tensor, parameters
from ..ranks.fsdp import reshard
from ..ranks.sharding import Agreements, Sharding, session_vote
from ..ranks.vote import Vote, describe
from ..regions.views import whole
from ..report.progress import ProgressLike
from ..report.report import LoadReport
from ..schemes.scheme import Scheme
from ..schemes.selection import matches
from ..tensor.qtensor import QTensor
from ..text import printable
from . import registration
from .arming import ArmedPlain, ArmedQuantized, Arming
from .model_transaction import ModelTransaction, logger, waits_for_its_end
from .options import OnMissing, OnNonfinite, ReloadOptions
from .session import Session
from .snapshot import Snapshot, is_plain_memory, put
from .transaction import State


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
    only: Sequence[str] | None = None,
    progress: ProgressLike = None,
) -> ReloadSession:
    """Load new high-precision values into a quantized model, in place.

    The reload begins with this call. Used as a context manager it ends with the block; without `with`, call `finish()`
    or `abort()` on the session that is returned. In between, any loader, in any number of chunks, in any order and from
    any thread, writes to the model's parameters: `load_state_dict`, `copy_`, assignment of new Parameters, ...

    Whatever the loader leaves out keeps its bytes. Where it writes a part of what shares a scale (one of the shards of
    a fused per-tensor weight, half a row), the rest is quantized again from its quantized values, which costs accuracy;
    the report and a warning name such weights.

    Args:
        model: A model with quantized weights.
        atomic: An exception anywhere (in the loader, an invalid value, something missing, a warning that is an error,
            KeyboardInterrupt) leaves every parameter, buffer and attribute as it was, bit for bit. Needs a second copy
            of what is written: at most the bytes of the quantized model. With False each matrix is replaced as soon as
            all of it has arrived, and only those that have arrived in part have a second copy; after an exception each
            is all old or all new. An interrupt that comes when the new values are being put in place is raised when all
            are.
        shadow: Where the second copy lives. "device" keeps new values beside the old ones until they are committed.
            "host" saves the old ones in host memory (pinned, for a GPU) and writes in place, so the device needs no
            extra memory; the model must not be used until the reload is over.
        on_missing: What becomes of elements nobody wrote: "keep", "zero", or "error" to raise IncompleteLoadError.
        on_nonfinite: As `online_quant` takes it.
        strict_reads: As `online_quant` takes it.
        process_group: Ranks that hold shards of the same weights, as `online_quant` takes it; those of DTensors are
            known. They agree on scales, and all commit or none does: if one fails, all raise, and keep the old values.
        assert_identity: Check before anything is replaced that every Parameter is the same object, at the same address,
            with the same attributes and ties, and raise QTensorError if one is not.
        only: Patterns, as `online_quant` takes them in `ignore`, of names or layers: the reload is for the weights that
            match one. A write to another is an error, and `on_missing` is about those that match; all others keep their
            bytes. None: the reload is for all weights. Buffers are not weights.
        progress: As `online_quant` takes it.

    Returns:
        The session, which is open.

    Raises:
        ConfigError: An option has a value it cannot have.
        QTensorError: No weight of the model is quantized, one is a view, another session that is open loads it, or a
            pattern of `only` matches none.
    """
    options = ReloadOptions(
        atomic=atomic,
        shadow=shadow,
        on_missing=on_missing,
        on_nonfinite=on_nonfinite,
        strict_reads=strict_reads,
        process_group=process_group,
        assert_identity=assert_identity,
        only=only,
        progress=progress,
    )
    reload = Reload(model, options)
    session = ReloadSession(reload)  # From here on somebody ends what is begun.
    reload.arm(model)
    return session


class ReloadSession(Session):
    """One reload. See `online_reload`."""


class Reload(ModelTransaction):
    """One reload into weights that a model is using."""

    opener = "online_reload"
    options: ReloadOptions

    def __init__(self, model: nn.Module, options: ReloadOptions) -> None:
        reshard(model)
        schemes = sorted({str(p.scheme) for p in local_parameters(model) if isinstance(p, QTensor)})
        if not schemes:
            raise QTensorError("online_reload: no weight of this model is quantized; load it with online_quant(...)")
        super().__init__(model, ", ".join(schemes), options)
        self._arming: dict[ReloadedWeight, Arming] = {}
        self._touched: set[ArmedWeight] = set()
        self._finished_layers: dict[tuple[str, nn.Module], None] = {}
        self._vote: Vote | None = None
        self._agreements = Agreements()

    # Arming

    def arm(self, model: nn.Module) -> None:
        """Let every parameter of the model take new values."""
        try:
            self._vote = session_vote(model, self.options.process_group)
            if self._vote is not None:
                self._vote.open()
            self._refuse_what_cannot_be_reloaded(model)
            self._before = Snapshot(model, self.options.atomic)
            self.begin()
            self._agreements = Agreements(self.options.process_group, self._vote)
            registration.install(self)
            self._arm_all(model)
        except BaseException as error:
            self.abort(error)
            raise

    def _refuse_what_cannot_be_reloaded(self, model: nn.Module) -> None:
        for module_name, module, name, held in parameters(model):
            param: Any = local_tensor(held)
            if isinstance(param, LAZY):
                waits_for_its_end(param)
            if isinstance(param, LAZY):
                state = "another session that is still open" if not param._armed.host.closed else "an aborted load"
                why = f"is armed by {state}; finish it, or load the model with online_quant first"
            elif isinstance(param, QTensor) and (param.transposed or not param.whole_units):
                why = "is a view of a quantized weight; it cannot be reloaded on its own"
            else:
                continue
            raise QTensorError(f"{full_name((module_name, module, name))} {why}")

    def _arm_all(self, model: nn.Module) -> None:
        seen: dict[int, tuple[torch.Tensor, list[Owner]]] = {}
        for module_name, module, name, param in parameters(model):
            seen.setdefault(id(param), (param, []))[1].append((module_name, module, name))
        for held, owners in seen.values():
            param = local_tensor(held)
            if isinstance(param, QTensor):
                self._arm_quantized(param, owners, held)
            elif param.is_floating_point() and not param.is_meta:
                if is_plain_memory(param):
                    self._arm_plain(param, owners)
                else:  # Sparse or expanded: a loader writes to it as PyTorch lets it.
                    self._before.watch(param)
        self._tree.changed()
        self._exclude({weight: self._tree.owners(weight) for weight in self._arming})

    def _exclude(self, owners: dict[ReloadedWeight, list[Owner]]) -> None:
        """With `only`: nothing may be written to the weights that no pattern matches, under any of their names."""
        only = self.options.only
        if only is None:
            return
        unused = set(only)
        for weight, places in owners.items():
            found = {p for p in only for place in places if matches(p, place[0], full_name(place))}
            unused -= found
            weight.excluded = not found
        if unused:
            raise QTensorError(f"online_reload: no weight matches {', '.join(sorted(map(repr, unused)))} of `only`")

    def _weight(self, param: torch.Tensor, owner: Owner) -> ReloadedWeight:
        return ReloadedWeight(self, tuple(param.shape), param.dtype, param.device, (owner[1], owner[2]))

    def _arm_quantized(self, param: QTensor, owners: list[Owner], held: torch.Tensor) -> None:
        weight = self._weight(param, owners[0])
        self._agreements.share(weight, owners, held, param.scheme.format)
        self._open(weight, param.with_parts(*param.parts()))
        self._arming[weight] = arming = ArmedQuantized(param, weight)
        arming.do()
        self._progress.expect(1)

    def _arm_plain(self, param: torch.Tensor, owners: list[Owner]) -> None:
        weight = self._weight(param, owners[0])
        self._open(weight, param.detach())
        self._arming[weight] = arming = ArmedPlain(param, weight)
        if not arming.do():
            # C++ holds a weak reference: it stays as it is, and a loader writes to it directly.
            self._before.watch(param)
            del self._arming[weight]

    def _open(self, weight: ReloadedWeight, live: torch.Tensor) -> None:
        shadow = self.options.shadow if self.options.atomic else "device"
        weight.open_on(live, self.second_copy, shadow, early=not self.options.atomic)

    # What armed weights ask (lazy.weight.Host)

    def decide(self, weight: ArmedWeight) -> Scheme | None:
        raise AssertionError("the weights of a reload are decided on")

    def policy_for(self, weight: ArmedWeight) -> str:
        return "keep" if isinstance(weight, ReloadedWeight) and weight.excluded else self.on_missing

    def touch(self, weight: ArmedWeight) -> None:
        self._agreements.advance()
        super().touch(weight)

    def _turned_to(self, weight: ArmedWeight) -> None:
        self._touched.add(weight)

    def submit(self, weight: ArmedWeight) -> None:
        self._agreements.submit(weight)

    def completed(self, weight: ArmedWeight) -> None:
        self.hold(weight)
        if isinstance(weight.store, QuantStore):
            self._progress.advance(weight.store.nbytes)
        if weight in self._touched and self.layer_hooks:
            self._run_layer_hooks(weight)

    def reopened(self, weight: ArmedWeight) -> None:
        self.hold(weight, -1)  # The Parameter stands for the live values, which are whole.

    def _run_layer_hooks(self, weight: ArmedWeight) -> None:
        if self.options.atomic:
            self._finished_layers.update({(name, module): None for name, module, _ in self._tree.owners(weight)})
        else:
            super()._run_layer_hooks(weight)

    # Finishing

    def _gather(self) -> None:
        """What was put into a module in place of its Parameter or buffer, or exchanged with a Parameter
        (`torch.utils.swap_tensors`), is taken as new values for it."""
        for weight, arming in self._arming.items():
            if not isinstance(arming.param, LAZY):
                values = arming.param.detach()
                if values.shape != weight.shape or values.is_meta:
                    raise self._misfit(weight.name, weight.shape, values)
                arming.do()
                without_grad(partial(arming.param.data.copy_, values))
        for owner, original, current in self._before.replaced():
            _, module, name = owner
            if not isinstance(current, torch.Tensor) or current.shape != original.shape or current.is_meta:
                raise self._misfit(full_name(owner), original.shape, current)
            if isinstance(original, LAZY):
                original._armed.write(whole(original._armed.shape), current.detach())
            else:
                without_grad(partial(original.copy_, current))
            put(module, name, original)

    @staticmethod
    def _misfit(name: str, shape: tuple[int, ...], found: Any) -> WeightShapeError:
        what = list(found.shape) if isinstance(found, torch.Tensor) else found
        return WeightShapeError(
            f"{name} {list(shape)} was replaced by {what} during the reload; write new values of the same shape"
        )

    def _complete(self) -> None:
        shared = self._agreements.weights
        written = {weight.name for weight in shared if weight in self._touched}
        if self._vote is not None and any(self.policy_for(weight) == "keep" for weight in shared):
            written = self._vote.union("written", written)
        for weight in self._arming:
            store = weight.store
            if not isinstance(store, QuantStore) or self.policy_for(weight) != "keep":
                continue
            in_part = store.has_open_units()
            if weight in shared and weight.shared is True:
                in_part = weight.name in written and not weight.coverage.complete
                weight.complete_shared(weight.name in written)
            if in_part:
                self._notes[weight.name] = "a part was rewritten: what shares its scales was quantized a second time"
                self._warnings.append(
                    f"{weight.name}: only a part of what shares a {weight.scheme} scale was written; the rest was "
                    "quantized again from its quantized values. Write the whole of it to keep full accuracy."
                )
        super()._complete()

    def _agree(self) -> None:
        self._agreements.finish()

    def _build(self) -> None:
        if self.options.assert_identity:
            self._before.require_same(self._at_commit())

    def _at_commit(self) -> dict[int, torch.Tensor]:
        """By Parameter: the memory that it will stand for when it is committed."""
        return {id(arming.param): arming.final for arming in self._arming.values()}

    def vote(self) -> None:
        if self._vote is not None:
            self._vote.settle()

    def withdraw(self, error: BaseException | None) -> bool:
        reason = describe(error) if error is not None else "its session was aborted"
        return self._vote is None or self._vote.fail(reason)

    def commit(self) -> None:
        for weight in self._arming:
            weight.commit()
        for arming in self._arming.values():
            arming.undo(committed=True)

    def _undo(self) -> None:
        if not self.begun:
            return
        for weight in self._arming:
            weight.discard()
        self._before.restore()
        for arming in self._arming.values():
            arming.undo()

    def close(self, state: State) -> None:
        super().close(state)
        if state == "finished":
            self._agreements.close()
        else:
            self._agreements.leave()
        self._arming = {}

    def tell(self) -> None:
        super().tell()
        assert self._report is not None
        for name, module in self._finished_layers:
            for hook in self.layer_hooks:
                try:
                    hook(name, module)
                except Exception as error:
                    problem = f"{name}: the reload is finished, and its on_layer_quantized hook raised {error!r}"
                    self._report.warnings.append(problem)
                    logger.warning(printable(problem), exc_info=True)

    def _settings(self) -> dict[str, str]:
        told = {key: str(getattr(self.options, key)) for key in ("atomic", "shadow", "assert_identity", "only")}
        return super()._settings() | told

    def _summary(self, state: str) -> LoadReport:
        report = super()._summary(state)
        report.collectives, report.collective_bytes = self._agreements.collectives, self._agreements.bytes
        return report
