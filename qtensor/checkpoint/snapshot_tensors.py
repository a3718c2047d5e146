"""Tensors of a snapshot: each as the plain tensors that its file holds and a JSON object that says what they are.

A quantized weight is its parts, under its name and `::qdata`, `::scale`, `::global_scale`. A plain tensor is itself,
with its dimensions in the order of its memory (a convolution may be channels-last). What has memory in common with
another tensor, is split over ranks, or is of a class of another library has no such form, and is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, SnapshotError
from ..kernels import Parts
from ..lazy.lazy_tensor import LAZY
from ..modules import is_dtensor
from ..schemes.scheme import Scheme, as_scheme
from ..tensor.checksums import weight_checksums
from ..tensor.qtensor import QTensor
from .reading import DTYPE_NAMES, DTYPES
from .writing import Names

_PARTS = ("qdata", "scale", "global_scale")
HOW = ("sums", "sha256", "header")
"""What may be compared before a snapshot is used."""
_ROWS, _WORDS = 64, 509  # int64 words of a row: not a multiple, nor a divisor, of any sector's or page's
_PLAIN_CLASSES = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True)
class Packed:
    """tensors: what the file holds. about: by name, what each of the snapshot's tensors is."""

    tensors: dict[str, torch.Tensor]
    about: dict[str, dict[str, Any]]


def pack(tensors: Mapping[str, torch.Tensor]) -> Packed:
    """Raises SnapshotError that names a tensor which cannot be in a snapshot."""
    names, found = Names(), Packed({}, {})
    spans: list[tuple[str, int, int, str]] = []
    for name, tensor in tensors.items():
        _require_packable(name, tensor)
        if isinstance(tensor, QTensor):
            parts = {f"{name}::{n}": part for n, part in zip(_PARTS, tensor.parts(), strict=False)}
            order = []
        else:
            order = _order(tensor)
            parts = {name: tensor.detach().permute(order)}
        for own, part in parts.items():
            names.claim(own, name)
            found.tensors[own] = part.detach().contiguous()
        spans += [(str(part.device), *_span(part), name) for part in parts.values() if part.numel()]
        found.about[name] = _about(tensor, order) | {"sums": column_sums(found.tensors[own] for own in parts)}
    for (device, _, end, name), (other_device, start, _, other) in pairwise(sorted(spans)):
        if device == other_device and start < end and name != other:
            raise SnapshotError(
                f"{name} and {other} have memory in common, and would be two tensors after a snapshot; clone one of "
                "them, or tie them as one Parameter"
            )
    sums = weight_checksums(tensors)
    for name, about in found.about.items():
        about["sha256"] = sums[name]
    return found


def unpack(name: str, about: Mapping[str, Any], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor that `pack` was given. read: a tensor of the file, by its name there. Raises KeyError, TypeError,
    ValueError or RuntimeError where these are not the tensors of one."""
    dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
    scheme = about["scheme"]
    if scheme is None:
        held = read(name)
        tensor = held.permute(sorted(range(held.dim()), key=about["order"].__getitem__))
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, and not {dtype} {list(shape)}")
        return tensor
    made = Scheme(as_scheme(scheme["name"]).format, scheme["activation"])
    fmt = made.format
    parts = [read(f"{name}::{part}") for part in _PARTS[: 3 if fmt.has_global_scale else 2]]
    stored = (*shape[:-2], shape[-1], shape[-2]) if scheme["transposed"] else shape
    wanted = _outline(stored, made)
    if [(p.shape, p.dtype) for p in parts] != wanted:
        raise ValueError(f"{name}: its parts are not those of {made} {list(shape)}")
    gain = parts[2] if fmt.has_global_scale else None
    return QTensor(parts[0], parts[1], made, dtype, scheme["transposed"], global_scale=gain, cols=stored[-1])


def require_bytes(
    tensors: Mapping[str, torch.Tensor], about: Mapping[str, Mapping[str, Any]], file: object, how: str
) -> None:
    """Compare tensors with what was noted of them when they were written, in one of the ways of `HOW`.

    Raises SnapshotError that names one whose bytes are others.
    """
    found: Mapping[str, str] = {}
    if how == "sha256":
        found = weight_checksums(tensors)
    elif how == "sums":
        found = {name: column_sums(_stored(tensor, about[name])) for name, tensor in tensors.items()}
    for name, value in found.items():
        if value != about[name].get(how):
            raise SnapshotError(
                f"{file}: {name} is damaged: its bytes are not those that were written. Load the model in the ordinary "
                "way, and save a new snapshot of it."
            )


def require_how(how: object) -> None:
    """Raises ConfigError for a way to verify that is none."""
    if not isinstance(how, str) or how not in HOW:
        raise ConfigError(f"verify is one of {', '.join(map(repr, HOW))}, not {how!r}")


def column_sums(tensors: Iterable[torch.Tensor]) -> str:
    """A digest of bytes, computed as fast as memory is read: SHA-256 of their sums, one for 64 words of 8 bytes.

    Words are added column by column, 64 rows of 509 at a time, modulo 2^64. Damage that is not seen has to change two
    words of one column by opposite amounts, and no other sum: so a run of fewer than 4072 bytes is always seen, and
    sectors or pages that were exchanged are, since no two of 64 rows begin in the same column.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        blocks = raw.numel() // (8 * _ROWS * _WORDS)
        whole = blocks * 8 * _ROWS * _WORDS
        digest.update(raw.numel().to_bytes(8, "little"))
        if blocks:
            if raw.storage_offset() % 8:  # a part of a buffer: no words begin there
                raw = raw.clone()
            sums = raw[:whole].view(torch.int64).view(blocks, _ROWS, _WORDS).sum(1)
            digest.update(sums.view(-1).view(torch.uint8).numpy().data)
        digest.update(raw[whole:].numpy().data)
    return digest.hexdigest()


def _stored(tensor: torch.Tensor, about: Mapping[str, Any]) -> Iterable[torch.Tensor]:
    """What the file holds of a tensor."""
    return tensor.parts() if isinstance(tensor, QTensor) else (tensor.permute(about["order"]),)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of its first byte, and behind its last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _outline(stored: tuple[int, ...], scheme: Scheme) -> list[tuple[torch.Size, torch.dtype]]:
    return [(part.shape, part.dtype) for part in Parts.of(stored, scheme.format, "meta")]


def _about(tensor: torch.Tensor, order: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "scheme": None}
    if isinstance(tensor, QTensor):
        scheme = tensor.scheme
        found["scheme"] = {"name": scheme.name, "activation": scheme.activation, "transposed": tensor.transposed}
    else:
        found["order"] = order
    return found


def _order(tensor: torch.Tensor) -> list[int]:
    """The dimensions from the slowest in memory to the fastest, if it has no gaps; else as they are."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.dim()))


def _require_packable(name: str, tensor: torch.Tensor) -> None:
    if isinstance(tensor, LAZY):
        raise SnapshotError(f"{name} is still being loaded; leave the `with online_quant(...)` block first")
    if is_dtensor(tensor):
        raise SnapshotError(f"{name} is split over ranks as a DTensor; save it with torch.distributed.checkpoint")
    if tensor.is_meta:
        raise SnapshotError(f"{name} is on the meta device and has no values to save")
    if isinstance(tensor, QTensor):
        if not tensor.whole_units or tensor._padded is not None or tensor._is_room:
            raise SnapshotError(f"{name} is a part of a quantized weight, and has scales in common with the rest of it")
        return
    if type(tensor) not in _PLAIN_CLASSES or tensor.layout != torch.strided:
        raise SnapshotError(
            f"{name} is a {type(tensor).__name__} ({tensor.layout}), and a snapshot holds QTensors and plain tensors"
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise SnapshotError(f"{name} is {tensor.dtype}, which safetensors cannot hold")
