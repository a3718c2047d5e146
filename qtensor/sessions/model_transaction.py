"""ModelTransaction: what a load and a reload of a PyTorch model have in common.

It opens and closes, hears from the weights as they complete, sees to what the loader left unwritten, and reports.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import IncompleteLoadError
from ..kernels import upload
from ..lazy.lazy_tensor import LAZY
from ..lazy.plain_store import PlainStore
from ..lazy.quant_store import QuantStore
from ..lazy.uninitialised import is_untouched
from ..lazy.weight import ArmedWeight
from ..modules import Owner, full_name
from ..ranks.fsdp import Hold
from ..regions.coverage import Box
from ..report.progress import Progress
from ..report.report import LoadReport, describe_missing, versions
from ..tensor.qtensor import QTensor
from ..text import joined, printable
from . import registration
from .adapters import ADAPTER, adapter_parameters, keep_initial, may_be_new
from .host import LoadHost
from .incoming import Incoming
from .model_tree import ModuleTree
from .options import SessionOptions
from .transaction import State, Transaction
from .watching import Watch

if TYPE_CHECKING:
    from ..schemes.plan import Plan

logger = logging.getLogger("qtensor")
_WHY_CLOSED: dict[State, str] = {"finished": "the session has finished", "aborted": "its load was aborted"}
_STILL_META = "still on the meta device"
_FRAMES_TO_USER = 6  # warnings: this file, the transaction twice, the session's finish and __exit__, the user's block


class ModelTransaction(LoadHost, Transaction):
    """The weights of one model, from arming to their final form.

    opener: the public function that begins it, for messages.
    """

    opener = ""
    begun = False

    def __init__(self, model: nn.Module | None, scheme: str, options: SessionOptions) -> None:
        super().__init__()
        self.options = options
        self.strict_reads = options.strict_reads
        self.refuse_nonfinite = options.on_nonfinite == "error"
        self._scheme = scheme
        self._tree = ModuleTree(model)
        self._fsdp = Hold(None)
        self._watch = Watch()
        self._last_names: WeakKeyDictionary[ArmedWeight, str] = WeakKeyDictionary()
        self.layer_hooks: list[Callable[[str, nn.Module], None]] = []
        self._notes: dict[str, str] = {}
        self._warnings: list[str] = []
        self._filled: dict[str, list[Box]] = {}
        self._report: LoadReport | None = None
        self._reporting = False
        self._progress = Progress(options.progress)
        self.incoming = Incoming(options.source, options.strict_source == "lossless", self.staged)

    @property
    def plan(self) -> Plan | None:
        """What was chosen for a session that was told how many bytes there are."""
        return None

    @property
    def on_missing(self) -> str:
        return self.options.on_missing

    def policy_for(self, weight: ArmedWeight) -> str:
        """`on_missing`, as far as it is about this weight."""
        return self.on_missing

    # The course of it (Transaction)

    def enter(self) -> None:
        """A `with` block of the session begins."""

    def begin(self) -> None:
        """Before anything is armed."""
        self.begun = True
        self._fsdp = Hold(self._tree.model)
        self._memory.start()

    def prepare(self) -> None:
        """Complete what `on_missing` allows, verify, and build the final form of each weight beside the weights.

        Raises IncompleteLoadError naming every weight and range that is missing, or the error that an unfinished
        weight met while loading.
        """
        registration.unlisten(self)
        self._watch.end()
        self._fsdp.reshard()
        self._release_all()
        self._gather()
        self._seal()
        self._complete()
        self._agree()
        self._build()
        self._report = self._summary("finished")
        self._warn()

    def close(self, state: State) -> None:
        # A session may outlive its model, for its report: it keeps names alone.
        if self.closed is None:
            self._last_names = WeakKeyDictionary({weight: self.name_of(weight) for weight in self._weights})
        self.closed = _WHY_CLOSED[state]
        self._tree.forget()
        registration.unlisten(self)
        registration.uninstall(self)
        upload.release()
        self._writing.clear()
        self._progress.close()
        self.incoming.discard()
        self._memory.stage_nothing()
        self._second_copies = 0
        self._fsdp.release()

    def roll_back(self) -> None:
        self._watch.end()
        self._fsdp.reshard()
        if not self._reporting:  # It is a report of a failure, and must not become another: one try.
            self._reporting = True
            self._report = self._summary("aborted")
        elif self._report is None or self._report.state != "aborted":
            self._report = self._summary_of("aborted", self._scheme)
        self._undo()

    def tell(self) -> None:
        assert self._report is not None
        logger.info(
            "quantized %d weights to %d bytes in %.2f s",
            len(self._report.layers),
            self._report.quantized_bytes,
            self._report.seconds,
        )

    def _gather(self) -> None:
        """Take in what was assigned where no hook could see it."""
        raise NotImplementedError

    def _agree(self) -> None:
        """Quantize the weights whose scales are shared with other ranks."""
        raise NotImplementedError

    def _build(self) -> None:
        """Everything is there and valid: make what `commit` will put in place."""

    def _undo(self) -> None:
        """The weights' part of `roll_back`."""
        raise NotImplementedError

    def _seal(self) -> None:
        """From here on a write of another thread is an error: it could not be in what is verified and reported."""
        for weight in list(self._weights):
            weight.seal()

    def report(self) -> LoadReport:
        """What has happened so far; after the end, the final account."""
        return self._report or self._summary(self.state)

    # What armed weights ask (lazy.weight.Host)

    def name_of(self, weight: ArmedWeight) -> str:
        if self.closed:
            return self._last_names.get(weight, weight.owner[1])
        return full_name(self._tree.owners(weight)[0])

    def enroll(self, weight: ArmedWeight) -> None:
        super().enroll(weight)
        self._tree.changed()

    def copied(self, module: nn.Module, memo: dict[int, object]) -> bool:
        return self._tree.note_copy(module, memo)

    def completed(self, weight: ArmedWeight) -> None:
        super().completed(weight)
        if not isinstance(weight.store, QuantStore):
            return
        self._progress.advance(weight.store.nbytes)
        if self.layer_hooks:
            self._run_layer_hooks(weight)

    def _run_layer_hooks(self, weight: ArmedWeight) -> None:
        for module_name, module, _ in self._tree.owners(weight):
            params: list[Any] = [p for p in module._parameters.values() if isinstance(p, LAZY)]
            armed = [p._armed for p in params]
            if all(w.scheme is None or w.settled for w in armed):
                for hook in self.layer_hooks:
                    hook(module_name, module)

    # Finishing

    def _complete(self) -> None:
        """Raise what went wrong and was not put right, apply on_missing, raise for whatever is still not there: in this
        order, as what is filled may be live at once (`atomic=False`), whatever comes next."""
        weights = self._weights_to_complete()
        self._require_no_errors(weights)
        self._fill(weights)

    def _require_no_errors(self, weights: Iterable[ArmedWeight]) -> None:
        for weight in weights:
            weight.settle_if_complete()
            if weight.error is not None:
                raise weight.error
            self.incoming.finish(weight)

    def _fill(self, weights: dict[ArmedWeight, list[Owner]]) -> None:
        missing: list[str] = []
        boxes: dict[str, Any] = {}
        for weight, owners in weights.items():
            name = full_name(owners[0])
            if not weight.coverage.complete and may_be_new(name) and keep_initial(weight, name):
                self._notes[name] = f"{ADAPTER}; keeps its initial values"
            if not weight.coverage.complete:
                gaps, policy = weight.coverage.missing(), self.policy_for(weight)
                self._notes.setdefault(name, f"unwritten elements: {policy}")
                if policy == "error" or not weight.fill_missing(policy):
                    boxes[name] = gaps
                    missing.append(describe_missing(name, weight.shape, gaps, reopened=weight.was_settled))
                else:
                    self._filled[name] = gaps
            weight.verify()
        on_meta = False
        for name, tensor, why in self._without_values():
            boxes[name] = [tuple((0, n) for n in tensor.shape)]
            missing.append(f"{name}: {why}")
            on_meta = on_meta or tensor.is_meta
        if missing:
            advice = (
                'Pass on_missing="zero" to fill them, "init" for layers that are meant to be new (a classifier head).'
                if self.on_missing == "error"
                else (f'on_missing="{self.on_missing}" has nothing to fill them with.')
            )
            if on_meta:
                advice = (
                    "No loader gave these a value in memory. A device_map that puts layers on the disk, or offloads "
                    "them, leaves nothing to quantize: keep all layers on devices, or on the CPU, and offload the "
                    "quantized model with accelerate's cpu_offload or dispatch_model."
                )
            raise IncompleteLoadError(_bullets(missing) + f" {advice}", boxes)

    def _weights_to_complete(self) -> dict[ArmedWeight, list[Owner]]:
        """The weights of the models that are being loaded. Not those of modules that a constructor made and dropped: in
        a plain model they would be gone at once, here they are in a circle with their weights. What is read off a given
        model has none of them, and a collection takes as long as a small reload's all."""
        live, given = self._tree.live(self), self._tree.model is not None
        if not given and any(w.coverage.covered for w in live) and not all(w.coverage.complete for w in live):
            del live
            self._tree.changed()
            gc.collect()
            live = self._tree.live(self)
        return live

    def _without_values(self) -> Iterator[tuple[str, torch.Tensor, str]]:
        """Names and tensors that were put into the model out of sight and hold nothing, and what they are."""
        for module_name, module, name, param in self._tree.parameters():
            if isinstance(param, LAZY):
                continue
            full = full_name((module_name, module, name))
            if param.is_meta:
                # accelerate keeps the values elsewhere
                yield full, param, "offloaded by accelerate" if hasattr(module, "_hf_hook") else _STILL_META
            elif is_untouched(param):
                yield full, param, "memory that nobody wrote to"
        for name, buffer in self._tree.plain_buffers():
            if buffer.is_meta:
                yield name, buffer, _STILL_META

    # Reporting

    def _summary(self, state: str) -> LoadReport:
        report = self._summary_of(state, self._scheme)
        report.settings = self._settings() | versions()
        seen: set[int] = set()
        # By address and size: a buffer that is a view of all of a parameter is the same bytes.
        plain: dict[tuple[int, int], int] = {}
        live = self._tree.live(self) if self.closed is None else {}
        adapters = {key for model in self._tree.models() for key in adapter_parameters(model)}
        for weight, owners in live.items():
            name = full_name(owners[0])
            if not weight.coverage.complete or name in self._filled:
                report.missing[name] = self._filled.get(name) or weight.coverage.missing()
                if report.missing[name] == [tuple((0, n) for n in weight.shape)]:
                    report.untouched.append(name)
            if weight.store is None:
                continue
            if isinstance(weight.store, QuantStore):
                report.layers.append(self._layer(name, weight.store.result, weight, self._notes.get(name, "")))
            elif isinstance(weight.store, PlainStore):
                plain |= _held(weight.store.tensor)
                why = _why_plain(weight, self.min_sqnr) or self._notes.get(name, "")
                report.passthrough[name] = why or self._why_left(owners, weight.store.tensor)
        for module_name, module, name, param in self._tree.parameters():
            if isinstance(param, LAZY) or id(param) in seen:
                continue
            seen.add(id(param))
            name = full_name((module_name, module, name))
            if isinstance(param, QTensor):
                report.layers.append(self._layer(name, param, note=self._notes.get(name, "")))
            elif not param.is_meta:
                plain |= _held(param)
                report.passthrough[name] = ADAPTER if id(param) in adapters else ""
        for _, buffer in self._tree.plain_buffers():
            if not buffer.is_meta:
                plain |= _held(buffer)
        report.passthrough_bytes = sum(plain.values())
        return self._sum_up(report)

    def _why_left(self, owners: list[Owner], values: torch.Tensor) -> str:
        """Why a weight was not chosen, where that may surprise."""
        return ""

    def _settings(self) -> dict[str, str]:
        """What the session was told, as text for the report."""
        options = self.options
        return {
            "session": self.opener,
            "scheme": self._scheme,
            "on_missing": options.on_missing,
            "on_nonfinite": options.on_nonfinite,
            "strict_reads": str(options.strict_reads),
        }

    def _warn(self) -> None:
        """Before the commit: where warnings are errors, they are reasons not to."""
        assert self._report is not None
        self._report.warnings += self._warnings
        for warning in self._report.warnings:
            warnings.warn(printable(f"{self.opener}: {warning}"), stacklevel=_FRAMES_TO_USER)


def _held(tensor: torch.Tensor) -> dict[tuple[int, int], int]:
    """The bytes a tensor holds, by address and size. One that is not in one piece of memory is told by its object."""
    if tensor.layout is torch.strided:
        return {(tensor.data_ptr(), tensor.nbytes): tensor.nbytes}
    return {(id(tensor), 0): tensor.values().nbytes if tensor.is_coalesced() else tensor._values().nbytes}


def waits_for_its_end(param: Any) -> bool:
    """Is the session that armed this lazy weight open? One that an interrupt kept from its end is ended now."""
    host = param._armed.host
    if getattr(host, "unsettled", False):
        host.settle()
    return not host.closed


def _why_plain(weight: ArmedWeight, min_sqnr: float | None) -> str:
    if weight.sqnr is not None and min_sqnr is not None:
        return f"SQNR {weight.sqnr:.1f} dB is below min_sqnr={min_sqnr:g}"
    return ""


def _bullets(lines: list[str]) -> str:
    if len(lines) == 1:
        return printable(lines[0]) + "."
    shown = lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])
    return f"{len(lines)} weights are incomplete.\n  " + joined(shown, "\n  ") + "\n "
