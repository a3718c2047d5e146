"""A second device for tests: its memory is the host's, and everything on it runs there.

`install` changes the process for good (a backend's name can be given once), so it belongs in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "faraway"


class _Far(torch.Tensor):
    """A tensor on the device; `host` has its elements."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> Any:
        far: Any = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), dtype=host.dtype, device=torch.device(NAME, 0)
        )
        far.host = host
        return far

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """PyTorch exchanges what is behind the Python object, of which `host` is a part."""
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [spec.name for spec in func._schema.arguments]
        args, kwargs = args[:1], dict(zip(names[1:], args[1:], strict=False)) | (kwargs or {})
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if device is not None:
            kwargs["device"] = "cpu"
        host_args, host_kwargs = tree_map_only(_Far, lambda t: t.host, (args, kwargs))
        out = func(*host_args, **host_kwargs)
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], _Far):
            return args[0]
        if device is not None and device.type != NAME:
            return out
        if func._schema.arguments[0].alias_info is not None and func._schema.arguments[0].alias_info.is_write:
            return args[0]
        return tree_map_only(torch.Tensor, _Far, out)


def install() -> torch.device:
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")

    def empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
        return _Far(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype(), device="cpu"))

    def empty(size: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
        return _Far(torch.empty(size, dtype=dtype or torch.get_default_dtype(), device="cpu"))

    def copy_from(source: Any, target: Any, non_blocking: bool = False) -> torch.Tensor:
        getattr(target, "host", target).copy_(getattr(source, "host", source))
        return target

    library.impl("_copy_from", copy_from, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    install.library = library  # type: ignore[attr-defined]
    return torch.device(NAME, 0)
