"""Module hooks: how open sessions hear of parameters and submodules as they are registered.

PyTorch's registration hooks are process-wide, so they are installed once, while any session is open, and do nothing
for threads and weights that no session has armed. Construction arms the calling thread's weights alone; assigning to a
weight that is armed already is a load, from whatever thread it comes.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..lazy.lazy_tensor import LazyWeight, LiveQTensor
from ..modules import local_tensor
from ..tensor.qtensor import QTensor


class Listener(Protocol):
    """A session that arms weights as they are constructed."""

    def constructed(self, module: nn.Module, name: str, param: nn.Parameter) -> torch.Tensor | None: ...
    def attached(self, parent: nn.Module, child: nn.Module | None) -> None: ...


# What else is in place while any session is open: functions that put it there and take it away.
PATCHES: list[tuple[Callable[[], None], Callable[[], None]]] = []

_lock = threading.Lock()
_open = 0
_handles: list[Any] = []
_thread = threading.local()


def listening() -> Listener | None:
    """The session that arms what the calling thread constructs."""
    return getattr(_thread, "listener", None)


def listen(listener: Listener | None) -> None:
    _thread.listener = listener


def install() -> None:
    """Count one more open session; the first one installs the hooks."""
    global _open
    with _lock:
        _open += 1
        if _open == 1:
            _handles.append(register_module_parameter_registration_hook(_on_parameter))
            _handles.append(register_module_module_registration_hook(_on_module))
            for start, _ in PATCHES:
                start()


def uninstall() -> None:
    """Count one open session less; the last one removes the hooks."""
    global _open
    with _lock:
        _open -= 1
        if _open == 0:
            while _handles:
                _handles.pop().remove()
            for _, stop in PATCHES:
                stop()


def is_constructing(module: nn.Module) -> bool:
    """Is the module's own __init__ running? A parameter assigned there is being created, not loaded."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_placeholder() -> bool:
    """Is transformers assigning an uninitialised tensor, to be initialised later, for a key its checkpoint lacks?"""
    frame = sys._getframe(2)
    for _ in range(5):
        if frame is None:
            break
        if frame.f_code.co_name == "_move_missing_keys_from_meta_to_device":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _on_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> Any:
    if param is None or isinstance(param, (LazyWeight, QTensor)):
        return None
    held: Any = module._parameters.get(name)
    existing = local_tensor(held)
    if (
        isinstance(existing, (LazyWeight, LiveQTensor))
        and not existing._armed.host.closed
        and (existing.shape == local_tensor(param).shape or existing._armed.in_place)
        and not is_constructing(module)
    ):
        if not param.is_meta and not _is_placeholder():
            existing.data = local_tensor(param).detach()
            existing._armed.assigned = weakref.ref(param)
            held.__dict__.update({k: v for k, v in param.__dict__.items() if k not in held.__dict__})
        return held
    listener = listening()
    return listener.constructed(module, name, param) if listener is not None else None


def _on_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    listener = listening()
    if listener is not None:
        listener.attached(parent, child)
