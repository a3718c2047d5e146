"""Names: which part of which weight each tensor of a checkpoint is.

A model's parameters and its checkpoint's tensors need not be the same: transformers keeps a mixture's experts in one
stack of fused matrices, and writes one matrix per expert. Its own conversions say how, as operations on tensors. Run
on tensors that have a geometry and no values, they leave each result as a view, whose storage tells which parameter it
is of, and whose size, stride and offset tell which part.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import CheckpointError
from ..regions.boxes import as_box
from ..regions.coverage import Box
from ..regions.views import View, whole


class Part(NamedTuple):
    """A tensor of a checkpoint as part of a model's parameter or buffer `name`."""

    name: str
    view: View


class _Probe(torch.Tensor):
    """A meta tensor that stays a view: what a conversion would copy for its layout's sake, it only looks at."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, each once: of names that are tied, the one a checkpoint has."""
    drop = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    found: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or name in ignored:
            continue
        twin = names.get(id(tensor))
        if twin is not None:
            if twin not in drop:
                continue
            del found[twin]
        names[id(tensor)], found[name] = name, tensor
    return found


def parts_of(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    """Every tensor of the model's checkpoint, by its name there."""
    if not is_transformers(model):
        return {name: Part(name, whole(tuple(tensor.shape))) for name, tensor in tensors.items()}
    from transformers.core_model_loading import revert_weight_conversion

    probes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(_Probe)
        for name, tensor in tensors.items()
    }
    origin = {probe.untyped_storage()._cdata: name for name, probe in probes.items()}
    parts = {}
    for name, probe in revert_weight_conversion(model, probes).items():  # type: ignore[arg-type]
        owner = origin.get(probe.untyped_storage()._cdata)
        if owner is None:
            raise CheckpointError(
                f"{name}: transformers computes it anew for {type(model).__name__}'s checkpoint, rather than "
                "rearranging a weight, so it cannot be stored in quantized form"
            )
        parts[name] = Part(owner, View(tuple(probe.shape), tuple(probe.stride()), int(probe.storage_offset())))
    return parts


def matrix(name: str, shape: tuple[int, ...], view: View) -> Box:
    """The box of a weight `[..., N, K]` that a view is, if that is whole rows of one matrix, or all of a stack.

    Raises CheckpointError naming the tensor: what is transposed or cut otherwise has no scales of its own.
    """
    found = as_box(shape, *view)
    if found is not None:
        order = [d for d in found.order if d is not None]
        if order == sorted(order) and found.box[-1] == (0, shape[-1]):
            return found.box
    raise CheckpointError(
        f"{name}: the checkpoint has this quantized weight transposed or cut across its rows, where its scales do not "
        "apply. Add it to `ignore`."
    )


def is_transformers(model: nn.Module) -> bool:
    """Is it a model of the transformers library? It is not imported to find out."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)
