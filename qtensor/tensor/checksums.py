"""Checksums of weights, to compare what a trainer sent with what an engine serves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from .qtensor import QTensor


def weight_checksums(model: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The sha256, in hexadecimal, of every parameter of a model (or every tensor of a mapping) by name.

    Of a quantized weight: its quantized values, then its scales, row-major, as they lie in memory. So a trainer's
    `weight_checksums({"fc.weight": quantize(weight, scheme)})` equals the engine's if, and only if, the bytes do.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else model
    return {name: _sha256(tensor) for name, tensor in tensors.items()}


def _sha256(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for part in tensor.parts() if isinstance(tensor, QTensor) else (tensor,):
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
