"""save_pretrained of transformers' models that hold quantized weights: it writes what `save_checkpoint` writes.

transformers splits and renames the tensors of a model by its own rules, and hands them to safetensors, which takes no
quantized weight. So a model that a session has finished gets a `save_pretrained` of its own: the one of its class,
given the tensors in the form they have on disk, and a config that says so. It writes into any folder, as transformers
does; `save_checkpoint` reads back what it wrote, and replaces a folder in one step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..sessions.replacing import WHEN_FINISHED
from ..tensor.qtensor import QTensor
from .layouts import COMPRESSED_TENSORS
from .mapping import is_transformers
from .saving import checkpoint_tensors


def save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `save_pretrained`; quantized weights as `save_checkpoint` stores them.

    A model that carries adapters saves these alone, as transformers would.
    """
    plain = functools.partial(type(model).save_pretrained, model, save_directory, *args)
    given = kwargs.get("state_dict")
    if getattr(model, "_hf_peft_config_loaded", False) or not _quantized(given if given is not None else model):
        return plain(**kwargs)
    contents, quantization = checkpoint_tensors(model, COMPRESSED_TENSORS)
    tensors: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, stored in contents.items():
        values = stored.values().detach()
        # Parts of a fused matrix may share one scale, which transformers would take for a tie.
        tensors[name] = values.clone() if values.data_ptr() in taken else values
        taken.add(values.data_ptr())
    # Of a model that was loaded with a QTensorConfig: transformers would ask its quantizer for the tensors.
    quantizer = model.__dict__.pop("hf_quantizer", None)
    config = model.config.__dict__.pop("quantization_config", None)
    model.config.quantization_config = quantization
    try:
        return plain(**kwargs | {"state_dict": tensors, "save_original_format": False})
    finally:
        del model.config.quantization_config
        if config is not None:
            model.config.quantization_config = config
        if quantizer is not None:
            model.hf_quantizer = quantizer


def _quantized(holder: Any) -> bool:
    tensors = holder.values() if isinstance(holder, dict) else holder.parameters()
    return any(isinstance(tensor, QTensor) for tensor in tensors)


def equip(model: nn.Module) -> None:
    """Give `save_pretrained` to transformers' models in a model whose load is finished. May be repeated."""
    for module in model.modules():
        if is_transformers(module) and any(isinstance(param, QTensor) for param in module.parameters()):
            module.__dict__["save_pretrained"] = functools.partial(save_pretrained, module)


def install() -> None:
    """Sessions equip what they have loaded. May be repeated."""
    if equip not in WHEN_FINISHED:
        WHEN_FINISHED.append(equip)
