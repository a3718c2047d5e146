"""Weights that a loader put where no hook sees them, directly into `module._parameters`: found and quantized later."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import NonFiniteWeightError
from ..modules import Owner, full_name
from ..schemes.scheme import Scheme
from ..tensor.qtensor import quantize
from .adapters import adapter_parameters
from .model_tree import ModuleTree


def unseen_weights(tree: ModuleTree) -> list[tuple[nn.Parameter, list[Owner]]]:
    """Ordinary Parameters with values, each with all of its names, but those of adapters. While a session is open, none
    is ordinary that it saw."""
    adapters = {key for model in tree.models() for key in adapter_parameters(model)}
    found: dict[int, tuple[nn.Parameter, list[Owner]]] = {}
    for module_name, module, name, param in tree.parameters():
        if type(param) is not nn.Parameter or param.is_meta or not param.is_floating_point():
            continue
        if id(param) not in adapters:
            found.setdefault(id(param), (param, []))[1].append((module_name, module, name))
    return list(found.values())


def quantized(
    param: nn.Parameter, owners: list[Owner], scheme: Scheme, on_nonfinite: str, device: torch.device | None
) -> nn.Parameter:
    """The quantized weight of those values. Raises NonFiniteWeightError with the weight's name."""
    try:
        result = quantize(param, scheme, on_nonfinite=on_nonfinite)
    except NonFiniteWeightError as error:
        raise NonFiniteWeightError(str(error).replace("weight", full_name(owners[0]), 1)) from None
    return nn.Parameter(result if device is None else result.to(device), requires_grad=False)
