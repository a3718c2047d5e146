"""Adapters: the parameters that peft and its like add to a model. They are trained, so they stay in high precision.

They are told from the model's own without importing peft: a module of peft's holds what it wraps under one of a few
names, and the rest is the adapter's. Where other libraries add parameters, or layers, their names say so.
"""

from __future__ import annotations

import re

from torch import nn

from ..lazy.plain_store import PlainStore
from ..lazy.weight import ArmedWeight
from ..modules import full_name, named_modules, parameters

ADAPTER = "part of an adapter"
"""Why such a parameter is not quantized, for the report."""
_WRAPPED = ("base_layer", "original_module", "model", "base_model")
_LOW_RANK = re.compile(r"(^|\.)lora_")
_NAMES = re.compile(r"(.*\.)?(lora_\w+|\w*adapters?(_\w+)?|gating_factor)(\.|$)")


def adapter_parameters(root: nn.Module) -> set[int]:
    """The ids of the parameters that adapters have added to a model."""
    found = {id(p) for place, layer, name, p in parameters(root) if is_low_rank(full_name((place, layer, name)))}
    layers = [layer for _, layer in named_modules(root, distinct=True)]
    of_peft = {
        kind: any(base.__module__.startswith("peft.") for base in kind.__mro__) for kind in set(map(type, layers))
    }
    for layer in layers:
        if of_peft[type(layer)]:
            wrapped = [child for name in _WRAPPED if (child := layer._modules.get(name)) is not None]
            found |= {id(p) for p in layer.parameters()} - {id(p) for child in wrapped for p in child.parameters()}
    return found


def is_low_rank(name: str) -> bool:
    """Is it what every library calls the matrices of LoRA, or the layers that hold them? name: the parameter's, full
    or in its module."""
    return _LOW_RANK.search(name) is not None


def keep_initial(weight: ArmedWeight, name: str) -> bool:
    """Let a weight that stays plain keep the values it was initialised with. False if it has none."""
    store = weight.store
    if store is None and is_low_rank(name):  # A layer, made before anybody knew what it would be called.
        return weight.fill_missing("init")
    return isinstance(store, PlainStore) and store.initialised and weight.fill_missing("keep")


def may_be_new(name: str) -> bool:
    """Does a parameter's full name say that it belongs to an adapter, so that a base checkpoint has no value for it?"""
    return _NAMES.match(name) is not None
