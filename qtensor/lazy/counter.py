"""CopyCounter: what any loader wrote into a model, and what it missed. A loader debugger that needs no session."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..regions.coverage import Box, Coverage
from ..regions.views import View, cover
from ..report.report import describe_boxes
from ..text import joined
from .effects import RANDOM, SCATTERED, accumulates, collectives, flatten, touched_elements, written_arguments
from .lazy_tensor import LazyWeight, LiveQTensor, view_of
from .weight import ArmedWeight

_COLLECTIVES = collectives()


@dataclass(frozen=True)
class CopyReport:
    """copied_numel: elements written, every time they were. missing: unwritten boxes per weight. complete: the rest."""

    copied_numel: int
    complete: list[str]
    missing: dict[str, list[Box]]
    shapes: dict[str, tuple[int, ...]]

    def to_json(self) -> str:
        return json.dumps({"copied_numel": self.copied_numel, "complete": self.complete, "missing": self.missing})

    def __str__(self) -> str:
        lines = [f"{self.copied_numel:,} elements written; {len(self.complete)} tensors complete"]
        lines += [f"{name}: {describe_boxes(self.shapes[name], boxes)}" for name, boxes in self.missing.items()]
        return joined(lines)


@dataclass
class _Entry:
    """One tensor of the model as it was when counting began."""

    tensor: torch.Tensor
    storage: int | None
    coverage: Coverage
    offset: int


class CopyCounter(TorchDispatchMode):
    """Watches writes to a model's parameters and persistent buffers, plain, lazy or on the meta device.

        with CopyCounter(model) as counter:
            load(model)
        print(counter.report())

    Coverage is exact, by region. A tensor replaced by assignment (`assign=True`, `module.weight = ...`) counts as
    written; random initialisation does not. It sees the thread that entered it (a property of dispatch modes).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.copied_numel = 0
        self._entries: dict[str, _Entry] = {}
        self._by_storage: dict[int, list[_Entry]] = {}
        self._by_weight: dict[ArmedWeight, _Entry] = {}

    def __enter__(self) -> CopyCounter:
        known: dict[int, _Entry] = {}
        for name, tensor in _tensors(self.model):
            entry = known.get(id(tensor)) or self._watch(tensor)
            known[id(tensor)] = self._entries[name] = entry
        super().__enter__()
        return self

    def coverage(self, name: str) -> Coverage:
        """What was written of the tensor `name`. Raises KeyError for a name the model did not have."""
        return self._settled()[name].coverage

    def missing(self) -> dict[str, list[Box]]:
        """The boxes of every tensor that nobody wrote, one `(start, stop)` per dimension."""
        return {name: e.coverage.missing() for name, e in self._settled().items() if not e.coverage.complete}

    def report(self) -> CopyReport:
        missing = self.missing()
        complete = [name for name in self._entries if name not in missing]
        shapes = {name: entry.coverage.shape for name, entry in self._entries.items()}
        return CopyReport(self.copied_numel, complete, missing, shapes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for i, name in written_arguments(func):
            for target in flatten(args[i] if i < len(args) else kwargs.get(name)):
                self._record(func, target, args, kwargs)
        if func in _COLLECTIVES:
            for target in flatten(args[0]):
                self._record(func, target, args, kwargs)
        return out

    def _watch(self, tensor: torch.Tensor) -> _Entry:
        coverage = Coverage(tensor.shape)
        if isinstance(tensor, (LazyWeight, LiveQTensor)):
            entry = _Entry(tensor, None, coverage, 0)
            self._by_weight[tensor._armed] = entry
        else:
            storage = tensor.untyped_storage()._cdata
            entry = _Entry(tensor, storage, coverage, int(tensor.storage_offset()))
            self._by_storage.setdefault(storage, []).append(entry)
        return entry

    def _record(self, func: Any, target: Any, args: Any, kwargs: Any) -> None:
        if not isinstance(target, torch.Tensor) or func.overloadpacket in RANDOM:
            return
        if isinstance(target, (LazyWeight, LiveQTensor)):
            entry = self._by_weight.get(target._armed)
            entries, view = [entry] if entry else [], view_of(target)
        else:
            entries = self._by_storage.get(target.untyped_storage()._cdata, [])
            view = View(tuple(target.shape), target.stride(), int(target.storage_offset()))
        for entry in entries:
            self._cover(entry, func, target, view._replace(offset=view.offset - entry.offset), args, kwargs)

    def _cover(self, entry: _Entry, func: Any, target: torch.Tensor, view: View, args: Any, kwargs: Any) -> None:
        coverage = entry.coverage
        last = view.offset + sum((n - 1) * step for n, step in zip(*view[:2], strict=True))
        if 0 in view.size or last < 0 or view.offset >= coverage.numel:
            return
        if func in SCATTERED and not accumulates(func, args, kwargs):
            touched = touched_elements(func, args, kwargs, coverage.shape, view).cpu()
            self.copied_numel += int(touched.sum())
            coverage.add_mask(touched.numpy())
        elif view.offset >= 0 and last < coverage.numel and entry.tensor.is_contiguous():
            self.copied_numel += target.numel()
            cover(coverage, view)
        else:
            self._cover_shared(entry, view, last)

    def _cover_shared(self, entry: _Entry, view: View, last: int) -> None:
        """A write to memory laid out unlike the tensor: a flat buffer of several weights, or a transposed one."""
        first = min(view.offset, 0)
        flat = torch.zeros(max(last, entry.coverage.numel - 1) - first + 1, dtype=torch.bool, device="cpu")
        flat.as_strided(view.size, view.stride, view.offset - first).fill_(True)
        mask = flat[-first : entry.coverage.numel - first].as_strided(entry.coverage.shape, entry.tensor.stride())
        self.copied_numel += int(mask.sum())
        entry.coverage.add_mask(mask.numpy())

    def _settled(self) -> dict[str, _Entry]:
        """Entries after accounting for tensors that were replaced instead of written."""
        now = dict(_tensors(self.model))
        for name, entry in self._entries.items():
            tensor = now.get(name)
            if tensor is None or tensor.is_meta or entry.storage is None:
                continue
            if tensor is not entry.tensor or tensor.untyped_storage()._cdata != entry.storage:
                entry.coverage.add([(0, n) for n in entry.coverage.shape])
        return self._entries


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers under every name they have."""
    found: list[tuple[str, torch.Tensor]] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        found += [(dot + name, p) for name, p in module._parameters.items() if p is not None]
        persistent = set(module._buffers) - module._non_persistent_buffers_set
        found += [(dot + name, b) for name, b in module._buffers.items() if b is not None and name in persistent]
    return found
