"""A model's modules: the owners and names of its parameters, and what this rank holds of them.

Of a Parameter that is split over a device mesh (a DTensor), the local tensor is the weight that loads and quantizes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Owner = tuple[str, nn.Module, str]
"""A module's name, the module, and the parameter's name in it."""
Split = tuple[int, "dist.ProcessGroup"]
"""A dimension of a weight, and the ranks it is split over."""


def named_modules(root: nn.Module, distinct: bool = False) -> list[tuple[str, nn.Module]]:
    """A module and all below it, under every name they have, or (`distinct`) the first. As `root.named_modules()`,
    whose generators hand each module up through every level above it."""
    found: list[tuple[str, nn.Module]] = []
    _collect("", root, found, set() if distinct else None)
    return found


def _collect(name: str, module: nn.Module, found: list[tuple[str, nn.Module]], seen: set[nn.Module] | None) -> None:
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    found.append((name, module))
    for child, below in module._modules.items():
        if below is not None:
            _collect(f"{name}.{child}" if name else child, below, found, seen)


def parameters(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Every parameter below a module, under every name it has: module name, module, name, parameter."""
    for module_name, module in named_modules(root):
        for name, param in list(module._parameters.items()):
            if param is not None:
                yield module_name, module, name, param


def local_parameters(root: nn.Module) -> Iterator[Any]:
    """What this rank holds of every parameter below a module."""
    for *_, param in parameters(root):
        yield local_tensor(param)


def full_name(owner: Owner) -> str:
    """ "model.layers.0.mlp.up_proj.weight" """
    module_name, _, name = owner
    return f"{module_name}.{name}" if module_name else name


def weight_of(module: str) -> str:
    """What a checkpoint calls a module's weight: "model.norm" → "model.norm.weight"."""
    return f"{module}.weight" if module else "weight"


def module_of(weight: str) -> str | None:
    """The module whose weight a checkpoint's tensor is by its name; None if it is no module's weight."""
    if weight == "weight":
        return ""
    return weight.removesuffix(".weight") if weight.endswith(".weight") else None


def is_dtensor(param: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then nobody has made one
    return module is not None and isinstance(param, module.DTensor)


def local_tensor(param: Any) -> Any:
    """What this rank holds of a parameter: of an ordinary one, itself."""
    return param._local_tensor if is_dtensor(param) else param


def splits(param: Any) -> list[Split]:
    """How a DTensor is split."""
    mesh = param.device_mesh
    return [(p.dim % param.dim(), mesh.get_group(i)) for i, p in enumerate(param.placements) if not p.is_replicate()]


def home(param: Any) -> torch.device:
    """The device a parameter's values belong on, also while it is on the meta device."""
    device: torch.device = local_tensor(param).device
    if device.type != "meta":
        return device
    return torch.device(param.device_mesh.device_type if is_dtensor(param) else "cpu")


def rehome(param: Any) -> Any:
    """A DTensor Parameter like `param`, on the device of its local tensor: one made on meta says so for ever."""
    new = type(param)(param._local_tensor, param._spec, requires_grad=param.requires_grad)
    new.__dict__.update(param.__dict__)
    return new
