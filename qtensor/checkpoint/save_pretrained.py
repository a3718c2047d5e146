"""What models of transformers and diffusers that hold quantized weights do otherwise than their class: save, and count.

Both libraries hand the tensors of a model to safetensors, which takes no quantized weight, and count elements by their
logical dtype. So a model that a session has finished gets a `save_pretrained` of its own, the one of its class given
the tensors in the form they have on disk and a config that says so, and a `get_memory_footprint` of what is held.
It writes what `save_checkpoint` writes, into any folder, as the library does.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..sessions.replacing import WHEN_FINISHED
from ..tensor.qtensor import QTensor
from .mapping import is_transformers


def save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `save_pretrained`; quantized weights as `save_checkpoint` stores them.

    A model that carries adapters saves these alone, as transformers would.
    """
    plain = functools.partial(type(model).save_pretrained, model, save_directory, *args)
    given = kwargs.get("state_dict")
    if getattr(model, "_hf_peft_config_loaded", False) or not _quantized(given if given is not None else model):
        return plain(**kwargs)
    tensors, quantization = _contents(model)
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


def save_diffusers(
    model: Any,
    save_directory: Any,
    *args: Any,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    use_flashpack: bool = False,
    **kwargs: Any,
) -> Any:
    """diffusers' `save_pretrained`; quantized weights as `save_checkpoint` stores them. A pipeline looks by which names
    it has arguments."""
    plain = functools.partial(type(model).save_pretrained, model, save_directory, *args, **kwargs)
    options: dict[str, Any] = {"variant": variant, "max_shard_size": max_shard_size}
    if not _quantized(model):
        return plain(safe_serialization=safe_serialization, use_flashpack=use_flashpack, **options)
    if use_flashpack or not safe_serialization:
        raise CheckpointError(
            f"{type(model).__name__}: quantized weights are saved as safetensors files; leave safe_serialization on "
            "and use_flashpack off"
        )
    tensors, quantization = _contents(model)
    quantizer, config = model.__dict__.pop("hf_quantizer", None), model._internal_dict
    model.register_to_config(quantization_config=quantization)
    model.__dict__["state_dict"] = lambda *_, **__: tensors
    try:
        return plain(**options)
    finally:
        del model.__dict__["state_dict"]
        model._internal_dict = config
        if quantizer is not None:
            model.hf_quantizer = quantizer


def _contents(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors of a model's checkpoint, and what its config says of those that are quantized."""
    from .layouts import COMPRESSED_TENSORS  # here: every load imports this file, and few save
    from .saving import checkpoint_tensors

    contents, quantization = checkpoint_tensors(model, COMPRESSED_TENSORS)
    tensors: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, stored in contents.items():
        values = stored.values().detach()
        # Parts of a fused matrix may share one scale, which both libraries would take for a tie.
        tensors[name] = values.clone() if values.data_ptr() in taken else values
        taken.add(values.data_ptr())
    return tensors, quantization


def get_memory_footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """The bytes that a model's parameters, and its buffers, hold: of quantized weights, values and scales."""
    tensors = [*model.parameters(), *(model.buffers() if return_buffers else ())]
    return sum(tensor.nbytes for tensor in tensors)


def _quantized(holder: Any) -> bool:
    tensors = holder.values() if isinstance(holder, dict) else holder.parameters()
    return any(isinstance(tensor, QTensor) for tensor in tensors)


def equip(model: nn.Module) -> None:
    """Give these methods to transformers' and diffusers' models in a model whose load is finished. May be repeated."""
    for module in model.modules():
        save = save_pretrained if is_transformers(module) else save_diffusers if _is_diffusers(module) else None
        if save is not None and _quantized(module):
            module.__dict__["save_pretrained"] = functools.partial(save, module)
            module.__dict__["get_memory_footprint"] = functools.partial(get_memory_footprint, module)


def _is_diffusers(model: nn.Module) -> bool:
    """Is it a model of the diffusers library? It is not imported to find out."""
    library = sys.modules.get("diffusers.models.modeling_utils")
    return library is not None and isinstance(model, library.ModelMixin)


def install() -> None:
    """Sessions equip what they have loaded. May be repeated."""
    if equip not in WHEN_FINISHED:
        WHEN_FINISHED.append(equip)
