"""Module hooks: how open sessions hear of parameters and submodules as they are registered.

PyTorch's registration hooks are process-wide, so they are installed once, while any session is open, and do nothing
for threads and weights that no session has armed. Construction arms the calling thread's weights alone; assigning to a
weight that is armed already is a load, from whatever thread it comes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..callers import is_constructing, puts_placeholder
from ..interrupts import in_turn
from ..kernels.cpu.compiling import Once
from ..lazy import uninitialised
from ..lazy.lazy_tensor import LazyWeight, LiveQTensor, at
from ..modules import local_tensor
from ..tensor.qtensor import QTensor


class Listener(Protocol):
    """A session that arms weights as they are constructed."""

    def constructed(self, module: nn.Module, name: str, param: nn.Parameter) -> torch.Tensor | None: ...
    def attached(self, parent: nn.Module, child: nn.Module | None) -> None: ...


# What else is in place while any session is open: functions that put it there and take it away, which may be repeated.
PATCHES: list[tuple[Callable[[], None], Callable[[], None]]] = []

_turn = threading.RLock()
_open: WeakSet[Any] = WeakSet()
_listening: dict[int, Listener] = {}


class _Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> None:  # type: ignore[override]
        return None


@Once
def _set_up_subclasses() -> None:
    """At a process's first operation of any tensor subclass torch imports some 500 modules, half a second long, and
    what an interrupt leaves of that stops every other thread that imports. Here none comes."""
    torch.ops.aten.zero_.default(torch.Tensor._make_wrapper_subclass(_Subclass, (1,)))


def listening() -> Listener | None:
    """The session that arms what the calling thread constructs."""
    return _listening.get(threading.get_ident())


def listen(listener: Listener) -> None:
    """Let a session hear of what the calling thread constructs."""
    _listening[threading.get_ident()] = listener


def unlisten(listener: object) -> None:
    """The session hears of nothing any more, whichever thread it listened to."""
    for thread in [thread for thread, other in list(_listening.items()) if other is listener]:
        del _listening[thread]


def install(session: object) -> None:
    """A session is open; with the first one the hooks come. May be repeated."""
    _set_up_subclasses()
    in_turn(_turn, partial(_install, session))


def _install(session: object) -> None:
    _open.add(session)
    for hooks, own, register in _HOOKS:
        if own not in hooks.values():
            register(own)
    for start, _ in PATCHES:
        start()


def uninstall(session: object) -> None:
    """A session is not open any more; with the last one the hooks go. May be repeated."""
    in_turn(_turn, partial(_uninstall, session))


def _uninstall(session: object) -> None:
    _open.discard(session)
    if _open:
        return
    for hooks, own, _ in _HOOKS:
        for key in [key for key, hook in hooks.items() if hook is own]:
            hooks.pop(key, None)
    for _, stop in PATCHES:
        stop()
    uninitialised.forget()


def installed() -> bool:
    """Is there a hook, or a session that any thread listens for?"""
    return bool(_listening) or any(own in hooks.values() for hooks, own, _ in _HOOKS)


def _on_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> Any:
    if isinstance(param, (LazyWeight, LiveQTensor)):
        # A weight that is tied, or that is given another name by what transforms it.
        param._armed.adopt(param)
        if (listener := listening()) is not None:
            listener.attached(module, None)
    if param is None or isinstance(param, (LazyWeight, QTensor)):
        return None
    held = module._parameters.get(name)
    if take_assigned(module, held, param):
        return held
    listener = listening()
    return listener.constructed(module, name, param) if listener is not None else None


def take_assigned(module: nn.Module, held: Any, param: Any) -> bool:
    """A Parameter is assigned where a module holds `held`. If that is a weight being loaded, it takes the values."""
    existing = local_tensor(held)
    if (
        not isinstance(existing, (LazyWeight, LiveQTensor))
        or existing._armed.host.closed
        or not (existing.shape == local_tensor(param).shape or existing._armed.in_place)
        or is_constructing(module)
    ):
        return False
    if not param.is_meta and not puts_placeholder():
        values = local_tensor(param).detach()
        if existing.device != values.device and existing._armed.host.goes_anywhere(existing._armed):
            # As in a plain model, a weight is where it is put.
            existing.data = at(existing._armed.retyped(existing.dtype, values.device), existing._view)
        existing.data = values
        existing._armed.assigned = weakref.ref(param)
        held.__dict__.update({k: v for k, v in param.__dict__.items() if k not in held.__dict__})
    return True


def _on_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    listener = listening()
    if listener is not None:
        listener.attached(parent, child)


# By the dictionaries that PyTorch keeps them in: a handle can be lost to an interrupt before anyone holds it.
_HOOKS: list[tuple[dict[int, Any], Any, Callable[[Any], Any]]] = [
    (
        torch_module._global_parameter_registration_hooks,
        _on_parameter,
        torch_module.register_module_parameter_registration_hook,
    ),
    (torch_module._global_module_registration_hooks, _on_module, torch_module.register_module_module_registration_hook),
]
