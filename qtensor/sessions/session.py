"""Sessions: the life of one load or reload, from its first weight to the end.

`Session` is what `online_quant` and `online_reload` share: it opens and closes, hears from the weights as they
complete, sees at the end to what the loader left unwritten, and reports. Whatever happens, it leaves no hook behind.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import ConfigError, IncompleteLoadError, QTensorError
from ..kernels import upload
from ..lazy.lazy_tensor import LAZY, swap
from ..lazy.quant_store import QuantStore
from ..lazy.weight import ArmedWeight
from ..modules import Owner, full_name
from ..ranks.fsdp import Hold
from ..regions.coverage import Box
from ..report.progress import Progress, ProgressLike
from ..report.report import LoadReport, describe_missing, versions
from ..tensor.qtensor import QTensor
from . import registration
from .host import LoadHost
from .model_tree import ModuleTree

logger = logging.getLogger("qtensor")
OnMissing = Literal["error", "zero", "keep", "init"]
OnNonfinite = Literal["error", "keep"]
# Attributes that make a tensor lazy or quantized; all others belong to the user and follow the Parameter.
_OWN = {"_armed", "_meta", "_live", "_is_param", *QTensor.__annotations__}


class Session(LoadHost):
    """`finish()` runs when the `with` block ends, `abort()` when it raises.

    opener: the function that makes such a session, for messages.
    """

    opener = ""

    def __init__(
        self,
        model: nn.Module | None,
        scheme: str,
        on_missing: OnMissing,
        on_nonfinite: OnNonfinite,
        strict_reads: bool,
        progress: ProgressLike,
    ) -> None:
        super().__init__()
        if on_nonfinite not in ("error", "keep"):
            raise ConfigError(f'on_nonfinite is "error" or "keep", not {on_nonfinite!r}')
        self.on_missing, self.strict_reads = on_missing, strict_reads
        self.refuse_nonfinite = on_nonfinite == "error"
        self._scheme = scheme
        self._state = "new"
        self._tree = ModuleTree(model)
        self._last_names: WeakKeyDictionary[ArmedWeight, str] = WeakKeyDictionary()
        self._layer_hooks: list[Callable[[str, nn.Module], None]] = []
        self._notes: dict[str, str] = {}
        self._warnings: list[str] = []
        self._filled: dict[str, list[Box]] = {}
        self._report: LoadReport | None = None
        self._progress = Progress(progress)

    def __enter__(self) -> Self:
        if self._state != "open":
            raise QTensorError(f"this session is {self._state}; start a new one with {self.opener}(...)")
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._state != "open":
            return
        if kind is None:
            self.finish()
        else:
            self._abandon(error)

    def on_layer_quantized(self, hook: Callable[[str, nn.Module], None]) -> None:
        """Call `hook(name, module)` each time all weights of a module that are to be quantized are there."""
        self._layer_hooks.append(hook)

    # Life

    def _begin(self) -> None:
        self._fsdp = Hold(self._tree.model)
        registration.install()
        self._state = "open"
        self._memory.start()

    def finish(self) -> LoadReport:
        """End the load: complete what `on_missing` allows, turn lazy weights into their final form, report.

        Raises IncompleteLoadError naming every weight and range that is missing, or the error that an unfinished
        weight met while loading. After an error the session is over, and the model can be armed again.
        """
        self._require_open()
        self._stop_listening()
        self._fsdp.reshard()
        try:
            self._release_all()
            self._gather()
            self._complete()
            self._agree()
        except BaseException as error:
            self._abandon(error)
            raise
        self._report = self._summary("finished")
        self._realise()
        self._close("finished", "the session has finished")
        self._fsdp.release()
        self._warn()
        return self._report

    def abort(self) -> None:
        """Give up: staging and unfinished weights are freed, hooks removed. The model can be armed again."""
        self._abandon(None)

    def _abandon(self, error: BaseException | None) -> None:
        if self._state != "open":
            return
        self._fsdp.reshard()
        report = self._summary("aborted")
        self._close("aborted", "its load was aborted")
        try:
            self._undo()
        finally:
            self._fsdp.release()
        self._report = report

    def _gather(self) -> None:
        """Take in what was assigned where no hook could see it."""
        raise NotImplementedError

    def _agree(self) -> None:
        """Wait for the ranks this session shares weights with."""

    def _realise(self) -> None:
        """Everything is there and valid: the weights take their final form."""
        raise NotImplementedError

    def _undo(self) -> None:
        """Free what an aborted session holds."""
        raise NotImplementedError

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
        registration.uninstall()
        upload.release()
        self._writing.clear()
        self._progress.close()

    def _stop_listening(self) -> None:
        listener: object = registration.listening()
        if listener is self:
            registration.listen(None)

    # What armed weights ask (lazy.weight.Host)

    def name_of(self, weight: ArmedWeight) -> str:
        if self.closed:
            return self._last_names.get(weight, weight.owner[1])
        return full_name(self._tree.owners(weight)[0])

    def enroll(self, weight: ArmedWeight) -> None:
        super().enroll(weight)
        self._tree.changed()

    def completed(self, weight: ArmedWeight) -> None:
        super().completed(weight)
        if not isinstance(weight.store, QuantStore):
            return
        self._progress.advance(weight.store.result.nbytes)
        if self._layer_hooks:
            self._run_layer_hooks(weight)

    def _run_layer_hooks(self, weight: ArmedWeight) -> None:
        for module_name, module, _ in self._tree.owners(weight):
            params: list[Any] = [p for p in module._parameters.values() if isinstance(p, LAZY)]
            armed = [p._armed for p in params]
            if all(w.scheme is None or w.settled for w in armed):
                for hook in self._layer_hooks:
                    hook(module_name, module)

    # Finishing

    def _complete(self) -> None:
        """Apply on_missing, then raise for whatever is still not there."""
        missing: list[str] = []
        boxes: dict[str, Any] = {}
        for weight, owners in self._tree.live(self).items():
            name = full_name(owners[0])
            if not weight.coverage.numel and not weight.settled:
                weight.take_nothing()
            if not weight.coverage.complete:
                if weight.error is not None:
                    raise weight.error
                gaps = weight.coverage.missing()
                self._notes.setdefault(name, f"unwritten elements: {self.on_missing}")
                if self.on_missing == "error" or not weight.fill_missing(self.on_missing):
                    boxes[name] = gaps
                    missing.append(describe_missing(name, weight.shape, gaps, reopened=weight.was_settled))
                else:
                    self._filled[name] = gaps
            weight.verify()
        on_meta = False
        for name, tensor, offloaded in self._on_meta():
            boxes[name] = [tuple((0, n) for n in tensor.shape)]
            missing.append(f"{name}: {'offloaded by accelerate' if offloaded else 'still on the meta device'}")
            on_meta = True
        if missing:
            advice = (
                'Pass on_missing="zero" to fill them.'
                if self.on_missing == "error"
                else (f'on_missing="{self.on_missing}" has nothing to fill them with.')
            )
            if on_meta:
                advice = (
                    "No loader gave these a value in memory. A device_map that puts layers on the disk, or offloads "
                    "them, leaves nothing to quantize: keep all layers on devices."
                )
            raise IncompleteLoadError(_bullets(missing) + f" {advice}", boxes)

    def _on_meta(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """Names and tensors without memory, and whether accelerate keeps their values elsewhere."""
        for module_name, module, name, param in self._tree.parameters():
            if not isinstance(param, LAZY) and param.is_meta:
                yield full_name((module_name, module, name)), param, hasattr(module, "_hf_hook")
        for name, buffer in self._tree.plain_buffers():
            if buffer.is_meta:
                yield name, buffer, False

    def _replace(self, param: torch.Tensor, new: torch.Tensor, owners: Sequence[Owner] = ()) -> None:
        """Make the Python object `param` be `new`, so that everyone who holds it sees the change.

        Where PyTorch refuses to swap (C++ holds a weak reference), the owners get the new object.
        """
        new.__dict__.update(attributes_of(param))
        try:
            swap(param, new)
        except RuntimeError:
            for _, module, name in owners:
                module._parameters[name] = new  # type: ignore[assignment]

    # Reporting

    def _summary(self, state: str) -> LoadReport:
        report = self._summary_of(state, self._scheme)
        report.settings = self._settings() | versions()
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
                report.layers.append(self._layer(name, weight.store.result, weight, self._notes.get(name, "")))
            else:
                plain[weight.store.tensor.data_ptr(), weight.store.tensor.nbytes] = weight.store.tensor.nbytes
                report.passthrough[name] = _why_plain(weight, self.min_sqnr)
        for module_name, module, name, param in self._tree.parameters():
            if isinstance(param, LAZY) or id(param) in seen:
                continue
            seen.add(id(param))
            name = full_name((module_name, module, name))
            if isinstance(param, QTensor):
                report.layers.append(self._layer(name, param, note=self._notes.get(name, "")))
            elif not param.is_meta:
                plain[param.data_ptr(), param.nbytes] = param.nbytes
                report.passthrough[name] = ""
        for _, buffer in self._tree.plain_buffers():
            if not buffer.is_meta:
                plain[buffer.data_ptr(), buffer.nbytes] = buffer.nbytes
        report.passthrough_bytes = sum(plain.values())
        return self._sum_up(report)

    def _settings(self) -> dict[str, str]:
        """What the session was told, as text for the report."""
        return {
            "session": self.opener,
            "scheme": self._scheme,
            "on_missing": self.on_missing,
            "on_nonfinite": "error" if self.refuse_nonfinite else "keep",
            "strict_reads": str(self.strict_reads),
        }

    def _warn(self) -> None:
        assert self._report is not None
        self._report.warnings += self._warnings
        for warning in self._report.warnings:
            warnings.warn(f"{self.opener}: {warning}", stacklevel=4)
        logger.info(
            "quantized %d weights to %d bytes in %.2f s",
            len(self._report.layers),
            self._report.quantized_bytes,
            self._report.seconds,
        )


def attributes_of(param: torch.Tensor) -> dict[str, Any]:
    return {k: v for k, v in param.__dict__.items() if k not in _OWN}


def _why_plain(weight: ArmedWeight, min_sqnr: float | None) -> str:
    if weight.sqnr is not None and min_sqnr is not None:
        return f"SQNR {weight.sqnr:.1f} dB is below min_sqnr={min_sqnr:g}"
    return ""


def _bullets(lines: list[str]) -> str:
    if len(lines) == 1:
        return lines[0] + "."
    shown = lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])
    return f"{len(lines)} weights are incomplete.\n  " + "\n  ".join(shown) + "\n "
