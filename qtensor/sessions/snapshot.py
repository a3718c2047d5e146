"""Snapshot: what a model was before a reload, to compare with and to put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import QTensorError
from ..interrupts import without_grad
from ..lazy.lazy_tensor import attributes_of
from ..modules import Owner, full_name, local_tensor, named_modules
from ..tensor.qtensor import QTensor


class Snapshot:
    """What a model was before a reload: its Parameters and buffers as objects, their addresses and attributes, and
    (with `values`) the bytes of those tensors that no store looks after."""

    def __init__(self, model: nn.Module, values: bool) -> None:
        self._values = values
        self._entries: list[tuple[Owner, torch.Tensor]] = []
        self._attributes: dict[int, tuple[torch.Tensor, dict[str, Any], tuple[int, ...]]] = {}
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        for module_name, module in named_modules(model, distinct=True):
            for entries in (module._parameters, module._buffers):
                for name, tensor in entries.items():
                    if tensor is not None:
                        self._entries.append(((module_name, module, name), tensor))
                        self._attributes[id(tensor)] = (tensor, attributes_of(tensor), _addresses(tensor))
            for buffer in module._buffers.values():
                if buffer is not None:
                    self.watch(buffer)
            for param in module._parameters.values():
                local = local_tensor(param)
                if local is not None and not isinstance(local, QTensor) and not local.is_floating_point():
                    self.watch(local)

    def watch(self, tensor: torch.Tensor) -> None:
        """Nobody else looks after this one's values."""
        if self._values and not tensor.is_meta:
            memory = _memory(tensor)
            self._saved.append((memory, memory.detach().clone()))

    def replaced(self) -> Iterator[tuple[Owner, Any, Any]]:
        """Entries of modules that hold another object now: owner, the original, what is there."""
        for (module_name, module, name), original in self._entries:
            current = _entries(module, name).get(name)
            if current is not original:
                yield (module_name, module, name), original, current

    def restore(self) -> None:
        for (_, module, name), original in self._entries:
            if _entries(module, name).get(name) is not original:
                put(module, name, original)
        for tensor, values in self._saved:
            without_grad(partial(tensor.copy_, values))
        for tensor, attributes, _ in self._attributes.values():
            for key in attributes_of(tensor).keys() - attributes.keys():
                del tensor.__dict__[key]
            tensor.__dict__.update(attributes)

    def require_same(self, becoming: Mapping[int, torch.Tensor]) -> None:
        """Raise QTensorError unless objects, addresses and attributes are what they were.

        becoming: by the id of those Parameters that are about to change, the memory they will stand for.
        """
        for owner, original, _ in self.replaced():
            raise QTensorError(f"assert_identity: {full_name(owner)} {list(original.shape)} is another object now")
        for owner, original in self._entries:
            tensor, attributes, addresses = self._attributes[id(original)]
            local = local_tensor(tensor)
            if _addresses(becoming.get(id(local), local)) != addresses:
                raise QTensorError(f"assert_identity: {full_name(owner)} has moved to another address")
            now = attributes_of(tensor)
            if now.keys() != attributes.keys() or any(now[key] is not attributes[key] for key in now):
                raise QTensorError(f"assert_identity: {full_name(owner)} has other attributes now")


def _addresses(tensor: torch.Tensor) -> tuple[int, ...]:
    local = local_tensor(tensor)
    parts = local.parts() if isinstance(local, QTensor) else (local,)
    return tuple(part.data_ptr() for part in parts if part.layout is torch.strided)


def is_plain_memory(tensor: torch.Tensor) -> bool:
    """Is each element of the tensor an element of memory, and no other's?"""
    if tensor.layout is not torch.strided:
        return False
    return all(step or n <= 1 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """What to copy to save a tensor's values, and to copy back: of an expanded one each element once."""
    local = local_tensor(tensor)
    if local.layout is not torch.strided:
        return local  # A sparse tensor's memory is replaced when it is written to.
    local = local.detach()
    size = [min(n, 1) if not step else n for n, step in zip(local.shape, local.stride(), strict=True)]
    return local.as_strided(size, local.stride(), local.storage_offset())


def _entries(module: nn.Module, name: str) -> dict[str, Any]:
    return module._parameters if name in module._parameters else module._buffers


def put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Place a tensor where a module keeps its kind, past every hook."""
    isparam = isinstance(tensor, nn.Parameter)
    (module._buffers if isparam else module._parameters).pop(name, None)
    (module._parameters if isparam else module._buffers)[name] = tensor  # type: ignore[assignment]
