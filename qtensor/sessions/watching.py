"""Assignments into `module._parameters`, which PyTorch's hooks do not see: how accelerate and diffusers load a model.

While a session is open, the modules whose weights it arms keep their parameters in a dictionary that hears of new
values. It is an ordinary one again before the session ends, and so is that of a copy.
"""

from __future__ import annotations

import weakref
from typing import Any
from weakref import WeakSet

from torch import nn

from .incoming import take_part
from .registration import take_assigned


class WatchedParameters(dict[str, Any]):
    """A module's `_parameters`: an ordinary Parameter assigned to a weight that is being loaded is a write to it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module._parameters)
        self._module = weakref.ref(module)

    def __setitem__(self, name: str, param: Any) -> None:
        module = self._module()
        is_value = module is not None and type(param) is nn.Parameter and not param.is_meta
        if is_value and name not in self and take_part(module, name, param):  # type: ignore[arg-type]
            return
        if not (is_value and take_assigned(module, self.get(name), param)):  # type: ignore[arg-type]
            super().__setitem__(name, param)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class Watch:
    """The modules of one session that are watched."""

    def __init__(self) -> None:
        self._modules: WeakSet[nn.Module] = WeakSet()

    def over(self, module: nn.Module) -> None:
        """Watch a module. May be repeated."""
        if type(module._parameters) is dict:
            self._modules.add(module)
            module.__dict__["_parameters"] = WatchedParameters(module)

    def end(self) -> None:
        """All modules have ordinary dictionaries. May be repeated."""
        for module in list(self._modules):
            if isinstance(module._parameters, WatchedParameters):
                module.__dict__["_parameters"] = dict(module._parameters)
