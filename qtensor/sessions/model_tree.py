"""ModuleTree: the modules a session loads, and what the weights in them are called.

While a model is under construction its tree is still growing: a weight is registered long before the module that holds
it has a parent. So names are read off the tree when they are needed, and again after it has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn

from ..lazy.lazy_tensor import LAZY, LazyWeight
from ..lazy.weight import ArmedWeight
from ..modules import Owner, full_name, local_tensor, named_modules, parameters


class ModuleTree:
    """The given model, or all modules that were noted, by weak reference."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._modules: WeakSet[nn.Module] = WeakSet()
        self._copies: WeakSet[nn.Module] = WeakSet()
        self._parents: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
        self._names: dict[ArmedWeight, list[tuple[str, ref[nn.Module], str]]] = {}
        self._module_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._stale = True

    @property
    def model(self) -> nn.Module | None:
        """The given model, if one was given."""
        return self._model

    def note(self, module: nn.Module, parent: nn.Module | None = None) -> None:
        """A module exists, perhaps as the child of another."""
        self._modules.add(module)
        self._stale = True
        if parent is not None:
            self._modules.add(parent)
            self._parents.setdefault(module, WeakSet()).add(parent)

    def note_copy(self, module: nn.Module, memo: dict[int, object]) -> bool:
        """A module is being deep-copied, alone or with what it is part of. Its copy exists, and has no attributes yet.
        Returns whether the copy is loaded: not if a model was given."""
        copy = memo.get(id(module))
        if not isinstance(copy, nn.Module) or self._model is not None:
            return False
        if copy not in self._copies:
            self._copies.add(copy)
            self.note(copy)
            for parent in list(self._parents.get(module, ())):
                self.note_copy(parent, memo)
                if isinstance(held_by := memo.get(id(parent)), nn.Module):
                    self.note(copy, held_by)
        return True

    def changed(self) -> None:
        """Names that were read off the tree may be wrong by now."""
        self._stale, self._names = True, {}

    def forget(self) -> None:
        """Let go of the model."""
        self._model, self._names, self._stale = None, {}, False
        self._modules.clear()
        self._copies.clear()

    def owners(self, weight: ArmedWeight) -> list[Owner]:
        """The names of a weight; tied weights have several. Of one in no module any more the module is None."""
        if self._stale:
            self._read_names()
        known = [(prefix, module(), name) for prefix, module, name in self._names.get(weight, ())]
        if found := [(prefix, module, name) for prefix, module, name in known if module is not None]:
            return found
        module, name = weight.owner
        prefix = None if module is None else self._module_names.get(module)
        if prefix is None:
            origin = None if weight.copy_of is None else weight.copy_of()
            prefix = self.owners(origin)[0][0] if origin is not None else ""
        return [(prefix, module, name)]

    def parameters(self) -> Iterator[tuple[str, nn.Module, str, Any]]:
        """Every parameter of every model, under every name it has: module name, module, name, parameter (of a DTensor,
        its local tensor)."""
        for model in self.models():
            for module_name, module, name, param in parameters(model):
                yield module_name, module, name, local_tensor(param)

    def lazy_buffers(self) -> Iterator[tuple[str, nn.Module, str, LazyWeight]]:
        for model in self.models():
            for module_name, module in named_modules(model, distinct=True):
                for name, buffer in module._buffers.items():
                    if isinstance(buffer, LazyWeight):
                        yield module_name, module, name, buffer

    def plain_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        for model in self.models():
            seen: set[int] = set()
            for module_name, module in named_modules(model, distinct=True):
                for name, buffer in module._buffers.items():
                    if buffer is not None and id(buffer) not in seen and not isinstance(buffer, LazyWeight):
                        seen.add(id(buffer))
                        yield full_name((module_name, module, name)), buffer

    def live(self, host: object) -> dict[ArmedWeight, list[Owner]]:
        """The weights armed by `host` that are part of a model now; others were replaced or dropped."""
        self._stale = True
        live: dict[ArmedWeight, list[Owner]] = {}
        for module_name, module, name, param in self.parameters():
            if isinstance(param, LAZY) and param._armed.host is host:
                live.setdefault(param._armed, []).append((module_name, module, name))
        for module_name, module, name, buffer in self.lazy_buffers():
            if buffer._armed not in live:
                live[buffer._armed] = [(module_name, module, name)]
        return live

    def models(self) -> list[nn.Module]:
        """The roots that are being loaded: not those that were only built to be copied, or as a copy."""
        return [m for m in self._roots() if m is self._model or not self._is_idle(m)]

    def _roots(self) -> list[nn.Module]:
        if self._model is not None:
            return [self._model]
        return [m for m in list(self._modules) if "_parameters" in vars(m) and not self._is_held(m)]

    def _is_held(self, module: nn.Module) -> bool:
        """Is it part of another? A library may have wrapped it for a while, and let go of it or of the wrapper."""
        parents = list(self._parents.get(module, ()))
        return any(module in vars(parent).get("_modules", {}).values() for parent in parents)

    def _is_idle(self, root: nn.Module) -> bool:
        """Was nothing written to a module that was deep-copied, as the layer given to nn.TransformerEncoder is, or to a
        copy?"""
        held = [local_tensor(param) for *_, param in parameters(root)]
        weights = [param._armed for param in held if isinstance(param, LAZY)]
        is_copy = root in self._copies
        return bool(weights) and all((w.copied or is_copy) and not w.coverage.covered for w in weights)

    def _read_names(self) -> None:
        self._stale = False
        names: dict[ArmedWeight, list[tuple[str, ref[nn.Module], str]]] = {}
        self._module_names = WeakKeyDictionary()
        for root in self._roots():
            for module_name, module, name, whole in parameters(root):
                param = local_tensor(whole)
                self._module_names.setdefault(module, module_name)
                if isinstance(param, LAZY):
                    param._armed.adopt(param)
                    names.setdefault(param._armed, []).append((module_name, ref(module), name))
        self._names = names
