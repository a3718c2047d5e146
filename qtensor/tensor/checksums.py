"""Checksums of weights, to compare what a trainer sent with what an engine serves, weight by weight or by one root."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn

from ..errors import ConfigError, QTensorError
from .digests import Content, sha256_of, usual_workers
from .qtensor import QTensor


def weight_checksums(model: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The sha256, in hexadecimal, of every parameter of a model (or every tensor of a mapping) by name.

    Of a quantized weight: its quantized values, then its scales, row-major, as they lie in memory. So a trainer's
    `weight_checksums({"fc.weight": quantize(weight, scheme)})` equals the engine's if, and only if, the bytes do.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else dict(model)
    contents = [Content(_bytes_on_cpu(tensor), partial(_pieces, tensor)) for tensor in tensors.values()]
    return {
        name: digest.hex() for name, digest in zip(tensors, sha256_of(contents, usual_workers(contents)), strict=True)
    }


def weight_root(weights: nn.Module | Mapping[str, torch.Tensor] | Mapping[str, str]) -> str:
    """One sha256, in hexadecimal, for all weights: two models have the same if, and only if, names and bytes are equal.

    It is the root of a Merkle tree as RFC 6962 builds it. Its leaves are the names in the order of their UTF-8 bytes,
    each followed by a zero byte and the weight's checksum.

    Args:
        weights: A model, tensors by name, or what `weight_checksums` gave for either.

    Returns:
        The root.

    Raises:
        ConfigError: A checksum is no sha256 in hexadecimal.
    """
    given: Mapping[str, torch.Tensor | str] = (
        dict(weights.named_parameters(remove_duplicate=False)) if isinstance(weights, nn.Module) else weights
    )
    sums = {name: value for name, value in given.items() if isinstance(value, str)}
    sums |= weight_checksums({name: value for name, value in given.items() if isinstance(value, torch.Tensor)})
    leaves = []
    for name, checksum in sorted((name.encode(), checksum) for name, checksum in sums.items()):
        try:
            digest = bytes.fromhex(checksum)
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise ConfigError(f"weight_root: {name.decode()} has no sha256 in hexadecimal: {checksum!r:.80}")
        leaves.append(hashlib.sha256(b"\0" + name + b"\0" + digest).digest())
    return _root(leaves).hex()


def _root(leaves: list[bytes]) -> bytes:
    """Of two or more: of the largest power of two that is less than all of them, and of the rest."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256().digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + _root(leaves[:half]) + _root(leaves[half:])).digest()


def changed_weights(model: nn.Module, checksums: Mapping[str, str]) -> list[str]:
    """The names whose weights in `model` have other bytes than these checksums say, in their order.

    A trainer sends the checksums of what it has (`weight_checksums` of its quantized weights), and then only the
    weights that this names; those that the mapping leaves out are not looked at.

    Args:
        model: A model, some of whose weights may be quantized.
        checksums: By the model's names, as `weight_checksums` gives them.

    Returns:
        The names to send.

    Raises:
        QTensorError: The model has no parameter of a name.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [name for name in checksums if name not in held]:
        raise QTensorError(f"changed_weights: the model has no parameter {', '.join(unknown[:3])}")
    live = weight_checksums({name: held[name] for name in checksums})
    return [name for name, checksum in checksums.items() if live[name] != checksum]


def _bytes_on_cpu(tensor: torch.Tensor) -> int:
    """How much there is to be hashed where it lies. What has to be copied for it first counts for nothing: then one
    thread copies one at a time."""
    parts = tensor.parts() if isinstance(tensor, QTensor) else (tensor,)
    return sum(part.nbytes for part in parts) if all(p.device.type == "cpu" and p.is_contiguous() for p in parts) else 0


def _pieces(tensor: torch.Tensor, _: int = 0) -> Iterator[memoryview]:
    for part in tensor.parts() if isinstance(tensor, QTensor) else (tensor,):
        yield part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
