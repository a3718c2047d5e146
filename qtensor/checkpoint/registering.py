"""Which libraries know `QTensorConfig`: transformers, and diffusers as soon as somebody imports it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

from ..extras import require


def config_class() -> Any:
    """`QTensorConfig`, registered with transformers and diffusers. Raises MissingExtraError where there is neither."""
    alone = importlib.util.find_spec("transformers") is None
    if alone and importlib.util.find_spec("diffusers") is None:
        require("transformers", "demo", "QTensorConfig")
    if not alone:
        from . import quantizer

        quantizer.register()
    from . import diffusers
    from .quantization_config import QTensorConfig

    _Waiting.place(diffusers.TABLES, diffusers.register)
    return QTensorConfig


class _Waiting(MetaPathFinder):
    """Calls a function when a module has been imported, which takes seconds and may never happen."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self._module, self._then = module, then

    @classmethod
    def place(cls, module: str, then: Callable[[], None]) -> None:
        """Call it now, if the module is there. May be repeated."""
        if module in sys.modules:
            then()
        elif not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls(module, then))

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self._then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
